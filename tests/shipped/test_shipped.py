"""What the package ships: small, half precision, Stable Diffusion 1.x in every part, and described."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sun import SunAdapter
from sun.layers import layers_from_structure, layers_of_unet
from sun.shipped import EMOJI_COMPACT, EMOJI_CONTROLNET, EMOJI_DIFFUSION, EMOJI_INPAINTING, EMOJI_SUN

REPOSITORY = Path(__file__).resolve().parents[2]


def settings(part: str, name: str = "config.json") -> dict:
    return json.loads((EMOJI_DIFFUSION / part / name).read_text(encoding="utf-8"))


def test_weights_are_small_and_in_half_precision():
    files = [*EMOJI_DIFFUSION.rglob("*.safetensors"), EMOJI_SUN]
    assert sum(f.stat().st_size for f in files[:-1]) <= 30e6
    assert EMOJI_SUN.stat().st_size <= 4e6
    assert len(files) == 4
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
        assert kinds <= {"F16", "I64"}, file


def test_all_weights_together_are_small():
    try:
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=REPOSITORY, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    files = [REPOSITORY / name for name in tracked.decode().split("\0") if name.endswith(".safetensors")]
    assert 10e6 < sum(f.stat().st_size for f in files) <= 60e6
    assert not [name for name in tracked.decode().split("\0") if name.endswith((".ckpt", ".bin", ".pt", ".pth"))]


def test_emoji_diffusion_is_a_stable_diffusion_1():
    unet, text, vae = settings("unet"), settings("text_encoder"), settings("vae")
    assert len(unet["block_out_channels"]) == 4
    assert unet["layers_per_block"] == 2
    assert len(layers_from_structure(tuple(unet["block_out_channels"]))) == 16
    assert unet["cross_attention_dim"] == text["hidden_size"]
    assert (unet["in_channels"], vae["latent_channels"]) == (4, 4)
    assert (vae["_class_name"], len(vae["decoder_block_out_channels"])) == ("AutoencoderTiny", 4)
    assert text["max_position_embeddings"] == settings("tokenizer", "tokenizer_config.json")["model_max_length"] == 77
    schedule = settings("scheduler", "scheduler_config.json")
    assert (schedule["beta_schedule"], schedule["beta_start"], schedule["beta_end"]) == (
        "scaled_linear", 0.00085, 0.012,
    )  # fmt: skip
    assert (schedule["prediction_type"], schedule["num_train_timesteps"]) == ("epsilon", 1000)


def test_the_adapter_says_what_it_is_and_fits():
    adapter = SunAdapter.load(EMOJI_SUN)
    info, unet = adapter.info, settings("unet")
    layers = layers_from_structure(tuple(unet["block_out_channels"]))
    adapter.check_base([layer.channels for layer in layers], unet["cross_attention_dim"], "Emoji Diffusion")
    assert (info.base_model, info.guidance_scale, info.stage_length) == ("Emoji Diffusion", 1.5, 0.25)
    assert info.normalized
    assert info.training["step"] > 100
    assert all(torch.isfinite(p).all() for p in adapter.parameters())
    assert "/" not in json.dumps({**info.training, "run": 0, "teacher_solver": 0})


@torch.no_grad()
def test_the_compact_u_net_is_assembled_from_the_base_and_near_it():
    """An ordinary U-Net of its plan's shape, whose noise is the base's but for a thousandth of its mean square."""
    from diffusers import UNet2DConditionModel

    from sun.compact import assemble, read_plan, shape_of

    unet, plan = UNet2DConditionModel.from_pretrained(EMOJI_DIFFUSION / "unet"), read_plan(EMOJI_COMPACT / "plan.json")
    small = assemble(unet, plan)
    assert shape_of(UNet2DConditionModel.load_config(EMOJI_COMPACT)) == plan.kept.result
    x, t = torch.randn(4, 4, 16, 16, generator=torch.manual_seed(0)), torch.tensor([999, 900, 800, 700])
    text = torch.randn(4, 77, 128, generator=torch.manual_seed(1))
    full, near = (u.float()(x, t, text).sample for u in (unet, small))
    assert 0 < (near - full).square().mean() < 1e-3 * full.square().mean()
    assert len(SunAdapter.load(EMOJI_SUN).for_unet(small).layers) == len(layers_of_unet(small))


@torch.no_grad()
def test_the_controlnet_steers_four_steps_of_sun():
    """Along the edges of a shirt that is turned and stretched, as no caption can say."""
    from diffusers import StableDiffusionControlNetPipeline, StableDiffusionPipeline
    from PIL import Image

    import sun
    from sun.pipelines.schedulers import make_scheduler
    from sun.shipped.control_lora import controlnet_from_unet
    from sun.shipped.edges import edge_agreement

    base = StableDiffusionPipeline.from_pretrained(EMOJI_DIFFUSION, safety_checker=None)
    parts = {**base.components, "controlnet": controlnet_from_unet(base.unet, EMOJI_CONTROLNET)}
    pipe = StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    sun.attach(pipe, EMOJI_SUN)
    edges = torch.tensor(list(Image.open(EMOJI_CONTROLNET.with_name("edges-1.png")).convert("L").tobytes()))
    edges = (edges.view(1, 1, 128, 128) > 127).float()

    def agreement(strength: float) -> float:
        pixels = pipe(
            "large shirt emoji, green background", image=edges.expand(1, 3, 128, 128), num_inference_steps=4,
            generator=torch.manual_seed(1), controlnet_conditioning_scale=strength, output_type="pt",
        ).images  # fmt: skip
        return float(edge_agreement(pixels, edges))

    assert agreement(1.0) > 0.5 > agreement(0.0)


@pytest.mark.parametrize(
    "card",
    [EMOJI_DIFFUSION / "README.md", EMOJI_SUN.with_suffix(".md"), EMOJI_CONTROLNET.with_name("README.md"),
     EMOJI_INPAINTING.with_name("README.md"), EMOJI_COMPACT / "README.md"],
)  # fmt: skip
def test_cards_give_licence_command_seed_and_figures(card):
    text = card.read_text(encoding="utf-8").lower()
    for fact in ("cc-by 4.0", "sun train", "seed", "minutes", "loss", "twemoji"):
        assert fact in text, fact
