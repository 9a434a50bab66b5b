"""What a run with LTC-Accel did, and how it is said."""

from __future__ import annotations

import logging
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """``calls`` of the model that were made, of the ``steps`` calls that the sampler asked for.

    guarded: steps that ran because the last one had turned more than expected. why: what kept more from being skipped;
    empty if nothing did.
    """

    calls: int
    steps: int
    guarded: int = 0
    why: str = ""

    @property
    def saved(self) -> int:
        """Calls that were not made, in percent."""
        return round(100 * (self.steps - self.calls) / self.steps) if self.steps else 0

    def __str__(self) -> str:
        """``13 of 20 calls, 35 % saved``"""
        return f"{self.calls} of {self.steps} calls, {self.saved} % saved"

    @property
    def with_reason(self) -> str:
        """The same with what kept more from being skipped, where something did."""
        return f"{self} ({self.why})" if self.why else str(self)

    @property
    def sentence(self) -> str:
        """All of it, for a log or a page."""
        guarded = f"; {self.guarded} more were to be skipped, but the picture turned" if self.guarded else ""
        why = f" ({self.why})" if self.why else ""
        return f"LTC-Accel: {self}{guarded}{why}."


def say(counts: Counts) -> None:
    """Write what a run did into the log; as a warning where nothing was saved."""
    log.log(logging.INFO if counts.calls < counts.steps else logging.WARNING, "%s", counts.sentence)
