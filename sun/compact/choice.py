"""Which parts to remove for a budget of seconds: an exact knapsack over what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product

from .structure import CompactError, Shape, candidates, kept


def choose(
    shape: Shape, budget: float, seconds: Mapping[str, float], importance: Mapping[str, float]
) -> tuple[str, ...]:
    """The least important set of candidates without which at most ``budget`` of the seconds are left.

    seconds: ``whole`` and what each candidate saves; importance: of each. Both are taken as additive. Raises
    CompactError where no set saves enough, saying how far it goes.
    """
    need = (1 - budget) * seconds["whole"]
    best: tuple[float, float, tuple[str, ...]] | None = None
    most = 0.0
    for names in compatible_sets(shape):
        saved = sum(seconds[name] for name in names)
        most = max(most, saved)
        if saved >= need:
            rank = (sum(importance[name] for name in names), -saved, names)
            best = rank if best is None or rank < best else best
    if best is None:
        raise CompactError(
            f"A budget of {budget:g} of the seconds cannot be met: without everything that can go, "
            f"{1 - most / seconds['whole']:.3f} of them are left. Give a larger budget."
        )
    return best[2]


def shallow_first(shape: Shape, budget: float, seconds: Mapping[str, float]) -> tuple[str, ...]:
    """Pairs of layers from the finest stage inwards, then the middle, until the budget is met. Raises CompactError."""
    chosen: list[str] = []
    order = [name for name in candidates(shape) if name.startswith("pair.")]
    order = [n for s in range(shape.stages) for n in reversed(order) if n.split(".")[1] == str(s)]
    order += ["mid"] * (shape.mid_depth >= 0)
    for name in order:
        if 1 - sum(seconds[n] for n in chosen) / seconds["whole"] <= budget:
            return tuple(chosen)
        chosen.append(name)
    left = 1 - sum(seconds[n] for n in chosen) / seconds["whole"]
    if left <= budget:
        return tuple(chosen)
    raise CompactError(
        f"A budget of {budget:g} of the seconds cannot be met by pairs of layers and the middle: {left:.3f} are left. "
        "Give a larger budget, or states (sun assemble --states), which also weigh transformers."
    )


def compatible_sets(shape: Shape) -> Iterator[tuple[str, ...]]:
    """Every set of candidates that can go together: of a stage its pairs, or a cut of its transformers, not both.

    A pair's figure holds its transformers, so that the two would not add up.
    """
    names = candidates(shape)
    choices: list[list[tuple[str, ...]]] = []
    for s in range(shape.stages):
        pairs = [n for n in names if n.startswith(f"pair.{s}.")]
        cuts = [n for n in names if n.startswith((f"depth.{s}.",)) or n == f"transformers.{s}"]
        several = [tuple(pairs[-count:]) for count in range(1, len(pairs) + 1)]  # the last layers go first
        choices.append([(), *several, *((n,) for n in cuts)])
    inner: list[tuple[str, ...]] = [()] + [(n,) for n in ("mid", "innermost") if n in names]
    last = {n for group in choices[-1] for n in group}
    for *stages, middle in product(*choices, inner):
        together = tuple(n for group in stages for n in group)
        if middle == ("innermost",) and last & {*together}:
            continue
        if middle == ("mid",) and any(n.startswith(f"depth.{shape.stages - 1}.") for n in together):
            continue  # cut of the last stage's transformers counts the middle's
        kept(shape, (*together, *middle))  # names and rules in one place
        yield (*together, *middle)
