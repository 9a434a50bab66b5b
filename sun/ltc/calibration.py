"""Error-aware calibration: two passes over some prompts, and a global bias on request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from .errors import LtcError
from .interval import LtcSettings
from .run import LtcRun, Measurements
from .table import LtcKey, LtcTable
from .transitions import Fit

Opener = Callable[[LtcKey], LtcRun]


def run_calibration(
    run: Callable[[Opener], list[Tensor]],
    settings: LtcSettings,
    *,
    find_bias: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> LtcTable:
    """The table that ``run`` leads to: it samples some prompts, always from the same noise, and returns the latents.

    ``run`` calls what it is given with the key of each batch to get the batch's run. The first pass measures angles
    on trajectories without skips and chooses the steps; the second fits the coefficients, each on the errors of the
    skips before it. find_bias: also one factor on all coefficients (:func:`bisect_bias`). progress: is told what is
    going on. A table without coefficients means that no step turns little enough. Raises LtcError where nothing was
    sampled, and where the batches had different schedules.
    """
    measured: dict[LtcKey, Measurements] = {}

    def measure(key: LtcKey) -> LtcRun:
        return LtcRun(key.steps, measure=measured.setdefault(key, Measurements(key.steps, settings)))

    progress("measuring angles")
    reference = run(measure)
    if len(measured) != 1:
        had = "several" if measured else "none, as nothing was sampled"
        raise LtcError(f"A calibration of LTC-Accel samples one schedule; this one had {had}.")
    ((key, found),) = measured.items()
    if not found.skipped():
        return found.table(key)
    fits = {i: Fit(settings.terms) for i in found.skipped()}
    progress("fitting coefficients")
    run(lambda key: LtcRun(key.steps, fits=fits, terms=settings.terms))
    coefficients = {i: fit.coefficients() for i, fit in fits.items()}
    table = LtcTable(key, settings, coefficients, found.turns, pictures=found.pictures, error_aware=True)
    if not find_bias:
        return table

    def error(bias: float) -> float:
        progress(f"trying bias {bias:.4f}")
        tried = run(lambda key: LtcRun(key.steps, table=replace(table, bias=bias)))
        return sum(float((a - b).square().sum()) for a, b in zip(tried, reference, strict=True))

    return replace(table, bias=bisect_bias(error))


def bisect_bias(error: Callable[[float], float], low: float = 0.9, high: float = 1.1, rounds: int = 5) -> float:
    """The factor between ``low`` and ``high`` with the least ``error``, found by bisection on the error's slope."""
    for _ in range(rounds):
        middle, reach = (low + high) / 2, (high - low) / 16
        if error(middle + reach) < error(middle - reach):
            low = middle
        else:
            high = middle
    best = (low + high) / 2
    return best if error(best) < error(1.0) else 1.0
