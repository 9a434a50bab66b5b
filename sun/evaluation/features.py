"""The networks that look at pictures: what set distance, feature distance and agreement are measured with.

``emoji``: our own image-text model of emoji scenes. ``clip``: a CLIP of transformers from a local folder, and for the
set distance Inception if its weights are given. ``none``: no such network; the set distance then uses the sampling
U-Net's own features of latents, and agreement is not measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from ..common import worlds
from ..common.identity import fingerprint
from ..common.settings import ConfigError
from ..common.worlds import EMOJI
from ..pictures.png import to_images
from ..pipelines.loading import load_part
from ..shipped import EMOJI_CONTRAST
from .sampler import Sampler

FEATURES = ("auto", EMOJI, "clip", "none")
INCEPTION_SIZE = 299


class FeatureNetwork(Protocol):
    """Pixels are [B, 3, H, W] in -1..1; features [B, D] have length 1, so that products are cosines."""

    def image_features(self, pixels: Tensor) -> Tensor: ...

    def image_maps(self, pixels: Tensor) -> list[Tensor]:
        """Feature maps [B, C, h, w] of several depths."""
        ...

    def text_features(self, texts: list[str]) -> Tensor: ...


@dataclass
class Features:
    """A network with the name and fingerprint its figures are kept under; ``of_sets`` makes the features of sets.

    ``of_sets`` takes pixels [B, 3, H, W] and latents [B, 4, h, w] and gives [B, D].
    """

    name: str
    network: FeatureNetwork | None
    of_sets: Callable[[Tensor, Tensor], Tensor]
    print: str
    sets: str


def load_features(
    name: str, sampler: Sampler, *, emoji_model: bool, contrast: str = "", clip_model: str = "", inception: str = ""
) -> Features:
    """The network called ``name``. ``auto``: ``emoji`` for the shipped model where its network is there, else ``none``.

    ``contrast``: folder of an emoji network, empty for the shipped one. ``clip_model``: folder of a CLIP model.
    ``inception``: file with the Inception weights of torch-fidelity. Raises ConfigError.
    """
    if name == "auto":
        name = EMOJI if emoji_model and (contrast or EMOJI_CONTRAST.is_dir()) else "none"
    if name == "none":
        return Features("none", None, lambda _pixels, latents: sampler.features(latents), "unet", "own U-Net")
    if name == EMOJI:
        network = _load_contrast(contrast).to(sampler.device).eval()
        where = Path(contrast) if contrast else EMOJI_CONTRAST
        return Features(EMOJI, network, lambda pixels, _: _spread(network, pixels), fingerprint(where), EMOJI)
    if name != "clip":
        raise ConfigError(f"features takes {', '.join(FEATURES)}, not {name!r}.")
    clip = ClipFeatures(clip_model, sampler.device)
    mark = fingerprint(clip_model)
    if not inception:
        return Features("clip", clip, lambda pixels, _: _spread(clip, pixels), mark, "CLIP")
    extractor = _load_inception(inception).to(sampler.device)
    mark += fingerprint(inception)
    return Features("clip", clip, lambda pixels, _: inception_features(extractor, pixels), mark, "Inception")


def _spread(network: FeatureNetwork, pixels: Tensor) -> Tensor:
    """Features of length 1 times sqrt(D): components of the usual size, which KID's kernel expects."""
    features = network.image_features(pixels).float()
    return features * features.shape[1] ** 0.5


def _load_contrast(folder: str) -> Any:
    if not folder and not EMOJI_CONTRAST.is_dir():
        raise ConfigError(
            f'features = "{EMOJI}": this installation has no shipped network. Train one with `sun train-emoji '
            'contrast` and name its folder with the setting contrast, or use features = "none".'
        )
    return worlds.find(EMOJI, "features").load(folder or None)


class ClipFeatures:
    """A CLIP model (Radford et al. 2021) of transformers, from a local folder."""

    def __init__(self, folder: str, device: torch.device | str):
        from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

        if not folder or not (Path(folder) / "config.json").is_file():
            raise ConfigError(
                'features = "clip" needs the setting clip_model: a local folder of a CLIP model with its tokenizer '
                f"and image processor (openai/clip-vit-large-patch14, for example), not {folder!r}. "
                "Nothing is downloaded."
            )
        self.device = torch.device(device)
        self.model = load_part(CLIPModel, Path(folder), torch.float32).to(self.device)
        self.processor: Any = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
        self.tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)

    @torch.no_grad()
    def image_features(self, pixels: Tensor) -> Tensor:
        return _unit(self.model.get_image_features(pixel_values=self._processed(pixels)))

    @torch.no_grad()
    def image_maps(self, pixels: Tensor) -> list[Tensor]:
        states = self.model.vision_model(pixel_values=self._processed(pixels), output_hidden_states=True).hidden_states
        depth = len(states) - 1
        chosen = sorted({max(1, depth // 4), max(1, depth // 2), max(1, 3 * depth // 4), depth})
        side = round((states[0].shape[1] - 1) ** 0.5)  # the first token is the class token
        return [states[i][:, 1:].transpose(1, 2).unflatten(2, (side, side)) for i in chosen]

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _unit(self.model.get_text_features(**tokens.to(self.device)))

    def _processed(self, pixels: Tensor) -> Tensor:
        return self.processor(images=to_images(pixels), return_tensors="pt").pixel_values.to(self.device)


def _unit(output: Any) -> Tensor:
    """Projected features of either version of transformers, of length 1."""
    features: Tensor = output if isinstance(output, Tensor) else output.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _load_inception(weights: str) -> Any:
    """The Inception of FID as torchmetrics runs it, with weights from a local file."""
    if not Path(weights).is_file():
        raise ConfigError(f"inception = {weights} is no file. Give torch-fidelity's weights (pt_inception).")
    from torchmetrics.image.fid import FrechetInceptionDistance

    try:
        return FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=weights).inception
    except ModuleNotFoundError as error:
        raise ConfigError(
            'Inception features need torch-fidelity: pip install -e ".[inception]" in a clone of the repository, or '
            "leave the setting inception empty for CLIP features."
        ) from error


@torch.no_grad()
def inception_features(extractor: Any, pixels: Tensor) -> Tensor:
    """[B, 2048] of pictures resized with PIL's antialiased bicubic (Parmar et al. 2022, clean-fid)."""
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    resized = [image.resize(size, Image.Resampling.BICUBIC) for image in to_images(pixels)]
    array = torch.stack([torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8).view(*size, 3) for i in resized])
    features: Tensor = extractor(array.permute(0, 3, 1, 2).to(pixels.device))
    return features.float()
