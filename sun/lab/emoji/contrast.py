"""EmojiContrast: a small image-text model that judges the pictures of Emoji Diffusion.

Two encoders into one space, trained to find each other's partner in a batch (CLIP, Radford et al. 2021,
arXiv 2103.00020) on all emoji styles, so that it judges fine-tuned models as fairly as the base. It needs torch,
safetensors and transformers' tokenizer; ``contrast_training`` trains it.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...shipped import EMOJI_CONTRAST

WEIGHTS, SETTINGS, TOKENIZER = "model.safetensors", "config.json", "tokenizer"


@dataclass
class ContrastShape:
    """Sizes of the model. ``widths`` are the channels of the picture encoder's stages, each at half the size before."""

    size: int = 64  # pixels; pictures of other sizes are resized
    widths: tuple[int, ...] = (32, 64, 128, 128)
    text_width: int = 96
    text_layers: int = 2
    text_heads: int = 4
    dim: int = 128  # of the common space


class ResidualBlock(nn.Sequential):
    """[B, C, H, W] -> the same, with two 3x3 convolutions added. Normalised by groups: no state to average."""

    def __init__(self, width: int):
        layers = [(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)]
        super().__init__(*(part for layer in layers for part in layer))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class PictureEncoder(nn.Module):
    """Pixels [B, 3, size, size] -> [B, dim], and the output of each stage on the way."""

    def __init__(self, shape: ContrastShape):
        super().__init__()
        side = shape.size // 2 ** len(shape.widths)
        if side * 2 ** len(shape.widths) != shape.size:
            raise ValueError(f"size {shape.size} must be a multiple of {2 ** len(shape.widths)}, one halving a stage")
        inputs = (3, *shape.widths[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, 3, stride=2, padding=1), ResidualBlock(o))
            for i, o in zip(inputs, shape.widths, strict=True)
        )
        # Flattened rather than averaged: captions say where things are.
        last = shape.widths[-1]
        self.head = nn.Sequential(
            nn.GroupNorm(8, last),
            nn.SiLU(),
            nn.Conv2d(last, 32, 1),
            nn.Flatten(),
            nn.Linear(32 * side * side, shape.dim, bias=False),
        )

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """The output [B, C, h, w] of each stage."""
        outputs = [pixels]
        for stage in self.stages:
            outputs.append(stage(outputs[-1]))
        return outputs[1:]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.maps(pixels)[-1])


class TextEncoder(nn.Module):
    """Token ids [B, L] and their mask (1: a token, 0: padding) -> [B, dim]."""

    def __init__(self, shape: ContrastShape, vocabulary: int, length: int):
        super().__init__()
        width = shape.text_width
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(torch.empty(length, width))
        nn.init.normal_(self.tokens.weight, std=0.02)  # both as CLIP's
        nn.init.normal_(self.positions, std=0.01)
        layer = nn.TransformerEncoderLayer(
            width, shape.text_heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(
            layer, shape.text_layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.projection = nn.Linear(width, shape.dim, bias=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.layers(self.tokens(ids) + self.positions[: ids.shape[1]], src_key_padding_mask=mask == 0)
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1).to(x.dtype)
        return self.projection((weights * x).sum(1))


class EmojiContrast(nn.Module):
    """Scores how well pictures and texts fit together, and gives features to compare pictures by."""

    def __init__(self, shape: ContrastShape, tokenizer: Any):
        """``tokenizer``: a transformers ``CLIPTokenizer``; it is saved with the model."""
        super().__init__()
        self.shape, self.tokenizer = shape, tokenizer
        self.picture = PictureEncoder(shape)
        self.text = TextEncoder(shape, len(tokenizer), tokenizer.model_max_length)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @property
    def device(self) -> torch.device:
        return self.log_scale.device

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features of pictures and of tokens, both [B, dim] of length 1, and the scale of their cosines."""
        return self.image_features(pixels), self._text_features(ids, mask), self.log_scale.exp()

    def image_features(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] in -1..1 -> [B, dim] of length 1."""
        return F.normalize(self.picture(self._resized(pixels)).float(), dim=-1)

    def image_maps(self, pixels: Tensor) -> list[Tensor]:
        """Pixels [B, 3, H, W] in -1..1 -> the output [B, C, h, w] of each stage, from fine to coarse."""
        return [m.float() for m in self.picture.maps(self._resized(pixels))]

    def text_features(self, texts: list[str]) -> Tensor:
        """[B, dim] of length 1."""
        return self._text_features(*self.tokenize(texts))

    def agreement(self, pixels: Tensor, texts: list[str]) -> Tensor:
        """Cosine [B] of each picture with its own text."""
        return (self.image_features(pixels) * self.text_features(texts)).sum(-1)

    def tokenize(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Token ids and mask, both [B, L] with L the longest text's length, at most the tokenizer's (77)."""
        length = self.tokenizer.model_max_length
        batch = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return batch.input_ids.to(self.device), batch.attention_mask.to(self.device)

    def _text_features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return F.normalize(self.text(ids, mask).float(), dim=-1)

    def _resized(self, pixels: Tensor) -> Tensor:
        pixels = pixels.to(self.device, torch.float32)
        size = (self.shape.size, self.shape.size)
        if pixels.shape[-2:] == size:
            return pixels
        return F.interpolate(pixels, size, mode="bilinear", antialias=True, align_corners=False)

    def save(self, folder: str | Path) -> Path:
        """Write the model as fp16 with its settings and its tokenizer into ``folder``; returns it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {k: v.detach().half().cpu().contiguous() for k, v in self.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / SETTINGS).write_text(json.dumps(asdict(self.shape), indent=2) + "\n")
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        return folder

    @classmethod
    def load(cls, folder: str | Path | None = None) -> EmojiContrast:
        """A saved model, frozen, in fp32; the shipped one by default.

        Raises FileNotFoundError that says how to make one.
        """
        from transformers import CLIPTokenizer

        source = EMOJI_CONTRAST if folder is None else Path(folder)
        missing = [name for name in (WEIGHTS, SETTINGS, TOKENIZER) if not (source / name).exists()]
        if missing:
            raise FileNotFoundError(
                f"{source} is no image-text model ({', '.join(missing)} missing): "
                "`sun train-emoji contrast` trains one, `sun train-emoji ship --contrast RUN` installs it."
            )
        settings = json.loads((source / SETTINGS).read_text())
        shape = ContrastShape(**{**settings, "widths": tuple(settings["widths"])})
        model = cls(shape, CLIPTokenizer.from_pretrained(source / TOKENIZER))
        model.load_state_dict(load_file(source / WEIGHTS))
        return model.float().eval().requires_grad_(False)
