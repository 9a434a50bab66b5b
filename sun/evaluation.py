"""Measure methods against the 25-step DPM-Solver++ reference with CFG, at equal noise (``sun evaluate``).

Methods are named ``SAMPLER-STEPS``: ``ddim-4``, ``dpmpp-8``, ``unipc-4`` run with CFG (two U-Net rows a picture and
step), ``cond-25`` is DPM-Solver++ without guidance, ``sun-4`` is SUN. U-Net calls are counted by a hook on the
U-Net as rows per picture, so a CFG step counts two however it is batched.
"""

from __future__ import annotations

import random
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import SunAdapter
from .pipelines import attach, detach
from .schedulers import make_scheduler
from .text import encode_texts

REFERENCE = "dpmpp-25"


@dataclass
class EvaluateConfig:
    """``model``/``adapter`` default to the shipped ones; ``prompts_file`` holds one ``positive | negative`` a line."""

    model: str = "emoji"
    adapter: str = ""
    prompts: int = 512
    prompts_file: str = ""
    methods: tuple[str, ...] = ("ddim-4", "dpmpp-4", "cond-25", "sun-4", "sun-8")
    guidance_scale: float = 0.0  # 0: the adapter's own w
    batch_size: int = 64
    seed: int = 20_000
    negative_pairs: int = 128
    resolution: int = 0
    device: str = ""
    precision: str = "bf16"
    style: str = "twemoji"
    grid: str = ""


@dataclass
class Sample:
    """Latents [B, 4, h, w] (model units), U-Net rows per picture, and seconds per picture of the U-Net loop."""

    latents: Tensor
    unet_calls: float
    seconds: float


class CallCounter:
    """Counts U-Net forwards and the rows (batch entries) they carried, through a forward pre-hook."""

    def __init__(self, unet: torch.nn.Module):
        self.calls, self.rows = 0, 0
        self._handle = unet.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        self.calls += 1
        self.rows += sample.shape[0]

    def __enter__(self) -> CallCounter:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()


# What each method's name means: the scheduler it steps with. ``cond`` runs without guidance, ``sun`` with the adapter.
METHODS = {"ddim": "ddim", "dpmpp": "dpmpp_2m", "unipc": "unipc", "euler": "euler", "cond": "dpmpp_2m", "sun": "ddim"}


def split_method(method: str) -> tuple[str, int]:
    """``"dpmpp-25"`` -> ("dpmpp", 25). Raises ``ValueError`` that lists the known methods."""
    name, _, steps = method.rpartition("-")
    if name not in METHODS or not steps.isdigit():
        known = ", ".join(f"{m}-STEPS" for m in METHODS)
        raise ValueError(f"unknown method {method!r}: choose from {known}")
    return name, int(steps)


class Sampler:
    """Runs any method of this module on one frozen model; SUN needs an adapter."""

    def __init__(
        self, unet: Any, vae: Any, text_encoder: Any, tokenizer: Any, scheduler: Any, *,
        adapter: SunAdapter | None = None, w: float = 8.0, resolution: int = 0, attached: bool = False,
    ):  # fmt: skip
        self.unet, self.vae, self.text_encoder, self.tokenizer = unet, vae, text_encoder, tokenizer
        self.scheduler_config, self.w, self.adapter, self.attached = scheduler.config, w, adapter, attached
        self.latent_size = resolution // 8 if resolution else unet.config.sample_size
        self.device = next(unet.parameters()).device

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Text states [B, 77, D]."""
        return encode_texts(self.tokenizer, self.text_encoder, texts)

    def noise(self, count: int, seed: int) -> Tensor:
        """[count, 4, h, w]; entry i depends on seed + i alone, so batches do not change pictures."""
        shape = (self.unet.config.in_channels, self.latent_size, self.latent_size)
        drawn = [torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)]
        return torch.stack(drawn).to(self.device)

    @torch.no_grad()
    def __call__(
        self, method: str, prompts: list[str], negatives: list[str], noise: Tensor, strength: float = 1.0
    ) -> Sample:
        """Denoise ``noise`` with ``method``. Text encoding is outside the timing, as it is the same for all."""
        name, steps = split_method(method)
        scheduler = make_scheduler(METHODS[name], self.scheduler_config)
        scheduler.set_timesteps(steps, device=self.device)
        positive = self.encode(prompts)
        negative = None if name == "cond" else self.encode(negatives)
        x = noise * scheduler.init_noise_sigma
        uses_sun = name == "sun"
        if uses_sun and not self.attached:
            if self.adapter is None:
                raise ValueError("this method needs a SUN adapter")
            attach(self.unet, self.adapter, strength=strength)
        try:
            with CallCounter(self.unet) as counter:
                began = time.perf_counter()
                for t in scheduler.timesteps:
                    model_input = scheduler.scale_model_input(x, t)
                    if uses_sun:
                        kwargs = {"sun_negative": negative}
                        predicted = self.unet(model_input, t, positive, cross_attention_kwargs=kwargs).sample
                    elif negative is None:
                        predicted = self.unet(model_input, t, positive).sample
                    else:
                        both = self.unet(torch.cat([model_input] * 2), t, torch.cat([positive, negative])).sample
                        e_positive, e_negative = both.float().chunk(2)
                        predicted = e_negative + self.w * (e_positive - e_negative)
                    x = scheduler.step(predicted.float(), t, x, return_dict=False)[0]
                self._synchronize()
                seconds = time.perf_counter() - began
        finally:
            if uses_sun and not self.attached:
                detach(self.unet)
        return Sample(x.float(), counter.rows / len(noise), seconds / len(noise))

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Any]:
        """RGB pictures of latents [B, 4, h, w]."""
        from .images import to_images

        pixels = [
            self.vae.decode(part.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
            for part in latents.split(8)
        ]
        return to_images(torch.cat(pixels).float())

    @torch.no_grad()
    def features(self, latents: Tensor) -> Tensor:
        """[B, D]: spatial means of the frozen U-Net's down-stage outputs on latents noised to t = 50, empty prompt.

        A learned description of content that needs no other network; used for the set distance.
        """
        grabbed: list[Tensor] = []
        hooks = [
            b.register_forward_hook(lambda _m, _i, out: grabbed.append(out[0].float().mean((2, 3))))
            for b in self.unet.down_blocks[:3]
        ]
        try:
            t = torch.full((len(latents),), 50, device=self.device)
            a = self.scheduler_alpha(50)
            fixed = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0)).to(self.device)
            self.unet(a**0.5 * latents + (1 - a) ** 0.5 * fixed, t, self.encode([""]).expand(len(latents), -1, -1))
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(grabbed, dim=1)

    def scheduler_alpha(self, t: int) -> float:
        return float(make_scheduler("ddim", self.scheduler_config).alphas_cumprod[t])


class _Given(torch.nn.Module):
    """Feature "network" for torchmetrics that passes given features through."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """FID formula on given features [N, D]."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Given(features.shape[1])).set_dtype(torch.float64)
    metric.update(reference.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return float(metric.compute())


def kernel_distance(features: Tensor, reference: Tensor) -> float:
    """KID (unbiased at small N) on given features [N, D]."""
    from torchmetrics.image.kid import KernelInceptionDistance

    torch.manual_seed(0)
    size = min(len(features), len(reference), 256)
    metric = KernelInceptionDistance(feature=_Given(features.shape[1]), subsets=20, subset_size=size)
    metric.update(reference.cpu(), real=True)
    metric.update(features.cpu(), real=False)
    return float(metric.compute()[0])


def bootstrap_interval(values: Tensor, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [N]."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(values), (draws, len(values)), generator=generator)
    means = values.cpu()[picks].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


@dataclass
class PromptSet:
    positives: list[str]
    negatives: list[str]
    other_negatives: list[str] = field(default_factory=list)


def build_prompts(config: EvaluateConfig) -> PromptSet:
    """Prompts with random negatives: from a file, or emoji scenes that training did not render."""
    from .training.negatives import NegativePrompts

    rng = random.Random(config.seed)
    if config.prompts_file:
        lines = [line for line in Path(config.prompts_file).read_text().splitlines() if line.strip()]
        pairs = [line.partition("|")[::2] for line in lines][: config.prompts]
        positives, negatives = [p.strip() for p, _ in pairs], [n.strip() for _, n in pairs]
        source = NegativePrompts.load("auto", "photo", 8, 0.0)
    else:
        from .emoji.scenes import random_scene
        from .emoji.sources import load_metadata

        emojis = load_metadata()
        positives = [random_scene(emojis, rng).caption for _ in range(config.prompts)]
        source = NegativePrompts.load("auto", "emoji", 6, 0.1)
        negatives = [source.draw(rng) for _ in positives]
    return PromptSet(positives, negatives, [source.draw(rng) for _ in positives])


def negative_direction(
    sampler: Sampler, prompts: PromptSet, config: EvaluateConfig, runs: dict[str, Sample]
) -> dict[str, Any]:
    """Change only the negative prompt: cosine between each method's change of latents and the reference's.

    ``runs`` hold the reference and the methods with the prompts' own negatives, from the noise of ``config.seed``.
    """
    count = min(config.negative_pairs, len(prompts.positives))
    positives, others = prompts.positives[:count], prompts.other_negatives[:count]
    noise = sampler.noise(count, config.seed)
    changes = {
        method: (
            run_batched(sampler, method, positives, others, noise, config.batch_size).latents - run.latents[:count]
        ).flatten(1)
        for method, run in runs.items()
    }
    reference = changes.pop(REFERENCE)
    shuffled = reference.roll(1, 0)
    out: dict[str, Any] = {"pairs": count}
    for method, change in changes.items():
        cosine = torch.cosine_similarity(change, reference, dim=1)
        control = torch.cosine_similarity(change, shuffled, dim=1)
        out[method] = {
            "cosine": float(cosine.mean()),
            "interval": bootstrap_interval(cosine),
            "positive_share": float((cosine > 0).float().mean()),
            "cosine_with_other_pairs_change": float(control.mean()),
            "relative_size": float(change.norm(dim=1).mean() / reference.norm(dim=1).mean()),
        }  # fmt: skip
    return out


def run_batched(
    sampler: Sampler, method: str, positives: list[str], negatives: list[str], noise: Tensor, size: int
) -> Sample:
    """One method over all prompts in batches, with a progress bar."""
    latents, rows, seconds = [], 0.0, 0.0
    for i in tqdm(range(0, len(positives), size), desc=method, leave=False):
        part = sampler(method, positives[i : i + size], negatives[i : i + size], noise[i : i + size])
        latents.append(part.latents)
        rows += part.unet_calls * len(part.latents)
        seconds += part.seconds * len(part.latents)
    return Sample(torch.cat(latents), rows / len(positives), seconds / len(positives))


def load_sampler(config: EvaluateConfig) -> Sampler:
    from .shipped import EMOJI_SUN
    from .training.sun import load_base

    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    pipe = load_base(config.model).to(device)
    adapter = SunAdapter.load(config.adapter or EMOJI_SUN, dtype=torch.float32).to(device)
    w = config.guidance_scale or adapter.info.guidance_scale or 8.0
    return Sampler(
        pipe.unet,
        pipe.vae,
        pipe.text_encoder,
        pipe.tokenizer,
        pipe.scheduler,
        adapter=adapter,
        w=w,
        resolution=config.resolution,
    )


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All figures as a dictionary: ``methods`` (``unet_calls``, ``seconds``, ``paired_mse``, ``set_distance`` of each),
    ``floor`` (reference against itself with other noise) and ``negative_prompt`` (direction of change)."""
    sampler = load_sampler(config)
    prompts = build_prompts(config)
    noise = sampler.noise(len(prompts.positives), config.seed)
    autocast = torch.autocast(sampler.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()
    with autocast:
        sampler(REFERENCE.replace("25", "2"), prompts.positives[:2], prompts.negatives[:2], noise[:2])  # warm up
        runs = {
            m: run_batched(sampler, m, prompts.positives, prompts.negatives, noise, config.batch_size)
            for m in dict.fromkeys((REFERENCE, *config.methods))
        }
        other = sampler.noise(len(prompts.positives), config.seed + 1_000_000)
        floor = run_batched(sampler, REFERENCE, prompts.positives, prompts.negatives, other, config.batch_size)
        features = {
            m: _batched_features(sampler, r.latents, config.batch_size) for m, r in {**runs, "floor": floor}.items()
        }
        steered = {m: r for m, r in runs.items() if m == REFERENCE or m.startswith("sun")}
        direction = negative_direction(sampler, prompts, config, steered)
    reference = runs[REFERENCE].latents

    def row(name: str, run: Sample) -> dict[str, Any]:
        error = (run.latents - reference).square().mean((1, 2, 3))
        return {
            "unet_calls": run.unet_calls,
            "seconds": run.seconds,
            "paired_mse": float(error.mean()),
            "paired_mse_interval": bootstrap_interval(error),
            "set_distance": frechet_distance(features[name], features[REFERENCE]),
            "kid": kernel_distance(features[name], features[REFERENCE]),
        }

    result = {
        "reference": {
            "method": REFERENCE,
            "unet_calls": runs[REFERENCE].unet_calls,
            "seconds": runs[REFERENCE].seconds,
        },
        "methods": {m: row(m, runs[m]) for m in config.methods},
        "floor": {**row("floor", floor), "what": "the reference again with other noise"},
        "negative_prompt": direction,
        "guidance_scale": sampler.w,
        "settings": asdict(config),
    }
    if config.grid:
        _save_comparison(sampler, {m: r.latents[:12] for m, r in runs.items()}, Path(config.grid))
    return result


def _batched_features(sampler: Sampler, latents: Tensor, size: int) -> Tensor:
    return torch.cat([sampler.features(part) for part in latents.split(size)])


def _save_comparison(sampler: Sampler, latents: dict[str, Tensor], path: Path) -> None:
    from .images import save_grid

    rows = [sampler.decode(x) for x in latents.values()]
    save_grid([image for r in rows for image in r], len(rows[0]), path, row_labels=list(latents))
