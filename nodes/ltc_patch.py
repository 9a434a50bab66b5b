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

from ..sun.common.identity import digest_of
from ..sun.ltc import LtcKey, LtcSettings, LtcTable, TableStore, adapter_digest, fingerprint, kdiffusion
from ..sun.ltc.fingerprint import signs_digest
from ..sun.ltc.kdiffusion import SamplerRun
from ..sun.ltc.keep import AUTOMATIC, running
from . import merging, notices, sun_patch, switching_patch

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
    patcher = guider.model_patcher
    model = fingerprint(patcher.model.diffusion_model, attention=not patcher.patches)  # they may be in place or not
    sampler, w = f"flow_{solver}" if flow else solver, float(getattr(guider, "cfg", 1.0))
    key = LtcKey(model, sampler, levels, w, steering(patcher))

    def measured(table: LtcTable) -> None:
        text = "ltc_measured" if table.coefficients else "ltc_nothing"
        notices.tell(choice.node, text, calls=table.calls, steps=key.steps)

    with running(key, choice.settings, TableStore(tables_folder()), choice.calibration, measured) as run:
        run.real |= _switching_steps(patcher, key.steps)
        options = extra_args["model_options"].setdefault("transformer_options", {})
        options[KEY] = SamplerRun(solver, levels, run)
        try:
            samples = executor(guider, sigmas, extra_args, *args, **kwargs)
        finally:
            options.pop(KEY, None)
        if levels[-1] == 0:  # otherwise another sampler goes on from here, and the last step was not seen
            run.finish(samples)
    if run.measure is None:
        saved = round(100 * run.skips_made / key.steps)
        notices.tell(choice.node, "ltc_saved", calls=key.steps - run.skips_made, steps=key.steps, saved=saved)
    return samples


def _switching_steps(patcher: ModelPatcher, steps: int) -> set[int]:
    """The step in which another U-Net takes over, which is never skipped."""
    switches = switching_patch.choice_of(patcher)
    first = None if switches is None else switches.switching.switches_at(steps)
    return set() if first is None else {first}


def steering(patcher: ModelPatcher) -> str:
    """SUN, the LoRAs and the second U-Net of a model, for `LtcKey`."""
    parts: list[str] = []
    sun, adapters = sun_patch.settings_of(patcher), patcher.get_additional_models_with_key(sun_patch.KEY)
    if sun is not None and adapters:
        scale = "" if sun.guidance is None else f"{sun.guidance:.4g}"
        parts.append(f"sun {adapter_digest(adapters[0].model)} {sun.strength:.4g} {scale} {sun.effect}")
    if patcher.patches:
        parts.append(f"lora {patches_digest(patcher.patches)}")
    if (switches := switching_patch.choice_of(patcher)) is not None:
        small = switches.small
        parts.append(f"switching {fingerprint(small.model.diffusion_model, attention=not small.patches)}")
        parts.append(f"{switches.switching} {steering(small)}".rstrip())
    return " ".join(parts)


def patches_digest(patches: dict[Any, list[tuple[Any, ...]]]) -> str:
    """16 hexadecimal digits of the weight patches of a model: LoRAs, and what merging nodes make."""
    known = []
    for key in sorted(patches, key=str):
        for strength, content, of_model, *_ in patches[key]:
            known.append(f"{key} {strength:.4g} {of_model:.4g} {signs_digest(tensors_in(content))}")
    return digest_of(known)


def tensors_in(content: Any) -> list[torch.Tensor]:
    """All tensors of a patch: a tensor, a tuple of a kind and tensors, or an object of comfy.weight_adapter."""
    if isinstance(content, torch.Tensor):
        return [content]
    if isinstance(content, (tuple, list)):
        return [tensor for part in content for tensor in tensors_in(part)]
    return tensors_in(getattr(content, "weights", ()))


def _predict_noise(
    executor: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    options = model_options if model_options is not None else {}
    run = options.get("transformer_options", {}).get(KEY)
    if not isinstance(run, SamplerRun):
        return executor(x, timestep, options, seed)
    return run.denoised(x, lambda: executor(x, timestep, options, seed))
