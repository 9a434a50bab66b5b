"""A short name of a denoising model and of what changes it, the same in every host and number format.

Only signs of weights are looked at: no number format rounds them away.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

# The first and last layers of a U-Net of the SD family, under diffusers' names and under LDM's. A LoRA leaves them.
_ENDS = (
    ("conv_in.weight", "input_blocks.0.0.weight"),
    ("conv_in.bias", "input_blocks.0.0.bias"),
    ("time_embedding.linear_1.bias", "time_embed.0.bias"),
    ("conv_out.weight", "out.2.weight"),
    ("conv_out.bias", "out.2.bias"),
)
# What LoRAs are trained for and merged into; called the same in both.
_ATTENTION = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
_MOST = 4096
"""Signs of one parameter."""
_SOME = 256
"""Signs of one parameter of many."""


def fingerprint(model: nn.Module, *, attention: bool = True) -> str:
    """16 hexadecimal digits of a model's identity.

    A U-Net of the SD family is known by its first and last layers and by a part of every attention layer, which a LoRA
    merged into it changes; any other network by its class, the shapes of its parameters and a part of each. Layers
    that a LoRA adds are not looked at. attention: False where the host may be changing these weights right now.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if ".lora_" not in name}
    ends = [_first(parameters, names) for names in _ENDS]
    hashed = hashlib.sha256()
    if all(end is not None and not end.is_meta for end in ends):
        for end in signs([end for end in ends if end is not None], _MOST):
            hashed.update(end)
        parts = [p for name, p in parameters.items() if attention and name.endswith(_ATTENTION)]
    else:
        shapes = sorted(str(tuple(p.shape)) for p in parameters.values())
        hashed.update(f"{type(model).__name__}\0{shapes}".encode())
        parts = list(parameters.values())
    for part in sorted(signs(parts, _SOME)):  # hosts list them in other orders
        hashed.update(part)
    return hashed.hexdigest()[:16]


def lora_of(model: nn.Module) -> str:
    """16 hexadecimal digits of the LoRAs that act in a model through peft's layers; empty where none does."""
    parts: list[str] = []
    for name, module in getattr(model, "_orig_mod", model).named_modules():
        scaling = getattr(module, "scaling", None)
        if not isinstance(scaling, Mapping) or getattr(module, "disable_adapters", False):
            continue
        for adapter in getattr(module, "active_adapters", ()):
            own = (p for key, p in module.named_parameters() if key.startswith("lora_") and f".{adapter}" in key)
            if scaling.get(adapter) and (weights := list(own)):
                parts.append(f"{name} {scaling[adapter]:.4g} {signs_digest(weights)}")
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:16] if parts else ""


def adapter_digest(adapter: nn.Module) -> str:
    """16 hexadecimal digits of a SUN adapter's identity.

    Besides the signs, the size of its vectors (alpha, beta), in which adapters for several guidance scales differ.
    """
    vectors = [p.detach().float().abs().mean() for p in adapter.parameters() if p.ndim == 1]
    size = f"{float(torch.stack(vectors).mean()):.2g}" if vectors else ""
    return hashlib.sha256(f"{signs_digest(adapter.parameters())} {size}".encode()).hexdigest()[:16]


def signs_digest(tensors: Iterable[Tensor]) -> str:
    """16 hexadecimal digits of the signs of some tensors, in their order."""
    return hashlib.sha256(b"\0".join(signs(list(tensors), _SOME))).hexdigest()[:16]


def signs(tensors: list[Any], most: int) -> list[bytes]:
    """The signs of the first ``most`` numbers of each tensor, eight a byte. Those of whole numbers are left out."""
    known = [t.detach().reshape(-1)[:most] for t in tensors if t.is_floating_point() and not t.is_meta]
    if not known:
        return []
    places = {t.device for t in known}
    flat = [t.to(torch.float32) if len(places) == 1 else t.to("cpu", torch.float32) for t in known]
    bits = torch.signbit(torch.cat(flat)).to("cpu", torch.uint8)  # one transfer from the device
    return [bytes(_packed(part)) for part in bits.split([len(t) for t in known])]


def _packed(bits: Tensor) -> list[int]:
    padded = rearrange(torch.nn.functional.pad(bits, (0, -len(bits) % 8)), "(bytes bits) -> bytes bits", bits=8)
    powers = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    packed: list[int] = (padded * powers).sum(1, dtype=torch.int64).tolist()
    return packed


def _first(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> torch.Tensor | None:
    return next((parameters[name] for name in names if name in parameters), None)
