"""Skipped steps around a diffusers scheduler, whichever it is: the model's output is forecast, and the scheduler steps.

Any scheduler turns (output, timestep, latents) into latents. All that has to be known of it is what the output means
and how its latents are scaled, so that a call can be told as (sigma, x, denoised).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .skipping import SkipRun, distinct

OpenSkips = Callable[[tuple[float, ...], bool, str], SkipRun]
"""(noise levels, whether fresh noise is added, why nothing can be skipped) -> the run to make."""

_NOISY = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "UnCLIP", "SASolver", "CogVideoXDPM")
LEAST_SIGNAL = 1e-9
"""alphas_cumprod where a schedule begins at no signal at all; its sigma is then only large."""


class Outputs:
    """What a diffusers scheduler's outputs and latents mean, as (sigma, x, denoised)."""

    def __init__(self, scheduler: Any) -> None:
        config, name = scheduler.config, type(scheduler).__name__
        self.prediction = str(config.get("prediction_type") or "epsilon")
        self.flow = "FlowMatch" in name or bool(config.get("use_flow_sigmas")) or self.prediction == "flow_prediction"
        self.continuous = config.get("timestep_type") == "continuous" and self.prediction == "v_prediction"
        self.steps_trained = float(config.get("num_train_timesteps") or 1000)
        alphas = getattr(scheduler, "alphas_cumprod", None)
        self.refused = ""
        if "EDM" in name or not (self.flow or isinstance(alphas, Tensor)):
            self.refused = f"the noise levels of {name} are not known"
        elif not self.flow and self.prediction not in ("epsilon", "v_prediction", "sample"):
            self.refused = f"a model that predicts {self.prediction!r} is not known"
        elif not {"model_output", "timestep", "sample"} <= set(inspect.signature(scheduler.step).parameters):
            self.refused = f"{name} takes other steps"
        kept = torch.ones(2) if alphas is None else alphas.double().cpu().clamp(LEAST_SIGNAL, 1 - LEAST_SIGNAL)
        self._log_sigmas = (((1 - kept) / kept).log() / 2).tolist()
        self.unit_variance = not self.flow and abs(float(getattr(scheduler, "init_noise_sigma", 1.0)) - 1.0) < 1e-6

    def sigma(self, timestep: float) -> float:
        """The noise level of a timestep, which may lie between two that were trained; continuous ones (Stable Video
        Diffusion) are a quarter of its logarithm."""
        if self.flow:
            return timestep / self.steps_trained
        if self.continuous:
            return math.exp(4 * timestep)
        last = len(self._log_sigmas) - 1
        at = min(max(timestep, 0.0), float(last))
        low = min(int(at), last - 1)
        between = at - low
        return math.exp((1 - between) * self._log_sigmas[low] + between * self._log_sigmas[low + 1])

    def levels(self, scheduler: Any, begin: int) -> tuple[tuple[float, ...], frozenset[int]]:
        """Noise levels of the steps from timestep number ``begin`` on, each once, and 0; and which of them several
        steps share, as of timesteps that are rounded. Schedulers of second order name a step twice, or its middle
        besides."""
        times = [float(t) for t in scheduler.timesteps[begin :: getattr(scheduler, "order", 1)]]
        once, crowded = distinct([self.sigma(time) for time in times])
        return (*once, 0.0), crowded

    def latents(self, sigma: float, sample: Tensor) -> Tensor:
        """Latents x0 + sigma * noise [B, ...], float32, of the scheduler's own."""
        return sample.float() * ((1 + sigma * sigma) ** 0.5 if self.unit_variance else 1.0)

    def denoised(self, sigma: float, x: Tensor, output: Tensor) -> Tensor:
        """x0 [B, ...], float32, of the model's ``output`` at latents ``x``, both [B, ...]."""
        output = output.float()
        if self.flow or self.prediction == "epsilon":
            return x - sigma * output
        if self.prediction == "sample":
            return output
        variance = 1 + sigma * sigma
        return x / variance - output * (sigma / variance**0.5)

    def output(self, sigma: float, x: Tensor, denoised: Tensor) -> Tensor:
        """The model's output [B, ...] that means ``denoised`` at latents ``x``, both [B, ...]."""
        if self.prediction == "sample" and not self.flow:
            return denoised
        noise = (x - denoised) / sigma
        if self.flow or self.prediction == "epsilon":
            return noise
        return (noise - sigma * denoised) / (1 + sigma * sigma) ** 0.5


def adds_noise(scheduler: Any, given: Any = None) -> bool:
    """Whether a scheduler adds fresh noise in a step that is given these arguments."""
    config, given = scheduler.config, given or {}
    named = any(word in type(scheduler).__name__ for word in _NOISY)
    chosen = str(config.get("algorithm_type") or "").startswith("sde") or bool(config.get("stochastic_sampling"))
    return named or chosen or bool(given.get("eta")) or bool(given.get("s_churn"))


class OutputStepper:
    """Steps in the place of ``scheduler.step`` during one run; ``open_run`` is asked for the run at the first step."""

    def __init__(self, scheduler: Any, open_run: OpenSkips) -> None:
        self.scheduler, self.outputs = scheduler, Outputs(scheduler)
        self.run: SkipRun | None = None
        self.stopped = ""
        """Why nothing is skipped, where that was known before the run began."""
        self.ran = self.answered = False
        """Whether a model was called in the step under way, and whether one was answered for."""
        self._open_run = open_run
        self._original = scheduler.step
        self._signature = inspect.signature(scheduler.step)
        self._next: float | None = None
        self._times: list[float] = []
        self._asked: dict[int, str] = {}  # the steps in which a model was asked something else, and what
        self._at = 0

    @property
    def done(self) -> int:
        """Steps of the scheduler that were made."""
        return self._at

    @property
    def skips_next(self) -> bool:
        """Whether the model need not be called before the next step."""
        return self.run is not None and self._next is not None and self.run.skips(self._next)

    def must_run(self, asked: str = "") -> None:
        """The model is asked something else than before: the step under way runs, and what was seen is forgotten.

        asked: names what it is asked otherwise, for the user where no step is left to skip.
        """
        if self.run is not None:
            self.run.forget()
        if asked:
            self._asked[self._at] = asked

    def stop(self, why: str) -> None:
        """Skip nothing more in this run, and say why."""
        if self.run is None:
            self.stopped = why
        else:
            self.run.stop(why)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """``scheduler.step``. For a skipped step the output only tells the number format, or is None."""
        given = self._signature.bind(*args, **kwargs)
        found = given.arguments
        if self.run is None:
            self._begin(found)
        assert self.run is not None
        if not self.outputs.refused:
            sigma = self.outputs.sigma(float(found["timestep"]))
            self._answer(self.run, sigma, found)
        else:
            self.run.made += 1
        self.ran = self.answered = False
        self._next = self._sigma_after(float(found["timestep"]))
        if self._at == len(self._times) > 1 and not self.run.why and len(self._asked) == self._at - 1:
            self.run.why = f"the model is asked something else in every step ({self._asked[self._at - 1]})"
        return self._original(*given.args, **given.kwargs)

    def _answer(self, run: SkipRun, sigma: float, found: dict[str, Any]) -> None:
        """Note the model's output, or put the forecast in its place: never where the model ran for this step."""
        output, x = found["model_output"], self.outputs.latents(sigma, found["sample"])
        if (self.answered or not self.ran) and run.skips(sigma) and run.suits(x):
            made = self.outputs.output(sigma, x, run.answer(sigma, x))
            found["model_output"] = made.to(found["sample"].dtype if output is None else output.dtype)
        else:
            run.see(sigma, x, self.outputs.denoised(sigma, x, output))

    def _begin(self, found: dict[str, Any]) -> None:
        """The timesteps that are left when a picture is the start are found by the first of them."""
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None:
            times = [float(t) for t in self.scheduler.timesteps]
            first = float(found["timestep"])
            begin = times.index(first) if first in times else 0
        self._times = [float(t) for t in self.scheduler.timesteps[begin:]]
        levels, crowded = self.outputs.levels(self.scheduler, begin)
        refused = self.outputs.refused or self.stopped
        self.run = self._open_run(levels, adds_noise(self.scheduler, found), refused)
        self.run.keep(crowded)

    def _sigma_after(self, timestep: float) -> float | None:
        """The noise level of the next step; None after the last one, and where the pipeline goes its own way."""
        known = self._at < len(self._times) and math.isclose(
            self._times[self._at], timestep, rel_tol=1e-6, abs_tol=1e-6
        )
        self._at += 1
        if not known or self._at >= len(self._times) or self.outputs.refused:
            return None
        return self.outputs.sigma(self._times[self._at])
