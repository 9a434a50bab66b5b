"""A compact U-Net, assembled and written here, loads in ComfyUI's own loaders and gives diffusers' numbers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sun.compact import LISTS, Plan, assemble, plan, save_single_file, shape_of
from sun.compact.ldm import why_not_comfyui

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
# Each family's U-Net, narrow; ComfyUI tells the families apart by these very numbers, so its table gets ours.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd1": (
        "SD15",
        {"block_out_channels": (32, 64, 64, 64), "down_block_types": (CROSS,) * 3 + (PLAIN,), "attention_head_dim": 8,
         "cross_attention_dim": 24},
        {"model_channels": 32, "context_dim": 24},
    ),
    "sd2": (
        "SD20",
        {"block_out_channels": (64, 64, 128, 128), "down_block_types": (CROSS,) * 3 + (PLAIN,),
         "attention_head_dim": (1, 1, 2, 2), "cross_attention_dim": 40, "use_linear_projection": True},
        {"model_channels": 64, "context_dim": 40},
    ),
    "sdxl": (
        "SDXL",
        {"block_out_channels": (64, 64, 128), "down_block_types": (PLAIN, CROSS, CROSS),
         "attention_head_dim": (1, 1, 2), "cross_attention_dim": 56, "use_linear_projection": True,
         "transformer_layers_per_block": (1, 2, 10),
         "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64},
        {"model_channels": 64, "context_dim": 56, "adm_in_channels": 64},
    ),
}  # fmt: skip


XL = ("SSD1B", "Segmind_Vega", "KOALA_700M", "KOALA_1B")


def original(family: str) -> Any:
    from diffusers import UNet2DConditionModel

    config = FAMILIES[family][1]
    up = tuple(kind.replace("Down", "Up") for kind in reversed(config["down_block_types"]))
    torch.manual_seed(0)
    return UNet2DConditionModel(sample_size=8, up_block_types=up, **config).eval()


@pytest.fixture
def narrow(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI takes our widths for its families'."""
    import comfy.supported_models

    for family, (name, _, numbers) in FAMILIES.items():
        for kind in (name, *(XL if family == "sdxl" else ())):
            known = getattr(comfy.supported_models, kind)
            monkeypatch.setattr(known, "unet_config", {**known.unet_config, **numbers})


def compare(model: Any, small: Any) -> None:
    """The loaded MODEL's U-Net against diffusers' on the same input."""
    config = small.config
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, config.cross_attention_dim)
    t, added, y = torch.tensor([900.0, 30.0]), {}, {}
    if config.addition_embed_type:
        ids = torch.zeros(2, 6)
        added = {"added_cond_kwargs": {"text_embeds": torch.randn(2, 16), "time_ids": ids}}
        pooled = added["added_cond_kwargs"]["text_embeds"]
        embedded = small.add_time_proj(ids.flatten()).reshape(2, -1)
        y = {"y": torch.cat([pooled, embedded], -1)}
    with torch.no_grad():
        theirs = small(x, t, text, **added).sample
        ours = model.model.diffusion_model.float()(x, t, context=text, transformer_options={}, **y)
    assert (ours - theirs).abs().max() < 1e-3 * theirs.abs().max()


@pytest.mark.parametrize(
    ("family", "remove"),
    [
        ("sd1", "shallow"),
        ("sd1", "bk-tiny"),
        ("sd2", "bk-base"),
        ("sdxl", "depth.2.4 mid"),  # as SSD-1B
        ("sdxl", "pair.0.1 pair.1.1 pair.2.1 depth.2.5"),  # as KOALA-700M
    ],
)
def test_stock_loaders_take_the_single_file(
    host: SimpleNamespace, narrow: None, family: str, remove: str, tmp_path: Path
) -> None:
    """Load Checkpoint and Load Diffusion Model; ComfyUI reads the structure off the names of the tensors."""
    import comfy.sd

    unet = original(family)
    chosen = plan(unet, named=remove) if remove in LISTS else Plan(tuple(remove.split()), shape_of(unet.config))
    small = assemble(unet, chosen)
    file = tmp_path / "small.safetensors"
    save_single_file(small, file)
    model, *_ = comfy.sd.load_checkpoint_guess_config(str(file), output_vae=False, output_clip=False)
    assert list(model.model.model_config.unet_config["num_res_blocks"]) == list(
        [small.config.layers_per_block] * len(small.down_blocks)
        if isinstance(small.config.layers_per_block, int)
        else small.config.layers_per_block
    )
    compare(model, small)
    compare(comfy.sd.load_diffusion_model(str(file)), small)


def test_stock_loaders_refuse_the_diffusers_layout(host: SimpleNamespace, narrow: None, tmp_path: Path) -> None:
    """Of diffusers' names ComfyUI knows a list of published U-Nets, which is why the single file is there."""
    import comfy.sd

    unet = original("sd1")
    save_file(assemble(unet, plan(unet, named="shallow")).state_dict(), tmp_path / "unet.safetensors")
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        comfy.sd.load_diffusion_model(str(tmp_path / "unet.safetensors"))


def test_an_sdxl_u_net_comfyui_does_not_know_is_told_beforehand(
    host: SimpleNamespace, narrow: None, tmp_path: Path
) -> None:
    import comfy.sd

    unet = original("sdxl")
    small = assemble(unet, Plan(("pair.1.1",), shape_of(unet.config)))
    said = save_single_file(small, tmp_path / "small.safetensors")
    assert said[0] == why_not_comfyui(small.config)
    assert "[0, 0, 2, 10, 10] is none they know" in said[0]
    assert comfy.sd.load_diffusion_model_state_dict(small.state_dict()) is None
    with pytest.raises(RuntimeError, match="Could not detect model type"):
        comfy.sd.load_checkpoint_guess_config(str(tmp_path / "small.safetensors"))
