"""What was made for the original on a compact U-Net: SUN, LoRA, ControlNet, LTC-Accel, feature inheritance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler
from family import family_unet
from tiny import make_adapter

import sun
from sun import SunAdapter, SunFileError
from sun.compact import CompactError, assemble, carry_over, control_residuals, plan, shape_of, structure
from sun.layers import kept_positions, layers_of_unet

ROWS = 2


def call(unet: Any, negative: torch.Tensor | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    x, text = torch.randn(ROWS, 4, 8, 8, generator=generator), torch.randn(ROWS, 5, 16, generator=generator)
    given = {} if negative is None else {"cross_attention_kwargs": {"sun_negative": negative}}
    with torch.no_grad():
        return unet(x, torch.tensor([900, 40]), text, **given).sample


@pytest.mark.parametrize("name", ["shallow", "bk-base", "bk-small", "bk-tiny"])
def test_an_adapter_drops_the_layers_that_are_gone(name: str) -> None:
    """Each layer that stays sits where the original's attention of the same weights is."""
    unet = family_unet("sd1")
    small = assemble(unet, plan(unet, named=name))
    adapter = make_adapter(unet)
    fitted = adapter.for_unet(small)
    own, new = dict(unet.named_modules()), dict(small.named_modules())
    assert len(fitted.layers) == len(layers_of_unet(small)) < len(adapter.layers)
    for layer, kept in zip(layers_of_unet(small), fitted.layers, strict=True):
        index = next(i for i, la in enumerate(adapter.layers) if la is kept)
        place = layers_of_unet(unet)[index].diffusers
        assert torch.equal(new[layer.diffusers].to_q.weight, own[place].to_q.weight)
    plain, negative = call(small), torch.randn(1, 5, 16)
    sun.attach(small, fitted)
    assert (call(small, negative) - plain).abs().max() > 1e-3
    sun.detach(small)
    assert torch.equal(call(small), plain)


def test_on_the_original_it_is_the_adapter_itself() -> None:
    unet = family_unet("sd1")
    adapter = make_adapter(unet)
    assert adapter.for_unet(unet) is adapter


def test_an_adapter_of_another_base_is_refused() -> None:
    unet = family_unet("sd1")
    small = assemble(unet, plan(unet, named="shallow"))
    other = make_adapter(family_unet("sd1", block_out_channels=(16, 64, 64, 64)))
    with pytest.raises(SunFileError, match="not even as a compact one of its base"):
        other.for_unet(small)
    compact = make_adapter(small)
    with pytest.raises(SunFileError, match="not even as a compact one"):
        compact.for_unet(unet)
    unnamed = SunAdapter([16] * 3, 16)
    assert kept_positions(unnamed.names, small) is None
    with pytest.raises(SunFileError, match=r"adapter\.for_unet"):
        sun.attach(small, make_adapter(unet))


@pytest.mark.parametrize("name", ["shallow", "bk-tiny"])
def test_a_lora_of_the_original_follows_its_layers(name: str) -> None:
    """Layers are renumbered on the way up: each tensor goes where the layer went, what has no layer left is told."""
    from peft import LoraConfig, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict

    unet = family_unet("sd1")
    chosen = plan(unet, named=name)
    small = assemble(unet, chosen)
    before = call(small)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    weights = get_peft_model_state_dict(unet)
    carried, gone = carry_over(weights, chosen)
    assert len(carried) + len(gone) == len(weights)
    assert all("up_blocks.3.attentions.1." in g or "attentions.1." in g or "mid_block" in g for g in gone)
    finest = len(small.up_blocks) - 1
    tail = "transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert torch.equal(carried[f"up_blocks.{finest}.attentions.1.{tail}"], weights[f"up_blocks.3.attentions.2.{tail}"])
    small.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    loaded = set_peft_model_state_dict(small, carried)
    assert not loaded.unexpected_keys
    assert (call(small) - before).abs().max() > 1e-4
    kohya = {f"lora_unet_up_blocks_3_attentions_{j}_proj_in.lora_up.weight": torch.ones(j + 1) for j in range(3)}
    renamed, lost = carry_over({**kohya, "lora_te_x": torch.ones(1)}, chosen)
    assert len(renamed[f"lora_unet_up_blocks_{finest}_attentions_1_proj_in.lora_up.weight"]) == 3
    assert lost == ["lora_unet_up_blocks_3_attentions_1_proj_in.lora_up.weight"]
    assert "lora_te_x" in renamed
    with pytest.raises(CompactError, match="diffusers or kohya"):
        carry_over({"lora_unet_output_blocks_11_1_proj_in.lora_up.weight": torch.ones(1)}, chosen)


def test_inheritance_and_ltc_run_on_a_compact_pipeline(make_pipeline: Callable[..., Any]) -> None:
    from sun import inheritance, ltc

    pipe = make_pipeline()
    pipe.unet = assemble(pipe.unet, plan(pipe.unet, named="shallow"))
    draw = {"num_inference_steps": 6, "output_type": "latent", "guidance_scale": 3.0}

    def picture() -> torch.Tensor:
        return pipe(["a"], generator=torch.Generator().manual_seed(0), **draw).images

    plain = picture()
    inheritance.attach(pipe, "stages=1")
    assert bool(picture().isfinite().all())
    inheritance.detach(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    ltc.attach(pipe)
    assert bool(picture().isfinite().all())
    ltc.detach(pipe)
    assert plain.shape == picture().shape


def test_a_controlnet_of_the_original_gives_what_the_compact_one_has_places_for() -> None:
    """A ControlNet gives a residual for each of the original's skip connections; a compact U-Net has fewer."""
    unet = family_unet("sd1")
    control = ControlNetModel.from_unet(unet).eval()
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 5, 16)
    with torch.no_grad():
        for module in (*control.controlnet_down_blocks, control.controlnet_mid_block):
            torch.nn.init.normal_(module.weight, std=0.1)
        down, mid = control(x, t, text, torch.randn(1, 3, 64, 64), return_dict=False)
        chosen = plan(unet, named="shallow")
        small = assemble(unet, chosen)
        kept = control_residuals(down, chosen)
        steered = small(x, t, text, down_block_additional_residuals=kept, mid_block_additional_residual=mid).sample
        assert (steered - small(x, t, text).sample).abs().max() > 1e-3
    with pytest.raises(CompactError, match="12 residuals"):
        control_residuals(down[:-1], chosen)


@pytest.mark.parametrize("dot", [".", "_"])
def test_a_lora_of_a_sampling_layer_follows_its_stage(dot: str) -> None:
    """Without the innermost stage the way up counts from another one, and the last stage has no way down."""
    shape = shape_of(family_unet("sd1").config)
    stays, last = structure.kept(shape, ["innermost"]), shape.stages - 1
    up, down = (f"unet.{way}_blocks.1.{way}samplers.0.conv.".replace(".", dot) for way in ("up", "down"))
    assert structure.new_name(up, stays) == up.replace("1", "0", 1)
    assert structure.new_name(down, stays) == down
    assert structure.new_name(down.replace("1", str(last - 1), 1), stays) is None
