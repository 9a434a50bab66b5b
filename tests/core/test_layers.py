"""The layer map against the table of Stable Diffusion 1.5, made by running diffusers 0.42.1 and ComfyUI."""

from __future__ import annotations

import pytest
import torch
from tiny import STAGES, make_unet
from torch import nn

from sun.layers import guess_layers, layers_from_structure, layers_of_ldm, layers_of_unet

# checkpoint index, diffusers, ComfyUI block key, LDM module, C, transformer_index
SD15 = [
    (1, "down_blocks.0.attentions.0", ("input", 1), "input_blocks.1.1", 320, 0),
    (3, "down_blocks.0.attentions.1", ("input", 2), "input_blocks.2.1", 320, 1),
    (5, "down_blocks.1.attentions.0", ("input", 4), "input_blocks.4.1", 640, 2),
    (7, "down_blocks.1.attentions.1", ("input", 5), "input_blocks.5.1", 640, 3),
    (9, "down_blocks.2.attentions.0", ("input", 7), "input_blocks.7.1", 1280, 4),
    (11, "down_blocks.2.attentions.1", ("input", 8), "input_blocks.8.1", 1280, 5),
    (13, "up_blocks.1.attentions.0", ("output", 3), "output_blocks.3.1", 1280, 7),
    (15, "up_blocks.1.attentions.1", ("output", 4), "output_blocks.4.1", 1280, 8),
    (17, "up_blocks.1.attentions.2", ("output", 5), "output_blocks.5.1", 1280, 9),
    (19, "up_blocks.2.attentions.0", ("output", 6), "output_blocks.6.1", 640, 10),
    (21, "up_blocks.2.attentions.1", ("output", 7), "output_blocks.7.1", 640, 11),
    (23, "up_blocks.2.attentions.2", ("output", 8), "output_blocks.8.1", 640, 12),
    (25, "up_blocks.3.attentions.0", ("output", 9), "output_blocks.9.1", 320, 13),
    (27, "up_blocks.3.attentions.1", ("output", 10), "output_blocks.10.1", 320, 14),
    (29, "up_blocks.3.attentions.2", ("output", 11), "output_blocks.11.1", 320, 15),
    (31, "mid_block.attentions.0", ("middle", 0), "middle_block.1", 1280, 6),
]


def rows(layers, widths=(320, 640, 1280)):
    """The layers as rows of the table, their widths replaced by Stable Diffusion 1.5's."""
    known = dict(zip(sorted({layer.channels for layer in layers}), widths, strict=True))
    tail = ".transformer_blocks.0.attn2"
    for layer in layers:
        assert layer.diffusers == layer.name + tail
        assert layer.ldm.endswith(tail)
        assert layer.comfy[2] == 0
    return [
        (la.index, la.name, la.comfy[:2], la.ldm.removesuffix(tail), known[la.channels], la.transformer_index)
        for la in layers
    ]


def ldm_shapes(table=SD15, text_width=768):
    """Names and shapes of Stable Diffusion 1.5's LDM checkpoint, as far as they matter here."""
    shapes = {f"input_blocks.{i}.0.in_layers.0.weight": (320,) for i in (1, 2, 4, 5, 7, 8, 10, 11)}
    shapes |= {"input_blocks.0.0.weight": (320, 4, 3, 3), "middle_block.0.in_layers.0.weight": (1280,)}
    shapes |= {f"input_blocks.{i}.0.op.weight": (320, 320, 3, 3) for i in (3, 6, 9)}
    shapes |= {f"output_blocks.{i}.0.in_layers.0.weight": (640,) for i in range(12)}
    for _, _, _, ldm, channels, _ in table:
        attention = f"{ldm}.transformer_blocks.0.attn2"
        shapes |= {f"{attention}.to_q.weight": (channels, channels), f"{attention}.to_k.weight": (channels, text_width)}
        shapes |= {f"{ldm}.transformer_blocks.0.attn1.to_q.weight": (channels, channels)}
    return shapes


def test_structure_of_stable_diffusion_15():
    assert rows(layers_from_structure((320, 640, 1280, 1280))) == SD15


def test_unet_with_stable_diffusion_15s_blocks():
    layers = layers_of_unet(make_unet())
    assert rows(layers) == SD15
    assert [layer.channels for layer in layers] == [8, 8, 16, 16, 24, 24, 24, 24, 24, 16, 16, 16, 8, 8, 8, 24]


def test_unet_of_stable_diffusion_15_itself():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    layers = layers_of_unet(unet)
    assert rows(layers) == SD15
    assert sum(layer.channels for layer in layers) == 12_480
    names = list(unet.attn_processors)
    assert [names[layer.index] for layer in layers] == [f"{layer.diffusers}.processor" for layer in layers]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_ldm_checkpoint_names(prefix):
    assert rows(layers_of_ldm({prefix + name: shape for name, shape in ldm_shapes().items()})) == SD15


def test_ldm_module():
    root = nn.Module()
    for name, shape in ldm_shapes(text_width=12).items():
        *parents, leaf = name.removesuffix(".weight").split(".")
        module = root
        for part in parents:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.add_module(leaf, nn.Linear(shape[-1], shape[0], device="meta"))
    assert rows(layers_of_ldm(root)) == SD15


def test_ldm_with_equal_widths_everywhere():
    """ComfyUI's smallest loadable SD 1.5 checkpoint has channel_mult [1, 1, 1, 1]."""
    table = [(*row[:4], 320, row[5]) for row in SD15]
    assert rows(layers_of_ldm(ldm_shapes(table)), widths=(320,)) == table


def test_something_else_is_not_an_ldm_unet():
    with pytest.raises(ValueError, match="input_blocks"):
        layers_of_ldm({"down_blocks.0.weight": (1, 1)})
    incomplete = {k: v for k, v in ldm_shapes().items() if not k.startswith("middle_block.1")}
    assert len(layers_of_ldm(incomplete)) == 15
    moved = {k.replace("input_blocks.1.1", "input_blocks.1.2"): v for k, v in ldm_shapes().items()}
    with pytest.raises(ValueError, match=r"SD 1\.x"):
        layers_of_ldm(moved)


def test_sdxl_structure_has_deeper_transformers():
    layers = layers_from_structure((320, 640, 1280), attention=(False, True, True), depth=(1, 2, 10))
    assert len(layers) == 70
    assert [layer.index for layer in layers] == list(range(1, 140, 2))
    keys = {layer.comfy for layer in layers}
    blocks = {(block, i): d + 1 for block, i, d in sorted(keys)}
    assert {k: v for k, v in blocks.items() if k[0] == "input"} == {
        ("input", 4): 2, ("input", 5): 2, ("input", 7): 10, ("input", 8): 10,
    }  # fmt: skip
    assert {k: v for k, v in blocks.items() if k[0] == "output"} == {
        **{("output", i): 10 for i in (0, 1, 2)}, **{("output", i): 2 for i in (3, 4, 5)},
    }  # fmt: skip
    assert blocks["middle", 0] == 10
    assert layers[1].name == "down_blocks.1.attentions.0.transformer_blocks.1"
    assert [layer.transformer_index for layer in layers if layer.comfy[0] == "middle"] == [4] * 10


def test_unet_with_deeper_transformers_and_other_depth_a_stage():
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=(1, 3),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    expected = layers_from_structure((8, 16), (1, 3), attention=(False, True), depth=(1, 2))
    assert layers_of_unet(unet) == expected
    assert len(expected) == 2 * 3 + 2 * 4 + 2


def test_names_are_guessed_from_widths():
    for stages in ((320, 640, 1280, 1280), STAGES, (64, 96, 128, 128), (32, 32, 32, 32)):
        layers = layers_from_structure(stages)
        assert guess_layers([layer.channels for layer in layers]) == layers
    three = layers_from_structure((8, 16, 24, 24), 3)
    assert guess_layers([layer.channels for layer in three]) == three
    assert guess_layers([8, 16, 24]) is None
    assert guess_layers([8]) is None
