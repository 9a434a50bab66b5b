"""Everything the extension puts into the host, in one place. scripts/sun_script.py calls `register` at load time."""

from __future__ import annotations

import logging

from modules import script_callbacks

from . import api, infotext, sampler, settings, tab, xyz
from .hosts import steps
from .script import SunScript

__all__ = ["SunScript", "register"]

log = logging.getLogger(__name__)


def register() -> None:
    """Adds sampler, schedule, settings, tab, axes and routes. The host clears callbacks itself before a reload."""
    sampler.register()
    script_callbacks.on_ui_settings(settings.register)
    script_callbacks.on_ui_tabs(tab.create_tabs)
    script_callbacks.on_before_ui(xyz.register)
    script_callbacks.on_app_started(api.register)
    script_callbacks.on_infotext_pasted(infotext.mend_pasted)
    # Once here and not once a run: the host would keep every one of them.
    script_callbacks.on_cfg_denoiser(steps.before_step)
    script_callbacks.on_cfg_denoised(steps.after_step)
