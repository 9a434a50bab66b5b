"""LTC-Accel around samplers of k-diffusion's kind (ComfyUI, A1111, Forge), which ask a function for `denoised`.

A step is skipped by answering in the model's place: the answer is the `denoised` that makes the sampler's own update go
where LTC-Accel wants it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from .counts import Counts
from .errors import noise_added, unknown_sampler
from .run import LtcRun

SOLVERS = {"sample_euler": "euler", "sample_dpmpp_2m": "dpmpp_2m", "sample_heun": "heun", "sample_dpm_2": "dpm_2"}
NOISY = ("ancestral", "sde", "lcm", "ddpm", "seeds", "sa_solver", "tcd")
PLAIN = (
    *SOLVERS,
    *(f"sample_{name}" for name in ("lms", "deis", "ipndm", "ipndm_v", "res_multistep", "unipc", "heunpp2")),
    *(f"sample_{name}" for name in ("gradient_estimation", "exp_heun_2_x0", "dpmpp_3m", "dpm_fast")),
    "ddim",
    "plms",
    "unipc",
)
"""Samplers that are known to add no noise; of others it is found out by looking."""
UNFIT = {
    "adaptive": "it chooses its steps by what the model says",
    "cfg_pp": "it asks for the negative prompt's answer besides",
    "cfgpp": "it asks for the negative prompt's answer besides",
}
_CALLS = {"heun": 2, "dpm_2": 2}


def solver_of(
    name: str, options: Mapping[str, Any] | None = None, solvers: Mapping[str, str] = SOLVERS, shown: str = ""
) -> str:
    """The solver behind the name of a sampler's function.

    options: what the function is called with. solvers: names a host has besides those of k-diffusion. shown: the name
    that its users know. Raises LtcError for a sampler that cannot be accelerated, saying which can.
    """
    shown = shown or name.removeprefix("sample_")
    if any(word in name for word in NOISY):
        raise noise_added(shown)
    if name not in solvers:
        raise unknown_sampler(shown)
    for option in ("s_churn", "eta"):
        if (options or {}).get(option, 0) > 0:
            raise noise_added(f"{shown} with {option}")
    return solvers[name]


def kind_of(name: str, options: Mapping[str, Any] | None = None, shown: str = "") -> tuple[bool | None, str]:
    """Of a sampler's function: whether it adds fresh noise (None: not known), and why no call of it can be skipped.

    options: what the function is called with. shown: the name that its users know.
    """
    shown = shown or name.removeprefix("sample_")
    why = next((reason for word, reason in UNFIT.items() if word in name), "")
    if why:
        return None, f"{shown} cannot go without a call: {why}"
    if any(word in name for word in NOISY):
        return True, ""
    given = [(options or {}).get(option) for option in ("s_churn", "eta")]
    if any(isinstance(value, (int, float)) and value > 0 for value in given):
        return True, ""
    return (False if name in PLAIN else None), ""


class SamplerRun:
    """One sampling run by the paper: follows the sampler, and in skipped steps says what the model would have to."""

    def __init__(self, solver: str, sigmas: tuple[float, ...], run: LtcRun) -> None:
        self.solver, self.sigmas, self.run = solver, sigmas, run
        self._calls_a_step = _CALLS.get(solver, 1)
        self._calls = 0
        self._derivative: Tensor | None = None
        self._previous: Tensor | None = None

    def __deepcopy__(self, _memo: object) -> SamplerRun:
        """Itself: who copies a host's options in the middle of a run stays in that run."""
        return self

    @property
    def sigma(self) -> float:
        """The noise level at the beginning of the step that the next call belongs to."""
        return self.sigmas[self._calls // self._calls_a_step]

    def direction(self, x: Tensor) -> Tensor | None:
        """For the sampler's next call, at latents x [B, ...]: dx/dsigma of a skipped step, which is the noise that the
        model would predict; None where the model is to be called."""
        i, call = divmod(self._calls, self._calls_a_step)
        self._calls += 1
        if call == 0:
            self.run.enter(i, x)
            self._derivative = None
            if self.run.skips(i):
                self._derivative = (self.run.target(i) - x) / (self.sigmas[i + 1] - self.sigmas[i])
        return self._derivative

    @property
    def counts(self) -> Counts:
        """What became of the run so far, in steps."""
        return self.run.counts

    def denoised(self, _sigma: float, x: Tensor, model: Callable[[], Tensor], _state: object = None) -> Tensor:
        """`denoised` [B, ...] for the sampler's next call, at latents x; `model` gives the model's."""
        i, call = divmod(self._calls, self._calls_a_step)
        derivative = self.direction(x)
        answer = model() if derivative is None else self._answer(i, call, x, derivative)
        self._previous = answer
        return answer

    def _answer(self, i: int, call: int, x: Tensor, derivative: Tensor) -> Tensor:
        """What makes every sampler go along `derivative` for the whole of step i."""
        here, there = self.sigmas[i], self.sigmas[i + 1]
        if call == 1:  # Heun looks at the end of the step, DPM2 at its middle
            here = there if self.solver == "heun" else math.sqrt(here * there)
        answer = x - here * derivative
        if self.solver == "dpmpp_2m" and there > 0 and i > 0 and self._previous is not None:
            # It extrapolates from the last denoised; this one makes the extrapolation come out right.
            ratio = math.log(self.sigmas[i - 1] / here) / math.log(here / there)
            answer = (answer + self._previous / (2 * ratio)) / (1 + 1 / (2 * ratio))
        return answer.to(x.dtype)
