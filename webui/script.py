"""The accordion "SUN" of txt2img and img2img, and the run behind it (accordion, tab, X/Y/Z plot and API alike)."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import gradio as gr
from modules import scripts, shared
from modules.ui_components import InputAccordion, ToolButton

from . import folders, host, infotext, negative, sampler, store
from .run import SunRun, SunSettings, active, fit

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

TITLE = "SUN"
CONTROLS = ("enabled", "adapter", "strength", "steps", "main_negative", "negative", "denoise_mode", "sampling")
"""Names of the script's arguments, in order; the API's `alwayson_scripts` may give them by name in one object."""
DENOISE_MODES = ["trained", "respaced"]
SAMPLINGS = ["sun", "schedule", "keep"]


@dataclass
class Counter:
    """U-Net calls of a run: forwards of the module, rows in them, and seconds spent sampling."""

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0


class SunScript(scripts.Script):
    """The host makes one for txt2img and one for img2img."""

    sun_script = True

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        names = folders.names()
        with InputAccordion(False, label=TITLE, elem_id=self.elem_id("enabled")) as enabled:
            with gr.Row():
                adapter = gr.Dropdown(names, value=names[0], label="SUN adapter", elem_id=self.elem_id("adapter"))
                refresh = ToolButton("\U0001f504", elem_id=self.elem_id("refresh"))
                strength = gr.Slider(0, 2, value=1.0, step=0.05, label="SUN strength", elem_id=self.elem_id("strength"))
                steps = gr.Slider(1, 50, value=4, step=1, label="SUN steps", elem_id=self.elem_id("steps"))
            main_negative = gr.Checkbox(
                True, label="Use the main negative prompt", elem_id=self.elem_id("main_negative")
            )
            own = gr.Textbox(
                "", lines=2, label="SUN negative prompt", elem_id=self.elem_id("negative"),
                placeholder="Used when the box above is off. It acts at CFG 1, where the host's own does not.",
            )  # fmt: skip
            with gr.Row():
                mode = gr.Radio(
                    DENOISE_MODES,
                    value="trained",
                    label="SUN image to image, hires fix",
                    elem_id=self.elem_id("denoise_mode"),
                )
                sampling = gr.Radio(SAMPLINGS, value="sun", label="SUN sampler", elem_id=self.elem_id("sampling"))
        refresh.click(fn=lambda: gr.update(choices=folders.names()), inputs=[], outputs=[adapter])
        controls = [enabled, adapter, strength, steps, main_negative, own, mode, sampling]
        self.infotext_fields = [(c, infotext.READERS[name]) for c, name in zip(controls, CONTROLS, strict=True)]
        self.paste_field_names = [infotext.ADAPTER, infotext.STRENGTH, infotext.NEGATIVE]
        return controls

    def before_process(self, p: Any, *args: Any) -> None:
        p.sun_run = None
        try:
            enabled, settings = read_arguments(args)
        except (TypeError, ValueError) as error:
            p.sun_run = SunRun(SunSettings(""), error=error)
            return
        if not enabled:
            return
        p.sun_run = SunRun(replace(settings, **getattr(p, "sun_overrides", {})))
        with kept_error(p.sun_run):
            prepare(p, p.sun_run)

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if run := run_of(p):
            with kept_error(run):
                run.schedules = negative.encode(p, run.settings)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        run, counter = run_of(p), getattr(p, "sun_counter", None)
        if run and getattr(p, "is_hr_pass", False):
            with kept_error(run):
                run.schedules = negative.encode(p, run.settings, hires=True)
        if run or counter:
            guard_sampling(p, run, counter)


def run_of(p: Any) -> SunRun | None:
    """The SUN of a processing object; None where SUN is off."""
    return getattr(p, "sun_run", None)


def override(p: Any, **values: Any) -> None:
    """Sets fields of the run's settings on this processing object only, whatever the accordion says."""
    p.sun_overrides = {**getattr(p, "sun_overrides", {}), **values}


def arguments(settings: SunSettings | None) -> list[Any]:
    """The script's arguments for these settings; None switches SUN off."""
    chosen = settings or SunSettings(folders.SHIPPED)
    values = {field.name: getattr(chosen, field.name) for field in fields(chosen)}
    return [{**values, "enabled": settings is not None}[name] for name in CONTROLS]


def read_arguments(args: tuple[Any, ...]) -> tuple[bool, SunSettings]:
    """Whether SUN is on, and its settings, from the controls' values or from one object with some of them."""
    if args and isinstance(args[0], dict):
        unknown = set(args[0]) - set(CONTROLS)
        if unknown:
            raise ValueError(f"SUN has no arguments {sorted(unknown)}; it has {', '.join(CONTROLS)}.")
        given = {"enabled": True, **args[0]}
    else:
        given = dict(zip(CONTROLS, args, strict=False))
    enabled = bool(given.pop("enabled", False))
    values = {name: value for name, value in given.items() if value is not None}
    values.setdefault("adapter", folders.names()[0])
    settings = SunSettings(**values)
    return enabled, replace(settings, steps=int(settings.steps), strength=float(settings.strength))


@contextmanager
def kept_error(run: SunRun) -> Iterator[None]:
    """Keeps an exception for `guard_sampling`: the host would log it and paint a picture without SUN."""
    try:
        yield
    except Exception as error:
        run.error = run.error or error


def prepare(p: Any, run: SunRun) -> None:
    """Loads the adapter and sets what SUN needs on the processing object. Raises SunFileError, FileNotFoundError."""
    settings = run.settings
    if settings.denoise_mode not in DENOISE_MODES or settings.sampling not in SAMPLINGS:
        raise ValueError(f"SUN: denoise mode is one of {DENOISE_MODES}, sampler one of {SAMPLINGS}.")
    if not settings.main_negative and settings.negative and p.styles:
        text = shared.prompt_styles.apply_negative_styles_to_prompt(settings.negative, p.styles)
        run.settings = settings = replace(settings, negative=text)
    path = folders.find(settings.adapter)
    run.adapter = store.load(path)
    p.steps, p.cfg_scale = settings.steps, 1.0
    if hasattr(p, "hr_cfg"):
        p.hr_cfg = 1.0
    if settings.sampling != "keep":
        p.scheduler = sampler.SCHEDULE_LABEL
    if settings.sampling == "sun":
        p.sampler_name = sampler.SAMPLER
    if getattr(p, "enable_hr", False) and settings.sampling != "keep":
        p.hr_scheduler = None
        p.hr_sampler_name = None if settings.sampling == "sun" else p.hr_sampler_name
    p.extra_generation_params.update(infotext.write(settings, path))


def guard_sampling(p: Any, run: SunRun | None, counter: Counter | None) -> None:
    """Wraps the run of this processing object's sampler, so that SUN is on the model only while it samples.

    What is hung on the model leaves with the `with` block, after an error or an interruption too.
    """
    own = p.sampler
    launch = getattr(own, "sun_launch", None) or own.launch_sampling  # a sampler may run several batches
    own.sun_launch = launch

    def guarded(steps: int, func: Any) -> Any:
        with ExitStack() as stack:
            if counter is not None:
                stack.enter_context(counting(p.sd_model, counter))
            if run is None:
                return launch(steps, func)
            if run.error is not None:
                raise run.error
            enter_sun(stack, p, run)
            result = launch(steps, func)
        if run.error is not None:
            raise run.error
        if not run.layer_calls and not (shared.state.interrupted or shared.state.skipped):
            raise RuntimeError(
                "SUN: the model ran without ever reaching SUN's layers. Something replaces its U-Net (TensorRT, say); "
                "switch that off."
            )
        return result

    own.launch_sampling = guarded


def enter_sun(stack: ExitStack, p: Any, run: SunRun) -> None:
    """Puts SUN on the model until `stack` closes. Raises SunFileError if the adapter does not fit the model."""
    family = host.of(p.sd_model)
    assert run.adapter is not None
    run.layers = fit(run.adapter, family.unet_of(p.sd_model), "the loaded model")
    if run.settings.strength == 0.0:
        log.info("SUN: strength is 0, so the plain model samples without guidance.")
    run.layer_calls = 0
    stack.enter_context(active(run))
    stack.enter_context(family.sampling(run, p))
    if getattr(shared.cmd_opts, "lowvram", False) or getattr(shared.cmd_opts, "medvram", False):
        stack.callback(store.forget_copy)
    log.info(
        "SUN active: %d layers, adapter %s, strength %g, %s",
        len(run.layers), run.settings.adapter, run.settings.strength, p.sampler_name,
    )  # fmt: skip


@contextmanager
def counting(sd_model: Any, counter: Counter) -> Iterator[None]:
    """Counts the calls of the U-Net while the block runs."""

    def count(_module: Any, args: tuple[Any, ...]) -> None:
        counter.calls += 1
        counter.rows += args[0].shape[0]

    handle = host.of(sd_model).unet_of(sd_model).register_forward_pre_hook(count)
    begin = time.perf_counter()
    try:
        yield
    finally:
        counter.seconds += time.perf_counter() - begin
        handle.remove()
