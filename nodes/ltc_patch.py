"""LTC-Accel in ComfyUI: how it gets into the sampling.

Nothing is patched while nothing is sampled. Two wrappers hang on a clone of the model:

    SAMPLER_SAMPLE   once a run         knows the sampler and its sigmas, and looks for a table
    PREDICT_NOISE    each model call    in a skipped step answers itself, instead of both passes of guidance
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_sampling
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..sun.ltc import LtcKey, LtcSettings, TableStore, fingerprint, kdiffusion
from ..sun.ltc.kdiffusion import SamplerRun
from ..sun.ltc.keep import AUTOMATIC, keep_measured, open_run
from . import merging, notices

log = logging.getLogger(__name__)

KEY = "sun_ltc"


@dataclass(frozen=True)
class LtcChoice:
    """What Apply LTC-Accel remembers."""

    settings: LtcSettings
    calibration: str
    node: str | None = None  # where the page shows what a run did


def tables_folder() -> Path:
    """Where tables are kept: ComfyUI's user folder, out of reach of its web server where it knows such a place."""
    system = getattr(folder_paths, "get_system_user_directory", None)
    base = Path(system("sun")) if system else Path(folder_paths.get_user_directory()) / "default" / "sun"
    return base / "ltc"


def apply(model: ModelPatcher, settings: LtcSettings, calibration: str = AUTOMATIC) -> ModelPatcher:
    """A clone of `model` that skips steps. An LTC-Accel already on the model is replaced."""
    patched = model.clone()
    if patched.get_attachment(KEY) is not None:
        log.warning("LTC-Accel: the model had it already; the later node takes its place.")
    patched.set_attachments(KEY, LtcChoice(settings, calibration, notices.running_node()))
    merging.speak_up(patched)
    for kind, wrapper in ((WrappersMP.SAMPLER_SAMPLE, _sampler_sample), (WrappersMP.PREDICT_NOISE, _predict_noise)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def solver_of(sampler: Any) -> str:
    """Name of a ComfyUI SAMPLER's solver. Raises LtcError for one that cannot be accelerated, saying which can."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    return kdiffusion.solver_of(name, getattr(sampler, "extra_options", {}))


# ------------------------------------------------------------------------------------------------------ the wrappers


def _sampler_sample(
    executor: Any, guider: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any
) -> torch.Tensor:
    choice: LtcChoice | None = guider.model_patcher.get_attachment(KEY)
    if choice is None or len(sigmas) < 2:
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    solver = solver_of(executor.class_obj)
    levels = tuple(float(sigma) for sigma in sigmas)
    flow = isinstance(guider.model_patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    key = LtcKey(
        fingerprint(guider.model_patcher.model.diffusion_model), f"flow_{solver}" if flow else solver, levels,
        float(getattr(guider, "cfg", 1.0)),
    )  # fmt: skip
    store = TableStore(tables_folder())
    run = open_run(key, choice.settings, store, choice.calibration)
    options = extra_args["model_options"].setdefault("transformer_options", {})
    options[KEY] = SamplerRun(solver, levels, run)
    try:
        samples = executor(guider, sigmas, extra_args, *args, **kwargs)
    finally:
        options.pop(KEY, None)
    if levels[-1] == 0:  # otherwise another sampler goes on from here, and the last step was not seen
        run.finish(samples)
    if run.measure is not None:
        table = keep_measured(run.measure, key, store)
        text = "ltc_measured" if table.coefficients else "ltc_nothing"
        notices.tell(choice.node, text, calls=table.calls, steps=key.steps)
    else:
        saved = round(100 * run.skips_made / key.steps)
        notices.tell(choice.node, "ltc_saved", calls=key.steps - run.skips_made, steps=key.steps, saved=saved)
    return samples


def _predict_noise(
    executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:  # fmt: skip
    options = model_options if model_options is not None else {}
    run = options.get("transformer_options", {}).get(KEY)
    if not isinstance(run, SamplerRun):
        return executor(x, timestep, options, seed)
    return run.denoised(x, lambda: executor(x, timestep, options, seed))
