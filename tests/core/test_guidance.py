"""Adapters that take the guidance scale: what they compute, their files, and how diffusers hands them the scale."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sun
from sun.adapter import SunAdapter, SunLayer
from sun.attention import attend, attention_normalization, sun_attention
from sun.files import SunFileError, SunInfo
from sun.surgery import bake, from_unet, recentre, strengthen, widen


def adapter(positive: bool = True, guided: bool = True) -> SunAdapter:
    torch.manual_seed(0)
    made = SunAdapter([8, 16], 12, positive, info=SunInfo(guidance_scale=4.0), guided=guided)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, 5, 12), torch.randn(2, 7, 12)


def run(layer: SunLayer, guidance: torch.Tensor | None = None, strength: float = 1.0) -> torch.Tensor:
    torch.manual_seed(2)
    query, z_p = torch.randn(2, 2, 9, layer.channels)
    negative, positive = texts()
    both = layer.texts([(1.0, negative)], positive, strength=strength, guidance=guidance)
    return sun_attention(query, z_p, both, 2)


def test_scales_follow_the_logarithm_of_the_guidance_scale() -> None:
    made = adapter(positive=False)
    layer = made.sun_layers()[0]
    torch.manual_seed(2)
    query, z_p = torch.randn(2, 2, 9, 8)
    negative = texts()[0]
    z_n = attend(query, layer.to_k_neg(negative), layer.to_v_neg(negative), 2)
    for row, w in enumerate((2.0, 11.0)):
        r = torch.log(torch.tensor(w / 4.0))
        alpha = layer.alpha_neg + r * layer.alpha_neg_w[0] + r**2 * layer.alpha_neg_w[1]
        beta = layer.beta_neg + r * layer.beta_neg_w[0] + r**2 * layer.beta_neg_w[1]
        expected = z_p - attention_normalization(z_n, z_p, alpha, beta)
        one = sun_attention(query, z_p, layer.texts([(1.0, negative)], guidance=made.guidance(w)), 2)
        torch.testing.assert_close(one, expected)
        features = made.guidance(torch.tensor([2.0, 11.0]))
        both = sun_attention(query, z_p, layer.texts([(1.0, negative)], guidance=features), 2)
        torch.testing.assert_close(both[row], expected[row])


def test_its_own_scale_and_none_are_the_plain_adapter() -> None:
    made = adapter()
    assert made.guidance(None) is None
    assert made.guidance(4.0) is None
    features = made.guidance(torch.tensor([4.0]))
    for layer in made.sun_layers():
        torch.testing.assert_close(run(layer, features), run(layer))


@pytest.mark.parametrize("scale", [1.0, 4.0, 9.5])
def test_baking_fixes_one_scale(scale: float) -> None:
    made = adapter()
    plain = bake(made, scale)
    assert not plain.guided
    assert plain.info.guidance_scale == scale
    for mine, theirs in zip(made.sun_layers(), plain.sun_layers(), strict=True):
        torch.testing.assert_close(run(theirs), run(mine, made.guidance(scale)))


@pytest.mark.parametrize("positive", [True, False])
def test_a_strength_in_the_weights_is_that_strength_of_a_run_at_every_scale(positive: bool) -> None:
    made, sizes = adapter(positive), [1.0, 0.75, -0.5]
    for strength in sizes:
        scaled = strengthen(made, strength)
        for mine, theirs in zip(made.sun_layers(), scaled.sun_layers(), strict=True):
            for w in (1.0, 4.0, 6.0):
                features = made.guidance(torch.tensor([w]))
                torch.testing.assert_close(run(theirs, features), run(mine, features, strength))
    with pytest.raises(ValueError, match="finite"):
        strengthen(made, math.nan)


@pytest.mark.parametrize("scale", [1.5, 4.0, 9.5])
def test_another_scale_by_default_changes_nothing_at_any_scale(scale: float) -> None:
    made = adapter()
    moved = recentre(made, scale)
    assert (moved.guided, moved.info.guidance_scale) == (True, scale)
    for mine, theirs in zip(made.sun_layers(), moved.sun_layers(), strict=True):
        torch.testing.assert_close(run(theirs), run(mine, made.guidance(scale)))
        for w in (1.0, 4.0, 6.0):
            torch.testing.assert_close(
                run(theirs, moved.guidance(torch.tensor([w]))), run(mine, made.guidance(torch.tensor([w])))
            )
    assert made.info.guidance_scale == 4.0
    with pytest.raises(ValueError, match="fixed at"):
        recentre(bake(made, 4.0), 2.0)


@pytest.mark.parametrize("positive", [True, False])
def test_files_keep_it_and_the_authors_layout_cannot(tmp_path: Path, positive: bool) -> None:
    made = adapter(positive)
    made.save(tmp_path / "a.safetensors")
    again = SunAdapter.load(tmp_path / "a.safetensors")
    assert again.guided
    for a, b in zip(made.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(SunFileError, match="bake"):
        made.save(tmp_path / "b.safetensors", layout="official")
    bake(made, 7.0).save(tmp_path / "b.safetensors", layout="official")
    assert SunAdapter.load(tmp_path / "b.safetensors").info.guidance_scale == 7.0


def test_a_file_that_lost_some_of_them_is_incomplete(tmp_path: Path) -> None:
    adapter().save(tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    lost = next(k for k in tensors if k.endswith("beta_pos_w"))
    del tensors[lost]
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(SunFileError, match=lost.replace(".", r"\.")):
        SunAdapter.load(tmp_path / "a.safetensors")


def test_scales_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="fixed at 4"):
        adapter(guided=False).guidance(7.0)
    with pytest.raises(ValueError, match="a number above 0, not inf"):
        adapter().guidance(torch.tensor([4.0, float("inf")]))
    with pytest.raises(ValueError, match="above 0"):
        adapter().guidance(0.0)
    assert adapter(guided=False).guidance(4.0) is None


def test_diffusers_hands_over_the_scale(pipe) -> None:
    made = from_unet(pipe.unet, alpha=0.3, w=4.0, guided=True)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("_w"):
                parameter.fill_(0.2)

    def draw(target: SunAdapter, **options: object) -> torch.Tensor:
        sun.attach(pipe, target, **options.pop("attach", {}))
        return pipe(
            "a",
            negative_prompt="b",
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **options,
        ).images

    own, nine = draw(made), draw(made, guidance_scale=9.0)
    torch.testing.assert_close(own, draw(made, guidance_scale=4.0))
    assert not torch.allclose(own, nine)
    torch.testing.assert_close(nine, draw(bake(made, 9.0)))
    torch.testing.assert_close(nine, draw(made, attach={"guidance_scale": 9.0}))
    torch.testing.assert_close(draw(made, attach={"guidance_scale": 9.0}, guidance_scale=4.0), own)
    with pytest.raises(ValueError, match="fixed"):
        sun.attach(pipe, bake(made, 9.0), guidance_scale=3.0)
    sun.detach(pipe)


@pytest.mark.parametrize("positive", [True, False])
def test_widened_it_is_the_same_at_every_scale_until_it_is_trained(positive: bool) -> None:
    plain = adapter(positive, guided=False).half()
    wide = widen(plain)
    assert wide.guided
    assert (wide.names, wide.info, wide.positive) == (plain.names, plain.info, positive)
    assert {p.dtype for p in wide.parameters()} == {torch.float16}
    wide, plain = wide.float(), plain.float()
    for mine, theirs in zip(wide.sun_layers(), plain.sun_layers(), strict=True):
        assert torch.equal(run(mine, wide.guidance(9.0)), run(theirs))
    again = widen(wide)
    assert all(map(torch.equal, again.state_dict().values(), wide.state_dict().values()))


@pytest.mark.parametrize("w", [1.5, 2.0, 4.0, 7.5])
def test_one_that_grows_follows_what_guidance_adds(w: float) -> None:
    """(scale - 1) / (w - 1) of alpha and beta, near enough around w; strength says the same of the plain one."""
    plain = adapter(guided=False)
    plain.info.guidance_scale = w
    wide = widen(plain, growing=True)
    for scale in (1.0, w, 1.5 * w, 2 * w):
        share = (scale - 1) / (w - 1)
        for mine, theirs in zip(wide.sun_layers(), plain.sun_layers(), strict=True):
            for name in ("alpha_neg", "beta_neg", "alpha_pos", "beta_pos"):
                found, own = mine.factor(name, wide.guidance(scale)), getattr(theirs, name)
                tolerance = abs(math.log(scale / w)) ** 3 / 3 * w / (w - 1)  # of what the second order leaves out
                assert (found.reshape(-1) - share * own).abs().max() <= tolerance * own.abs().max() + 1e-6, (
                    scale,
                    name,
                )


def test_one_that_grows_from_no_guidance_or_learned_before_stays_as_it_is() -> None:
    plain, made = adapter(guided=False), adapter()
    plain.info.guidance_scale = 1.0
    assert all(
        (value == 0).all() for name, value in widen(plain, growing=True).state_dict().items() if name.endswith("_w")
    )
    assert all(map(torch.equal, widen(made, growing=True).state_dict().values(), made.state_dict().values()))


def test_an_adapter_of_unknown_scale_is_widened_from_a_stated_one() -> None:
    with pytest.raises(ValueError, match="does not record the guidance scale"):
        widen(SunAdapter([8], 12))
    assert widen(SunAdapter([8], 12), 7.0).info.guidance_scale == 7.0


def test_scales_beyond_the_training_are_told_as_such() -> None:
    made = adapter()
    assert made.guidance_range is None
    assert made.guidance_note(20.0) == ""
    made.info.training["guidance_range"] = [1.0, 8.0]
    assert made.guidance_range == (1.0, 8.0)
    assert [made.guidance_note(w) for w in (None, 0.0, 1.0, 4.0, 8.0)] == [""] * 5
    assert "from 1 to 8; 9.5 is a guess" in made.guidance_note(9.5)
