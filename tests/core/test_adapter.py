"""``SunAdapter``: sizes from a U-Net or a file, the check of the base, its start beside a frozen U-Net."""

from __future__ import annotations

import pytest
import torch
from tiny import STAGES, TEXT_WIDTH, make_unet
from torch import nn

from sun import SunAdapter, SunFileError, SunInfo
from sun.attention import attend, sun_attention
from sun.layers import layers_from_structure, layers_of_unet
from sun.surgery import from_unet

SD15 = tuple(layer.channels for layer in layers_from_structure((320, 640, 1280, 1280)))


@pytest.mark.parametrize(("positive", "parameters"), [(True, 38_388_480), (False, 19_194_240)])
def test_parameter_counts_of_stable_diffusion_15(positive, parameters):
    adapter = SunAdapter(SD15, 768, positive, device="meta")
    assert sum(p.numel() for p in adapter.parameters()) == parameters
    assert len(adapter.layers) == 16


@pytest.mark.parametrize("positive", [True, False])
def test_from_unet_copies_the_frozen_projections(positive):
    unet = make_unet()
    adapter = from_unet(unet, positive=positive, alpha=0.25, w=8.0, info=SunInfo(base_model="tiny"))
    assert adapter.positive is positive
    assert adapter.text_width == TEXT_WIDTH
    assert (adapter.info.base_model, adapter.info.guidance_scale) == ("tiny", 8.0)
    layers = layers_of_unet(unet)
    assert adapter.channels == tuple(layer.channels for layer in layers)
    assert adapter.names == tuple(layer.name for layer in layers)
    for layer, own in zip(layers, adapter.sun_layers(), strict=True):
        frozen = unet.get_submodule(layer.diffusers)
        for branch in ("neg", "pos") if positive else ("neg",):
            assert torch.equal(getattr(own, f"to_k_{branch}").weight, frozen.to_k.weight)
            assert torch.equal(getattr(own, f"to_v_{branch}").weight, frozen.to_v.weight)
            assert (getattr(own, f"alpha_{branch}") == 0.25).all()
            assert (getattr(own, f"beta_{branch}") == 0).all()
    assert all(p.requires_grad for p in adapter.parameters())
    with torch.no_grad():
        adapter.sun_layers()[0].to_k_neg.weight.zero_()
    assert unet.get_submodule(layers[0].diffusers).to_k.weight.abs().sum() > 0  # a copy, not the same tensor


def test_from_unet_follows_other_structures_and_dtypes():
    unet = make_unet(stages=(8, 12, 16, 16), text_width=10).to(torch.bfloat16)
    adapter = from_unet(unet)
    assert adapter.text_width == 10
    assert set(adapter.channels) == {8, 12, 16}
    assert next(adapter.parameters()).dtype == torch.bfloat16
    assert next(from_unet(unet, dtype=torch.float32).parameters()).dtype == torch.float32


def test_check_base_names_both_sides():
    adapter = SunAdapter((8, 8, 16), 768, info=SunInfo(base_model="Tiny"))
    adapter.check_base((8, 8, 16), 768, "this model")
    with pytest.raises(SunFileError, match=r"768 \(Stable Diffusion 1.x\), and SDXL base has 2048 \(SDXL\).*Tiny.*Use"):
        adapter.check_base((8, 8, 16), 2048, "SDXL base")
    with pytest.raises(SunFileError, match="3 layers, and that model has 4"):
        adapter.check_base((8, 8, 16, 16), 768, "that model")
    with pytest.raises(SunFileError, match=r"layers\.1 is 8 wide, and that of that model is 16"):
        adapter.check_base((8, 16, 16), 768, "that model")


def test_check_base_names_the_file(tmp_path):
    SunAdapter((8, 8, 16), 12).save(tmp_path / "mine.safetensors")
    with pytest.raises(SunFileError, match=r"mine\.safetensors does not fit: .* 12, and x has 768"):
        SunAdapter.load(tmp_path / "mine.safetensors").check_base((8, 8, 16), 768, "x")


def test_loading_with_a_hosts_linear_class_and_dtype(tmp_path):
    class HostLinear(nn.Linear):
        pass

    SunAdapter((8, 8, 16), 12).save(tmp_path / "a.safetensors", dtype=torch.float16)
    adapter = SunAdapter.load(tmp_path / "a.safetensors", dtype=torch.float32, linear=HostLinear)
    assert isinstance(adapter.sun_layers()[0].to_k_neg, HostLinear)
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert not adapter.training
    assert {p.device.type for p in SunAdapter.load(tmp_path / "a.safetensors").parameters()} == {"cpu"}


def test_names_must_match_the_layers():
    with pytest.raises(ValueError, match="2 names for 3 layers"):
        SunAdapter((8, 8, 16), 12, names=("a", "b"))


def test_tiny_models_have_three_widths():
    assert set(STAGES) == {8, 16, 24}  # else the checks of widths in these tests would check nothing


@pytest.mark.parametrize("positive", [True, False])
def test_without_attention_normalization_alpha_and_beta_scale_the_branch_itself(tmp_path, positive):
    torch.manual_seed(0)
    adapter = SunAdapter([8] * 16, 12, positive, info=SunInfo(normalized=False))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    adapter.save(tmp_path / "plain.safetensors")
    loaded = SunAdapter.load(tmp_path / "plain.safetensors")
    assert not loaded.info.normalized
    layer = loaded.sun_layers()[3]
    query, z_p, negative, text = (
        torch.randn(2, 5, 8),
        torch.randn(2, 5, 8),
        torch.randn(2, 4, 12),
        torch.randn(2, 6, 12),
    )
    z = sun_attention(query, z_p, layer.texts([(1.0, negative)], text), 2)
    z_n = attend(query, layer.to_k_neg(negative), layer.to_v_neg(negative), 2)
    expected = z_p - (layer.alpha_neg * z_n + layer.beta_neg)
    if positive:
        z_e = attend(query, layer.to_k_pos(text), layer.to_v_pos(text), 2)
        expected = expected + layer.alpha_pos * z_e + layer.beta_pos
    torch.testing.assert_close(z, expected)
    with pytest.raises(SunFileError, match="Attention Normalization"):
        adapter.save(tmp_path / "theirs.safetensors", layout="official")
    assert SunAdapter([8], 12).info.normalized
