"""The frozen models: the base, and fine-tunes of it, real and virtual, that take turns with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.settings import ConfigError
from ..pipelines.latents import latent_scale
from ..pipelines.loading import ModelError, load_pipeline, load_unet, noise_schedule, require_text_to_image
from ..pipelines.text import encode_texts
from .data.samples import Encode
from .virtual import VirtualFineTune, Weights


def check_predicts_noise(folder: str | Path, scheduler_config: Mapping[str, Any]) -> None:
    """Raise ConfigError unless a model with this scheduler predicts the noise (epsilon)."""
    kind = scheduler_config.get("prediction_type", "epsilon")
    if kind != "epsilon":
        raise ConfigError(f"{folder} predicts {kind!r}; SUN is trained on models that predict the noise (epsilon).")


def load_frozen(model: str) -> Any:
    """StableDiffusionPipeline of a model as :func:`sun.pipelines.loading.load_pipeline` takes it, every weight frozen.

    Raises ConfigError, a FileNotFoundError too where there is no model, and for one that does not predict the noise or
    is an inpainting model.
    """
    pipe = load_pipeline(model, torch.float32)
    check_predicts_noise(model, pipe.scheduler.config)
    require_text_to_image(pipe, model)
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.requires_grad_(False).eval()
    return pipe


def encoder_of(pipe: Any) -> Encode:
    """Texts -> text states [B, L, D] of this model, without gradients."""

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        return encode_texts(pipe.tokenizer, pipe.text_encoder, texts)

    return encode


def pixels_of(pipe: Any, resolution: int) -> int:
    """Pixels to a side of the pictures trained on: ``resolution``, or the model's own where that is 0."""
    own: int = pipe.unet.config.sample_size * latent_scale(pipe.vae)
    return resolution or own


def latent_shape(pipe: Any, resolution: int) -> tuple[int, int, int]:
    """[C, h, w] of the latents of such pictures."""
    side = pixels_of(pipe, resolution) // latent_scale(pipe.vae)
    return pipe.unet.config.in_channels, side, side


class FrozenModels:
    """The weights that one frozen U-Net has in turn, so that an adapter does not lean on its own: these, and those of
    fine-tunes of it.

    unet: the frozen U-Net. folders: diffusers folders of models with the same U-Net; only their U-Nets are used.
    virtual: makes further ones of the weights of those folders' models, which are computed in their turn. Raises
    ConfigError, naming the folder, for one that is none, does not fit or does not predict the noise.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        folders: Sequence[str],
        virtual: Callable[[Sequence[Weights]], Sequence[VirtualFineTune]] | None = None,
    ):
        self._parameters = dict(unet.named_parameters())
        self._weights = [{name: parameter.data for name, parameter in self._parameters.items()}]
        self._weights += [self._read(folder) for folder in folders]
        self._virtual = list(virtual(self._weights[1:])) if virtual else []
        self._computed: tuple[int, dict[str, Tensor]] = (0, {})

    def __len__(self) -> int:
        return len(self._weights) + len(self._virtual)

    def use(self, index: int) -> None:
        """Gives the U-Net the weights of model ``index``; 0 is the base. Never between forward and backward pass."""
        if len(self) == 1:
            return
        weights = self._weights_of(index)
        for name, parameter in self._parameters.items():
            parameter.data = weights[name]

    def _weights_of(self, index: int) -> dict[str, Tensor]:
        """Of the virtual ones only the last that was used is kept."""
        if index < len(self._weights):
            return self._weights[index]
        if self._computed[0] != index:
            self._computed = (index, {})  # before the next is made: two are never held
            self._computed = (index, self._virtual[index - len(self._weights)].weights(self._weights[0]))
        return self._computed[1]

    def turn(self, step: int, every: int) -> int:
        """Whose turn step ``step`` is, when they change each ``every`` steps."""
        return step // every % len(self)

    def _read(self, folder: str) -> dict[str, Tensor]:
        if not (Path(folder) / "unet" / "config.json").exists():
            raise ConfigError(f"fine_tunes: {folder} is not a diffusers folder of a model (no unet/config.json).")
        own = self._parameters
        try:
            check_predicts_noise(folder, noise_schedule(folder))
            other = dict(load_unet(folder, torch.float32).named_parameters())
        except ModelError as error:
            raise ConfigError(f"fine_tunes: {error}") from error
        if {name: p.shape for name, p in other.items()} != {name: p.shape for name, p in own.items()}:
            raise ConfigError(f"fine_tunes: the U-Net of {folder} has other layers than the base's.")
        return {name: parameter.data.to(own[name].device, own[name].dtype) for name, parameter in other.items()}


def use_fast_attention(unet: Any, device: torch.device) -> None:
    """On CPUs, let ``unet``'s attention be plain matrix products instead of the fused kernel.

    The fused kernel's backward takes a quarter of a training step there; without it a step of Emoji Diffusion is 1.4
    times as fast. Call it before SUN is attached. Accelerators keep the fused kernel.
    """
    if device.type == "cpu":
        from diffusers.models.attention_processor import AttnProcessor

        unet.set_attn_processor(AttnProcessor())
