"""The loaded model of each family around one U-Net in LDM layout."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

Encode = Callable[[list[str]], torch.Tensor]


def sd_sigmas() -> torch.Tensor:
    """Sigma of every training timestep of Stable Diffusion 1.x, [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)
    return ((1 - alphas) / alphas).sqrt().float()


def any_text(width: int, tokens: int = 7) -> Encode:
    """A text encoder for tests that need no meaning: the same states for the same words."""

    def encode(texts: list[str]) -> torch.Tensor:
        rows = []
        for text in texts:
            generator = torch.Generator().manual_seed(zlib.crc32(text.encode()))
            rows.append(torch.randn((tokens, width), generator=generator))
        return torch.stack(rows)

    return encode


class Model:
    """Denoised prediction in k-diffusion's space from the U-Net's eps."""

    def __init__(self, unet: Any, encode: Encode) -> None:
        self.sigmas = sd_sigmas()
        self.alphas_cumprod = 1 / (self.sigmas**2 + 1)
        self.encode, self.encoded = encode, []

    def get_learned_conditioning(self, texts: list[str]) -> torch.Tensor:
        self.encoded += list(texts)
        return self.encode(list(texts))

    def denoised(self, x: torch.Tensor, sigma: torch.Tensor, call: Callable[..., torch.Tensor]) -> torch.Tensor:
        t = (self.sigmas[None] - sigma[:, None]).abs().argmin(1)
        s = sigma.view(-1, 1, 1, 1)
        return x - s * call(x / (s**2 + 1).sqrt(), t)


def vector_of(unet: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    """What SDXL is told besides, here made of the text."""
    return {"y": text[:, 0, : unet.vector]} if unet.vector else {}


class A1111Model(Model):
    """`sd_model.model.diffusion_model`; an inpainting U-Net (9 channels) gets image_cond beside x."""

    def __init__(self, unet: Any, encode: Encode) -> None:
        super().__init__(unet, encode)
        self.model = SimpleNamespace(diffusion_model=unet)

    def apply_model(self, x: Any, sigma: Any, text: Any, image_cond: Any) -> torch.Tensor:
        unet = self.model.diffusion_model

        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            if unet.input_blocks[0][0].in_channels == 9:
                x = torch.cat([x, image_cond.expand(-1, 5, *x.shape[2:])], 1)
            return unet(x, t, context=text, **vector_of(unet, text))

        return self.denoised(x, sigma, call)


class UnetPatcher:
    """clone() deep-copies model_options; modifiers are a list in them."""

    def __init__(self, model: Any, options: dict[str, Any] | None = None) -> None:
        self.model, self.model_options = model, options or {"transformer_options": {}}
        self.controlnet_linked_list: Any = None
        """The test's: gives the residuals of a call, {"input" | "middle" | "output": [...]}, for its latents."""

    def clone(self) -> UnetPatcher:
        copied = UnetPatcher(self.model, copy.deepcopy(self.model_options))
        copied.controlnet_linked_list = self.controlnet_linked_list
        return copied

    def add_conditioning_modifier(self, modifier: Any) -> None:
        self.model_options.setdefault("conditioning_modifiers", []).append(modifier)

    def set_attn2_replace(self, patch: Any, block: str, number: int) -> None:
        replace = self.model_options["transformer_options"].setdefault("patches_replace", {})
        replace.setdefault("attn2", {})[(block, number)] = patch


class ForgeModel(Model):
    """`sd_model.forge_objects.unet` is a patcher, put back to `forge_objects_after_applying_lora` before a sampling."""

    def __init__(self, unet: Any, encode: Encode) -> None:
        super().__init__(unet, encode)
        inner = SimpleNamespace(diffusion_model=unet, apply_model=self.apply_model)
        self.forge_objects_after_applying_lora = SimpleNamespace(unet=UnetPatcher(inner))
        self.forge_objects = SimpleNamespace(unet=self.forge_objects_after_applying_lora.unet)

    def apply_model(self, x: Any, sigma: Any, text: Any, options: dict[str, Any], control: Any = None) -> torch.Tensor:
        unet = self.forge_objects.unet.model.diffusion_model

        def call(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return unet(x, t, context=text, control=control, transformer_options=options, **vector_of(unet, text))

        return self.denoised(x, sigma, call)
