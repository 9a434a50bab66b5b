"""What a model file is, for every surface: ``sun inspect``, ComfyUI's nodes and route, the web UIs.

From the header alone, so that a list of models costs no memory; only ``sun inspect`` reads an adapter's weights.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import files
from .common.identity import Stamp, sha256_of, stamp
from .common.reading import ReadError, printable, read_json
from .files import AdapterTensors, SunFileError

_TRANSFORMER_LORA = "a LoRA for a diffusion transformer (Flux, SD 3); SUN works with Stable Diffusion 1.x"
_NO_LORAS = {
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".on_input": "IA3",
    ".ia3_": "IA3",
    ".vera_": "VeRA",
    ".b1.weight": "GLoRA",
}
_LORA_FAMILY = {
    ".hada_w1": "LoHa",
    ".lokr_w": "LoKr",
    ".dora_scale": "DoRA",
    ".lora_magnitude_vector": "DoRA",
    ".w_norm": "file of changed norms",
    ".diff": "file of whole differences",
}
# (what it is, a text every such file has in one of its tensor names); the first match counts.
_KINDS = (
    (
        "a Stable Diffusion checkpoint (U-Net, text encoder, VAE in one file); use it as --model",
        "model.diffusion_model.",
    ),
    ("a Control-LoRA, a ControlNet made of the model's own U-Net; use it as --controlnet", "lora_controlnet"),
    ("a ControlNet", "zero_conv"),
    ("a ControlNet", "controlnet_cond_embedding."),
    # what --lora would refuse, and is not to be sent there for
    ("a LoRA for SDXL, which has two text encoders; SUN works with Stable Diffusion 1.x", "lora_te2_"),
    *((_TRANSFORMER_LORA, mark) for mark in ("lora_transformer_", "transformer.transformer_", "transformer.single_")),
    *((f"an adapter of the kind {kind}, which --lora does not take", mark) for mark, kind in _NO_LORAS.items()),
    *((f"a {kind}, of LoRA's family; use it as --lora", mark) for mark, kind in _LORA_FAMILY.items()),
    *(("a LoRA; use it as --lora", mark) for mark in (".lora_", ".lora.", "_lora.", "lora_unet_", "lora_te_")),
    ("an IP-Adapter", "ip_adapter."),
    ("a textual inversion embedding", "emb_params"),
    ("a VAE", "decoder.up_blocks."),
    ("a VAE", "decoder.up."),
    ("a diffusers U-Net; use its model folder as --model", "down_blocks.0.resnets."),
    ("a text encoder", "text_model.encoder."),
)


@dataclass(frozen=True)
class AdapterFacts:
    """What an adapter is. None: its file does not record it."""

    layout: str | None
    base_model: str | None
    branches: str
    """"negative" (the paper) or "negative+positive" (the authors' release)."""
    layers: int
    widths: tuple[int, ...]
    """Of the base's attention layers, finest first, each once."""
    text_width: int
    parameters: int
    dtype: str
    guidance_scale: float | None
    """w, the scale it was trained for; where it takes any, the one by default."""
    takes_guidance_scale: bool
    guidance_range: tuple[float, float] | None
    """From where to where it was trained to take the scale."""
    stage_length: float | None

    @property
    def positive(self) -> bool:
        """Has the positive branch."""
        return "positive" in self.branches

    @property
    def steps(self) -> int | None:
        """Steps it was trained for."""
        return round(1 / self.stage_length) if self.stage_length else None


def facts_of(adapter: AdapterTensors) -> AdapterFacts:
    """The facts of an adapter's content, with values or without. Raises SunFileError for a guidance range of words."""
    info = adapter.info
    parts = [part for layer in adapter.layers for part in layer.values()]
    return AdapterFacts(
        layout=info.layout,
        base_model=info.base_model or None,
        branches="negative+positive" if adapter.positive else "negative",
        layers=len(adapter.layers),
        widths=tuple(sorted(set(adapter.channels))),
        text_width=adapter.text_width,
        parameters=sum(part.numel() for part in parts),
        dtype=", ".join(sorted({str(part.dtype).removeprefix("torch.") for part in parts})),
        guidance_scale=info.guidance_scale,
        takes_guidance_scale=adapter.guided,
        guidance_range=files.guidance_range(info.training) if adapter.guided else None,
        stage_length=info.stage_length,
    )


def adapter_facts(path: str | os.PathLike[str]) -> AdapterFacts:
    """The facts of an adapter file, from its header; kept until the file changes. Raises SunFileError."""
    try:
        return _adapter_facts(stamp(path))
    except OSError:
        return facts_of(files.peek(path))  # says in a sentence what is wrong


@functools.lru_cache(maxsize=256)
def _adapter_facts(file: Stamp) -> AdapterFacts:
    return facts_of(files.peek(file[0]))


def describe(path: Path) -> dict[str, Any]:
    """What is in ``path``: always ``kind``, and for a SUN adapter all that is known of it.

    Raises SunFileError when the file is missing, damaged, or meant to be a SUN adapter but not usable as one.
    """
    if path.is_dir():
        return _describe_folder(path)
    try:
        return _describe_adapter(files.read(path), path)
    except SunFileError:
        names = _tensor_names(path)
        kind = next((kind for kind, mark in _KINDS if any(mark in name for name in names)), None)
        if kind is None or any(".to_k_neg" in name for name in names):
            raise
        return {"file": str(path), "kind": f"not a SUN adapter: {kind}", "tensors": len(names)}


def _describe_adapter(adapter: AdapterTensors, path: Path) -> dict[str, Any]:
    facts = asdict(facts_of(adapter))
    del facts["layers"], facts["widths"]  # a table of them follows
    return {
        "file": str(path),
        "kind": "SUN adapter",
        **{
            name: "not recorded" if value is None and name != "guidance_range" else value
            for name, value in facts.items()
        },
        "sha256": sha256_of(path),
        "training": adapter.info.training,
        "notes": adapter.info.notes,
        "layers": [
            {"name": name, "width": width} | _scales(layer)
            for name, width, layer in zip(adapter.names, adapter.channels, adapter.layers, strict=True)
        ],
    }


def _scales(layer: Mapping[str, torch.Tensor]) -> dict[str, tuple[float, float]]:
    """(mean, standard deviation) of alpha and beta of each branch."""
    vectors = {name: value.detach().float() for name, value in layer.items() if value.ndim == 1}
    return {name: (float(v.mean()), float(v.std(correction=0))) for name, v in vectors.items()}


def _describe_folder(path: Path) -> dict[str, Any]:
    index = path / "model_index.json"
    name = printable(str(path))
    if not index.is_file():
        raise SunFileError(f"{name} is a folder without model_index.json. Give a file, or a diffusers model folder.")
    try:
        content = read_json(index)
    except (ReadError, OSError) as error:
        raise SunFileError(f"{name} has no readable model_index.json: {error} Get the folder again.") from error
    kind = content.get("_class_name") if isinstance(content, dict) else None
    if not isinstance(kind, str):
        raise SunFileError(f"{name} has a model_index.json that names no pipeline. Get the folder again.")
    return {"file": str(path), "kind": f"a diffusers model folder ({printable(kind)[:80]}); use it as --model"}


def _tensor_names(path: Path) -> list[str]:
    """Names of a safetensors file's tensors; empty for anything else."""
    try:
        return list(files.header_of(path).tensors)
    except SunFileError:
        return []
