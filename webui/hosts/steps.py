"""The host's denoiser callbacks. Without a run of ours they do nothing."""

from __future__ import annotations

from typing import Any

from modules import shared

from .. import negative
from ..run import current
from . import family


def before_step(params: Any) -> None:
    """Gives the run the negative text of the step that begins (prompt editing may change it)."""
    run = current()
    if run is None:
        return
    try:
        run.use_negative(negative.at_step(run.schedules, params.denoiser.step))
        family.of(shared.sd_model).before_step(run, params)
    except Exception as error:  # the host would only log it and go on without SUN
        run.error = error


def after_step(params: Any) -> None:
    run = current()
    if run is not None and run.error is None:
        family.of(shared.sd_model).after_step(run, params)
