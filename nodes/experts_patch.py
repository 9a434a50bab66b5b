"""Experts of a compact U-Net in ComfyUI: they hang on a clone of the model and sit on its convolutions during a call.

The experts are an additional model of the patcher, so ComfyUI brings them to the device with the U-Net. APPLY_MODEL
looks up those of the device that runs; DIFFUSION_MODEL puts them on for one call and takes them off again. ComfyUI's
own convolutions do the work, with their number formats and LoRAs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..sun.compact import CompactError, Experts, read_experts
from ..sun.compact.experts import Alike
from ..sun.compact.ldm_experts import mixing_of
from . import merging
from .wrapping import UNetCall, around_unet, hang

log = logging.getLogger(__name__)

KEY = "sun_experts"


def apply(model: ModelPatcher, path: Path) -> ModelPatcher:
    """A clone of `model` whose U-Net has the experts of a file. Experts already on the model are replaced.

    Raises CompactError for a file that is none of experts, or of another U-Net.
    """
    unet = getattr(model.model, "diffusion_model", None)
    if unet is None or not hasattr(unet, "input_blocks"):
        kind = type(model.model.model_config).__name__
        raise CompactError(
            f"Experts are for a compact U-Net of Stable Diffusion, and this model ({kind}) has no U-Net."
        )
    patcher = _load(path)
    mixing_of(unet, patcher.model).remove()  # says now if they do not fit
    patched = model.clone()
    if patched.get_attachment(KEY) is not None:
        log.warning("Experts: the model had some already; those of %s take their place.", path.name)
    patched.set_attachments(KEY, path.name)
    patched.set_additional_models(KEY, [patcher])
    merging.speak_up(patched)
    hang(patched, KEY, {WrappersMP.APPLY_MODEL: _apply_model, WrappersMP.DIFFUSION_MODEL: _diffusion_model})
    return patched


def _load(path: Path) -> ModelPatcher:
    device = comfy.model_management.get_torch_device()
    patcher = ModelPatcher(
        read_experts(path), load_device=device, offload_device=comfy.model_management.unet_offload_device()
    )
    # ComfyUI with several GPUs builds one copy per device through this (since 0.23).
    patcher.cached_patcher_init = (lambda file, **_: _load(Path(file)), (str(path),))
    return patcher


def _apply_model(
    executor: Any,
    x: torch.Tensor,
    t: torch.Tensor,
    c_concat: Any = None,
    c_crossattn: Any = None,
    control: Any = None,
    transformer_options: dict[str, Any] | None = None,
    **kwargs: Any,
) -> torch.Tensor:
    options = transformer_options or {}
    # Looked up by the patcher that runs: with several GPUs each has its own copy.
    found = executor.class_obj.current_patcher.get_additional_models_with_key(KEY)
    if found:
        options = {**options, KEY: found[0].model}
    return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)


@around_unet
def _diffusion_model(call: UNetCall) -> torch.Tensor:
    experts = call.options.get(KEY)
    if not isinstance(experts, Experts):
        return call.go_on()
    mixing = mixing_of(call.unet, experts)
    # the prompts of a call follow one another, each with all pictures
    mixing.alike = Alike(max(1, len(call.options.get("cond_or_uncond", ()))))
    try:
        return call.go_on()
    finally:
        mixing.remove()
