"""What SUN costs: a U-Net call with SUN against the plain U-Net's, in one process, in turn (``sun bench``).

A run of N steps computes the adapter's K and V of the texts at its first step, so N calls of each kind are taken in
turn and their sums compared; that is a round. Figures are medians over rounds. Speed-ups are over DPM-Solver++ with 25
steps and classifier-free guidance, whose calls have two rows a picture: for 4 steps at most 25 * 2 / 4 = 12.5.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ..adapter import SunAdapter
from ..common.devices import device_name, synchronize
from ..pipelines import NEGATIVE, RUN, new_run
from ..pipelines.attach import attach, detach
from ..pipelines.latents import latent_scale

REFERENCE_STEPS = 25


@dataclass(frozen=True)
class Case:
    """One set of circumstances: a device, eager or compiled, pictures a call."""

    device: str
    compiled: bool
    batch: int

    def __str__(self) -> str:
        return f"{self.device}, {'compiled' if self.compiled else 'eager'}, batch {self.batch}"


@dataclass
class Times:
    """Seconds. plain and sun: of the N calls of each round; guided: of a call with two rows a picture, one a round."""

    plain: list[list[float]] = field(default_factory=list)
    sun: list[list[float]] = field(default_factory=list)
    guided: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def figures(times: Times) -> dict[str, Any]:
    """Medians over rounds, and what follows from them."""
    ratios = [sum(sun) / sum(plain) for sun, plain in zip(times.sun, times.plain, strict=True)]
    steps = len(times.sun[0])
    sun_call = statistics.median(sum(calls) / steps for calls in times.sun)
    found: dict[str, Any] = {
        "unet_call_ratio": statistics.median(ratios),
        "unet_call_ratio_interval": (min(ratios), max(ratios)),
        "first_call_ratio": statistics.median(s[0] / p[0] for s, p in zip(times.sun, times.plain, strict=True)),
        "plain_call_seconds": statistics.median(sum(calls) / steps for calls in times.plain),
        "sun_call_seconds": sun_call,
    }
    if times.guided:
        rounds = list(zip(times.guided, times.sun, strict=True))
        found |= {
            "guided_call_seconds": statistics.median(times.guided),
            "unet_speedup": statistics.median(REFERENCE_STEPS * guided / sum(sun) for guided, sun in rounds),
            "unet_speedup_limit": 2 * REFERENCE_STEPS / steps,
        }
        if times.decode:
            around = statistics.median(times.text) + statistics.median(times.decode)
            found |= {
                "text_seconds": statistics.median(times.text),
                "decode_seconds": statistics.median(times.decode),
                "pipeline_speedup": statistics.median(
                    (around + REFERENCE_STEPS * guided) / (around + sum(sun)) for guided, sun in rounds
                ),
            }
    return found


class Models(Protocol):
    """The three models of a Stable Diffusion."""

    unet: Any
    text_encoder: Any
    vae: Any


class Bench:
    """Models and random inputs for pictures of ``size`` pixels; measures one case after another."""

    def __init__(self, models: Models, adapter: SunAdapter, size: int, dtype: torch.dtype, steps: int = 4) -> None:
        self.models, self.adapter, self.dtype, self.steps = models, adapter, dtype, steps
        for module in (models.unet, models.vae, models.text_encoder, adapter):
            module.requires_grad_(False).eval()
            if next(module.parameters()).dtype != dtype:  # diffusers warns of every cast
                module.to(dtype)
        self.latent = max(1, size // latent_scale(models.vae))

    @torch.inference_mode()
    def measure(self, case: Case, rounds: int, on_round: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """The figures of a case, which also hold its circumstances; with ``error`` instead where it cannot run."""
        about = {
            "device": device_name(torch.device(case.device)),
            "compiled": case.compiled,
            "batch": case.batch,
            "latent": [case.batch, 4, self.latent, self.latent],
            "dtype": str(self.dtype).removeprefix("torch."),
            "steps": self.steps,
            "rounds": rounds,
        }
        try:
            return about | figures(self._times(case, rounds, on_round))
        except Exception as error:
            if not case.compiled:
                raise
            first = str(error).strip().splitlines() or [type(error).__name__]
            return about | {"error": f"torch.compile did not work here: {first[0]}"}
        finally:
            detach(self.models.unet)
            if case.compiled:
                torch.compiler.reset()

    def _times(self, case: Case, rounds: int, on_round: Callable[[], None]) -> Times:
        device = torch.device(case.device)
        for module in (self.models.unet, self.models.vae, self.models.text_encoder):
            module.to(device)
        unet = torch.compile(self.models.unet, dynamic=False) if case.compiled else self.models.unet
        attach(unet, self.adapter)
        x, t, positive, negative = self._inputs(case, device)
        plain, guided = _plain(unet, x, t, positive), None
        if case.batch == 1 and not case.compiled:
            guided = _plain(unet, torch.cat([x, x]), t, torch.cat([positive, negative]))
        found = Times()
        plain(), self._sun_run(unet, x, t, positive, negative)()
        if guided:
            guided()
        for turn in range(rounds):
            sun, pairs = self._sun_run(unet, x, t, positive, negative), []
            plain()  # what follows the decoder of the round before pays for memory
            for k in range(turn, turn + self.steps):  # who goes first changes, as the second finds warm caches
                pairs.append(_timed((plain, sun) if k % 2 == 0 else (sun, plain), device)[:: 1 if k % 2 == 0 else -1])
            found.plain.append([pair[0] for pair in pairs])
            found.sun.append([pair[1] for pair in pairs])
            if guided:
                found.guided += _timed([guided], device)
                self._around(found, device)
            on_round()
        return found

    def _inputs(self, case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        encoder = self.models.text_encoder.config

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device, self.dtype)

        text = (case.batch, encoder.max_position_embeddings, encoder.hidden_size)
        x = draw(case.batch, self.models.unet.config.in_channels, self.latent, self.latent)
        return x, torch.tensor(499, device=device), draw(*text), draw(*text)

    def _sun_run(self, unet: Any, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Callable[[], Any]:
        """A new run: its first call computes K and V of the texts, as a pipeline's does."""
        options = {NEGATIVE: negative, RUN: new_run(unet)}
        return lambda: unet(x, t, positive, cross_attention_kwargs=options)

    def _around(self, found: Times, device: torch.device) -> None:
        """Times what a pipeline does besides its U-Net calls: both texts encoded, one picture decoded."""
        encoder, vae = self.models.text_encoder, self.models.vae
        ids = torch.zeros(2, encoder.config.max_position_embeddings, dtype=torch.long, device=device)
        latents = torch.randn(1, vae.config.latent_channels, self.latent, self.latent, device=device, dtype=self.dtype)
        found.text += _timed([lambda: encoder(ids)], device)
        found.decode += _timed([lambda: vae.decode(latents)], device)


def _plain(unet: Any, x: Tensor, t: Tensor, text: Tensor) -> Callable[[], Any]:
    return lambda: unet(x, t, text)


def _timed(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for call in calls:
        synchronize(device)
        began = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - began)
    return seconds


def summary(cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report of ``sun bench``: the figures of the first case that has them all on top, every case below."""
    headline = next((row for row in cases.values() if "unet_speedup" in row), {})
    keys = ("unet_call_ratio", "unet_speedup", "unet_speedup_limit", "pipeline_speedup", "device", "dtype")
    return {key: headline[key] for key in keys if key in headline} | {"torch": torch.__version__, "cases": cases}
