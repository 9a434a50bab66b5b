"""Spectrum (Han et al. 2026, arXiv 2603.01623): the model's output as a polynomial of time, fitted while it runs.

Chebyshev polynomials T_0 ... T_M of tau = 2 t - 1 by ridge regression, C = (Phi'Phi + lambda I)^-1 Phi'H, over the
last steps that were computed; the forecast is w * global + (1 - w) * local, local being the line through the last two.
Steps that are computed grow rarer: one of ``window``, which grows by ``growth``.

The settings are those of the two ports that people run: the ComfyUI pack for SDXL, which forecasts the network's
output, and stable-diffusion.cpp, which forecasts the clean latents. The authors' own code forecasts the features before
the last convolution; this is written for the ports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...common.settings import ConfigError
from .step_skipping import Moment


@dataclass(frozen=True)
class SpectrumSettings:
    """weight: w of the blend. degree: M. ridge: lambda. window, growth: see above; ``grows_always``: at every step past
    the warm-up, not at computed ones alone. warmup: steps computed first. tail: steps computed last; tail_share: the
    same as a share of the run. history: computed steps that are remembered. span: steps that tau = -1 ... 1 stands
    for; 0 is the run's own. local: of the last difference that the line goes on by, at any distance. clean: forecast
    x0 instead of the noise.
    """

    weight: float = 0.3
    degree: int = 3
    ridge: float = 0.1
    window: float = 2.0
    growth: float = 0.25
    grows_always: bool = True
    warmup: int = 8
    tail: int = 3
    tail_share: float = 0.0
    history: int = 8
    span: int = 0
    local: float = 1.0
    clean: bool = False


SPECTRUM = {
    "comfyui": SpectrumSettings(),
    "sdcpp": SpectrumSettings(
        weight=0.4,
        ridge=1.0,
        growth=0.5,
        grows_always=False,
        warmup=4,
        tail=0,
        tail_share=0.1,
        history=6,
        span=50,
        local=0.5,
        clean=True,
    ),
}


def computed_steps(steps: int, settings: SpectrumSettings) -> tuple[int, ...]:
    """The steps in which the model is asked; they depend on nothing but the settings."""
    stop = int((1 - settings.tail_share) * steps) if settings.tail_share else steps - settings.tail
    window, waited, found = settings.window, 0, []
    for step in range(steps):
        asked = step < settings.warmup or step >= stop or (waited + 1) % max(1, math.floor(window)) == 0
        if asked:
            found.append(step)
        waited = 0 if asked else waited + 1
        if step >= settings.warmup and (asked or settings.grows_always):
            window += settings.growth
    return tuple(found)


def chebyshev(tau: Tensor, degree: int) -> Tensor:
    """[K, degree + 1]: T_0 ... T_degree at ``tau`` [K]."""
    return torch.stack([torch.cos(n * torch.acos(tau.clamp(-1, 1))) for n in range(degree + 1)], dim=1)


def ridge_weights(known: Tensor, wanted: Tensor, degree: int, ridge: float) -> Tensor:
    """[K]: how much of each value at ``known`` [K] makes up the fitted polynomial's value at ``wanted`` (a scalar)."""
    phi = chebyshev(known.double(), degree)
    there = chebyshev(wanted.double()[None], degree)[0]
    return phi @ torch.linalg.solve(phi.T @ phi + ridge * torch.eye(degree + 1).double(), there)


@dataclass
class Spectrum:
    """One picture. ``values`` of the last computed ``at`` steps."""

    settings: SpectrumSettings = field(default_factory=SpectrumSettings)
    at: list[int] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    asked: tuple[int, ...] | None = None

    def forecast(self, at: Moment) -> Tensor | None:
        if self.asked is None:
            self.asked = computed_steps(at.steps, self.settings)
        if at.step in self.asked or len(self.values) < 2:
            return None
        value = self.value(at.step, at.steps)
        return at.noise(value) if self.settings.clean else value

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        self.remember(at.step, at.clean(guided) if self.settings.clean else guided)

    def remember(self, step: int, value: Tensor) -> None:
        """Take a computed value into the history."""
        kept = self.settings.history
        self.at, self.values = [*self.at, step][-kept:], [*self.values, value][-kept:]

    def value(self, step: int, steps: int) -> Tensor:
        """The blended forecast for a step of ``steps``."""
        settings = self.settings
        taus = torch.tensor([*self.at, step]).double() / (settings.span or steps) * 2 - 1
        weights = ridge_weights(taus[:-1], taus[-1], settings.degree, settings.ridge).tolist()
        fitted = sum((w * v for w, v in zip(weights, self.values, strict=True)), torch.zeros_like(self.values[0]))
        local = self.values[-1] + settings.local * (self.values[-1] - self.values[-2])
        return settings.weight * fitted + (1 - settings.weight) * local


def spectrum_settings(preset: str, **given: float) -> SpectrumSettings:
    """A preset with some settings changed. Raises ConfigError for what cannot be fitted."""
    whole = ("degree", "warmup", "tail", "history")
    changed = {k: int(v) if k in whole else v for k, v in given.items()}
    settings = replace(SPECTRUM[preset], **changed)  # type: ignore[arg-type]
    if settings.degree < 0 or settings.window < 1 or settings.warmup < 2 or settings.ridge <= 0:
        raise ConfigError(
            "Spectrum takes degree of 0 or more, window of 1 or more, warmup of 2 or more, ridge above 0."
        )
    return settings
