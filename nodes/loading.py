"""SUN adapters under ComfyUI's model management: loading a file, checking it against a model, describing it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import comfy.model_management
import comfy.model_patcher
import comfy.ops

from ..sun.adapter import SunAdapter
from ..sun.common.identity import sha256_of
from ..sun.facts import facts_of
from ..sun.files import SunFileError
from ..sun.layers import AttentionLayer, layers_of_ldm


class LoadedAdapter(NamedTuple):
    """What travels on a SUN_ADAPTER link: a readable name and the weights under ComfyUI's model management."""

    name: str
    patcher: comfy.model_patcher.ModelPatcher

    @property
    def adapter(self) -> SunAdapter:
        return self.patcher.model


def load_adapter(path: Path | str, name: str | None = None, **_: Any) -> LoadedAdapter:
    """Reads an adapter file and hands it to ComfyUI's model management. Raises SunFileError."""
    adapter = SunAdapter.load(path, linear=comfy.ops.manual_cast.Linear)
    adapter.eval().requires_grad_(False)
    return LoadedAdapter(name or Path(path).name, _patcher(adapter, path))


def _patcher(adapter: SunAdapter, path: Path | str) -> comfy.model_patcher.ModelPatcher:
    patcher = comfy.model_patcher.ModelPatcher(
        adapter,
        load_device=comfy.model_management.get_torch_device(),
        offload_device=comfy.model_management.unet_offload_device(),
    )
    # ComfyUI with several GPUs builds one copy per device through this (since 0.23).
    patcher.cached_patcher_init = (lambda file, **_: load_adapter(file).patcher, (str(path),))
    return patcher


def layers_of(model: comfy.model_patcher.ModelPatcher) -> tuple[AttentionLayer, ...]:
    """The cross-attention layers of a ComfyUI model; empty for a model without an SD-like U-Net."""
    unet = getattr(model.model, "diffusion_model", None)
    if unet is None or not hasattr(unet, "input_blocks"):
        return ()
    return tuple(layers_of_ldm(unet))


def check_base(model: comfy.model_patcher.ModelPatcher, loaded: LoadedAdapter) -> tuple[AttentionLayer, ...]:
    """The model's layers if the adapter fits it. Raises SunFileError that names both sides and what to do."""
    kind = type(model.model.model_config).__name__
    layers = layers_of(model)
    if not layers:
        raise SunFileError(
            f"SUN works on Stable Diffusion 1.x models, and this one ({kind}) has no U-Net with cross-attention. "
            f"Connect an SD 1.5 checkpoint, or the model of Load Emoji Diffusion."
        )
    width = model.model.model_config.unet_config.get("context_dim")
    loaded.adapter.check_base([layer.channels for layer in layers], width, where=f"this {kind} model")
    return layers


def fitted(model: comfy.model_patcher.ModelPatcher, loaded: LoadedAdapter) -> LoadedAdapter:
    """The adapter for this model: as it is, or without the layers that a compact U-Net of its base lacks.

    Raises SunFileError for a model it does not fit either way.
    """
    layers = layers_of(model)
    if not layers or len(layers) >= len(loaded.adapter.layers):
        return loaded
    unet = model.model.diffusion_model
    patcher = _patcher(loaded.adapter.for_unet(unet), str(loaded.adapter.info.path))
    patcher.cached_patcher_init = (
        lambda file, **_: _patcher(load_adapter(file).adapter.for_unet(unet), file),
        (str(loaded.adapter.info.path),),
    )
    return LoadedAdapter(loaded.name, patcher)


def describe(loaded: LoadedAdapter) -> tuple[str, str]:
    """(a few lines for people, the same as JSON) about an adapter. What its file does not record is null in the JSON.

    Keys: name, file, layout, base_model, widths (of the base's attention layers, finest first), text_width, layers,
    branches, parameters, dtype, guidance_scale (the w it was trained for), takes_guidance_scale (whether others
    can be asked for), guidance_range (those it was trained on), stage_length, sha256.
    """
    adapter = loaded.adapter
    path = Path(str(adapter.info.path))
    facts = {
        "name": loaded.name,
        "file": path.name,  # without its folder: pictures and workflows with this text are passed on
        **asdict(facts_of(adapter.tensors())),
        "sha256": sha256_of(path),
    }
    return _in_words(facts, adapter.guidance_in_words()), json.dumps(facts, indent=2)


def _in_words(facts: dict[str, Any], guidance: str) -> str:
    widths = " / ".join(str(width) for width in facts["widths"])
    stage = facts["stage_length"]
    stages = "" if not stage else f", stage length {stage:g} ({round(1 / stage)} steps)"
    return "\n".join(
        (
            facts["name"],
            f"Base: {facts['base_model'] or 'not recorded'}; widths {widths}, text width {facts['text_width']}",
            f"Branches: {facts['branches']}; {facts['layers']} layers, {facts['parameters']:,} parameters, "
            f"{facts['dtype']}",
            f"Trained guidance: {guidance}{stages}",
            f"SHA-256: {facts['sha256']}",
        )
    )
