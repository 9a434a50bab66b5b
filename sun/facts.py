"""Say what a model file is (``sun inspect``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .adapter import SunAdapter
from .common.identity import fingerprint
from .files import SunFileError

# (what it is, a text every such file has in one of its tensor names); the first match counts.
_KINDS = (
    (
        "a Stable Diffusion checkpoint (U-Net, text encoder, VAE in one file); use it as --model",
        "model.diffusion_model.",
    ),
    ("a Control-LoRA, a ControlNet made of the model's own U-Net; use it as --controlnet", "lora_controlnet"),
    ("a ControlNet", "zero_conv"),
    ("a ControlNet", "controlnet_cond_embedding."),
    ("a LoRA; use it as --lora", ".lora_"),
    ("a LoRA; use it as --lora", "lora_unet_"),
    ("an IP-Adapter", "ip_adapter."),
    ("a textual inversion embedding", "emb_params"),
    ("a VAE", "decoder.up_blocks."),
    ("a VAE", "decoder.up."),
    ("a diffusers U-Net; use its model folder as --model", "down_blocks.0.resnets."),
    ("a text encoder", "text_model.encoder."),
)


def describe(path: Path) -> dict[str, Any]:
    """What is in ``path``: always ``kind``, and for a SUN adapter all that is known of it.

    Raises SunFileError when the file is missing, damaged, or meant to be a SUN adapter but not usable as one.
    """
    if path.is_dir():
        return _describe_folder(path)
    try:
        return describe_adapter(SunAdapter.load(path), path)
    except SunFileError:
        names = _tensor_names(path)
        kind = next((kind for kind, mark in _KINDS if any(mark in name for name in names)), None)
        if kind is None or any(".to_k_neg" in name for name in names):
            raise
        return {"file": str(path), "kind": f"not a SUN adapter: {kind}", "tensors": len(names)}


def describe_adapter(adapter: SunAdapter, path: Path) -> dict[str, Any]:
    """All that is known of an adapter that was loaded from the file ``path``."""
    info = adapter.info
    weights = list(adapter.parameters())
    return {
        "file": str(path),
        "kind": "SUN adapter",
        "layout": info.layout,
        "base_model": info.base_model or "not recorded",
        "branches": info.branches,
        "guidance_scale": info.guidance_scale if info.guidance_scale is not None else "not recorded",
        "takes_guidance_scale": adapter.guided,
        "guidance_range": adapter.guidance_range,
        "stage_length": info.stage_length if info.stage_length is not None else "not recorded",
        "parameters": sum(w.numel() for w in weights),
        "dtype": ", ".join(sorted({str(w.dtype).removeprefix("torch.") for w in weights})),
        "text_width": adapter.text_width,
        "sha256": fingerprint(path),
        "training": info.training,
        "notes": info.notes,
        "layers": [
            {"name": name, "width": layer.channels} | _scales(layer.named_parameters())
            for name, layer in zip(adapter.names, adapter.sun_layers(), strict=True)
        ],
    }


def _scales(parameters: Any) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) of alpha and beta of each branch."""
    vectors = {name: value.detach().float() for name, value in parameters if value.ndim == 1}
    return {name: (float(v.mean()), float(v.std(correction=0))) for name, v in vectors.items()}


def _describe_folder(path: Path) -> dict[str, Any]:
    index = path / "model_index.json"
    if index.is_file():
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "unknown")
        return {"file": str(path), "kind": f"a diffusers model folder ({name}); use it as --model"}
    raise SunFileError(f"{path} is a folder without model_index.json. Give a file, or a diffusers model folder.")


def _tensor_names(path: Path) -> list[str]:
    """Names of a safetensors file's tensors; empty for anything else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as content:
            return list(content.keys())
    except (OSError, SafetensorError):
        return []
