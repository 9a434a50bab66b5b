"""The controls of the accordions in txt2img and img2img, and their values as settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion, ToolButton

from ..sun.inheritance import PRESETS
from . import folders
from .accelerators import CALIBRATIONS, OFF, AcceleratorSettings
from .run import SunSettings

TITLE = "SUN"
SUN_CONTROLS = ("enabled", "adapter", "strength", "steps", "main_negative", "negative", "denoise_mode", "sampling")
ACCELERATOR_CONTROLS = tuple(field.name for field in fields(AcceleratorSettings))
CONTROLS = (*SUN_CONTROLS, *ACCELERATOR_CONTROLS, "guidance")
"""Names of the script's arguments, in order; the API's `alwayson_scripts` may give them by name in one object."""
GUIDANCE = "SUN guidance (0: the adapter's own)"
DENOISE_MODES = ["trained", "respaced"]
SAMPLINGS = ["sun", "schedule", "keep"]


def create(elem_id: Callable[[str], str]) -> list[Any]:
    """The controls in the order of CONTROLS; `elem_id` makes the host's name of one."""
    *controls, guidance = _sun(elem_id)
    return [*controls, *_accelerators(elem_id), guidance]


def _sun(elem_id: Callable[[str], str]) -> list[Any]:
    names = folders.names()
    with InputAccordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
        with gr.Row():
            adapter = gr.Dropdown(names, value=names[0], label="SUN adapter", elem_id=elem_id("adapter"))
            refresh = ToolButton("\U0001f504", elem_id=elem_id("refresh"))
            strength = gr.Slider(0, 2, value=1.0, step=0.05, label="SUN strength", elem_id=elem_id("strength"))
            steps = gr.Slider(1, 50, value=4, step=1, label="SUN steps", elem_id=elem_id("steps"))
            guidance = gr.Slider(0, 30, value=0, step=0.1, label=GUIDANCE, elem_id=elem_id("guidance"))
        main_negative = gr.Checkbox(True, label="Use the main negative prompt", elem_id=elem_id("main_negative"))
        own = gr.Textbox(
            "", lines=2, label="SUN negative prompt", elem_id=elem_id("negative"),
            placeholder="Used when the box above is off. It acts at CFG 1, where the host's own does not.",
        )  # fmt: skip
        with gr.Row():
            mode = gr.Radio(
                DENOISE_MODES, value="trained", label="SUN image to image, hires fix", elem_id=elem_id("denoise_mode")
            )
            sampling = gr.Radio(SAMPLINGS, value="sun", label="SUN sampler", elem_id=elem_id("sampling"))
    refresh.click(fn=lambda: gr.update(choices=folders.names()), inputs=[], outputs=[adapter])
    return [enabled, adapter, strength, steps, main_negative, own, mode, sampling, guidance]


def _accelerators(elem_id: Callable[[str], str]) -> list[Any]:
    """An accordion of its own: opening that of SUN switches SUN on, and these work without."""
    default = AcceleratorSettings()
    with gr.Accordion("SUN without training", open=False, elem_id=elem_id("accelerators")):
        with gr.Row():
            ltc = gr.Checkbox(default.ltc, label="LTC-Accel: skip steps", elem_id=elem_id("ltc"))
            tau = gr.Slider(0, 1.6, value=default.tau, step=0.01, label="LTC-Accel turn (tau)", elem_id=elem_id("tau"))
            every = gr.Slider(2, 10, value=default.every, step=1, label="LTC-Accel every", elem_id=elem_id("every"))
        with gr.Row():
            calibration = gr.Radio(
                CALIBRATIONS, value=default.calibration, label="LTC-Accel calibration", elem_id=elem_id("calibration")
            )
            inherit = gr.Dropdown(
                [OFF, *PRESETS], value=OFF, label="Feature inheritance (a preset or a plan)", allow_custom_value=True,
                elem_id=elem_id("inherit"),
            )  # fmt: skip
    return [ltc, tau, every, calibration, inherit]


def arguments(settings: SunSettings | None, accelerators: AcceleratorSettings | None = None) -> list[Any]:
    """The script's arguments for these settings; None switches SUN, or the accelerators, off."""
    chosen, more = settings or SunSettings(folders.SHIPPED), accelerators or AcceleratorSettings()
    values = {field.name: getattr(of, field.name) for of in (chosen, more) for field in fields(of)}
    return [{**values, "enabled": settings is not None}[name] for name in CONTROLS]


def read_arguments(args: tuple[Any, ...]) -> tuple[bool, SunSettings, AcceleratorSettings]:
    """Whether SUN is on, its settings and the accelerators', from the controls' values or one object with some.

    An object that names only accelerators leaves SUN off. Raises ValueError for names that there are not.
    """
    if args and isinstance(args[0], dict):
        unknown = set(args[0]) - set(CONTROLS)
        if unknown:
            raise ValueError(f"SUN has no arguments {sorted(unknown)}; it has {', '.join(CONTROLS)}.")
        given = {"enabled": not args[0] or bool(set(args[0]) - set(ACCELERATOR_CONTROLS)), **args[0]}
    else:
        given = dict(zip(CONTROLS, args, strict=False))
    enabled = bool(given.pop("enabled", False))
    values = {name: value for name, value in given.items() if value is not None}
    accelerators = AcceleratorSettings(**{name: values.pop(name) for name in ACCELERATOR_CONTROLS if name in values})
    values.setdefault("adapter", folders.names()[0])
    settings = SunSettings(**values)
    settings = replace(
        settings, steps=int(settings.steps), strength=float(settings.strength), guidance=float(settings.guidance)
    )
    return enabled, settings, accelerators
