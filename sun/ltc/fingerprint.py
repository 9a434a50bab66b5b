"""A short name of a denoising model, the same in every host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import nn

# The first and last biases of a U-Net of the SD family, under diffusers' names and under LDM's. A LoRA leaves them.
_BIASES = (
    ("conv_in.bias", "input_blocks.0.0.bias"),
    ("time_embedding.linear_1.bias", "time_embed.0.bias"),
    ("conv_out.bias", "out.2.bias"),
)


def fingerprint(model: nn.Module) -> str:
    """16 hexadecimal digits of a model's identity.

    A U-Net of the SD family is known by its first and last biases, rounded to half precision, so that number formats
    and hosts do not matter; any other network by the shapes of its parameters and its class.
    """
    model = getattr(model, "_orig_mod", model)
    parameters = dict(model.named_parameters())
    found = [_first(parameters, names) for names in _BIASES]
    hashed = hashlib.sha256()
    if all(bias is not None and bias.device.type != "meta" for bias in found):
        for bias in found:
            assert bias is not None
            hashed.update(bias.detach().cpu().half().numpy().tobytes())
    else:
        shapes = sorted(str(tuple(p.shape)) for name, p in parameters.items() if "lora" not in name.lower())
        hashed.update(f"{type(model).__name__}\0{shapes}".encode())
    return hashed.hexdigest()[:16]


def _first(parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> torch.Tensor | None:
    return next((parameters[name] for name in names if name in parameters), None)
