"""LTC-Accel around a diffusers scheduler: one object a run, which steps in the scheduler's place.

A skip is made by asking the scheduler itself: every supported step is affine in the model's output, x' = b + k * m, so
two trial steps on a copy give b and k, and m = (x' - b) / k leads exactly to the wanted latents. The scheduler then
makes its step with this m, and a multistep solver finds a normal entry in its history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .errors import LtcError, noise_added, unknown_sampler
from .run import LtcRun

Open = Callable[[str, tuple[float, ...]], LtcRun]
"""(sampler, sigmas) -> the run to make."""

# sampler and whether latents are scaled to variance 1 (VP), by the class of the scheduler
_KNOWN = {
    "DDIMScheduler": ("euler", True),
    "EulerDiscreteScheduler": ("euler", False),
    "DPMSolverMultistepScheduler": ("dpmpp_2m", True),
    "HeunDiscreteScheduler": ("heun", False),
    "KDPM2DiscreteScheduler": ("dpm_2", False),
    "FlowMatchEulerDiscreteScheduler": ("flow_euler", False),
}
_CALLS = {"heun": 2, "dpm_2": 2}
_NOISY = ("Ancestral", "SDE", "DDPM", "LCM", "TCD", "EDMDPM")


def sampler_of(scheduler: Any) -> str:
    """Name of the solver that a scheduler is. Raises LtcError for one that cannot be accelerated, saying which can."""
    kind = next((c.__name__ for c in type(scheduler).__mro__ if c.__name__ in _KNOWN), "")
    name, config = type(scheduler).__name__, scheduler.config
    if not kind:
        raise (noise_added if any(word in name for word in _NOISY) else unknown_sampler)(name)
    algorithm = config.get("algorithm_type") or ""
    if algorithm.startswith("sde") or config.get("stochastic_sampling"):
        raise noise_added(f"{name} with {algorithm or 'stochastic_sampling'}")
    if kind in ("DDIMScheduler", "HeunDiscreteScheduler") and config.get("clip_sample"):
        raise LtcError(f"LTC-Accel does not work with {name} when it clips: set clip_sample=False in its config.")
    if config.get("thresholding"):
        raise LtcError(f"LTC-Accel does not work with {name} when it thresholds: set thresholding=False in its config.")
    sampler, _ = _KNOWN[kind]
    if kind == "DPMSolverMultistepScheduler":
        parts = (algorithm, config.get("solver_order"), config.get("solver_type"))
        if parts != ("dpmsolver++", 2, "midpoint"):
            sampler = "-".join(map(str, ("dpm", *parts)))
    return sampler


def noise_levels(scheduler: Any, begin: int = 0) -> tuple[float, ...]:
    """Sigma at the beginning of each step from timestep number ``begin`` on, and after the last one: [N + 1]."""
    calls = _CALLS.get(sampler_of(scheduler), 1)
    steps = -(-(len(scheduler.timesteps) - begin) // calls)
    levels = getattr(scheduler, "sigmas", None)
    if levels is not None:
        last = len(levels) - 1
        return tuple(float(levels[min(begin + i * calls, last)]) for i in range(steps + 1))
    # A schedule may begin at no signal at all; its sigma is then only large.
    kept = [max(float(scheduler.alphas_cumprod[int(t)]), 1e-9) for t in scheduler.timesteps[begin:]]
    return tuple(((1 - a) / a) ** 0.5 for a in (*kept, float(scheduler.final_alpha_cumprod)))


def has_unit_variance(scheduler: Any) -> bool:
    """Whether the scheduler's latents are scaled by 1 / sqrt(1 + sigma^2)."""
    if getattr(scheduler.config, "use_flow_sigmas", False):
        return False
    return any(c.__name__ in _KNOWN and _KNOWN[c.__name__][1] for c in type(scheduler).__mro__)


class Stepper:
    """Steps in the place of ``scheduler.step`` during one run; ``open_run`` is asked for the run at the first step."""

    def __init__(self, scheduler: Any, open_run: Open) -> None:
        self.scheduler, self.sampler = scheduler, sampler_of(scheduler)
        self.calls_a_step = _CALLS.get(self.sampler, 1)
        self.run: LtcRun | None = None
        self.stopped = ""
        """Why nothing is skipped, where that was known before the run began."""
        self._open_run = open_run
        self._original = scheduler.step
        self._calls = 0
        self._scales: tuple[float, ...] = ()
        self._target: Tensor | None = None

    @property
    def done(self) -> int:
        """Steps of the scheduler that were made."""
        return self._calls

    @property
    def skips_next(self) -> bool:
        """Whether the model need not be called before the next step."""
        step, _ = divmod(self._calls, self.calls_a_step)
        return self.run is not None and self.run.skips(step)

    def must_run(self) -> None:
        """A model comes in: the step under way runs."""
        if self.run is not None:
            self.run.real.add(self._calls // self.calls_a_step)

    def stop(self, why: str) -> None:
        """Skip nothing more in this run, and say why."""
        self.stopped = why
        if self.run is not None:
            self.run.stop(why)

    def step(self, model_output: Tensor | None, timestep: Any, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``scheduler.step``. For a skipped step ``model_output`` only tells the number format, or is None.

        Raises LtcError where the step is asked to add noise (eta, s_churn).
        """
        if kwargs.get("eta"):
            raise noise_added(f"eta = {kwargs['eta']:g}")
        if kwargs.get("s_churn"):
            raise noise_added(f"s_churn = {kwargs['s_churn']:g}")
        if self.run is None:
            self._begin(timestep)
        assert self.run is not None
        i, call = divmod(self._calls, self.calls_a_step)
        last_call = call == self.calls_a_step - 1 or i == self.run.steps - 1
        if call == 0:
            self.run.enter(i, self._plain(i, sample))
            self._target = self._scaled(i + 1, self.run.target(i)) if self.run.skips(i) else None
        target, kind = self._target, sample if model_output is None else model_output
        if i in self.run.fits and last_call and model_output is not None:
            full = self._try(model_output, timestep, sample)
            target = self._scaled(i + 1, self.run.fitted(i, self._plain(i + 1, full)))
        if target is not None:
            model_output = self._output_for(target, timestep, sample).to(kind.dtype)
        result = self._original(model_output, timestep, sample, *args, **kwargs)
        if target is not None:
            result = _replaced(result, target)
        self._calls += 1
        if i == self.run.steps - 1 and last_call:
            self.run.finish(self._plain(i + 1, result[0] if isinstance(result, tuple) else result.prev_sample))
        return result

    def _begin(self, timestep: Any) -> None:
        """The timesteps that are left when a picture is the start are found by the first of them."""
        begin = getattr(self.scheduler, "begin_index", None)
        if begin is None:
            times = [float(t) for t in self.scheduler.timesteps]
            begin = times.index(float(timestep)) if float(timestep) in times else 0
        begin += begin % self.calls_a_step  # the second call of a step has the timestep of the next one's first
        sigmas = noise_levels(self.scheduler, begin)
        unit = has_unit_variance(self.scheduler)
        self._scales = tuple((1 + s * s) ** 0.5 if unit else 1.0 for s in sigmas)
        self.run = self._open_run(self.sampler, sigmas)
        if self.stopped:
            self.run.stop(self.stopped)

    def _plain(self, i: int, x: Tensor) -> Tensor:
        """Latents at noise level i in the sigma parametrisation."""
        return x.float() * self._scales[i]

    def _scaled(self, i: int, x: Tensor) -> Tensor:
        """Back to the scheduler's own scale."""
        return x / self._scales[i]

    def _output_for(self, target: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        zero = torch.zeros_like(sample, dtype=torch.float32)
        base = self._try(zero, timestep, sample)
        slope = (self._try(zero + 1, timestep, sample) - base).flatten()[0]
        return (target - base) / slope

    def _try(self, model_output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        """The latents a step would give, without making it."""
        copy = object.__new__(type(self.scheduler))
        copy.__dict__.update(
            {k: list(v) if isinstance(v, list) else v for k, v in vars(self.scheduler).items() if k != "step"}
        )
        tried: Tensor = type(copy).step(copy, model_output.float(), timestep, sample.float(), return_dict=False)[0]
        return tried.float()


def _replaced(result: Any, latents: Tensor) -> Any:
    """A scheduler's result with other latents, in its own number format."""
    if isinstance(result, tuple):
        return (latents.to(result[0].dtype), *result[1:])
    result.prev_sample = latents.to(result.prev_sample.dtype)
    return result
