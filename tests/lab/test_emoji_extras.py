"""Emoji Diffusion's ControlNet and inpainting model: data, training, files, and what reads them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionControlNetPipeline, StableDiffusionInpaintPipeline, StableDiffusionPipeline
from peft import LoraConfig
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from small_models import EMOJIS, make_run
from torch.nn.utils import parametrize

from sun.common.settings import apply, read_config
from sun.lab.emoji.checks import control_figures, figure_table, inpainting_figures
from sun.lab.emoji.controlnet import ControlNetConfig, build_controlnet, save_controlnet, train_controlnet
from sun.lab.emoji.inpainting import (
    FIRST_LAYER,
    InpaintingConfig,
    draw_mask,
    latent_masks,
    load_inpainting_unet,
    masked,
    save_inpainting,
    train_inpainting,
    widen,
)
from sun.lab.emoji.scenes import Scene, render_scene, subject_mask
from sun.lab.emoji.style import LORA_TARGETS, LORA_WEIGHTS, save_lora
from sun.shipped import EMOJI_CONTROLNET, EMOJI_INPAINTING
from sun.shipped.control_lora import MARK, OWN_LAYERS, controlnet_from_unet, ldm_name, to_control_lora
from sun.shipped.edges import edge_agreement, edge_picture, find_edges
from sun.shipped.lowrank import add_low_rank, changes_of, merge

REPOSITORY = Path(__file__).resolve().parents[2]


def load(folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def shake(module: torch.nn.Module, std: float = 0.05) -> None:
    """Random values for what is trained, as training would leave it."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * std)


# --------------------------------------------------------------------------------------------------------------- edges


def test_a_square_has_four_thin_edges_and_nothing_else() -> None:
    pixels = torch.zeros(1, 3, 32, 32)
    pixels[:, :, 8:24, 8:24] = 1.0
    edges = find_edges(pixels)
    assert edges.shape == (1, 1, 32, 32)
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert edges[..., 16, :].sum() == edges[..., :, 16].sum() == 2
    assert edges[..., :6, :].sum() == edges[..., 10:22, 10:22].sum() == 0


def test_colours_of_equal_brightness_have_an_edge_between_them() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    pixels[:, 0, :, :8], pixels[:, 1, :, 8:] = 0.5, 0.5
    assert pixels.sum(1).unique().numel() == 1
    assert (find_edges(pixels).sum(3) == 1).all()


def test_weak_edges_count_where_they_go_on_from_strong_ones() -> None:
    pixels = torch.zeros(2, 1, 32, 32)
    pixels[0, :, :, 16:] = torch.linspace(1.0, 0.12, 32)[:, None]
    pixels[1, :, :, 16:] = 0.12  # the faint end of it, alone
    found = find_edges(pixels)
    assert found[0, 0, 24:].sum() > 0
    assert found[1].sum() == 0


def test_edges_of_a_picture_file_are_white_on_black() -> None:
    image = Image.new("RGB", (32, 24), "red")
    image.paste("blue", (16, 0, 32, 24))
    drawn = edge_picture(image)
    assert (drawn.mode, drawn.size) == ("RGB", (32, 24))
    assert sorted(color for _, color in drawn.getcolors()) == [(0, 0, 0), (255, 255, 255)]


def test_agreement_is_one_for_the_same_picture_and_falls_with_distance() -> None:
    def square(x: int) -> torch.Tensor:
        pixels = torch.zeros(1, 3, 64, 64)
        pixels[:, :, 16:40, x : x + 24] = 1.0
        return pixels

    edges = find_edges(square(16))
    scores = [float(edge_agreement(square(x), edges)) for x in (16, 17, 22, 36)]
    assert scores[0] == scores[1] == 1.0
    assert scores[1] > scores[2] > scores[3]
    assert float(edge_agreement(torch.zeros(1, 3, 64, 64), edges)) == 0
    assert float(edge_agreement(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8))) == 1


# ----------------------------------------------------------------------------------------------------- low-rank changes


def small_net() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8, 5))


def test_changes_start_at_nothing_and_merge_to_what_was_trained() -> None:
    net, x = small_net(), torch.randn(2, 4, 3, 3)
    before, weights = net(x), {k: v.clone() for k, v in net.state_dict().items()}
    add_low_rank(net, 2, leave=("2",))
    assert torch.equal(net(x), before)
    shake(net, 0.3)
    changes = changes_of(net)
    assert set(changes) == {"0.up", "0.down", "2.weight", "2.bias"}
    plain = small_net()
    plain.load_state_dict(merge(weights, changes))
    assert torch.allclose(plain(x), net(x), atol=2e-3)
    assert not torch.allclose(plain(x), before, atol=1e-2)
    assert torch.equal(plain[0].bias, weights["0.bias"])


def test_only_changes_and_the_layers_left_out_are_trained() -> None:
    net = small_net()
    add_low_rank(net, 2, leave=("2",))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    assert trained == {
        "0.parametrizations.weight.0.up", "0.parametrizations.weight.0.down", "2.weight", "2.bias",
    }  # fmt: skip
    assert parametrize.is_parametrized(net[0])
    assert not parametrize.is_parametrized(net[2])


def test_changes_for_another_base_are_refused() -> None:
    net = small_net()
    weights = dict(net.state_dict())
    add_low_rank(net, 2)
    changes = changes_of(net)
    with pytest.raises(ValueError, match=r"x\.safetensors changes 7\.up, which this base model does not have"):
        merge(weights, {"7.up": changes["0.up"], "7.down": changes["0.down"]}, "x.safetensors")
    with pytest.raises(ValueError, match="for a base model of another size"):
        merge(weights, {"2.up": changes["0.up"], "2.down": changes["0.down"]})


# ----------------------------------------------------------------------------------------------------------- ControlNet


@torch.no_grad()
def test_a_saved_controlnet_gives_the_same_numbers(tiny_model: Path, tmp_path: Path) -> None:
    unet = load(tiny_model).unet
    trained = build_controlnet(unet, 4)
    shake(trained)
    file = save_controlnet(trained, tmp_path / "edges.safetensors", "tiny")
    again = controlnet_from_unet(unet, file)
    torch.manual_seed(0)
    x, text, hint = torch.randn(2, 4, 4, 4), torch.randn(2, 77, 32), torch.rand(2, 3, 32, 32)
    expected, got = (c(x, 500, text, hint, return_dict=False) for c in (trained, again))
    for a, b in zip([*expected[0], expected[1]], [*got[0], got[1]], strict=True):
        assert torch.allclose(a, b, atol=2e-2 * float(a.abs().max()))
    assert float(expected[1].abs().max()) > 0


def test_a_new_controlnet_changes_nothing(tiny_model: Path) -> None:
    unet = load(tiny_model).unet
    x, text, hint = torch.randn(2, 4, 4, 4), torch.randn(2, 77, 32), torch.rand(2, 3, 32, 32)
    down, mid = build_controlnet(unet, 4).eval()(x, 500, text, hint, return_dict=False)
    assert not any(float(t.abs().max()) for t in [*down, mid])


def test_names_are_those_of_an_ldm_controlnet(full_depth_model: Path) -> None:
    controlnet = build_controlnet(load(full_depth_model).unet, 4)
    names = {
        "conv_in.up": "input_blocks.0.0.up",
        "time_embedding.linear_2.down": "time_embed.2.down",
        "down_blocks.0.resnets.1.conv1.up": "input_blocks.2.0.in_layers.2.up",
        "down_blocks.0.downsamplers.0.conv.up": "input_blocks.3.0.op.up",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.down":
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.down",
        "down_blocks.3.resnets.1.time_emb_proj.up": "input_blocks.11.0.emb_layers.1.up",
        "mid_block.resnets.1.conv2.up": "middle_block.2.out_layers.3.up",
        "mid_block.attentions.0.proj_in.up": "middle_block.1.proj_in.up",
        "controlnet_down_blocks.11.weight": "zero_convs.11.0.weight",
        "controlnet_mid_block.bias": "middle_block_out.0.bias",
        "controlnet_cond_embedding.conv_in.weight": "input_hint_block.0.weight",
        "controlnet_cond_embedding.blocks.5.weight": "input_hint_block.12.weight",
        "controlnet_cond_embedding.conv_out.weight": "input_hint_block.14.weight",
    }  # fmt: skip
    assert {name: ldm_name(name) for name in names} == names
    changes = changes_of(controlnet)
    assert set(names) <= set(changes)
    content = to_control_lora(changes)
    assert len(content) == len(changes) + 1
    assert MARK in content
    assert not [name for name in changes if name.startswith(OWN_LAYERS) and name.endswith(".up")]


def test_a_controlnet_for_another_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    unet = load(tiny_model).unet
    file = save_controlnet(build_controlnet(unet, 4), tmp_path / "edges.safetensors", "tiny")
    wider = type(unet).from_config({**unet.config, "block_out_channels": (64, 64)})
    with pytest.raises(ValueError, match=r"edges\.safetensors is for a base model of another size"):
        controlnet_from_unet(wider, file)
    with pytest.raises(ValueError, match="inpainting models have 9"):
        controlnet_from_unet(widen(unet), file)


def settings(folder: Path, model: Path, name: str) -> dict[str, Any]:
    return {
        "run": make_run(folder, name, lr=0.01), "model": str(model), "scenes": 6, "stages": ((32, 1.0),),
        "check_scenes": 2,
    }  # fmt: skip


def test_a_controlnet_trains_and_loads_with_its_card(packages: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = train_controlnet(ControlNetConfig(**settings(tmp_path, tiny_model, "control"), rank=4))
    content = load_file(folder / EMOJI_CONTROLNET.name)
    assert any(float(t.abs().max()) for name, t in content.items() if name.startswith("zero_convs"))
    pipe = load(tiny_model)
    controlnet = controlnet_from_unet(pipe.unet, folder / EMOJI_CONTROLNET.name)
    steered = StableDiffusionControlNetPipeline(
        **{**pipe.components, "controlnet": controlnet}, requires_safety_checker=False
    )
    edges = Image.open(folder / "edges-0.png")
    assert steered("owl", image=edges, num_inference_steps=2).images[0].size == edges.size == (32, 32)
    card = (folder / "README.md").read_text()
    for fact in ("license: cc-by-4.0", "Twemoji", "edge agreement", "find_edges", "seed 0", "| with it, 25 steps |"):
        assert fact in card
    figures = json.loads((folder / "settings.json").read_text())["edge_agreement"]
    assert set(figures) == {"without it, 25 steps", "with it, 25 steps"}
    assert str(tmp_path) not in card + (folder / "settings.json").read_text()
    assert (folder / "samples.png").exists()


def test_generate_takes_the_shipped_lora_by_name(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sun.pictures import draw as generate
    from sun.pictures.recipe import Recipe, RecipeError, png_text
    from sun.pipelines import lora

    unet = load(tiny_model).unet
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    shake(unet)
    file = save_lora(unet, tmp_path / "lora")
    plain = Recipe(prompt="owl", model=str(tiny_model), adapter="none", steps=1, batch=2, guidance=1.0, device="cpu")
    monkeypatch.setattr(lora, "EMOJI_LORA", tmp_path / "gone.safetensors")
    with pytest.raises(RecipeError, match="no shipped LoRA"):
        generate.load(replace(plain, loras=("emoji",)))
    monkeypatch.setattr(lora, "EMOJI_LORA", file)
    drawn = []
    for loras in ((), ("emoji:0.5",), (f"{file}:0.5",)):
        recipe = replace(plain, loras=loras)
        loaded = generate.load(recipe)
        drawn.append(generate.generate(loaded, generate.complete(recipe, loaded)).latents)
    assert torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[0], drawn[1])
    assert "<lora:emoji-google-style:0.5>" in png_text(replace(recipe, loras=("emoji:0.5",)), 0, {}, {})["parameters"]


def test_generate_takes_the_shipped_controlnet_by_name(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sun.pictures import draw as generate
    from sun.pictures.recipe import Recipe, RecipeError

    trained = build_controlnet(load(tiny_model).unet, 4)
    shake(trained)
    file = save_controlnet(trained, tmp_path / "edges.safetensors", "tiny")
    Image.effect_noise((32, 32), 80).convert("RGB").save(tmp_path / "control.png")
    # Two pictures: the tiny U-Net's middle is one pixel, which its norms refuse alone.
    plain = Recipe(prompt="owl", model=str(tiny_model), adapter="none", steps=2, batch=2, guidance=1.0, device="cpu")
    recipe = replace(plain, controlnet="emoji", control=str(tmp_path / "control.png"))
    with monkeypatch.context() as patched:
        patched.setattr(generate, "EMOJI_CONTROLNET", tmp_path / "gone.safetensors")
        with pytest.raises(RecipeError, match="no shipped ControlNet"):
            generate.load(recipe)
    monkeypatch.setattr(generate, "EMOJI_CONTROLNET", file)
    drawn = []
    for each in (plain, recipe):
        loaded = generate.load(each)
        drawn.append(generate.generate(loaded, generate.complete(each, loaded)).latents)
    assert drawn[1].isfinite().all()
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    assert set(recipe.files()) == {"control", "model"}
    text, _ = generate.png_texts(generate.complete(recipe, loaded))
    assert set(json.loads(text["sun"])["files"]) == {"control", "controlnet", "model"}


# ----------------------------------------------------------------------------------------------------------- inpainting


def pictures() -> dict[str, Image.Image]:
    """Each emoji a red disc."""
    disc = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    ImageDraw.Draw(disc).ellipse((0, 0, 63, 63), fill=(255, 0, 0, 255))
    return {e.code: disc for e in EMOJIS}


def test_the_subject_mask_is_the_emoji_and_nothing_else() -> None:
    scene = Scene((EMOJIS[0], EMOJIS[1]), "blue", "", "", False, "")
    drawn = render_scene(scene, pictures(), 64)
    for which, columns in ((0, range(0, 32)), (1, range(32, 64))):
        mask = subject_mask(scene, pictures(), 64, which)
        white = {(x, y) for x in range(64) for y in range(64) if mask.getpixel((x, y))}
        red = {(x, y) for x in columns for y in range(64) if drawn.getpixel((x, y))[0] > 150}
        assert len(white ^ red) < 0.1 * len(white)


def test_masks_are_of_every_kind_and_black_and_white() -> None:
    rng = random.Random(0)
    scene = Scene((EMOJIS[0],), "blue", "small", "", False, "")
    drawn = [draw_mask(scene, pictures(), 64, rng) for _ in range(60)]
    shares = [sum(mask.histogram()[255:]) / 64**2 for mask in drawn]
    assert all(sum(mask.histogram()[1:255]) == 0 for mask in drawn)
    assert all(0.01 < share <= 1 for share in shares)
    assert 1.0 in shares
    assert 0.5 in shares
    assert len(set(shares)) > 30


def test_the_masked_picture_shows_nothing_under_the_mask() -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 24, 24))
    drawn = masked(Image.new("RGB", (32, 32), "red"), mask)
    assert (drawn.getpixel((16, 16)), drawn.getpixel((2, 2))) == ((128, 128, 128), (255, 0, 0))
    small = latent_masks([mask, Image.new("L", (32, 32), 255)])
    assert small.shape == (2, 1, 4, 4)
    assert small[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0]]
    assert (small[1] == 1).all()


@torch.no_grad()
def test_a_widened_unet_draws_as_before_and_a_saved_one_as_trained(tiny_model: Path, tmp_path: Path) -> None:
    unet = load(tiny_model).unet
    wide = widen(unet)
    torch.manual_seed(0)
    x, text = torch.randn(2, 9, 4, 4), torch.randn(2, 77, 32)
    assert torch.allclose(wide(x, 500, text).sample, unet(x[:, :4], 500, text).sample, atol=2e-3)
    add_low_rank(wide, 4, leave=FIRST_LAYER)
    shake(wide)
    expected = wide(x, 500, text).sample
    again = load_inpainting_unet(unet, save_inpainting(wide, tmp_path / "x.safetensors", "tiny"))
    assert torch.allclose(again(x, 500, text).sample, expected, atol=2e-2 * float(expected.abs().max()))
    other = replace_rows(x)
    assert not torch.allclose(again(other, 500, text).sample, expected, atol=1e-2)  # it looks at mask and picture


def replace_rows(x: torch.Tensor) -> torch.Tensor:
    """``x`` with another mask and masked picture."""
    other = x.clone()
    other[:, 4:] = torch.randn_like(other[:, 4:])
    return other


def test_an_inpainting_model_trains_and_loads_with_its_card(packages: Path, tiny_model: Path, tmp_path: Path) -> None:
    folder = train_inpainting(InpaintingConfig(**settings(tmp_path, tiny_model, "inpaint"), rank=4))
    content = load_file(folder / EMOJI_INPAINTING.name)
    assert content["conv_in.weight"].shape == (32, 9, 3, 3)
    assert float(content["conv_in.weight"][:, 4:].abs().max()) > 0  # the new channels were trained
    pipe = load(tiny_model)
    wide = load_inpainting_unet(pipe.unet, folder / EMOJI_INPAINTING.name)
    inpaint = StableDiffusionInpaintPipeline(**{**pipe.components, "unet": wide}, requires_safety_checker=False)
    image, mask = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)
    assert inpaint("owl", image=image, mask_image=mask, num_inference_steps=2, height=32, width=32).images
    card = (folder / "README.md").read_text()
    for fact in ("license: cc-by-4.0", "Twemoji", "| outside | inside | seam |", "autoencoder alone", "seed 0"):
        assert fact in card
    errors = json.loads((folder / "settings.json").read_text())["errors"]
    assert set(errors) == {"autoencoder alone", "base, 25 steps", "inpainting, 25 steps"}
    assert str(tmp_path) not in card + (folder / "settings.json").read_text()


# -------------------------------------------------------------------------------------------- figures, files, commands


def test_inpainting_errors_are_counted_where_they_are() -> None:
    pixels, masks = torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    masks[..., 16:] = 1
    made = pixels.clone()
    made[..., 16:] += 0.2  # 25.5 of 255
    found = inpainting_figures({"a": made, "b": pixels}, pixels, masks)
    assert found["a"] == {
        "outside": 0.0, "inside": pytest.approx(25.5, abs=0.01), "seam": pytest.approx(25.5, abs=0.01),
    }  # fmt: skip
    assert set(found["b"].values()) == {0.0}
    made[..., 20:] = 0  # only the 4 columns at the seam are wrong
    seam = inpainting_figures({"a": made}, pixels, masks)["a"]
    assert seam["seam"] > 3 * seam["inside"]
    assert "| a | 0.0 | 25.5 |" in figure_table({"a": {"x": 0.0, "y": 25.5}}, "", "{:.1f}".format)


def test_control_figures_compare_pictures_with_the_scenes_edges() -> None:
    pixels = -torch.ones(1, 3, 32, 32)
    pixels[..., 8:24, 8:24] = 1
    found = control_figures({"same": pixels, "nothing": -torch.ones(1, 3, 32, 32)}, pixels)
    assert found == {"same": 1.0, "nothing": 0.0}


@pytest.mark.parametrize(("name", "config"), [("controlnet", ControlNetConfig()), ("inpainting", InpaintingConfig())])
def test_configurations_and_commands(name: str, config: Any) -> None:
    from typer.testing import CliRunner

    from sun.cli import app

    path = REPOSITORY / "configs" / f"emoji-{name}.toml"
    read = apply(replace(config), read_config(path), str(path))
    assert (read.run.output, read.run.batch_size, read.model) == (f"runs/emoji-{name}", 16, "emoji")
    assert CliRunner().invoke(app, ["train-emoji", name, "--help"]).exit_code == 0
    assert CliRunner().invoke(app, ["train-emoji", name, "--style", "noto"]).exit_code == 2


def test_finished_runs_are_shipped_with_their_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from sun import shipped
    from sun.cli import app

    homes = {"controlnet": "EMOJI_CONTROLNET", "inpainting": "EMOJI_INPAINTING", "lora": "EMOJI_LORA"}
    for name, target in homes.items():
        run = tmp_path / name / name
        run.mkdir(parents=True)
        (run / "README.md").write_text(f"# A card\nLoad {LORA_WEIGHTS}.\n" if name == "lora" else "# A card\n")
        file = tmp_path / "shipped" / getattr(shipped, target).parent.name / getattr(shipped, target).name
        (run / (LORA_WEIGHTS if name == "lora" else file.name)).write_bytes(b"weights")
        monkeypatch.setattr(shipped, target, file)
        (tmp_path / "notes.md").write_text("Seen by a person.")
        done = CliRunner().invoke(
            app, ["train-emoji", "ship", f"--{name}", str(run.parent), "--notes", str(tmp_path / "notes.md")]
        )
        assert done.exit_code == 0, done.output
        assert file.read_bytes() == b"weights"
        card = (file.parent / "README.md").read_text()
        assert "Seen by a person." in card
        assert name != "lora" or f"Load {file.name}." in card
