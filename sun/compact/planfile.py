"""A plan of model assembly: what is removed from which U-Net, and on what grounds. A small, readable JSON file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.reading import ReadError, printable, read_json
from .structure import LISTS, CompactError, Kept, Shape, kept

FORMAT = "sun-compact-plan-1"
_MOST = 2**20
_NUMBERS = ("seconds", "importance")


@dataclass(frozen=True)
class Plan:
    """What is removed (names as :func:`sun.compact.structure.candidates` gives them) from a U-Net of ``shape``.

    chosen: how, as "shallow" or "knapsack". budget: share of the original's seconds that was asked for.
    seconds: of one call of the original (``whole``) and what each candidate would save of it. importance: of each
    candidate, the mean squared change of the predicted noise without it, as a share of the noise's own mean square.
    measured: at which size, on what, and how far the figures add up.
    """

    remove: tuple[str, ...]
    shape: Shape
    chosen: str = ""
    budget: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    importance: dict[str, float] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    @property
    def kept(self) -> Kept:
        """What stays. Raises CompactError for a plan that contradicts itself."""
        return kept(self.shape, self.remove)

    @property
    def share(self) -> float | None:
        """Share of the original's seconds that should be left, where seconds were measured."""
        whole = self.seconds.get("whole")
        return 1 - sum(self.seconds[name] for name in self.remove) / whole if whole else None

    def check(self, shape: Shape, what: str = "this U-Net") -> None:
        """Raise CompactError, naming what differs, unless the plan was made for a U-Net of this shape."""
        found = self.shape.difference(shape)
        if found is None:
            return
        name, mine, theirs = found
        compact = [a <= b for a, b in zip(shape.layers, self.shape.layers, strict=False)]
        hint = " It may be compact already: give the original." if name == "layers" and all(compact) else ""
        raise CompactError(
            f"The plan is for another U-Net than {what}: its {name} is {mine} there and {theirs} "
            f"here.{hint} Make a plan for {what}."
        )

    def words(self) -> str:
        """What it removes and what that should bring, for people."""
        gone = ", ".join(self.remove) or "nothing"
        share = f"; {self.share:.3f} of the seconds should be left" if self.share is not None else ""
        return f"{self.chosen or 'plan'}: without {gone}{share}"


def write_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Write ``plan`` as JSON, in one piece. Raises OSError."""
    content: dict[str, Any] = {"format": FORMAT, "chosen": plan.chosen, "remove": list(plan.remove)}
    content |= {"budget": plan.budget, "share": plan.share}
    for name in _NUMBERS:
        content[name] = {key: float(f"{value:.6g}") for key, value in getattr(plan, name).items()}
    return write_json(path, {**content, "measured": plan.measured, "unet": plan.shape.as_json()})


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in a file by :func:`write_plan` or by hand. Raises CompactError, FileNotFoundError, OSError."""
    where = printable(str(path))
    try:
        content = read_json(path, _MOST)
    except ReadError as error:
        raise CompactError(str(error)) from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{where} does not exist. Give a list ({', '.join(LISTS)}) or the file of a plan, which `sun assemble "
            "--plan-only` writes."
        ) from error
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CompactError(
            f"{where} is no plan of model assembly (format {FORMAT}). `sun assemble --plan-only` makes one."
        )
    remove = content.get("remove")
    if not isinstance(remove, list) or not all(isinstance(name, str) for name in remove):
        raise CompactError(f"{where} names nothing to remove. `remove` is a list of names as pair.0.1.")
    numbers = {name: _numbers(content.get(name), name, where) for name in _NUMBERS}
    budget, chosen, measured = content.get("budget"), content.get("chosen", ""), content.get("measured", {})
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < 1):
        raise CompactError(f"{where} gives a budget that is no share between 0 and 1. Correct it, or leave it out.")
    if not isinstance(chosen, str) or not isinstance(measured, Mapping):
        raise CompactError(f"{where}: chosen is a text and measured a table of names. Correct them, or leave them out.")
    plan = Plan(
        remove=tuple(remove),
        shape=Shape.from_json(content.get("unet"), where),
        chosen=printable(chosen)[:40],
        budget=None if budget is None else float(budget),
        measured=dict(measured),
        **numbers,
    )
    try:
        plan.kept  # noqa: B018  (what contradicts itself is told with the file's name)
    except CompactError as error:
        raise CompactError(f"{where}: {error}") from error
    if plan.seconds and not {"whole", *plan.remove} <= {*plan.seconds}:
        raise CompactError(
            f"{where} gives no seconds of the whole U-Net and of all it removes. Leave them out, or all in."
        )
    return plan


def _numbers(content: Any, name: str, where: str) -> dict[str, float]:
    if content is None:
        return {}
    good = isinstance(content, Mapping) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in content.values()
    )
    if not good or (name == "seconds" and content and not content.get("whole", 0) > 0):
        raise CompactError(f"{where} gives {name} that are no positive numbers by name. Make it again.")
    return {str(key): float(value) for key, value in content.items()}
