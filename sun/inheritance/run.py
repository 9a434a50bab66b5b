"""The state of one sampling run with feature inheritance, in any host."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from .plan import Plan
from .roles import Memory, Role, memory_of, substituted

log = logging.getLogger(__name__)

MOST_CALLS = 256  # for one time and part, as for the tiles of a large picture; more is somebody calling in a loop


class InheritanceRun:
    """Counts steps by the times the U-Net is called for, and keeps the features of each part of the batch.

    The steps of a plan are those in which the U-Net is called: steps that LTC-Accel skips are not counted.
    """

    def __init__(self, plan: Plan, roles: tuple[Role, ...], steps: int = 0) -> None:
        self.plan, self.roles, self.steps = plan, roles, steps
        self.full = self.inherited = self.most_bytes = 0
        self._slots: dict[Hashable, Memory] = {}
        self._step, self._time = -1, float("inf")
        self._seen: Counter[Hashable] = Counter()

    @property
    def begun(self) -> bool:
        """Whether a step of this run has been counted."""
        return self._step >= 0

    def reset(self) -> None:
        """Begin a new run; nothing of the last one is kept."""
        self._slots.clear()
        self._step, self._time = -1, float("inf")
        self._seen.clear()

    @contextmanager
    def call(self, time: float, shape: tuple[int, ...], who: Hashable = None, full: bool = False) -> Iterator[bool]:
        """Around one call of the U-Net: yields whether it is a full one.

        time: timestep or sigma, which falls within a run; a rise begins a new run. shape: of the input. who: which
        part of the conditioning the call is for; calls for the same time and part are told apart by their order.
        full: this call cannot inherit.
        """
        if time > self._time or self._seen[shape, who] >= MOST_CALLS:
            self.reset()
        if time != self._time:
            self._step, self._time = self._step + 1, time
            self._seen.clear()
        slot = (shape, who, self._seen[shape, who])
        self._seen[shape, who] += 1
        memory = self._slots.get(slot)
        key = full or memory is None or self.plan.is_key(self._step, self.steps)
        memory = self._slots.setdefault(slot, {})
        if key:
            self.full += 1
        else:
            self.inherited += 1
        with substituted(self.roles, memory, self._step, key, self.plan.forecast):
            yield key
        if key:
            self.most_bytes = max(self.most_bytes, memory_of(self._slots))

    def finish(self) -> str:
        """Let go of the features; the line that says what the run did."""
        text = (
            f"Feature inheritance ({self.plan}): {self.full} full and {self.inherited} inherited U-Net calls, "
            f"{self.most_bytes / 2**20:.1f} MB of features kept"
        )
        self.reset()
        self.full = self.inherited = self.most_bytes = 0
        return text
