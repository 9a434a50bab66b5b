"""SUN's section of the settings page."""

from __future__ import annotations

from typing import Any

import gradio as gr
from modules import sd_samplers, shared

from .controls import DENOISE_CHOICES

SECTION = ("sun", "SUN")


def _samplers() -> dict[str, Any]:
    return {"choices": [sampler.name for sampler in sd_samplers.all_samplers]}


def register() -> None:
    """Adds the options; the values are read through `shared.opts` where they are used."""

    def add(key: str, default: Any, label: str, component: Any = None, arguments: Any = None) -> None:
        shared.opts.add_option(key, shared.OptionInfo(default, label, component, arguments, section=SECTION))

    add("sun_folder", "", "Another folder with SUN adapters")
    add("sun_show_tab", True, "Show the tab SUN (after Reload UI)")
    add(
        "sun_denoise_mode",
        "trained",
        "Image to image with the sampler SUN alone, without the accordion",
        gr.Radio,
        {"choices": DENOISE_CHOICES},
    )
    add("sun_compare_sampler", "DPM++ 2M", "Compare: sampler of the other picture", gr.Dropdown, _samplers)
    add(
        "sun_compare_steps",
        25,
        "Compare: its steps",
        gr.Slider,
        {"minimum": 1, "maximum": 100, "step": 1},
    )
    add(
        "sun_compare_cfg",
        7.0,
        "Compare: its CFG scale, where the adapter says none",
        gr.Slider,
        {"minimum": 1, "maximum": 20, "step": 0.5},
    )
