"""The controls of the accordions in txt2img and img2img."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from modules.ui_components import InputAccordion, ToolButton

from ..sun.inheritance import PRESETS
from ..sun.ltc.presets import tooltip as presets_tooltip
from ..sun.switching import ORDERS
from . import folders, switching
from .choices import (
    ACCELERATOR_CONTROLS,
    AUTOMATIC,
    CALIBRATIONS,
    CONTROLS,
    EVERY,
    GUIDANCE,
    LTC_PRESETS,
    OFF,
    SHARE,
    STEPS,
    STRENGTH,
    SUN_CONTROLS,
    TAIL,
    TAU,
    WARM_UP,
    AcceleratorSettings,
)

TITLE = "SUN"
TAKES_OVER = (
    "While SUN is on, it takes the place of the page's sampler, schedule type, sampling steps and CFG scale (1: the "
    "guidance is in the adapter). The page's prompts, size, seed and denoising strength count."
)
GUIDANCE_LABEL = "SUN guidance"
DENOISE_CHOICES = [
    ("the trained timesteps below the denoising strength (0.5: 2 of 4 steps)", "trained"),
    ("all steps, closer together", "respaced"),
]
SAMPLING_CHOICES = [
    ("SUN's own", "sun"),
    ("the page's sampler on SUN's timesteps", "schedule"),
    ("the page's sampler and schedule", "keep"),
]
CALIBRATION_CHOICES = list(
    zip(("once, then keep the measurement", "measure again in every run"), CALIBRATIONS, strict=True)
)


def create(elem_id: Callable[[str], str]) -> list[Any]:
    """The controls in the order of CONTROLS; `elem_id` makes the host's name of one."""
    *controls, guidance = _sun(elem_id)
    accelerators = [*_accelerators(elem_id), *_switching(elem_id)]
    made = dict(
        zip((*SUN_CONTROLS, "guidance", *ACCELERATOR_CONTROLS), (*controls, guidance, *accelerators), strict=True)
    )
    return [made[name] for name in CONTROLS]


def adapter_names() -> list[str]:
    """What the list of adapters offers."""
    return [AUTOMATIC, *folders.names()]


def adapter_list(elem_id: str, refresh_id: str, more: Callable[[], dict[Any, Any]] = dict) -> Any:
    """The list of adapters over the whole width (released names have 42 characters), its arrows, and what to do as long
    as there is no adapter of the user's own. more: what the arrows renew besides, by component."""
    with gr.Row():
        adapter = gr.Dropdown(
            adapter_names(),
            value=AUTOMATIC,
            label="SUN adapter file",
            elem_id=elem_id,
            info="Automatic: the first that fits the loaded model",
        )
        refresh = ToolButton("\U0001f504", elem_id=refresh_id)
    hint = gr.HTML(folders.first_steps(), elem_classes=["sun-hint"])

    def renewed() -> dict[Any, Any]:
        return {adapter: gr.update(choices=adapter_names()), hint: folders.first_steps(), **more()}

    refresh.click(fn=renewed, inputs=[], outputs=[adapter, hint, *more()])
    return adapter


def _sun(elem_id: Callable[[str], str]) -> list[Any]:
    with InputAccordion(False, label=TITLE, elem_id=elem_id("enabled")) as enabled:
        gr.HTML(f"<p>{TAKES_OVER}</p>", elem_classes=["sun-hint"])
        adapter = adapter_list(elem_id("adapter"), elem_id("refresh"))
        with gr.Row():
            steps = gr.Slider(
                *STEPS,
                value=4,
                step=1,
                label="SUN steps",
                elem_id=elem_id("steps"),
                info="4 is trained",
            )
            strength = gr.Slider(
                *STRENGTH,
                value=1.0,
                step=0.05,
                label="SUN strength",
                elem_id=elem_id("strength"),
                info="1: as trained, 0: off",
            )
            guidance = gr.Slider(
                *GUIDANCE,
                value=0,
                step=0.1,
                label=GUIDANCE_LABEL,
                elem_id=elem_id("guidance"),
                info="0: the adapter's own",
            )
        main_negative = gr.Checkbox(True, label="Use the main negative prompt", elem_id=elem_id("main_negative"))
        own = gr.Textbox(
            "",
            lines=2,
            label="SUN negative prompt",
            elem_id=elem_id("negative"),
            interactive=False,
            elem_classes=["sun-own-negative"],
            placeholder="Used when the box above is off. It acts at CFG 1, where the host's own does not.",
        )
        sampling = gr.Radio(SAMPLING_CHOICES, value="sun", label="SUN sampler", elem_id=elem_id("sampling"))
        mode = gr.Radio(
            DENOISE_CHOICES, value="trained", label="SUN image to image, hires fix", elem_id=elem_id("denoise_mode")
        )
    # What is not used cannot be written into; infotext that is pasted comes here, too.
    main_negative.change(
        fn=lambda main: gr.update(interactive=not main), inputs=[main_negative], outputs=[own], show_progress=False
    )
    return [enabled, adapter, strength, steps, main_negative, own, mode, sampling, guidance]


def _accelerators(elem_id: Callable[[str], str]) -> list[Any]:
    """An accordion of its own: opening that of SUN switches SUN on, and these work without."""
    default = AcceleratorSettings()
    with gr.Accordion("SUN without training", open=False, elem_id=elem_id("accelerators")):
        ltc = gr.Checkbox(default.ltc, label="LTC-Accel: skip steps", elem_id=elem_id("ltc"))
        preset = gr.Radio(
            LTC_PRESETS,
            value=default.preset,
            label="LTC-Accel preset",
            elem_id=elem_id("preset"),
            info=presets_tooltip(),
        )
        with gr.Row():
            warm_up = gr.Slider(
                *WARM_UP,
                value=default.warm_up,
                step=0.05,
                label="LTC-Accel warm-up",
                elem_id=elem_id("warm_up"),
                info="Share of the steps, at the start, that always run; below 0: the preset's",
            )
            tail = gr.Slider(
                *TAIL,
                value=default.tail,
                step=1,
                label="LTC-Accel tail",
                elem_id=elem_id("tail"),
                info="Steps at the end that always run; -1: the preset's",
            )
        tau, every, calibration = _paper(elem_id, default)
        inherit = gr.Dropdown(
            [OFF, *PRESETS],
            value=OFF,
            label="Feature inheritance (a preset or a plan)",
            allow_custom_value=True,
            elem_id=elem_id("inherit"),
            info="Parts of the U-Net reuse what they made some steps ago: fine changes little, fast much",
        )
    return [ltc, tau, every, calibration, inherit, preset, warm_up, tail]


def _paper(elem_id: Callable[[str], str], default: AcceleratorSettings) -> list[Any]:
    """What LTC-Accel's preset paper, the published method, takes besides."""
    with gr.Accordion("LTC-Accel as published (preset paper)", open=False, elem_id=elem_id("paper")):
        with gr.Row():
            tau = gr.Slider(
                *TAU,
                value=default.tau,
                step=0.01,
                label="LTC-Accel turn (tau)",
                elem_id=elem_id("tau"),
                info="Skip where the course turns by less, in radians",
            )
            every = gr.Slider(
                *EVERY,
                value=default.every,
                step=1,
                label="LTC-Accel every",
                elem_id=elem_id("every"),
                info="Skip one step of this many; 2 is the fastest",
            )
        calibration = gr.Radio(
            CALIBRATION_CHOICES,
            value=default.calibration,
            label="LTC-Accel calibration",
            elem_id=elem_id("calibration"),
            info="Measuring takes one run at full cost",
        )
    return [tau, every, calibration]


def switching_names() -> list[str]:
    """What the list of small U-Nets offers."""
    return [OFF, *switching.names()]


def _switching(elem_id: Callable[[str], str]) -> list[Any]:
    """An accordion of its own: it needs a second model."""
    default = AcceleratorSettings()
    with gr.Accordion("SUN switching (a second, small U-Net)", open=False, elem_id=elem_id("switching")):
        with gr.Row():
            switch = gr.Dropdown(
                switching_names(),
                value=default.switch,
                label="Small U-Net",
                elem_id=elem_id("switch"),
                info="Of a checkpoint or a file in models/sun: an assembled one, BK-SDM, or SSD-1B for SDXL",
            )
            refresh = ToolButton("\U0001f504", elem_id=elem_id("refresh_switch"))
        with gr.Row():
            share = gr.Slider(
                *SHARE,
                value=default.share,
                step=0.05,
                label="Its share of the steps",
                elem_id=elem_id("share"),
                info="0: the loaded model alone, 1: the small U-Net alone",
            )
            order = gr.Radio(
                list(ORDERS), value=default.switch_order, label="Which begins", elem_id=elem_id("switch_order")
            )
        refresh.click(fn=lambda: gr.update(choices=switching_names()), inputs=[], outputs=[switch])
    return [switch, share, order]
