"""One sampling run in any host that skips calls by forecasting the model's output.

It is told of every call, (sigma, x, denoised), and knows the noise levels of the steps. Which solver calls does not
matter: each finds in its history what it would have asked for. What cannot be identified is a real step.
"""

from __future__ import annotations

import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from .counts import Counts
from .forecast import NOISE, X0, Forecast
from .presets import AUTOMATIC_KIND, SkipSettings

log = logging.getLogger(__name__)

NODE = 0.25
"""A call this near to a noise level of the schedule, in steps, is the one of that step; others lie between two."""
CALM = 0.02
"""A turn in a step, relative to the output's size, that is no reason to run one; numbers that are none are."""
FRESH = 0.01
"""Part of new latents that no step without fresh noise explains."""
SAME = 1e-4
"""Noise levels that differ by less than this share are one: hosts round them."""


def distinct(levels: Sequence[float]) -> tuple[tuple[float, ...], frozenset[int]]:
    """Falling noise levels, each once, and which of these several steps share; others than falling ones stay."""
    once: list[float] = []
    crowded: set[int] = set()
    for level in levels:
        if once and math.isclose(once[-1], level, rel_tol=SAME):
            crowded.add(len(once) - 1)
        else:
            once.append(level)
    return tuple(once), frozenset(crowded)


class SkipRun:
    """The state of one run over ``sigmas`` [N + 1], the noise levels of the steps and the last one reached.

    noisy: whether the sampler adds fresh noise on the way; None finds out by looking. refused: why nothing is to be
    skipped, for samplers that no forecast suits. anew: steps in which another model takes over. Steps at one level
    count as one, and always run: which of them a call belongs to is not known. Of levels that rise nothing is skipped.
    """

    def __init__(
        self,
        sigmas: Sequence[float],
        settings: SkipSettings,
        *,
        noisy: bool | None = None,
        refused: str = "",
        anew: Collection[int] = (),
    ) -> None:
        self.levels, crowded = distinct(sigmas[:-1])
        self.settings, self.why = settings, refused
        self._anew = frozenset(len(distinct(sigmas[: step + 1])[0]) - 1 for step in anew)
        self.skipped = frozenset(settings.skipped(len(self.levels)))
        self.made = self.answered = self.guarded = 0
        kinds = {None: (NOISE, X0), False: (NOISE,), True: (X0,)}[noisy]
        if settings.kind != AUTOMATIC_KIND:
            kinds = (settings.kind,)
        self._forecasts = {
            kind: Forecast(kind, settings.terms, ridge=settings.ridge, memory=settings.memory) for kind in kinds
        }
        self._fresh = _FreshNoise() if len(kinds) > 1 else None
        self._step, self._skips, self._state = -1, False, None  # type: tuple[int, bool, Hashable]
        self._last_real, self._turned, self._turns = -1, False, list[Tensor]()
        if not self.why and not all(here > there for here, there in pairwise(self.levels)):
            self.why = "its noise levels do not fall from step to step"
        if not self.skipped and not self.why:
            self.why = nothing_to_skip(settings, len(self.levels))
        self.keep(crowded)

    def __deepcopy__(self, _memo: object) -> SkipRun:
        """Itself: who copies a host's options in the middle of a run stays in that run."""
        return self

    def keep(self, steps: Collection[int]) -> None:
        """Skip none of these steps of :attr:`levels`."""
        self.skipped -= frozenset(steps)

    @property
    def counts(self) -> Counts:
        """What became of the run so far, in calls."""
        return Counts(self.made, self.made + self.answered, self.guarded, self.why)

    def skips(self, sigma: float, state: Hashable = None) -> bool:
        """Whether the next call, at noise level ``sigma``, need not be made.

        state: what else the model's answer depends on in the course of the run, as prompts that change. Where it is
        another one the call is made, and what was seen before is forgotten.
        """
        if state != self._state:
            self._state = state
            self.forget()
        step = self._place(sigma)[0]
        if step != self._step:
            self._skips = self._may_skip(step)
            self._step = step
        return self._skips

    def denoised(self, sigma: float, x: Tensor, model: Callable[[], Tensor], state: Hashable = None) -> Tensor:
        """``denoised`` [B, ...] for the sampler's next call; ``model`` gives the model's."""
        if self.skips(sigma, state) and self.suits(x):
            return self.answer(sigma, x)
        made = model()
        self.see(sigma, x, made)
        return made

    def suits(self, x: Tensor) -> bool:
        """Whether what was seen has the form of latents ``x`` [B, ...]."""
        return self._forecast.suits(x)

    def answer(self, sigma: float, x: Tensor) -> Tensor:
        """``denoised`` [B, ...] at ``x`` in the place of the model."""
        self.answered += 1
        return self._forecast.denoised(sigma, x)

    def see(self, sigma: float, x: Tensor, denoised: Tensor) -> None:
        """Note a call that was made: ``denoised`` [B, ...] at latents ``x`` [B, ...]."""
        self.made += 1
        step, at_node = self._place(sigma)
        self._step, self._skips = step, False
        if self.why or not at_node or sigma <= 0 or not isinstance(denoised, Tensor):
            return
        if self._fresh is not None:
            self._fresh.see(x, denoised)
        for forecast in self._forecasts.values():
            forecast.see(sigma, x, denoised)
        self._watch(step)

    def forget(self) -> None:
        """Let go of what was seen, and run the step that is under way."""
        for forecast in self._forecasts.values():
            forecast.forget()
        self._skips = self._turned = False
        self._turns = []

    def _watch(self, step: int) -> None:
        """Note how far the call of this step was from its forecast, and whether that is more than was usual so far."""
        turned = next(iter(self._forecasts.values())).turned
        gone, self._last_real = step - self._last_real, step
        if turned is None or gone == 0:  # nothing was foretold, or the step is asked for a second time
            return
        turn = turned / gone
        if self._turns and self._turns[-1].shape == turn.shape:
            usual = torch.stack(self._turns).mean(0)
            self._turned = bool((~(turn <= self.settings.guard * usual) & ~(turn <= CALM)).any())
        self._turns.append(turn)

    def stop(self, why: str) -> None:
        """Skip nothing more, and say why, once."""
        if not self.why:
            self.why = why
            log.warning("LTC-Accel makes every call from here on: %s.", why)
        self.forget()

    @property
    def _forecast(self) -> Forecast:
        """The forecast that suits the sampler, settled when it is first asked for."""
        if self._fresh is not None:
            kind = X0 if self._fresh.found else NOISE
            self._forecasts, self._fresh = {kind: self._forecasts[kind]}, None
        return next(iter(self._forecasts.values()))

    def _may_skip(self, step: int) -> bool:
        if 0 <= step < self._step:
            self.stop("the sampler went back to more noise")
        elif step < 0 or step > self._step + 1:
            self.stop("the sampler does not follow the noise levels it was given")
        if step in self._anew:
            self.forget()
        if self.why or step not in self.skipped or not self._forecast.ready:
            return False
        if self.settings.guard and self._turned:
            self.guarded += 1
            return False
        return True

    def _place(self, sigma: float) -> tuple[int, bool]:
        """The step that a call belongs to, and whether it is at the beginning of that step."""
        levels = self.levels
        below = bisect_left(levels, -sigma, key=lambda level: -level)  # levels above sigma
        if below < len(levels) and math.isclose(levels[below], sigma, rel_tol=SAME):
            return below, True
        if below == 0:
            near = len(levels) > 1 and levels[0] > levels[1] > 0
            return (0, True) if near and sigma < levels[0] * (levels[0] / levels[1]) ** NODE else (-2, False)
        step = below - 1
        if sigma <= 0 or below >= len(levels) or levels[below] <= 0:
            return step, False
        gone = math.log(levels[step] / sigma) / math.log(levels[step] / levels[below])
        if gone > 1 - NODE:
            return below, True
        return step, gone < NODE


class _FreshNoise:
    """Whether a sampler adds noise of its own: then its latents are no mix of earlier latents and answers."""

    def __init__(self) -> None:
        self.found = False
        self._x: Tensor | None = None
        self._answers: list[Tensor] = []

    def see(self, x: Tensor, denoised: Tensor) -> None:
        flat, answer = (rearrange(t.detach().float(), "b ... -> b (...)") for t in (x, denoised))
        if self._x is not None and self._x.shape == flat.shape:
            known = torch.stack([self._x, *self._answers], 1)  # [B, K, N]
            known = known / known.norm(dim=2, keepdim=True).clamp_min(1e-30)
            gram = torch.einsum("bkn,bln->bkl", known, known).double().cpu()
            moments = torch.einsum("bkn,bn->bk", known, flat).double().cpu()
            factors = torch.linalg.solve(gram + 1e-7 * torch.eye(known.shape[1]).double(), moments)
            left = flat - torch.einsum("bk,bkn->bn", factors.to(known), known)
            self.found = self.found or bool((left.norm(dim=1) > FRESH * flat.norm(dim=1)).any())
        else:
            self._answers = []
        self._x, self._answers = flat, [answer, *self._answers][:4]


def nothing_to_skip(settings: SkipSettings, steps: int) -> str:
    """Why ``settings`` skip none of ``steps``: too few of them, or a share at the start and a tail that leave none."""
    usual = replace(settings, first=SkipSettings.first, last=SkipSettings.last)
    if steps > 1 and usual.skipped(steps):
        return f"the first {settings.first:.0%} and the last {settings.last} always run: of {steps} steps all"
    return f"{f'{steps} steps are' if steps > 1 else 'one step is'} too few to skip one of"
