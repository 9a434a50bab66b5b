"""Axes for the host's X/Y/Z plot: of SUN, and of the accelerators without training."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from modules import scripts

from . import folders
from .script import override

log = logging.getLogger(__name__)

PREFIX = "[SUN] "


def _apply(**fixed: Any) -> Callable[[str], Callable[[Any, Any, Any], None]]:
    """A maker of setters (p, value, all values) for a field of the settings; `fixed` fields are set with it."""

    def setter(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda p, value, _values: override(p, **{name: value}, **fixed)

    return setter


def find_plot() -> Any:
    """The module of the X/Y/Z plot script, which is loaded by path and has no import name of its own."""
    for data in scripts.scripts_data:
        if data.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid") and hasattr(data, "module"):
            return data.module
    return None


def register() -> None:
    """Adds the axes once; the plot keeps its list over "Reload UI" or makes a new one."""
    plot = find_plot()
    if plot is None:
        log.info("SUN: no X/Y/Z plot in this host, so no axes are added.")
        return
    plain, own_text, skipping = _apply(), _apply(main_negative=False), _apply(ltc=True)
    axes = [
        plot.AxisOption(PREFIX + "adapter", str, plain("adapter"), choices=folders.names, cost=0.5),
        plot.AxisOption(PREFIX + "strength", float, plain("strength")),
        plot.AxisOption(PREFIX + "guidance", float, plain("guidance")),
        plot.AxisOption(PREFIX + "steps", int, plain("steps")),
        plot.AxisOption(PREFIX + "negative prompt", str, own_text("negative")),
        plot.AxisOption(PREFIX + "denoise mode", str, plain("denoise_mode"), choices=lambda: ["trained", "respaced"]),
        plot.AxisOption(PREFIX + "LTC-Accel tau", float, skipping("tau")),
        plot.AxisOption(PREFIX + "LTC-Accel every", int, skipping("every")),
        # Without choices: plans in words are values, too, and a list of choices would refuse them.
        plot.AxisOption(PREFIX + "feature inheritance", str, plain("inherit")),
    ]
    kept = [axis for axis in plot.axis_options if not axis.label.startswith(PREFIX)]
    plot.axis_options[:] = kept + axes
