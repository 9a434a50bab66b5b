"""Load Emoji ControlNet and the inpainting variant: the same pictures as in diffusers, from ComfyUI's own classes."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_helpers import relative

PROMPT, NEGATIVE = "large polar bear, yellow background", "blurry, red, a car"


def in_diffusers(kind: str, emoji_folder: Path, adapter_file: Path, **inputs: Any) -> torch.Tensor:
    """Latents [1, 4, 16, 16] of SUN's 4 steps in a diffusers pipeline, ending at sigma 0 as ComfyUI does."""
    import diffusers

    import sun
    from sun.lab.emoji.inpainting import load_inpainting_unet
    from sun.shipped.control_lora import controlnet_from_unet

    base = diffusers.StableDiffusionPipeline.from_pretrained(emoji_folder, torch_dtype=torch.float32)
    parts = dict(base.components)
    if kind == "ControlNet":
        parts["controlnet"] = controlnet_from_unet(base.unet, inputs.pop("file"))
    else:
        parts["unet"] = load_inpainting_unet(base.unet, inputs.pop("file"))
    pipe = getattr(diffusers, f"StableDiffusion{kind}Pipeline")(**parts, requires_safety_checker=False)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(
        pipe.scheduler.config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    pipe.set_progress_bar_config(disable=True)
    sun.attach(pipe, sun.SunAdapter.load(adapter_file, dtype=torch.float32))
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(7))
    return pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=4, latents=noise, output_type="latent", **inputs
    ).images


def random_picture(seed: int = 5) -> torch.Tensor:
    """[1, 128, 128, 3] in 0..1, of patches of 16 pixels."""
    patches = torch.rand(1, 8, 8, 3, generator=torch.Generator().manual_seed(seed))
    return patches.repeat_interleave(16, dim=1).repeat_interleave(16, dim=2)


def steer(host, run, find_edges: bool, picture: torch.Tensor, strength: float = 1.0):
    control = host.nodes["SUN_LoadEmojiControlNet"].execute(find_edges).result[0]
    node = host.nodes["ControlNetApplyAdvanced"]()
    return node.apply_controlnet(run.positive, run.negative, control, picture, strength, 0.0, 1.0)


def test_the_controlnet_draws_what_it_draws_in_diffusers(
    host: SimpleNamespace, run: SimpleNamespace, random_extras, emoji_folder: Path, adapter_file: Path
) -> None:
    lines = (torch.rand(1, 128, 128, 1, generator=torch.Generator().manual_seed(1)) > 0.9).float().expand(-1, -1, -1, 3)
    model = run.apply()
    with run.count(model) as counts:
        ours = run.sun(model, *steer(host, run, False, lines)) * 0.18215
    assert (counts.unet, counts.sun) == (4, 64)
    theirs = in_diffusers(
        "ControlNet", emoji_folder, adapter_file, file=random_extras.control, image=lines.movedim(-1, 1)
    )
    difference, effect = relative(ours, theirs), relative(ours, run.sun(model) * 0.18215)
    print(f"ControlNet in ComfyUI against diffusers: {difference:.1e}, its effect: {effect:.1e}")
    assert difference < 1e-3 < 1e-2 < effect


def test_any_picture_gives_its_edges(host: SimpleNamespace, run: SimpleNamespace, random_extras) -> None:
    from sun.shipped.edges import find_edges

    picture, model = random_picture(), run.apply()
    lines = find_edges(picture.movedim(-1, 1)).movedim(1, -1).expand(-1, -1, -1, 3)
    assert 0.02 < float(lines.mean()) < 0.3
    expected = run.sun(model, *steer(host, run, False, lines))
    assert torch.equal(run.sun(model, *steer(host, run, True, picture)), expected)
    assert not torch.equal(run.sun(model, *steer(host, run, False, picture)), expected)


def test_the_stock_loader_reads_the_file(host: SimpleNamespace, run: SimpleNamespace, random_extras) -> None:
    folder = host.base / "models" / "controlnet"
    folder.mkdir(exist_ok=True)
    shutil.copy(random_extras.control, folder / "emoji.safetensors")
    try:
        control = host.nodes["ControlNetLoader"]().load_controlnet("emoji.safetensors")[0]
    finally:
        (folder / "emoji.safetensors").unlink()
    assert type(control) is host.comfy.controlnet.ControlLora
    lines = torch.zeros(1, 128, 128, 3)
    lines[:, 40:42, 20:100] = 1.0
    model, node = run.apply(), host.nodes["ControlNetApplyAdvanced"]()
    theirs = node.apply_controlnet(run.positive, run.negative, control, lines, 1.0, 0.0, 1.0)
    assert torch.equal(run.sun(model, *theirs), run.sun(model, *steer(host, run, False, lines)))


def test_the_inpainting_model_draws_what_it_draws_in_diffusers(
    host: SimpleNamespace, run: SimpleNamespace, random_extras, emoji_folder: Path, adapter_file: Path
) -> None:
    model, _, vae = host.nodes["SUN_LoadEmojiDiffusion"].execute(variant="inpainting").result
    picture, mask = random_picture(), torch.zeros(1, 128, 128)
    mask[..., 64:] = 1.0
    conditioning = host.nodes["InpaintModelConditioning"]()

    def paint(picture: torch.Tensor) -> torch.Tensor:
        given = conditioning.encode(run.positive, run.negative, picture, vae, mask, noise_mask=False)
        return run.sun(run.apply(model), given[0], given[1])

    ours = paint(picture) * 0.18215
    theirs = in_diffusers(
        "Inpaint", emoji_folder, adapter_file, file=random_extras.inpainting, image=picture.movedim(-1, 1),
        mask_image=mask[None], width=128, height=128, strength=1.0,
    )  # fmt: skip
    difference = relative(ours, theirs)
    print(f"inpainting in ComfyUI against diffusers: {difference:.1e}")
    assert difference < 1e-3
    assert relative(paint(random_picture(6)) * 0.18215, theirs) > 1e-3  # it looks at what is around the mask


def test_the_inpainting_model_without_a_picture_sees_grey(host: SimpleNamespace, run, random_extras) -> None:
    model, _, vae = host.nodes["SUN_LoadEmojiDiffusion"].execute(variant="inpainting").result
    like = torch.zeros(2, 4, 16, 16)
    blank = model.model.blank_inpaint_image_like(like)
    grey = model.model.latent_format.process_in(vae.encode(torch.full((1, 128, 128, 3), 0.5)))
    assert blank.shape == like.shape
    assert relative(blank[:1, :, 4:12, 4:12], grey[:, :, 4:12, 4:12]) < 0.2
    assert run.sun(run.apply(model)).isfinite().all()


def test_the_base_is_the_default_variant(host: SimpleNamespace, emoji: SimpleNamespace) -> None:
    load = host.nodes["SUN_LoadEmojiDiffusion"]
    (variant,) = load.GET_SCHEMA().inputs
    assert (variant.id, variant.options, variant.default, variant.optional) == (
        "variant", ["base", "inpainting", "compact"], "base", True,
    )  # fmt: skip
    assert emoji.model.model.diffusion_model.in_channels == 4
    assert load.fingerprint_inputs() == load.fingerprint_inputs("base")


def test_missing_weights_are_explained(host: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, error = host.part("nodes.nodes"), host.part("nodes.emoji_model").EmojiDiffusionError
    monkeypatch.setattr(module, "EMOJI_CONTROLNET", tmp_path / "gone.safetensors")
    monkeypatch.setitem(module.VARIANTS, "inpainting", tmp_path / "gone.safetensors")
    with pytest.raises(error, match=r"(?s)ControlNet of Emoji Diffusion is not in this.*gone.*train-emoji controlnet"):
        host.nodes["SUN_LoadEmojiControlNet"].execute(True)
    with pytest.raises(error, match=r"(?s)inpainting model of Emoji Diffusion is not in.*gone.*train-emoji inpainting"):
        host.nodes["SUN_LoadEmojiDiffusion"].execute("inpainting")


def test_weights_of_another_base_are_refused(host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    emoji, module = host.part("nodes.emoji_model"), host.part("nodes.nodes")
    save_file({"conv_in.weight": torch.zeros(64, 9, 3, 3), "x.up": torch.zeros(8, 2), "x.down": torch.zeros(2, 8)},
              tmp_path / "other.safetensors")  # fmt: skip
    monkeypatch.setitem(module.VARIANTS, "inpainting", tmp_path / "other.safetensors")
    with pytest.raises(emoji.EmojiDiffusionError, match=r"other\.safetensors changes x\.up"):
        host.nodes["SUN_LoadEmojiDiffusion"].execute("inpainting")
