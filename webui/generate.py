"""A picture from the tab or from SUN's API routes: the host's own processing with the accordion's arguments set."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from modules import processing, scripts, shared

from .choices import (
    MAX_SEED,
    MAX_TEXT,
    AcceleratorSettings,
    SunSettings,
    arguments,
    check_size,
    number,
    plain_text,
)
from .script import Counter

T = TypeVar("T")


@dataclass
class Request:
    """What to paint. settings: SUN's; None paints without SUN, with `sampler`, `steps` and `cfg`."""

    prompt: str
    negative: str = ""
    settings: SunSettings | None = None
    accelerators: AcceleratorSettings | None = None
    model: str = ""
    """A checkpoint of the host's list; empty for the loaded one."""
    width: int = 512
    height: int = 512
    batch_size: int = 1
    seed: int = -1
    image: Any = None
    """PIL picture to start from (RGB), or None."""
    mask: Any = None
    """PIL picture (L), white where `image` is painted anew, or None for all of it."""
    denoise: float = 0.75
    sampler: str = "DPM++ 2M"
    steps: int = 25
    cfg: float = 7.0
    save: bool = True


@dataclass
class Result:
    """images: PIL pictures without a grid. evaluations: rows the U-Net computed for each picture. guidance: the CFG
    scale that SUN stood in for; 0 without SUN, and where the adapter does not say."""

    images: list[Any] = field(default_factory=list)
    infotexts: list[str] = field(default_factory=list)
    seed: int = -1
    calls: int = 0
    evaluations: float = 0.0
    seconds: float = 0.0
    comments: str = ""
    guidance: float = 0.0
    interrupted: bool = False


def check(request: Request) -> None:
    """Raises ValueError for what no run should be asked for, whoever asks: sliders of a page bound nobody's request."""
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative)):
        plain_text(name, text, MAX_TEXT)
    for name, value in (("width", request.width), ("height", request.height)):
        if number(name, value, (64, 4096), whole=True) % 8:
            raise ValueError(f"SUN: {name} is {value}; it is a multiple of 8.")
    number("batch size", request.batch_size, (1, 16), whole=True)
    number("seed", request.seed, (-1, MAX_SEED), whole=True)
    number("denoise", request.denoise, (0, 1))
    steps = request.settings.steps if request.settings else request.steps
    check_size(request.width, request.height, request.batch_size, steps)


def paint(request: Request) -> Result:
    """Runs the host's processing. The caller holds the host's queue. Raises what the host and SUN raise."""
    check(request)
    counter = Counter()
    with closing(build(request)) as p:
        p.sun_counter = counter
        processed = processing.process_images(p)
    shared.total_tqdm.clear()
    count = len(processed.infotexts) - processed.index_of_first_image
    first = processed.index_of_first_image
    return Result(
        images=list(processed.images[first : first + count]),
        infotexts=list(processed.infotexts[first:]),
        seed=int(processed.seed),
        calls=counter.calls,
        evaluations=counter.rows / max(request.batch_size, 1),
        seconds=counter.seconds,
        comments=processed.comments,
        guidance=guidance_of(p),
        interrupted=bool(shared.state.interrupted),
    )


def guidance_of(p: Any) -> float:
    """The CFG scale that SUN stood in for in the run of a processing object; 0: none, or one that nobody knows."""
    run = getattr(p, "sun_run", None)
    if run is None or run.adapter is None:
        return 0.0
    return float(run.settings.guidance or run.adapter.info.guidance_scale or 0.0)


def build(request: Request) -> Any:
    """The host's processing object for a request, its scripts at their defaults except SUN."""
    options, kind = shared.opts, "img2img" if request.image is not None else "txt2img"
    # Masks among the pictures would be taken for pictures.
    overrides: dict[str, Any] = {
        key: False for key in ("return_mask", "return_mask_composite") if key in options.data_labels
    }
    if request.model:
        overrides["sd_model_checkpoint"] = request.model
    common = {
        "outpath_samples": options.outdir_samples or getattr(options, f"outdir_{kind}_samples"),
        "outpath_grids": options.outdir_grids or getattr(options, f"outdir_{kind}_grids"),
        "prompt": request.prompt,
        "negative_prompt": request.negative,
        "width": request.width,
        "height": request.height,
        "batch_size": request.batch_size,
        "seed": request.seed,
        "steps": request.steps,
        "cfg_scale": request.cfg,
        "sampler_name": request.sampler,
        "do_not_save_samples": not request.save,
        "do_not_save_grid": True,
        "override_settings": overrides,
    }
    if request.image is None:
        p = processing.StableDiffusionProcessingTxt2Img(**common)
        runner = scripts.scripts_txt2img
    else:
        p = processing.StableDiffusionProcessingImg2Img(
            **common,
            init_images=[request.image],
            mask=request.mask,
            inpainting_fill=1,  # start from the picture's own content
            inpaint_full_res=False,
            denoising_strength=request.denoise,
        )
        runner = scripts.scripts_img2img
    # The built-in seed and sampler controls would write their defaults over what is asked for here.
    p.scripts_setup_complete = True
    p.scripts = runner
    p.script_args = tuple(script_arguments(runner, request.settings, request.accelerators))
    return p


def script_arguments(
    runner: Any, settings: SunSettings | None, accelerators: AcceleratorSettings | None = None
) -> list[Any]:
    """The arguments of every script of the host: their controls' start values, and ours as given."""
    values = [getattr(control, "value", None) for control in runner.inputs]
    values[0] = 0  # no script of the dropdown
    for script in runner.alwayson_scripts:
        if getattr(script, "sun_script", False):
            values[script.args_from : script.args_to] = arguments(settings, accelerators)
            return values
    raise RuntimeError("SUN's script is not loaded. Look for its error at the start of the log.")


def on_main_thread(work: Callable[[], T]) -> T:
    """Runs `work` on the thread where Forge keeps its models; elsewhere at once. Raises what `work` raises."""
    try:
        thread = importlib.import_module("modules_forge.main_thread")
    except ImportError:
        return work()
    outcome: dict[str, Any] = {}

    def boxed() -> None:  # Forge prints exceptions there and returns None
        try:
            outcome["value"] = work()
        except BaseException as error:
            outcome["error"] = error

    thread.run_and_wait_result(boxed)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["value"]
