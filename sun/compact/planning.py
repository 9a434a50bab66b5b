"""The plan for a U-Net: a named list, or what measured seconds and importance choose within a budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..common.notes import note
from .assembly import assemble
from .choice import choose, shallow_first
from .measuring import State, call_seconds, described, importances, part_seconds, random_state
from .planfile import Plan
from .structure import CompactError, Shape, already_compact, candidates, named_list, shape_of


def plan(
    unet: Any,
    budget: float = 0.8,
    states: Sequence[State] | None = None,
    *,
    named: str = "",
    size: tuple[int, int] | None = None,
    batch: int = 1,
    repeats: int = 3,
    say: Callable[[str], object] = note,
) -> Plan:
    """What to remove from ``unet`` (a diffusers ``UNet2DConditionModel``).

    budget: share of the original's seconds that may be left. states: of real trajectories (see
    :func:`sun.compact.record_states`); with them the least important set within the budget is chosen, without them
    pairs from the finest stage inwards. named: a list (shallow, bk-base, bk-small, bk-tiny) instead of a budget.
    size: height and width of the latents seconds are measured at, by default the U-Net's own; batch: rows of that
    call. say: is told, in a sentence, how far the figures add up. Raises CompactError.
    """
    unet = getattr(unet, "_orig_mod", unet)
    shape = shape_of(unet.config)
    chosen = named_list(named, shape) if named else ()
    if why := already_compact(shape):
        note(f"{why} What this plan removes comes on top; for a plan of the original give the original.")
    if named:
        return Plan(chosen, shape, chosen=named)
    if not 0 < budget < 1:
        raise CompactError(f"The budget is a share of the original's seconds, between 0 and 1, not {budget:g}.")
    if not any(name.startswith("pair.") for name in candidates(shape)):
        raise CompactError("This U-Net has one layer in each stage already: it is a compact one. Give the original.")
    own = unet.config.sample_size or 64
    height, width = size or ((own, own) if isinstance(own, int) else tuple(own))
    state = random_state(unet, height, width, batch)
    seconds = part_seconds(unet, shape, state, repeats)
    measured = described(state, repeats)
    if states is None:
        return Plan(shallow_first(shape, budget, seconds), shape, "shallow-first", budget, seconds, {}, measured)
    return _by_importance(unet, shape, budget, states, seconds, measured, state, say)


def _by_importance(
    unet: Any,
    shape: Shape,
    budget: float,
    states: Sequence[State],
    seconds: dict[str, float],
    measured: dict[str, Any],
    state: State,
    say: Callable[[str], object],
) -> Plan:
    if not states:
        raise CompactError("No states to measure importance on: record some, or leave states out.")
    names = candidates(shape)
    importance = dict(zip(names, importances(unet, shape, states, [(name,) for name in names]), strict=True))
    chosen = choose(shape, budget, seconds, importance)
    small = assemble(unet, Plan(chosen, shape), share=True)
    (together,) = importances(unet, shape, states, [chosen])
    whole, left = call_seconds([unet, small], state, measured["repeats"])
    sums = {
        "importance_sum": sum(importance[name] for name in chosen),
        "importance_together": together,
        "share_predicted": 1 - sum(seconds[name] for name in chosen) / seconds["whole"],
        "share_measured": left / whole,
    }
    sums = {key: float(f"{value:.4g}") for key, value in sums.items()}
    say(
        f"Removed together, {', '.join(chosen)} change the noise by {sums['importance_together']:g} of its mean "
        f"square; one by one they add up to {sums['importance_sum']:g}. Of the seconds {sums['share_measured']:g} are "
        f"left; by their parts it would be {sums['share_predicted']:g}."
    )
    rows = sum(len(s.x) for s in states)
    measured = {**measured, "states": rows, "additivity": sums}
    return Plan(chosen, shape, "knapsack", budget, seconds, importance, measured)
