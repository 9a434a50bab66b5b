"""The parts of a Stable Diffusion with SUN as graphs: plain functions of tensors, with names for their inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import SunAdapter
from ..conditioning import AdapterTexts, LayerTexts
from ..pipelines import NEGATIVE

OPSET = 17
_BATCH, _HEIGHT, _WIDTH = "batch", "height", "width"
# Latents that no downsampling halves evenly: traced with them, a U-Net asks for the size at every upsampling.
_ODD = (13, 19)


@dataclass
class Graph:
    """A module to be written, an example of each input, and which axes of it may have any length."""

    module: nn.Module
    inputs: dict[str, Tensor]
    axes: dict[str, dict[int, str]]

    def write(self, file: Path) -> None:
        """As ONNX, the one form that both runtimes read. Large models get a file for each of their tensors."""
        file.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), warnings.catch_warnings():
            # torch's newer exporter (dynamo) takes ten times as long and fixes what should stay free.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                self.module.eval(),
                tuple(self.inputs.values()),
                str(file),
                dynamo=False,
                opset_version=OPSET,
                external_data=True,
                input_names=list(self.inputs),
                dynamic_axes=self.axes,
            )


class UNetWithSun(nn.Module):
    """noise = f(sample, timestep, positive, negative, strength, [guidance], [residuals of a ControlNet]).

    sample [B, C, H, W]; timestep [1]; positive [B, L, D]; negative [B, M, D]; strength []; guidance [1], the scale w
    itself. Without an adapter: f(sample, timestep, positive, [residuals]).
    """

    def __init__(self, unet: Any, adapter: SunAdapter | None, guided: bool) -> None:
        super().__init__()
        self.unet, self.adapter, self.guided = unet, adapter, guided

    def forward(self, sample: Tensor, timestep: Tensor, positive: Tensor, *others: Tensor) -> Tensor:
        rest, options = list(others), None
        if self.adapter is not None:
            negative, strength = rest.pop(0), rest.pop(0)
            features = self._features(rest.pop(0)) if self.guided else None
            texts = self.adapter.texts([(1.0, negative)], positive, guidance=features)
            options = {NEGATIVE: AdapterTexts(tuple(_scaled(layer, strength) for layer in texts.layers))}
        residuals: dict[str, Any] = {}
        if rest:
            residuals = {
                "down_block_additional_residuals": tuple(rest[:-1]),
                "mid_block_additional_residual": rest[-1],
            }
        noise: Tensor = self.unet(
            sample, timestep, positive, cross_attention_kwargs=options, return_dict=False, **residuals
        )[0]
        return noise

    def _features(self, guidance: Tensor) -> Tensor:
        """``SunAdapter.guidance`` of a scale that is known only when the graph runs."""
        assert self.adapter is not None
        own = self.adapter.info.guidance_scale
        assert own is not None
        ratio = torch.log(guidance / own)
        return torch.stack([ratio, ratio.square()], dim=-1)


def _scaled(texts: LayerTexts, strength: Tensor) -> LayerTexts:
    """What a layer made of the texts at strength 1, at another."""
    branches = tuple(branch._replace(scale=branch.scale * strength) for branch in texts.branches)
    assert texts.shift is not None
    return texts._replace(branches=branches, shift=texts.shift * strength)


class _Function(nn.Module):
    """A function of tensors that uses ``part``, as a module."""

    def __init__(self, part: Any, function: Callable[..., Any]) -> None:
        super().__init__()
        self.part, self.function = part, function

    def forward(self, *inputs: Tensor) -> Any:
        return self.function(self.part, *inputs)


def unet_graph(
    unet: Any, adapter: SunAdapter | None, guided: bool, latent: tuple[int, int] | None, residuals: Sequence[Tensor]
) -> Graph:
    """:class:`UNetWithSun` as a graph.

    guided: the adapter's guidance scale is an input. latent: (height, width) to fix, None for any. residuals: an
    example of a ControlNet's, [2, C, h, w] each, of the same latents.
    """
    height, width = latent or _ODD
    text_width = unet.config.cross_attention_dim
    inputs = {
        "sample": torch.randn(2, unet.config.in_channels, height, width),
        "timestep": torch.full((1,), 499.0),
        "positive": torch.randn(2, 77, text_width),
    }
    if adapter is not None:
        inputs |= {"negative": torch.randn(2, 77, text_width), "strength": torch.tensor(1.0)}
        if guided:
            inputs["guidance"] = torch.full((1,), float(adapter.info.guidance_scale or 1.0))
    axes = {"sample": _picture_axes(latent), "positive": {0: _BATCH, 1: "tokens"}}
    if adapter is not None:
        axes["negative"] = {0: _BATCH, 1: "negative_tokens"}
    for i, residual in enumerate(residuals):
        name = f"residual_{i}"
        inputs[name] = residual
        axes[name] = {0: _BATCH} if latent else {0: _BATCH, 2: f"height_{i}", 3: f"width_{i}"}
    return Graph(UNetWithSun(unet, adapter, guided), inputs, axes)


def controlnet_graph(controlnet: Any, latent: tuple[int, int] | None) -> Graph:
    """residuals = f(sample, timestep, positive, image [B, 3, 8 H, 8 W] in 0..1, scale [])."""
    height, width = latent or _ODD

    def residuals(part: Any, sample: Tensor, t: Tensor, text: Tensor, image: Tensor, scale: Tensor) -> Any:
        down, mid = part(sample, t, text, controlnet_cond=image, conditioning_scale=scale, return_dict=False)
        return (*down, mid)

    inputs = {
        "sample": torch.randn(2, controlnet.config.in_channels, height, width),
        "timestep": torch.full((1,), 499.0),
        "positive": torch.randn(2, 77, controlnet.config.cross_attention_dim),
        "image": torch.rand(2, controlnet.config.conditioning_channels, 8 * height, 8 * width),
        "scale": torch.tensor(1.0),
    }
    free = _picture_axes(latent)
    pixels = {axis: name if axis == 0 else f"pixel_{name}" for axis, name in free.items()}
    return Graph(
        _Function(controlnet, residuals),
        inputs,
        {"sample": free, "positive": {0: _BATCH, 1: "tokens"}, "image": pixels},
    )


def text_encoder_graph(text_encoder: Any) -> Graph:
    """states [B, 77, D] = f(input_ids [B, 77])."""
    length = text_encoder.config.max_position_embeddings
    ids = torch.zeros(2, length, dtype=torch.long)
    return Graph(
        _Function(text_encoder, lambda part, ids: part(ids)[0]), {"input_ids": ids}, {"input_ids": {0: _BATCH}}
    )


def vae_encoder_graph(vae: Any, pixels: tuple[int, int] | None, scale: int) -> Graph:
    """Mean and log variance [B, 2 C, H, W], or the latents of an autoencoder without a variance, of a picture."""
    height, width = pixels or tuple(scale * side for side in _ODD)

    def encode(part: Any, picture: Tensor) -> Any:
        found = part.encode(picture)
        return found.latent_dist.parameters if hasattr(found, "latent_dist") else found.latents

    return Graph(
        _Function(vae, encode), {"picture": torch.randn(2, 3, height, width)}, {"picture": _picture_axes(pixels)}
    )


def vae_decoder_graph(vae: Any, latent: tuple[int, int] | None) -> Graph:
    """A picture [B, 3, 8 H, 8 W] of latents [B, C, H, W]."""
    latents = torch.randn(2, vae.config.latent_channels, *(latent or _ODD))
    graph = _Function(vae, lambda part, latents: part.decode(latents, return_dict=False)[0])
    return Graph(graph, {"latents": latents}, {"latents": _picture_axes(latent)})


def _picture_axes(fixed: tuple[int, int] | None) -> dict[int, str]:
    return {0: _BATCH} if fixed else {0: _BATCH, 2: _HEIGHT, 3: _WIDTH}


@contextmanager
def in_plain_float(*parts: nn.Module) -> Iterator[None]:
    """Within it no weight wants a gradient and all are float32, as graphs are written."""
    for part in parts:
        part.float().requires_grad_(False).eval()
    yield
