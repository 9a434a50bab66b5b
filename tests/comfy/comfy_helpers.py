"""What the ComfyUI tests share: models of the shipped shapes with random weights, counting calls, comparing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch


def _byte_tokenizer(folder: Path) -> None:
    """A CLIP vocabulary of single bytes: every text works, nothing is learned."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    letters = [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def make_emoji_stand_in(folder: Path, seed: int = 0) -> None:
    """A diffusers folder shaped like Emoji Diffusion, with random weights in fp16."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    _byte_tokenizer(folder / "bytes")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "bytes", model_max_length=77)
    end = tokenizer.eos_token_id
    text = CLIPTextConfig(
        hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=512, hidden_act="quick_gelu",
        vocab_size=len(tokenizer), max_position_embeddings=77, bos_token_id=tokenizer.bos_token_id, eos_token_id=end,
        pad_token_id=end,
    )  # fmt: skip
    pipe = StableDiffusionPipeline(
        unet=UNet2DConditionModel(
            sample_size=16, block_out_channels=(64, 128, 128, 64), layers_per_block=2, cross_attention_dim=128,
            attention_head_dim=4,
        ),
        vae=AutoencoderTiny(scaling_factor=1.7),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, set_alpha_to_one=False, steps_offset=1,
            clip_sample=False,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).to(dtype=torch.float16)  # fmt: skip
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "bytes")


def make_adapter(model_folder: Path, path: Path, positive: bool = True, seed: int = 1) -> None:
    """An adapter for a diffusers model, at its start values with some noise on them."""
    from diffusers import UNet2DConditionModel

    from sun import SunAdapter

    torch.manual_seed(seed)
    adapter = SunAdapter.from_unet(UNet2DConditionModel.from_pretrained(model_folder / "unet"), positive=positive)
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if "alpha" in name else 0.02))
    adapter.save(path, dtype=torch.float16)


class Counts:
    """Counts calls of modules while it is entered: .unet, .sun (layer calls), and the .timesteps the U-Net saw."""

    def __init__(self, model, adapter) -> None:
        self._model, self._adapter = model, adapter

    def __enter__(self) -> Counts:
        self.unet, self.sun, self.timesteps, self._handles = 0, 0, [], []
        self._handles.append(self._model.model.diffusion_model.register_forward_pre_hook(self._unet))
        for layer in self._adapter.patcher.model.layers:
            self._handles.append(layer.register_forward_pre_hook(self._sun))
        return self

    def _unet(self, _, args) -> None:
        self.unet += 1
        self.timesteps.append(int(args[1][0]))

    def _sun(self, *_) -> None:
        self.sun += 1

    def __exit__(self, *_) -> None:
        for handle in self._handles:
            handle.remove()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
