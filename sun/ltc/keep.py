"""What becomes of a run that measured itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from .interval import LtcSettings
from .run import Measurements
from .table import LtcKey, LtcTable, TableStore

log = logging.getLogger(__name__)


def keep_measured(measured: Measurements, key: LtcKey, store: TableStore) -> LtcTable:
    """The table of a run that measured itself, kept for the next ones; one line says what it will bring."""
    table = measured.table(key)
    store.put(table)
    if table.coefficients:
        log.info("LTC-Accel measured %d steps of %s; the next runs call the model %d times.",
                 key.steps, key.sampler, table.calls)  # fmt: skip
    else:
        log.warning(none_calm(table.turns, measured.settings))
    return table


def none_calm(turns: Sequence[float], settings: LtcSettings) -> str:
    """Why no step is skipped, and what to do."""
    if len(turns) < 3:
        return "LTC-Accel found no step to skip in so few steps. Take more of them."
    return (
        f"LTC-Accel found no step to skip: every transition turns by {min(turns):.2f} radians or more, and tau is "
        f"{settings.tau:g}. Raise tau, take more steps, or set tau to 0 to skip by position alone."
    )
