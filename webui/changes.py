"""What changes the host's answer in the course of one sampling besides the noise level, for LTC-Accel to notice: texts
of prompt editing, a refiner's model, a negative prompt that is left out for a while, ControlNets that begin or end."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

from modules import shared

from .hosts import family

ALTERNATES = "Negative Guidance minimum sigma leaves out the negative prompt in some steps"


def schedules_of(cond: Any) -> set[tuple[int, ...]]:
    """The steps at which texts are exchanged, a tuple for each schedule, in whichever nesting a host keeps them."""
    if isinstance(cond, Mapping):
        return {ends for part in cond.values() for ends in schedules_of(part)}
    inner = getattr(cond, "batch", None) or getattr(cond, "schedules", None)
    if inner is None and isinstance(cond, (list, tuple)):
        inner = cond
    if not inner:
        return set()
    if all(hasattr(part, "end_at_step") for part in inner):
        return {tuple(int(part.end_at_step) for part in inner)}
    return {ends for part in inner for ends in schedules_of(part)}


def acting(ends: tuple[int, ...], step: int) -> int:
    """Which text of a schedule acts in a step, as the hosts choose it: after the last one it is the first again."""
    return next((i for i, end in enumerate(ends) if step <= end), 0)


class Changes:
    """Those of one sampling by the host's `denoiser`.

    scale: of guidance; at 1 it does not matter whether the negative prompt is left out. minimum: the sigma below which
    the host leaves it out (Negative Guidance minimum sigma), in every step or in every second one.
    """

    def __init__(self, p: Any, denoiser: Any, scale: float, minimum: float) -> None:
        self._denoiser = denoiser
        self._guided = not math.isclose(scale, 1.0)
        self._schedules: list[tuple[int, ...]] | None = None
        self._shares, self._bounds = list(unit_shares(p)), list(unit_bounds(p))
        self.minimum = minimum if self._guided else 0.0

    @property
    def alternating(self) -> float:
        """The sigma below which the steps take turns in leaving out the negative prompt, so that one says nothing of
        the next; 0 where they do not. Hosts without the option for all steps are taken for such that do."""
        return 0.0 if getattr(shared.opts, "s_min_uncond_all", False) else self.minimum

    @property
    def for_table(self) -> str:
        """For `LtcKey`: empty where the negative prompt acts in all steps."""
        share = getattr(shared.opts, "skip_early_cond", 0.0) if self._guided else 0.0
        parts = [f"negative from {share:g} of the steps" if share > 0 else ""]
        if self.minimum > 0:
            parts.append(f"negative down to {self.minimum:.4g}{', then in turns' if self.alternating else ''}")
        return " ".join(filter(None, parts))

    def at(self, sigma: float, extra: Mapping[str, Any]) -> Hashable:
        """What is the same for two calls between which nothing changed. extra: what the denoiser is called with."""
        if self._schedules is None:
            self._schedules = sorted(schedules_of(extra.get("cond")) | schedules_of(extra.get("uncond")))
        step = self._denoiser.step
        return (
            id(self._denoiser.inner_model),
            *(acting(ends, step) for ends in self._schedules),
            sigma < self.minimum,
            self._early(step),
            *(start <= share_done() <= end for start, end in self._shares),
            *(end <= sigma <= start for start, end in self._bounds),
        )

    def _early(self, step: int) -> bool:
        """Whether the host still ignores the negative prompt ("during early sampling")."""
        share = getattr(shared.opts, "skip_early_cond", 0.0)
        return self._guided and share > 0 and step / max(self._denoiser.total_steps, 1) <= share


def share_done() -> float:
    """How much of the sampling is done by the host's own count, by which A1111's ControlNet goes."""
    steps = getattr(shared.state, "sampling_steps", 0)
    return shared.state.sampling_step / steps if steps else 0.0


def unit_shares(p: Any) -> Iterator[tuple[float, float]]:
    """From which share of the steps to which the units of A1111's ControlNet extension act."""
    for network in _of_scripts(p, "latest_network"):
        for unit in getattr(network, "control_params", None) or ():
            yield float(unit.start_guidance_percent), float(unit.stop_guidance_percent)


def unit_bounds(p: Any) -> Iterator[tuple[float, float]]:
    """From which sigma down to which the units of the ControlNet panel act in Forge, reForge and Forge Classic."""
    sigma_at = family.of(p.sd_model).sigma_at(p.sd_model)
    if sigma_at is None:
        return
    for units in _of_scripts(p, "current_params"):
        for params in units.values():
            model = params.model
            if hasattr(model, "start_percent") and hasattr(model, "end_percent"):
                yield float(sigma_at(model.start_percent)), float(sigma_at(model.end_percent))


def _of_scripts(p: Any, name: str) -> Iterator[Any]:
    """What the extensions that take part in ``p`` keep under ``name``, where they keep something."""
    for script in getattr(getattr(p, "scripts", None), "alwayson_scripts", ()):
        if kept := getattr(script, name, None):
            yield kept
