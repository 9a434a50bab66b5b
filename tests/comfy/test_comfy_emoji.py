"""Load Emoji Diffusion: the shipped diffusers folder gives the same numbers in ComfyUI as in diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

SD15_FACTOR = 0.18215


@pytest.fixture(scope="module")
def pipe(emoji_folder: Path):
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline.from_pretrained(emoji_folder, torch_dtype=torch.float32)


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    """Largest difference relative to the largest value."""
    difference = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert difference < tolerance, f"relative difference {difference:.2e}, tolerance {tolerance:.0e}"


@torch.no_grad()
def test_unet_equals_diffusers(host: SimpleNamespace, pipe) -> None:
    model = host.nodes["SUN_LoadEmojiDiffusion"].execute().result[0]  # not the one that other tests run in fewer bits
    torch.manual_seed(0)
    x, text, t = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 128), torch.tensor([999, 249])
    ours = model.model.diffusion_model.float()(x, t.float(), context=text, transformer_options={})
    close(ours, pipe.unet(x, t, text).sample, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "prompt", ["", "large polar bear, yellow background", "cat face next to fish, purple background"]
)
def test_text_equals_diffusers(emoji: SimpleNamespace, pipe, prompt: str) -> None:
    ours, _ = emoji.clip.encode_from_tokens(emoji.clip.tokenize(prompt), return_pooled=True)
    theirs, _ = pipe.encode_prompt(prompt, "cpu", 1, False)
    close(ours, theirs, 1e-5)


@torch.no_grad()
def test_vae_equals_diffusers_in_both_directions(emoji: SimpleNamespace, pipe) -> None:
    torch.manual_seed(0)
    pixels = torch.rand(1, 64, 64, 3)
    factor = pipe.vae.config.scaling_factor
    internal = pipe.vae.encode(pixels.movedim(-1, 1) * 2 - 1).latents * factor  # what the U-Net sees
    latent = emoji.vae.encode(pixels)
    close(latent * SD15_FACTOR, internal, 1e-5)
    decoded = pipe.vae.decode(internal / factor).sample / 2 + 0.5
    close(emoji.vae.decode(latent).movedim(-1, 1), decoded.clamp(0, 1), 1e-5)


@torch.no_grad()
def test_previews_are_the_pictures(emoji: SimpleNamespace) -> None:
    """Through the previewer that ComfyUI makes for this latent format."""
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    ours = emoji.model.model.latent_format
    picture = emoji.vae.decode(ours.process_out(latents))[0]
    before, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        preview = latent_preview.get_previewer(torch.device("cpu"), ours).decode_latent_to_preview(latents)
    finally:
        args.preview_method = before
    difference = torch.from_numpy(np.asarray(preview) / 255.0) - picture.clamp(0, 1)
    assert difference.abs().max() < 0.01


def layers_without_weights(kind: type[torch.nn.Linear]) -> type[torch.nn.Linear]:
    """`kind` as newer ComfyUI makes it on NVIDIA: it has no weights until they are loaded, and keeps their dtype."""

    class Late(kind):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self.weight = self.bias = None

        def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors) -> None:
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    loaded = state_dict[prefix + name].clone()
                    setattr(self, name, torch.nn.Parameter(loaded, requires_grad=False))
            if self.weight is None:
                missing.append(prefix + "weight")

    return Late


def test_layers_that_get_their_weights_late(
    host: SimpleNamespace, emoji: SimpleNamespace, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.ops

    expected = run.sun(run.apply())
    for operations in (comfy.ops.manual_cast, comfy.ops.disable_weight_init):
        monkeypatch.setattr(operations, "Linear", layers_without_weights(operations.Linear))
    model, clip, _ = host.nodes["SUN_LoadEmojiDiffusion"].execute().result
    loader = host.nodes["SUN_LoadAdapter"]
    adapter = loader.execute(host.part("nodes.folders").SHIPPED).result[0]
    for loaded in (model.model.diffusion_model, clip.cond_stage_model, adapter.adapter):
        assert any(type(layer).__name__ == "Late" for layer in loaded.modules())
    tokens = clip.tokenize("large polar bear, yellow background")
    texts = [each.encode_from_tokens(tokens, return_pooled=True) for each in (clip, emoji.clip)]
    for ours, usual in zip(*texts, strict=True):
        assert torch.equal(ours, usual)
    assert torch.equal(run.sun(run.apply(model, adapter=adapter)), expected)


def test_incomplete_folder_is_named(host: SimpleNamespace, tmp_path: Path) -> None:
    emoji = host.part("nodes.emoji_model")
    with pytest.raises(emoji.EmojiDiffusionError, match="has no unet, vae, text_encoder, tokenizer, scheduler"):
        emoji.load(tmp_path)
