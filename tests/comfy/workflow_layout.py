"""Where the nodes of a workflow go: columns from left to right, so that no wire runs backwards or behind a node.

The usual layered drawing of a graph. A wire that passes over columns gets a lane in each of them, a place like a node's
without height; ComfyUI draws it through reroutes at the lane's ends.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

SWEEPS = 24
NODE_GAP, LANE_TO_NODE, LANE_TO_LANE = 44, 42, 20
CROSSING = 600.0  # a crossing counts like this many pixels of climbing


@dataclass(frozen=True)
class Item:
    """A node or a lane in a column. `height` is below its y; `head` (title and badges) above it; lanes have neither.

    band: items of band 1 lie below all of band 0 that shares columns with them.
    """

    key: object
    column: int
    height: float = 0.0
    head: float = 0.0
    band: int = 0

    @property
    def lane(self) -> bool:
        return self.head == 0.0


@dataclass(frozen=True)
class Wire:
    """A piece of a link between neighbouring columns; the offsets are from the items' y to their ends."""

    source: object
    target: object
    source_offset: float = 0.0
    target_offset: float = 0.0


def below(upper: Item, lower: Item) -> float:
    """The least distance between the y of two neighbours in a column."""
    if upper.lane and lower.lane:
        return LANE_TO_LANE
    gap = LANE_TO_NODE if upper.lane or lower.lane else NODE_GAP
    return upper.height + gap + lower.head


def nearest(wanted: Sequence[float], gaps: Sequence[float]) -> list[float]:
    """Positions nearest to `wanted` (least squares), in their order, each at least `gaps` after the one before.

    Isotonic regression by pooling adjacent violators.
    """
    offsets = list(itertools.accumulate(gaps, initial=0.0))
    pools: list[tuple[float, int]] = []  # (mean, members)
    for want, offset in zip(wanted, offsets, strict=True):
        mean, members = want - offset, 1
        while pools and pools[-1][0] > mean:
            before, count = pools.pop()
            mean, members = (before * count + mean * members) / (count + members), count + members
        pools.append((mean, members))
    means = [mean for mean, members in pools for _ in range(members)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


class Layout:
    """y of every item: `place()`. Columns hold their items from top to bottom as they were given, to begin with."""

    def __init__(self, items: Iterable[Item], wires: Iterable[Wire]) -> None:
        self.items = {item.key: item for item in items}
        self.wires = list(wires)
        self.columns: dict[tuple[int, int], list[Item]] = {}
        for item in self.items.values():
            self.columns.setdefault((item.band, item.column), []).append(item)
        self._near: dict[object, list[tuple[bool, float, object, float]]] = {key: [] for key in self.items}
        for wire in self.wires:
            self._near[wire.target].append((False, wire.target_offset, wire.source, wire.source_offset))
            self._near[wire.source].append((True, wire.source_offset, wire.target, wire.target_offset))

    def place(self, band_gap: float = 0.0) -> dict[object, float]:
        y: dict[object, float] = {}
        for stack in self.columns.values():
            self._stack(stack, [0.0] * len(stack), y)
        best, least = dict(y), self._cost(y)
        for sweep in range(SWEEPS):
            rightwards = sweep % 2 == 0
            for place in sorted(self.columns, reverse=not rightwards):
                both = sweep >= SWEEPS // 2
                self._settle(self.columns[place], None if both else rightwards, y)
            if (cost := self._cost(y)) < least:
                best, least = dict(y), cost
        return self._stand_on_zero(best, band_gap)

    def _settle(self, stack: list[Item], rightwards: bool | None, y: dict[object, float]) -> None:
        """Orders a column, and moves its items, towards what they are wired to: on the left, the right, or both."""

        def towards(item: Item) -> tuple[float, float]:
            """(where its wires end at the other side, where its own y should be therefore)."""
            near = [
                (y[other] + far, y[other] + far - own)
                for right, own, other, far in self._near[item.key]
                if rightwards is None or right is not rightwards
            ]
            if not near:
                return y[item.key], y[item.key]
            ends, wanted = zip(*near, strict=True)
            return sum(ends) / len(ends), sum(wanted) / len(wanted)

        aims = {item.key: towards(item) for item in stack}
        stack.sort(key=lambda item: aims[item.key][0])
        self._stack(stack, [aims[item.key][1] for item in stack], y)

    @staticmethod
    def _stack(stack: list[Item], wanted: list[float], y: dict[object, float]) -> None:
        gaps = [below(upper, lower) for upper, lower in itertools.pairwise(stack)]
        y.update(zip((item.key for item in stack), nearest(wanted, gaps), strict=True))

    def _cost(self, y: Mapping[object, float]) -> float:
        ends = [
            (self.items[w.source].column, y[w.source] + w.source_offset, y[w.target] + w.target_offset)
            for w in self.wires
        ]
        climbing = sum(abs(a - b) for _, a, b in ends)
        crossings = sum(
            (one[1] - two[1]) * (one[2] - two[2]) < 0
            for one, two in itertools.combinations(ends, 2)
            if one[0] == two[0]
        )
        return climbing + CROSSING * crossings

    def _stand_on_zero(self, y: dict[object, float], gap: float) -> dict[object, float]:
        """Each band's top at 0, but for bands that share columns with one above: those begin below it."""
        tops: dict[int, float] = {}
        for band in sorted({item.band for item in self.items.values()}):
            mine = [item for item in self.items.values() if item.band == band]
            columns = {item.column for item in mine}
            floor = max(
                (y[i.key] + i.height for i in self.items.values() if i.band < band and i.column in columns),
                default=None,
            )
            top = min(y[item.key] - item.head for item in mine)
            tops[band] = 0.0 if floor is None else floor + gap
            for item in mine:
                y[item.key] += tops[band] - top
        return y
