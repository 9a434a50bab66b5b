"""What feature inheritance leaves out, and in which steps: a level of the U-Net times a mode of time.

Reconstructed from the abstract of A-SDM (arXiv 2406.00210), whose body was not available, and from DeepCache
(arXiv 2312.00858), whose case is the level "outer".
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace

MODES = ("uniform", "dense-early", "dense-late")


class InheritanceError(ValueError):
    """A plan that cannot be used on a U-Net; the message says what can."""


@dataclass(frozen=True)
class Plan:
    """Which parts an inherit step leaves out, and which steps are full (key steps).

    stages: run only this many outermost stages (block level). outer: run only this many outermost blocks, counted as
    the U-Net keeps skip connections: its first convolution, then layers and downsamplers (finer than stages; 1 is
    DeepCache's first branch). layers: layers that give their last output, as ``up.3.0``. units: parts that give their
    last residual: ``up.3.0.resnet``, ``up.3.0.attention``, ``up.3.0.self``, ``.cross`` or ``.feedforward``.
    every: one step of this many is a key step. mode: uniform, or key steps dense early or late with distances that
    grow by ``power``. keys: the key steps themselves, instead of a mode. forecast: how far a feature is carried on
    along its last change; 0 inherits it as it is.
    """

    stages: int = 0
    outer: int = 0
    layers: tuple[str, ...] = ()
    units: tuple[str, ...] = ()
    every: int = 2
    mode: str = "uniform"
    power: float = 1.4
    keys: tuple[int, ...] = ()
    forecast: float = 0.0

    def __post_init__(self) -> None:
        if self.stages and self.outer:
            raise InheritanceError("A plan takes stages or outer, not both: stages=1 leaves out all but one stage.")
        if min(self.stages, self.outer, *self.keys, 0) < 0:
            raise InheritanceError("stages, outer and keys are counts and steps: 0 or more.")
        if not (self.stages or self.outer or self.layers or self.units):
            raise InheritanceError(
                "A plan names what to leave out: stages=1, outer=2, layers=up.3.0 or units=up.3.0.attention."
            )
        if self.every < 2 and not self.keys:
            raise InheritanceError(f"every is 2 or more: with {self.every} every step would be a full one.")
        if self.mode not in MODES or self.power < 1:
            raise InheritanceError(f"mode takes {', '.join(MODES)} and power 1 or more, not {self.mode}, {self.power}.")
        if not (math.isfinite(self.power) and math.isfinite(self.forecast)):
            raise InheritanceError(f"power and forecast are finite numbers, not {self.power} and {self.forecast}.")

    def is_key(self, step: int, steps: int = 0) -> bool:
        """Whether step number ``step`` (from 0) of ``steps`` is a full one.

        A uniform plan and one with ``keys`` need no number of steps; another raises InheritanceError without.
        """
        if self.keys:
            return step == 0 or step in self.keys
        if self.mode == "uniform":
            return step % self.every == 0
        if steps < 1:
            raise InheritanceError(f"A plan with mode {self.mode} needs the number of steps.")
        return step in self.key_steps(steps)

    def key_steps(self, steps: int) -> tuple[int, ...]:
        """The full ones of ``steps`` steps, the first of them always.

        The power law spaces them i_k = int(l_k^p + c) with l_k at equal distances.
        """
        if self.keys or self.mode == "uniform":
            return tuple(i for i in range(steps) if self.is_key(i))
        count = -(-steps // self.every)
        ends = [(k / count) ** self.power * steps for k in range(count)]
        early = {int(end) for end in ends}
        return tuple(sorted(early if self.mode == "dense-early" else {0} | {steps - 1 - i for i in early}))

    def __str__(self) -> str:
        """The plan as ``parse_plan`` reads it."""
        plain = Plan(outer=1)
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value and (item.name == "outer" or value != getattr(plain, item.name)):
                text = ",".join(map(str, value)) if isinstance(value, tuple) else f"{value}"
                parts.append(f"{item.name}={text}")
        return " ".join(parts)


# Chosen by docs/accelerators.md's figures: half a forecast brings a feature nearer at no cost, if it is one step old.
PRESETS = {
    "fine": Plan(stages=1, every=2, forecast=0.5),
    "balanced": Plan(outer=1, every=2, forecast=0.5),
    "fast": Plan(outer=1, every=3),
}


def parse_plan(text: str) -> Plan:
    """A preset's name, ``"stages=1 every=3 mode=dense-early"``, or both: ``"balanced forecast=0.5"``.

    Raises InheritanceError that lists what there is.
    """
    words = text.split()
    base = PRESETS.get(words[0]) if words else None
    known = {item.name: item for item in fields(Plan)}
    given: dict[str, object] = {}
    for word in words[1:] if base else words:
        name, equals, value = word.partition("=")
        if name not in known or not equals:
            raise InheritanceError(
                f"{word!r} is no part of a plan of feature inheritance. Write a preset ({', '.join(PRESETS)}) or "
                f"settings such as stages=1 every=2; there are: {', '.join(known)}."
            )
        given[name] = _value(name, value)
    if base is not None:
        return changed(base, given)
    return Plan(**given)  # type: ignore[arg-type]


def changed(plan: Plan, given: Mapping[str, object]) -> Plan:
    """``plan`` with other settings; naming one of stages and outer takes the other's place. Raises InheritanceError."""
    level = {"stages": 0, "outer": 0} if given.get("stages") or given.get("outer") else {}
    return replace(plan, **{**level, **given})  # type: ignore[arg-type]


def _value(name: str, value: str) -> object:
    try:
        if name in ("layers", "units"):
            return tuple(part for part in value.split(",") if part)
        if name == "keys":
            return tuple(sorted({int(part) for part in value.split(",") if part}))
        if name in ("power", "forecast"):
            return float(value)
        return value if name == "mode" else int(value)
    except ValueError:
        raise InheritanceError(f"the plan of feature inheritance has {name}={value}; {name} takes numbers.") from None


def check_names(wanted: Sequence[str], there: Collection[str], what: str) -> None:
    """Raise InheritanceError for names the U-Net does not have, listing some that it has."""
    if missing := [name for name in wanted if name not in there]:
        some = ", ".join(list(there)[:12])
        raise InheritanceError(f"This U-Net has no {what} {', '.join(missing)}. It has: {some} and so on.")
