"""What peers that leave out whole steps have in common: a method decides picture by picture whether the model is asked.

A :class:`Skipper` is one method at work on one picture. It gives the model's output of a step without the model, or
nothing, and then it is told what the model said. The sampler's own step is taken with either, so every solver keeps a
normal history. Rows of a batch that ask the model are asked together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...common.settings import ConfigError


@dataclass(frozen=True)
class Moment:
    """One step of one picture as a method sees it.

    step of ``steps``, from 0. latents [C, h, w]: the scheduler's own. z [C, h, w]: what the network is given, with
    variance 1: alpha * x0 + sigma * noise. time: the training timestep, of ``times``. later: that of the next step,
    0 after the last. beta: of the noise schedule at ``time``. levels [steps + 1]: sigma / alpha of every step, and 0.
    """

    step: int
    steps: int
    latents: Tensor
    z: Tensor
    alpha: float
    sigma: float
    time: float
    later: float
    times: int
    beta: float
    levels: tuple[float, ...] = ()

    def clean(self, noise: Tensor) -> Tensor:
        """x0 of a predicted noise."""
        return (self.z - self.sigma * noise) / self.alpha

    def noise(self, clean: Tensor) -> Tensor:
        """The predicted noise that says ``clean`` is x0."""
        return (self.z - self.alpha * clean) / self.sigma


class Skipper(Protocol):
    """A method at work on one picture."""

    def forecast(self, at: Moment) -> Tensor | None:
        """The guided noise [C, h, w] that stands for the model's, or None: ask the model."""
        ...

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        """What the model said: guided noise [C, h, w] and the rows [2, C, h, w] of the prompt and the negative."""
        ...


Ask = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x [B, C, h, w], t, positive, negative) -> noise of the prompts and of the negatives, each [B, C, h, w]."""


@dataclass(eq=False)
class Skipping:
    """A batch whose pictures each have a skipper; called in the place of a model with guidance ``w``."""

    ask: Ask
    make: Callable[[], Skipper]
    w: float
    scheduler: Any = None
    levels: tuple[float, ...] = ()
    skippers: list[Skipper] = field(default_factory=list)

    def begin(self, scheduler: Any) -> None:
        """A new run. Raises ConfigError for a model that predicts something else than noise."""
        kind = scheduler.config.get("prediction_type", "epsilon")
        if kind != "epsilon":
            raise ConfigError(f"peers that skip steps are written for models that predict noise, not {kind}.")
        self.scheduler, self.skippers = scheduler, []
        signals = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps]
        self.levels = (*(((1 - signal) / signal) ** 0.5 for signal in signals), 0.0)

    def __call__(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The guided noise [B, C, h, w] in float32 of network input x [B, C, h, w] at the scheduler's timestep t."""
        if not self.skippers:
            self.skippers = [self.make() for _ in x]
        moments = self._moments(x.float(), t)
        found = [skipper.forecast(at) for skipper, at in zip(self.skippers, moments, strict=True)]
        asked = [i for i, noise in enumerate(found) if noise is None]
        if asked:
            prompt, other = self.ask(x[asked], t, positive[asked], negative[asked])
            guided = other + self.w * (prompt - other)
            for k, i in enumerate(asked):
                self.skippers[i].learn(moments[i], guided[k], torch.stack([prompt[k], other[k]]))
                found[i] = guided[k]
        return torch.stack([noise for noise in found if noise is not None])

    def _moments(self, z: Tensor, t: Tensor) -> list[Moment]:
        scheduler, time = self.scheduler, float(t)
        times = [float(value) for value in scheduler.timesteps]
        step = times.index(time)
        signal = float(scheduler.alphas_cumprod[int(time)])
        # Euler's latents are x0 + sigma * noise
        scale = signal**-0.5 if float(scheduler.init_noise_sigma) > 1.5 else 1.0
        beta = float(scheduler.betas[int(time)])
        later = times[step + 1] if step + 1 < len(times) else 0.0
        alpha, sigma, levels = signal**0.5, (1 - signal) ** 0.5, len(scheduler.betas)
        shared = (alpha, sigma, time, later, levels, beta, self.levels)
        return [Moment(step, len(times), row * scale, row, *shared) for row in z]
