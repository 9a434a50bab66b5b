"""How a run begins, by a table or measuring itself, and what becomes of what it measured."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from .interval import LtcSettings, allowed
from .presets import PAPER
from .run import SPOILT, LtcRun, Measurements
from .table import LtcKey, LtcTable, TableStore

log = logging.getLogger(__name__)


AUTOMATIC, AGAIN = "automatic", "measure again"
"""The choices of a user: take the table there is, or forget it."""


UNUSED = "LTC-Accel: {}: for the preset paper alone, without effect here."
"""What is said of names that :func:`unused` returns."""


def unused(preset: str, **given: object) -> str:
    """Which settings of the published method were ``given`` another value than their own beside another ``preset``.

    Those are ``tau``, ``every`` and ``calibration``, and a preset other than "paper" takes none of them: hosts say so.
    Empty where there are none.
    """
    if preset == PAPER:
        return ""
    own = {"tau": LtcSettings.tau, "every": LtcSettings.every, "calibration": AUTOMATIC}
    return ", ".join(name for name, value in own.items() if given.get(name, value) != value)


@contextmanager
def running(
    key: LtcKey,
    settings: LtcSettings,
    store: TableStore,
    calibration: str = AUTOMATIC,
    said: Callable[[LtcTable], None] = lambda _: None,
) -> Iterator[LtcRun]:
    """One sampling run in any host: by the table kept for this key, or one that measures itself.

    What a run measured is kept when it ends, unless it broke off or its latents held NaN or infinity: ``said`` gets it,
    as a line goes to the log. Raises LtcError for a damaged table.
    """
    run = open_run(key, settings, store, calibration)
    yield run
    if run.measure is not None and run.complete:
        table = keep_measured(run.measure, key, store)
        if table is not None:
            said(table)


def open_run(key: LtcKey, settings: LtcSettings, store: TableStore, calibration: str = AUTOMATIC) -> LtcRun:
    """A run by the table kept for this key, or one that measures. Raises LtcError for a damaged table."""
    table = None if calibration == AGAIN else store.find(key, settings)
    if table is not None:
        log.info("LTC-Accel: %d of %d steps call the model.", table.calls, key.steps)
        return LtcRun(key.steps, table=table)
    log.info("LTC-Accel: no table for these %d steps yet, so this run measures at full cost.", key.steps)
    return LtcRun(key.steps, measure=Measurements(key.steps, settings))


def keep_measured(measured: Measurements, key: LtcKey, store: TableStore) -> LtcTable | None:
    """The table of a run that measured itself, kept for the next ones; one line says what it will bring. None, and
    nothing kept, where a picture holds NaN or infinity, which is said too."""
    if not measured.finite:
        log.warning("LTC-Accel keeps nothing of what this run measured: %s. The next run measures again.", SPOILT)
        return None
    table = measured.table(key)
    try:
        store.put(table)
    except OSError as error:  # the picture is made; only the next one pays for it
        log.warning("LTC-Accel could not keep what it measured, so the next run measures again: %s", error)
    log.log(logging.INFO if table.coefficients else logging.WARNING, "%s", summary(table))
    return table


def summary(table: LtcTable) -> str:
    """What a run that measured will bring."""
    if not table.coefficients:
        return none_calm(table.turns, table.settings)
    key = table.key
    return (
        f"LTC-Accel measured {key.steps} steps of {key.sampler}; the next runs call the model in {table.calls} of them."
    )


def none_calm(turns: Sequence[float], settings: LtcSettings) -> str:
    """Why no step is skipped, and what to do."""
    free = [turns[i - 1] for i in allowed(len(turns) + 1, settings)]
    if not free or not settings.tau:
        return "LTC-Accel found no step to skip in so few steps. Take more of them."
    why = f"the steps it may skip turn by {min(free):.2f} radians or more, and tau is {settings.tau:g}"
    if min(free) < settings.tau:
        why = f"too few steps in a row turn by less than tau ({settings.tau:g} radians) to skip one of {settings.every}"
    mend = "Raise tau, take more steps, or set tau to 0 to skip by position alone."
    return f"LTC-Accel found no step to skip: {why}. {mend}"
