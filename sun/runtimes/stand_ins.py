"""What diffusers' pipelines take for a U-Net, an autoencoder, a text encoder and a ControlNet: the same calls,
answered by a runtime's graphs, with the configs of what was exported.

Each holds one empty parameter, from which diffusers reads device and number format.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, ControlNetModel
from diffusers.configuration_utils import FrozenDict
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKLOutput
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.controlnets.controlnet import ControlNetOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..conditioning import repeated_side_by_side
from ..pipelines import GUIDANCE, NEGATIVE
from .engines import Run

STRENGTH = "sun_strength"


class _StandIn(nn.Module):
    config: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.register_parameter("empty", nn.Parameter(torch.empty(0), requires_grad=False))

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


def _numbers(value: Any, rows: int = 1) -> np.ndarray:
    """A number or a tensor as float32 [rows]."""
    return torch.as_tensor(value, dtype=torch.float32).reshape(-1).expand(rows).contiguous().numpy()


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().to("cpu", torch.float32).numpy())


def _tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(array) for array in arrays]


class UNetStandIn(_StandIn):
    """``UNet2DConditionModel`` with SUN in it. cross_attention_kwargs: ``sun_negative`` [B or 1, L, D],
    ``sun_strength`` and ``sun_guidance``; without a negative it is the plain U-Net. A call raises ValueError for what
    the graph does not take."""

    def __init__(self, config: Mapping[str, Any], run: Run, inputs: list[str]) -> None:
        super().__init__(FrozenDict(config))
        self.run, self.inputs = run, inputs
        self.residuals = [name for name in inputs if name.startswith("residual_")]

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        if given := sorted(name for name, value in others.items() if value is not None):
            raise ValueError(f"an exported U-Net takes no {', '.join(given)}. Use the model that was exported.")
        inputs = {
            "sample": _array(sample),
            "timestep": _numbers(timestep),
            "positive": _array(encoder_hidden_states),
        }
        inputs |= self._steering(dict(cross_attention_kwargs or {}), encoder_hidden_states)
        residuals = [*(down_block_additional_residuals or ()), mid_block_additional_residual]
        inputs |= self._residuals(sample, [r for r in residuals if r is not None])
        noise = _tensors(self.run(inputs))[0]
        return UNet2DConditionOutput(sample=noise) if return_dict else (noise,)

    def _steering(self, options: dict[str, Any], positive: Tensor) -> dict[str, np.ndarray]:
        if "negative" not in self.inputs:
            return {}
        negative = options.get(NEGATIVE)
        strength = 0.0 if negative is None else options.get(STRENGTH, 1.0)
        states = positive if negative is None else repeated_side_by_side(negative, len(positive), NEGATIVE)
        found = {"negative": _array(states), "strength": np.array(strength, dtype=np.float32)}
        if "guidance" in self.inputs:
            wanted = options.get(GUIDANCE)
            found["guidance"] = _numbers(self.config["sun_guidance"] if wanted is None else wanted)
        return found

    def _residuals(self, sample: Tensor, given: list[Tensor]) -> dict[str, np.ndarray]:
        if given and not self.residuals:
            raise ValueError("this model was exported without a ControlNet. Export it again with --controlnet.")
        if given:
            return {name: _array(value) for name, value in zip(self.residuals, given, strict=True)}
        return {
            name: np.zeros((len(sample), channels, -(-sample.shape[2] // by), -(-sample.shape[3] // by)), np.float32)
            for name, (channels, by) in zip(self.residuals, residual_shapes(self.config), strict=False)
        }


def residual_shapes(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(channels, how many latents one stands for) of each residual a ControlNet gives a U-Net of this config."""
    widths, each = config["block_out_channels"], config["layers_per_block"]
    counts = [each] * len(widths) if isinstance(each, int) else list(each)
    found = [(widths[0], 1)]
    for stage, (width, count) in enumerate(zip(widths, counts, strict=True)):
        found += [(width, 2**stage)] * count
        if stage < len(widths) - 1:
            found.append((width, 2 ** (stage + 1)))
    return [*found, (widths[-1], 2 ** (len(widths) - 1))]


class TextEncoderStandIn(_StandIn):
    """``CLIPTextModel``, of which the last states [B, L, D] are known: a call for others raises ValueError."""

    def __init__(self, config: Any, run: Run) -> None:
        super().__init__(config)
        self.run = run

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **options: Any) -> Any:
        if options.get("output_hidden_states"):
            raise ValueError("an exported text encoder gives its last layer alone: clip_skip needs the model itself.")
        ids = np.ascontiguousarray(input_ids.cpu().numpy().astype(np.int64))
        found = tuple(_tensors(self.run({"input_ids": ids})))
        return BaseModelOutput(last_hidden_state=found[0]) if options.get("return_dict") else found


class AutoencoderStandIn(_StandIn):
    """``AutoencoderKL`` or ``AutoencoderTiny``, as the config says."""

    def __init__(self, config: Mapping[str, Any], encode: Run, decode: Run) -> None:
        super().__init__(FrozenDict(config))
        self._encode, self._decode = encode, decode

    def encode(self, picture: Tensor, return_dict: bool = True) -> Any:
        found = _tensors(self._encode({"picture": _array(picture)}))[0]
        if self.config.get("_class_name") == AutoencoderTiny.__name__:
            return AutoencoderTinyOutput(latents=found) if return_dict else (found,)
        spread = DiagonalGaussianDistribution(found)
        return AutoencoderKLOutput(latent_dist=spread) if return_dict else (spread,)

    def decode(self, latents: Tensor, return_dict: bool = True, generator: Any = None) -> Any:
        picture = _tensors(self._decode({"latents": _array(latents)}))[0]
        return DecoderOutput(sample=picture) if return_dict else (picture,)


class ControlNetStandIn(ControlNetModel):
    """A ``ControlNetModel``, for which diffusers' pipelines look by class. Guess mode raises ValueError."""

    def __init__(self, config: Mapping[str, Any], run: Run) -> None:
        nn.Module.__init__(self)
        self._internal_dict = FrozenDict(config)
        self.register_parameter("empty", nn.Parameter(torch.empty(0), requires_grad=False))
        self._run = run

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def forward(
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        controlnet_cond: Tensor,
        conditioning_scale: float = 1.0,
        guess_mode: bool = False,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        if guess_mode:
            raise ValueError("an exported ControlNet has no guess mode. Use the model that was exported.")
        found = _tensors(
            self._run(
                {
                    "sample": _array(sample),
                    "timestep": _numbers(timestep),
                    "positive": _array(encoder_hidden_states),
                    "image": _array(controlnet_cond),
                    "scale": np.array(conditioning_scale, dtype=np.float32),
                }
            )
        )
        if return_dict:
            return ControlNetOutput(down_block_res_samples=tuple(found[:-1]), mid_block_res_sample=found[-1])
        return found[:-1], found[-1]
