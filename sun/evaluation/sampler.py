"""Run any method on one frozen model from given noise, with its U-Net calls counted and its loop timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapter import SunAdapter
from ..common.counting import CallCounter
from ..common.devices import AUTO, AUTOCAST, autocast, synchronize
from ..common.finite import require_finite
from ..ltc import LtcKey, LtcRun, LtcTable
from ..ltc.calibration import Opener, run_calibration
from ..ltc.schedulers import Stepper
from ..pipelines.loading import why_not_finite
from ..pipelines.schedulers import make_scheduler
from ..pipelines.text import encode_prompts
from .methods import Assets, Prepared, prepare, scheduler_of
from .names import MethodCall, parse_method

WEIGHTS = {"fp32": torch.float32, "bf16-weights": torch.bfloat16, "fp16-weights": torch.float16}
PRECISIONS = (AUTO, *AUTOCAST, *WEIGHTS)
CALIBRATION = 8  # pictures LTC-Accel is calibrated on at most, where no prompts are set aside for it
CALIBRATION_SEED = 77_000_000  # which no evaluation uses


@dataclass
class Sample:
    """Latents [B, 4, h, w] (model units), U-Net rows per picture, and seconds per picture of the U-Net loop: by the
    clock, and of processor time, which other programs on the machine do not lengthen."""

    latents: Tensor
    unet_calls: float
    seconds: float
    processor: float = 0.0


@dataclass(frozen=True)
class Edit:
    """Denoising that begins at a picture: ``init`` [B, 4, h, w] in model units.

    strength: the share of the steps that run, above 0; 1 begins at pure noise. mask [1 or B, 1, h, w]: 1 where the
    picture is made anew; elsewhere ``init`` is put back after every step, at that step's noise level.
    """

    init: Tensor
    strength: float = 1.0
    mask: Tensor | None = None

    def __getitem__(self, rows: slice) -> Edit:
        return replace(self, init=self.init[rows])


class Run(Protocol):
    """A method at work: prompts, negatives and noise [B, 4, h, w] to their sample."""

    def __call__(self, prompts: list[str], negatives: list[str], noise: Tensor, edit: Edit | None = None) -> Sample: ...


class Sampler:
    """Runs any method of :mod:`.names` on one frozen model; takes its name, or the call that was made of it.

    ``adapter`` is what plain ``sun-4`` uses, ``adapters`` those of ``sun[NAME]-4``; ``lcm_lora`` and
    ``guided_distill`` are the folders of those peers, ``unets`` those of ``compact[NAME]-25`` and
    ``switch[NAME]-25``. ``w`` is the scale of classifier-free guidance.
    """

    def __init__(
        self,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: Any,
        *,
        adapter: SunAdapter | None = None,
        w: float = 8.0,
        resolution: int = 0,
        attached: bool = False,
        adapters: Mapping[str, SunAdapter] | None = None,
        lcm_lora: str = "",
        guided_distill: str = "",
        unets: Mapping[str, str] | None = None,
    ):
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler_config, self.adapter = scheduler.config, adapter
        named = {**(adapters or {}), **({} if adapter is None else {"": adapter})}
        self.assets = Assets(unet, w, named, attached, lcm_lora, guided_distill, unets or {})
        self.calibration: list[tuple[str, str]] = []  # prompts and negatives for LTC-Accel's tables
        self.latent_size = resolution // 8 if resolution else unet.config.sample_size
        self.device = next(unet.parameters()).device

    @property
    def w(self) -> float:
        """The scale of classifier-free guidance, and of adapters that take one."""
        return self.assets.w

    @contextmanager
    def guided_by(self, w: float) -> Iterator[None]:
        """Another guidance scale for a while."""
        before, self.assets.w = self.assets.w, w
        try:
            yield
        finally:
            self.assets.w = before

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """The context to sample in: ``bf16`` and ``fp16`` compute in half with the weights as they are."""
        return autocast(self.device, precision)

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Text states [B, L, D] of prompts of any length."""
        return self.encode_both(texts)[0]

    @torch.no_grad()
    def encode_both(self, *groups: list[str]) -> tuple[Tensor, ...]:
        """Text states [B, L, D] of prompts, of negative prompts and so on, all of one length L."""
        return encode_prompts(self.tokenizer, self.text_encoder, *groups)

    def noise(self, count: int, seed: int) -> Tensor:
        """[count, 4, h, w]; entry i depends on seed + i alone, so batches do not change pictures."""
        shape = (self.unet.config.in_channels, self.latent_size, self.latent_size)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
        return torch.stack(drawn).to(self.device)

    @contextmanager
    def prepared(self, method: str | MethodCall, strength: float = 1.0) -> Iterator[Run]:
        """The U-Net made ready for ``method``: yields the function that samples a batch, for one batch or many.

        ``strength`` is SUN's, where the name of the method does not set it. LTC-Accel is calibrated here if prompts
        are set aside for it. Raises ConfigError, a ValueError.
        """
        call = parse_method(method)
        if "strength" in call.method.options and "strength" not in call.options:
            call = replace(call, options={**call.options, "strength": str(strength)})
        with prepare(self.assets, call) as ready:
            if ready.ltc is not None and self.calibration:  # once a model: not part of what a picture takes
                with torch.no_grad():
                    self._ltc_table(ready, call, [], [], None)
            yield partial(self._run, ready, call)

    def __call__(
        self,
        method: str | MethodCall,
        prompts: list[str],
        negatives: list[str],
        noise: Tensor,
        strength: float = 1.0,
        edit: Edit | None = None,
    ) -> Sample:
        """Denoise ``noise`` with ``method``. Text encoding is outside the timing, as it is the same for all."""
        with self.prepared(method, strength) as run:
            return run(prompts, negatives, noise, edit)

    @torch.no_grad()
    def _run(
        self,
        ready: Prepared,
        call: MethodCall,
        prompts: list[str],
        negatives: list[str],
        noise: Tensor,
        edit: Edit | None = None,
    ) -> Sample:
        positive, negative = (
            self.encode_both(prompts, negatives) if call.method.uses_negative else self.encode_both(prompts) * 2
        )
        if ready.ltc is None:
            return self._denoise(ready, call, positive, negative, noise, edit)
        table = self._ltc_table(ready, call, prompts, negatives, edit)
        return self._denoise(ready, call, positive, negative, noise, edit, lambda key: LtcRun(key.steps, table=table))

    def _ltc_table(
        self, ready: Prepared, call: MethodCall, prompts: list[str], negatives: list[str], edit: Edit | None
    ) -> LtcTable:
        """LTC-Accel's coefficients, found once a method on the calibration prompts, else on the first ones drawn."""
        assert ready.ltc is not None
        name = f"ltc {call} {1 if edit is None else edit.strength:g} {self.w:g}"
        if name not in self.assets.loaded:
            pairs = self.calibration or list(zip(prompts, negatives, strict=True))[:CALIBRATION]
            positive, negative = self.encode_both(*(list(texts) for texts in zip(*pairs, strict=True)))
            noise = self.noise(len(positive), CALIBRATION_SEED)
            start = None if edit is None else Edit(edit.init[:1].expand_as(noise), edit.strength)

            def run(open_run: Opener) -> list[Tensor]:
                return [self._denoise(ready, call, positive, negative, noise, start, open_run).latents]

            self.assets.loaded[name] = run_calibration(run, ready.ltc)
        table: LtcTable = self.assets.loaded[name]
        return table

    def _denoise(
        self,
        ready: Prepared,
        call: MethodCall,
        positive: Tensor,
        negative: Tensor,
        noise: Tensor,
        edit: Edit | None = None,
        open_ltc: Opener | None = None,
    ) -> Sample:
        scheduler = scheduler_of(call, self.scheduler_config)
        scheduler.set_timesteps(call.steps, device=self.device)
        ready.begin(scheduler)
        dtype = ready.unet.dtype
        begin = 0
        x = noise.float() * scheduler.init_noise_sigma
        if edit is not None and edit.strength < 1:
            begin = min(round((1 - edit.strength) * call.steps), call.steps - 1)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(begin)
            x = noised(scheduler, edit.init, noise, begin)
        extra = {"generator": picture_generators(noise)} if call.scheduler == "lcm" else {}
        stepper = None
        if open_ltc is not None:
            stepper = Stepper(scheduler, lambda sampler, sigmas: open_ltc(LtcKey("", sampler, sigmas, self.w)))
        step = stepper.step if stepper else scheduler.step
        with CallCounter(ready.unet) as counter:
            self.synchronize()
            began, processor = time.perf_counter(), time.process_time()
            for i, t in enumerate(scheduler.timesteps[begin:], begin + 1):
                predicted = None
                if stepper is None or not stepper.skips_next:
                    predicted = ready.predict(scheduler.scale_model_input(x, t).to(dtype), t, positive, negative)
                x = step(predicted, t, x, return_dict=False, **extra)[0]
                if edit is not None and edit.mask is not None:
                    x = edit.mask * x + (1 - edit.mask) * noised(scheduler, edit.init, noise, i)
            self.synchronize()
            seconds, processor = time.perf_counter() - began, time.process_time() - processor
        if not bool(x.isfinite().all()):
            parts = {"U-Net": ready.unet, "text encoder": self.text_encoder, "adapter": self.adapter}
            require_finite(x, f"the latents of {call}", why_not_finite(parts))
        return Sample(x.float(), counter.rows / len(noise), seconds / len(noise), processor / len(noise))

    def synchronize(self) -> None:
        """Wait until the device has finished, so that the clock tells the truth."""
        synchronize(self.device)

    @torch.no_grad()
    def pixels(self, latents: Tensor, at_once: int = 8) -> Tensor:
        """[B, 3, H, W] in -1..1 of latents [B, 4, h, w], rounded to 8 bits as a saved picture is."""
        parts = [
            self.vae.decode(part.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor).sample.float()
            for part in latents.split(at_once)
        ]
        pixels = torch.cat(parts)
        if not bool(pixels.isfinite().all()):
            require_finite(pixels, "the decoded pictures", why_not_finite({"autoencoder": self.vae}))
        return ((pixels.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1

    def decode(self, latents: Tensor) -> list[Any]:
        """RGB pictures of latents [B, 4, h, w]."""
        from ..pictures.png import to_images

        return to_images(self.pixels(latents))

    @torch.no_grad()
    def features(self, latents: Tensor) -> Tensor:
        """[B, D]: spatial means of :meth:`feature_maps`.

        A learned description of content that needs no other network; the set distance where there is none.
        """
        return torch.cat([maps.mean((2, 3)) for maps in self.feature_maps(latents)], dim=1)

    @torch.no_grad()
    def feature_maps(self, latents: Tensor) -> list[Tensor]:
        """The frozen U-Net's down-stage outputs [B, C, h, w] on latents noised to t = 50, empty prompt."""
        grabbed: list[Tensor] = []
        hooks = [
            b.register_forward_hook(lambda _m, _i, out: grabbed.append(out[0].float()))
            for b in self.unet.down_blocks[:3]
        ]
        try:
            latents = latents.to(self.device)
            t = torch.full((len(latents),), 50, device=self.device)
            a = self.scheduler_alpha(50)
            fixed = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(self.device)
            noised = (a**0.5 * latents + (1 - a) ** 0.5 * fixed).to(self.unet.dtype)
            self.unet(noised, t, self.encode([""]).expand(len(latents), -1, -1))
        finally:
            for hook in hooks:
                hook.remove()
        return grabbed

    def scheduler_alpha(self, t: int) -> float:
        return float(make_scheduler("ddim", self.scheduler_config).alphas_cumprod[t])


def noised(scheduler: Any, init: Tensor, noise: Tensor, place: int) -> Tensor:
    """``init`` with as much of ``noise`` as the state before step ``place`` has; none after the last."""
    if place == len(scheduler.timesteps):
        return init.float()
    noisy: Tensor = scheduler.add_noise(init.float(), noise.float(), scheduler.timesteps[place].repeat(len(init)))
    return noisy


def picture_generators(noise: Tensor) -> list[torch.Generator]:
    """A generator a picture for samplers that add noise, seeded by the bits of its start noise [B, C, h, w].

    So a picture depends on its own start noise alone, not on its batch.
    """
    seeds = noise.detach().float().cpu().flatten(1)[:, 0].contiguous().view(torch.int32).tolist()
    return [torch.Generator().manual_seed(seed & 0x7FFFFFFF) for seed in seeds]
