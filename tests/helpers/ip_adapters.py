"""Small random IP-Adapters in the layout of the files, for a tiny U-Net."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import IPAdapterPlusImageProjection
from tiny import TEXT_WIDTH

from sun.layers import layers_of_unet

IMAGE_WIDTH = 12
# From diffusers' names of the Plus projection to those in its file.
_PLUS_NAMES = {
    ".ln0.": ".0.norm1.",
    ".ln1.": ".0.norm2.",
    ".attn.to_out.0.": ".0.to_out.",
    ".attn.to_q.": ".0.to_q.",
    ".ff.0.": ".1.0.",
    ".ff.1.net.0.proj.": ".1.1.",
    ".ff.1.net.2.": ".1.3.",
}


def ip_adapter(unet: Any, seed: int = 11, *, plus: bool = False) -> dict[str, dict[str, torch.Tensor]]:
    """What ``pipe.load_ip_adapter`` reads from a file: 4 tokens a picture, or 6 of a Plus."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    layers = {}
    for layer in layers_of_unet(unet):
        for name in ("to_k_ip", "to_v_ip"):
            layers[f"{layer.index}.{name}.weight"] = 2 * random(layer.channels, TEXT_WIDTH)
    return {"image_proj": _plus(random) if plus else _plain(random), "ip_adapter": layers}


def _plain(random: Any) -> dict[str, torch.Tensor]:
    wide = 4 * TEXT_WIDTH
    return {
        "proj.weight": random(wide, IMAGE_WIDTH),
        "proj.bias": random(wide),
        "norm.weight": torch.ones(TEXT_WIDTH),
        "norm.bias": torch.zeros(TEXT_WIDTH),
    }


def _plus(random: Any) -> dict[str, torch.Tensor]:
    made = IPAdapterPlusImageProjection(IMAGE_WIDTH, TEXT_WIDTH, hidden_dims=64, heads=1, num_queries=6)
    state = {name: random(*value.shape) for name, value in made.state_dict().items()}
    found: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if ".attn.to_k." in name:
            other = state[name.replace("to_k", "to_v")]
            found[name.replace(".attn.to_k.", ".0.to_kv.")] = torch.cat([value, other])
        elif ".attn.to_v." not in name:
            for theirs, ours in _PLUS_NAMES.items():
                name = name.replace(theirs, ours)
            found[name] = value
    return found


def load(pipe: Any, *states: dict[str, dict[str, torch.Tensor]], scale: Any = 0.8) -> None:
    pipe.load_ip_adapter(list(states), subfolder=[""] * len(states), weight_name=[""] * len(states),
                         image_encoder_folder=None, low_cpu_mem_usage=False)  # fmt: skip
    pipe.set_ip_adapter_scale(scale)


def image_embeds(rows: int = 1, images: int = 1, seed: int = 3, *, plus: bool = False) -> torch.Tensor:
    """Of a picture's encoder: [rows, images, width], of a Plus [rows, images, tokens, width]."""
    shape = (rows, images, 5, IMAGE_WIDTH) if plus else (rows, images, IMAGE_WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
