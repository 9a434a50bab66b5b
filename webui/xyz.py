"""The host's X/Y/Z plot: axes of SUN and of the accelerators without training, and the host's own with SUN on.

SUN sets steps, sampler, schedule and CFG scale itself. An axis of the host over one of these acts in its place; one
that cannot act stops the plot, which would label equal pictures otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from modules import scripts, sd_samplers

from ..sun.ltc.presets import PAPER
from ..sun.switching import ORDERS
from . import folders, sampler, store, switching
from .choices import (
    AUTOMATIC,
    DENOISE_MODES,
    GUIDANCE,
    LTC_PRESETS,
    OFF,
    SUN_CONTROLS,
    SunSettings,
    number,
    override,
    read,
    read_arguments,
)
from .hosts import family
from .refusal import refusal

log = logging.getLogger(__name__)

PREFIX = "[SUN] "
CFG = "CFG Scale"
TAKEN_OVER = ("Steps", "Sampler", "Hires sampler", "Schedule type", CFG)
"""Axes of the host over what SUN sets itself."""
OF_OTHER_SCHEDULES = (
    "Schedule min sigma",
    "Schedule max sigma",
    "Schedule rho",
    "Beta schedule alpha",
    "Beta schedule beta",
    "Always discard next-to-last sigma",
)
OF_GUIDANCE = ("Negative Guidance minimum sigma",)
LABELS = {
    "negative": "negative prompt",
    "denoise_mode": "denoise mode",
    "preset": "LTC-Accel preset",
    "warm_up": "LTC-Accel warm-up",
    "tail": "LTC-Accel tail",
    "tau": "LTC-Accel tau",
    "every": "LTC-Accel every",
    "inherit": "feature inheritance",
    "switch": "switching model",
    "share": "switching share",
    "switch_order": "switching order",
}
NOTED = (*TAKEN_OVER, *OF_OTHER_SCHEDULES, *OF_GUIDANCE)


def _apply(**fixed: Any) -> Callable[[str], Callable[[Any, Any, Any], None]]:
    """A maker of setters (p, value, all values) for a field of the settings; `fixed` fields are set with it."""

    def setter(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda p, value, _values: override(p, **{name: value}, **fixed)

    return setter


def noting(axis: Any) -> Callable[[Any, Any, Any], None]:
    """The axis' setter, which also notes on the processing object that it was used."""
    apply = getattr(axis.apply, "sun_noted", axis.apply)

    def noted(p: Any, value: Any, values: Any) -> None:
        p.sun_axes = {*axes_of(p), axis.label}
        apply(p, value, values)

    noted.sun_noted = apply  # type: ignore[attr-defined]
    return noted


def axes_of(p: Any) -> set[str]:
    """The host's axes that have set something on this processing object, of those in NOTED."""
    axes: set[str] = getattr(p, "sun_axes", set())
    return axes


def confirming(axis: Any, check: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
    """What the plot asks before it paints anything: `check` of (p, values), and what the axis had asked itself.

    An error here is shown to the user. One in a cell goes to the log, and the cell stays black.
    """
    confirm = getattr(axis, "confirm", None)
    confirm = getattr(confirm, "sun_noted", confirm)

    def confirmed(p: Any, values: Any) -> None:
        try:
            check(p, values)
        except ValueError as error:
            if getattr(p, "is_api", False):
                raise refusal(error) from error
            raise
        if confirm is not None:
            confirm(p, values)

    confirmed.sun_noted = confirm  # type: ignore[attr-defined]
    return confirmed


def settings_of(p: Any) -> SunSettings | None:
    """SUN's settings on the page or in the request; None where SUN is off. Raises ValueError for wrong ones."""
    for script in getattr(p.scripts, "alwayson_scripts", ()):
        if getattr(script, "sun_script", False):
            enabled, settings, _ = read_arguments(p.script_args[script.args_from : script.args_to])
            return settings if enabled else None
    return None


def check_of_host(label: str) -> Callable[[Any, Any], None]:
    """Refuses an axis of the host, or values of it, with which the plot would fail or label equal pictures."""

    def check_axis(p: Any, values: Any) -> None:
        settings = settings_of(p)
        if settings is None:
            return
        check({label}, settings.sampling != "keep")
        if label == "Steps":
            for value in values:
                read("steps", value)
        elif label == "Sampler" and settings.sampling != "keep":
            for value in values:
                kept_to_trained(value, p)
        elif label == CFG:
            name = settings.adapter
            if name == AUTOMATIC:
                name = folders.that_fits(family.of(p.sd_model).unet_of(p.sd_model))
            facts = store.facts(folders.find(name))
            if facts is not None:
                for value in values:
                    guidance(value, facts.guided)

    return check_axis


def check_own(name: str) -> Callable[[Any, Any], None]:
    """Refuses an axis of SUN where SUN is off, and values that it cannot have."""

    def check_axis(p: Any, values: Any) -> None:
        if name in (*SUN_CONTROLS, "guidance") and settings_of(p) is None:
            label = PREFIX + LABELS.get(name, name)
            raise ValueError(f"{label} changes nothing while SUN is off. Switch SUN on in its accordion.")
        for value in values:
            read(name, value)

    return check_axis


def kept_to_trained(name: str, p: Any) -> None:
    """Raises ValueError if the sampler of this name cannot run on SUN's timesteps."""
    label = sd_samplers.samplers_map.get(str(name).lower(), name)
    sampler.keep_to_trained(sd_samplers.create_sampler(label, p.sd_model), SimpleNamespace(sampler_name=label))


def check(axes: set[str], own_schedule: bool) -> None:
    """Raises ValueError for an axis that would change nothing."""
    idle = axes & {*OF_GUIDANCE, *(OF_OTHER_SCHEDULES if own_schedule else ())}
    if idle:
        raise ValueError(
            f"SUN: the axis {min(idle)} changes nothing while SUN is on, and the plot would label equal pictures. "
            "Choose another axis, switch SUN off, or let it keep the page's sampler and schedule."
        )


def guidance(scale: float, guided: bool) -> float:
    """A value of the host's axis "CFG Scale" as the guidance scale of an adapter. Raises ValueError for an adapter that
    takes none."""
    if not guided:
        raise ValueError(
            f"SUN: the axis {CFG} changes nothing with this adapter, which has its guidance built in, and the plot "
            f"would label equal pictures. Use the axis {PREFIX}strength, or switch SUN off."
        )
    return float(number(CFG, scale, (0.1, GUIDANCE[1])))


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
    published = _apply(ltc=True, preset=PAPER)
    # Feature inheritance without choices: plans in words are values, too, and a list of choices would refuse them.
    made: tuple[tuple[str, type, Any, dict[str, Any]], ...] = (
        ("adapter", str, plain, {"choices": lambda: [AUTOMATIC, *folders.names()], "cost": 0.5}),
        ("strength", float, plain, {}),
        ("guidance", float, plain, {}),
        ("steps", int, plain, {}),
        ("negative", str, own_text, {}),
        ("denoise_mode", str, plain, {"choices": lambda: DENOISE_MODES}),
        ("preset", str, skipping, {"choices": lambda: LTC_PRESETS}),
        ("warm_up", float, skipping, {}),
        ("tail", int, skipping, {}),
        ("tau", float, published, {}),
        ("every", int, published, {}),
        ("inherit", str, plain, {}),
        ("switch", str, plain, {"choices": lambda: [OFF, *switching.names()], "cost": 0.5}),
        ("share", float, plain, {}),
        ("switch_order", str, plain, {"choices": lambda: list(ORDERS)}),
    )
    axes = []
    for name, kind, setter, more in made:
        axis = plot.AxisOption(PREFIX + LABELS.get(name, name), kind, setter(name), **more)
        axis.confirm = confirming(axis, check_own(name))
        axes.append(axis)
    kept = [axis for axis in plot.axis_options if not axis.label.startswith(PREFIX)]
    for axis in kept:
        if axis.label in NOTED:
            axis.apply, axis.confirm = noting(axis), confirming(axis, check_of_host(axis.label))
    plot.axis_options[:] = kept + axes
