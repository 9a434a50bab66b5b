"""How a U-Net is made ready for each method of :mod:`.names`, and the scheduler a method steps with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..adapter import SunAdapter
from ..common.settings import ConfigError
from ..compact import LISTS, assemble, attach_experts, read_experts, read_plan
from ..compact import plan as make_plan
from ..compact.expertfile import experts_beside
from ..ltc import LtcSettings
from ..pipelines import NEGATIVE, RUN, new_run
from ..pipelines.attach import attach, detach
from ..pipelines.loading import load_unet
from ..pipelines.lora import apply_lora
from ..pipelines.schedulers import make_scheduler
from .accelerators import deepcache, inheriting, ltc_settings, skipper_of
from .names import MethodCall
from .peers.nag import attach_nag, detach_nag
from .peers.nasa import attach_nasa, detach_nasa
from .peers.step_skipping import Skipping
from .switched import switched

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [B, 4, h, w], t, positive [B, L, D], negative [B, L, D]) -> predicted noise [B, 4, h, w] in float32."""


@dataclass
class Assets:
    """What methods work with: the frozen U-Net, w of classifier-free guidance, and the files of SUN and its peers.

    ``adapters`` by name, the main one as ``""``. ``attached``: the U-Net carries SUN already (a training run's), so
    nothing is put on or taken off. ``loaded`` keeps the U-Nets made for peers.
    """

    unet: Any
    w: float = 8.0
    adapters: Mapping[str, SunAdapter] = field(default_factory=dict)
    attached: bool = False
    lcm_lora: str = ""
    guided_distill: str = ""
    unets: Mapping[str, str] = field(default_factory=dict)
    loaded: dict[str, Any] = field(default_factory=dict)

    def peer_folder(self, call: MethodCall) -> str:
        """The folder of the files that a peer needs, or nothing."""
        if call.method.unet:
            return self.unets.get(call.variant, "")
        return str(getattr(self, call.method.peer)) if call.method.peer else ""

    def adapter_of(self, call: MethodCall) -> SunAdapter | None:
        """The adapter a method puts on the U-Net, if it has one and it is there."""
        return self.adapters.get(call.variant if call.method.named else "") if call.method.adapter else None


@dataclass(frozen=True)
class Prepared:
    """A U-Net ready for a method, and how to ask it; U-Net calls are counted on ``unet``.

    begin: told the scheduler before every run. ltc: how LTC-Accel chooses the steps to skip, if it does.
    """

    unet: Any
    predict: Predict
    begin: Callable[[Any], None] = lambda _scheduler: None
    ltc: LtcSettings | None = None


Prepare = Callable[[Assets, MethodCall], AbstractContextManager[Prepared]]


@contextmanager
def _guided(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """Classifier-free guidance: both texts in one batch of twice the rows."""

    def predict(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        e_positive, e_negative = _both(assets.unet, x, t, positive, negative)
        return e_negative + assets.w * (e_positive - e_negative)

    yield Prepared(assets.unet, predict)


def _both(unet: Any, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The noise [B, 4, h, w] of the prompts and of the negatives, in one call."""
    e_positive, e_negative = unet(torch.cat([x, x]), t, torch.cat([positive, negative])).sample.float().chunk(2)
    return e_positive, e_negative


@contextmanager
def _conditional(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    yield _plain(assets.unet)


def _plain(unet: Any) -> Prepared:
    return Prepared(unet, lambda x, t, positive, _negative: unet(x, t, positive).sample.float())


def _steered(unet: Any, keyword: str) -> Prepared:
    """One row a picture; the negative text goes to the attention processors as ``keyword``."""

    def predict(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return unet(x, t, positive, cross_attention_kwargs={keyword: negative}).sample.float()

    return Prepared(unet, predict)


def _sun_run(unet: Any) -> Prepared:
    """The same for SUN, which also keeps what it makes of texts that come again at the next step."""
    run = new_run(unet)

    def predict(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return unet(x, t, positive, cross_attention_kwargs={NEGATIVE: negative, RUN: run}).sample.float()

    return Prepared(unet, predict)


@contextmanager
def _sun(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    if assets.attached:
        yield _sun_run(assets.unet)
        return
    adapter = _adapter(assets, call)
    # One that takes the guidance scale is asked for the reference's.
    scale = assets.w if adapter.guided else None
    attach(assets.unet, adapter, strength=call.number("strength", 1.0), guidance_scale=scale)
    try:
        yield _sun_run(assets.unet)
    finally:
        detach(assets.unet)


def _adapter(assets: Assets, call: MethodCall) -> SunAdapter:
    if call.variant in assets.adapters:
        return assets.adapters[call.variant]
    if not call.variant:
        raise ConfigError(f"{call.text} needs a SUN adapter: give one with the setting adapter.")
    known = ", ".join(sorted(filter(None, assets.adapters))) or "none"
    raise ConfigError(
        f"{call.text}: there is no adapter {call.variant!r} in the table adapters (there are: {known}). "
        f'Add [adapters] {call.variant} = "FILE".'
    )


_TRAINING_FREE: dict[str, tuple[Callable[..., None], Callable[..., None]]] = {
    "nasa": (attach_nasa, detach_nasa),
    "nag": (attach_nag, detach_nag),
    "lcm-lora+nag": (attach_nag, detach_nag),
}


@contextmanager
def _training_free(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    put_on, take_off = _TRAINING_FREE[call.method.name]
    try:
        put_on(assets.unet, **call.numbers())
    except ValueError as error:
        raise ConfigError(f"{call.text}: {error}") from error
    try:
        yield _steered(assets.unet, "negative")
    finally:
        take_off(assets.unet)


@contextmanager
def _lcm_lora(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """The LoRA is fused into a copy of the U-Net: no time is lost, and the frozen weights stay exactly as they are."""
    yield _plain(_lcm_unet(assets, call))


@contextmanager
def _lcm_nag(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """What people use for a negative prompt without guidance: NAG in the attention of the LCM-LoRA's U-Net."""
    with _training_free(replace(assets, unet=_lcm_unet(assets, call)), call) as ready:
        yield ready


def _lcm_unet(assets: Assets, call: MethodCall) -> Any:
    if "lcm-lora" not in assets.loaded:
        path = _existing(assets.lcm_lora, "lcm_lora", "the folder of an LCM-LoRA as diffusers saves it", call)
        unet = copy.deepcopy(assets.unet)
        apply_lora(SimpleNamespace(unet=unet, text_encoder=torch.nn.Module()), path)
        assets.loaded["lcm-lora"] = unet.to(assets.unet.device, assets.unet.dtype).eval()
    return assets.loaded["lcm-lora"]


@contextmanager
def _guided_distill(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    if call.method.name not in assets.loaded:
        path = _existing(assets.guided_distill, "guided_distill", "a folder with the distilled U-Net in unet/", call)
        unet = load_unet(path)
        assets.loaded[call.method.name] = unet.to(assets.unet.device, assets.unet.dtype).eval().requires_grad_(False)
    yield _plain(assets.loaded[call.method.name])


def _alike(predict: Predict, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """A prediction whose passes nobody looks at, for :class:`Skipping`."""
    noise = predict(x, t, positive, negative)
    return noise, noise


def _with_ltc(base: Prepare) -> Prepare:
    """``base``, skipping steps: by a preset's forecast, or as published."""

    @contextmanager
    def prepare(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
        with base(assets, replace(call, variant="")) as ready:
            if call.forecasts:
                skipping = Skipping(partial(_alike, ready.predict), skipper_of(call), 1.0)
                yield replace(ready, predict=skipping, begin=skipping.begin)
            elif call.scheduler == "lcm":
                raise ConfigError(
                    f"{call.text}: LTC-Accel as published needs a sampler without fresh noise. Name a preset, as in "
                    f"{call.method.name}[balanced]-{call.steps}."
                )
            else:
                yield replace(ready, ltc=ltc_settings(call))

    return prepare


def _inheriting(base: Prepare) -> Prepare:
    """``base``, with features of earlier steps."""

    @contextmanager
    def prepare(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
        with base(assets, replace(call, variant="")) as ready, inheriting(ready.unet, call):
            yield ready

    return prepare


@contextmanager
def _deepcache(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    with _guided(assets, call) as ready, deepcache(ready.unet, call) as begin:
        yield replace(ready, begin=begin)


@contextmanager
def _switch(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """A compact U-Net makes a share of the steps, the original the rest."""
    unet = switched(assets.unet, _compact_unet(assets, call), call)
    with _guided(replace(assets, unet=unet), call) as ready:
        yield replace(ready, begin=unet.begin)


@contextmanager
def _compact(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """A compact U-Net in the original's place."""
    with _guided(replace(assets, unet=_compact_unet(assets, call)), call) as ready:
        yield ready


@contextmanager
def _compact_sun(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """The original's SUN adapter on a compact U-Net, without the layers that are gone."""
    adapter = _adapter(assets, replace(call, variant=""))
    unet = _compact_unet(assets, call)
    named = {"": adapter.for_unet(unet)}
    with _sun(replace(assets, unet=unet, adapters=named), replace(call, variant="")) as ready:
        yield ready


def _compact_unet(assets: Assets, call: MethodCall) -> Any:
    key = f"unets.{call.variant}"
    if key not in assets.loaded:
        source = assets.unets[call.variant]
        if Path(source).is_dir():
            small = load_unet(source)
            if experts := experts_beside(source):
                attach_experts(small, read_experts(experts))
        else:
            chosen = make_plan(assets.unet, named=source) if source in LISTS else read_plan(source)
            small = assemble(assets.unet, chosen)
        # torch's own `to`: diffusers' warns of layers to keep in float32, also where there are none
        torch.nn.Module.to(small, assets.unet.device, assets.unet.dtype)
        assets.loaded[key] = small.eval().requires_grad_(False)
    return assets.loaded[key]


@contextmanager
def _skipping(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """A peer that leaves out whole steps, picture by picture."""
    skipping = Skipping(partial(_both, assets.unet), skipper_of(call), assets.w)
    yield Prepared(assets.unet, skipping, skipping.begin)


def _existing(path: str, setting: str, what: str, call: MethodCall) -> Path:
    if not path:
        raise ConfigError(f"{call.text} needs the setting {setting}: {what}. Give it, or leave the method out.")
    if not Path(path).exists():
        raise ConfigError(f"{setting} = {path} does not exist; {call.text} needs {what}.")
    return Path(path)


_PREPARE: dict[str, Prepare] = {
    "ddim": _guided,
    "dpmpp": _guided,
    "unipc": _guided,
    "euler": _guided,
    "cond": _conditional,
    "sun": _sun,
    "nasa": _training_free,
    "nag": _training_free,
    "lcm-lora": _lcm_lora,
    "lcm-lora+nag": _lcm_nag,
    "lcm-lora+ltc": _with_ltc(_lcm_lora),
    "guided-distill": _guided_distill,
    "ltc": _with_ltc(_guided),
    "inherit": _inheriting(_guided),
    "ltc+inherit": _with_ltc(_inheriting(_guided)),
    "sun+ltc": _with_ltc(_sun),
    "sun+inherit": _inheriting(_sun),
    "switch": _switch,
    "compact": _compact,
    "compact+sun": _compact_sun,
    "deepcache": _deepcache,
    **dict.fromkeys(("spectrum", "sada", "adaptive", "easycache", "lazycache"), _skipping),
}


def prepare(assets: Assets, call: MethodCall) -> AbstractContextManager[Prepared]:
    """A context in which the U-Net is ready for a method. Raises ConfigError for files or packages it lacks."""
    return _PREPARE[call.method.name](assets, call)


def scheduler_of(call: MethodCall, config: Mapping[str, Any]) -> Any:
    """The scheduler a method steps with, on the noise schedule of ``config``.

    ``lcm`` is diffusers' multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378) on its own timesteps.
    """
    if call.scheduler == "lcm":
        from diffusers import LCMScheduler

        return LCMScheduler.from_config(config, clip_sample=False)
    return make_scheduler(call.scheduler, config)
