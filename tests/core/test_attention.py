"""The arithmetic of one SUN layer (Eq. 4-6) against the authors' processor and against slow, obvious versions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sun.adapter import SunAdapter, SunLayer
from sun.attention import attend, attention_normalization, sun_attention


def random_layer(channels: int = 12, text_width: int = 10, positive: bool = True, seed: int = 0) -> SunLayer:
    layer = SunLayer(channels, text_width, positive)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return layer


def random_inputs(rows: int = 2, channels: int = 12, text_width: int = 10, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "query": (rows, 9, channels),
        "z_p": (rows, 9, channels),
        "negative": (rows, 5, text_width),
        "positive": (rows, 7, text_width),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def steered(
    layer: SunLayer, query: torch.Tensor, z_p: torch.Tensor, negative: torch.Tensor,
    positive: torch.Tensor | None = None, *, attend: Any = attend, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """Z of a layer for one negative text; options as of ``SunLayer.texts``."""
    texts = layer.texts([(1.0, negative)], positive, **{k: v for k, v in options.items() if k != "heads"})
    return sun_attention(query, z_p, texts, options["heads"], attend)


def slow_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """softmax(Q K^T / sqrt(d)) V, one image and one head at a time."""
    width = query.shape[-1] // heads
    out = torch.zeros(*query.shape[:2], value.shape[-1], dtype=query.dtype)
    for image in range(query.shape[0]):
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = query[image, :, part] @ key[image, :, part].T / width**0.5
            out[image, :, part] = scores.softmax(-1) @ value[image, :, part]
    return out


def slow_sun(layer: SunLayer, query, z_p, negative, positive, heads: int) -> torch.Tensor:
    """Z = Zp - g(Zn) + g'(Ze), image by image, in float64."""
    layer = layer.double()
    out = []
    for i in range(query.shape[0]):
        q, zp, n, p = (x[i : i + 1].double() for x in (query, z_p, negative, positive))
        zn = slow_attention(q, n @ layer.to_k_neg.weight.T, n @ layer.to_v_neg.weight.T, heads)
        z = zp - (layer.alpha_neg * zn * ((zp**2).sum().sqrt() / (zn**2).sum().sqrt()) + layer.beta_neg)
        if layer.positive:
            ze = slow_attention(q, p @ layer.to_k_pos.weight.T, p @ layer.to_v_pos.weight.T, heads)
            z = z + (layer.alpha_pos * ze * ((zp**2).sum().sqrt() / (ze**2).sum().sqrt()) + layer.beta_pos)
        out.append(z)
    return torch.cat(out)


@pytest.mark.parametrize("case", ["square", "rect"])
def test_matches_the_authors_processor(case, data_folder, tmp_path):
    """Vectors computed in float64 by the authors' released attention processor."""
    golden = load_file(data_folder / "sun_attention.safetensors")
    golden = {key.removeprefix(f"{case}."): value for key, value in golden.items() if key.startswith(f"{case}.")}
    released = {k.removeprefix("adapter."): v for k, v in golden.items() if k.startswith("adapter.")}
    save_file({f"1.{key}": value for key, value in released.items()}, tmp_path / "released.safetensors")
    layer = SunAdapter.load(tmp_path / "released.safetensors").sun_layers()[0]
    heads = int(golden["heads"])
    query = golden["hidden_states"] @ golden["attn.to_q.weight"].T
    key, value = (golden["positive"] @ golden[f"attn.to_{x}.weight"].T for x in "kv")
    z_p = attend(query, key, value, heads)
    z = steered(layer, query, z_p, golden["negative"], golden["positive"], heads=heads)
    output = z @ golden["attn.to_out.0.weight"].T + golden["attn.to_out.0.bias"]
    assert torch.linalg.vector_norm(output - golden["output"]) <= 1e-5 * torch.linalg.vector_norm(golden["output"])
    assert (output - golden["output"]).abs().max() <= 1e-5 * golden["output"].abs().max()


@pytest.mark.parametrize("positive", [True, False])
def test_layer_matches_the_obvious_version(positive):
    layer, inputs = random_layer(positive=positive), random_inputs(rows=3)
    z = steered(layer, **inputs, heads=3)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, slow_sun(layer, **inputs, heads=3).float(), rtol=1e-5, atol=1e-5)


def test_an_image_does_not_depend_on_its_batch_mates():
    layer, inputs = random_layer(), random_inputs(rows=3)
    inputs["z_p"][1:] *= 50  # a norm over the whole batch would notice
    inputs["negative"][2] *= 20
    together = steered(layer, **inputs, heads=2)
    alone = steered(layer, **{name: value[:1] for name, value in inputs.items()}, heads=2)
    torch.testing.assert_close(together[:1], alone, rtol=1e-5, atol=1e-6)


def test_a_zero_negative_adds_beta_alone():
    layer, inputs = random_layer(positive=False), random_inputs()
    inputs["negative"].zero_()
    torch.testing.assert_close(steered(layer, **inputs, heads=2), inputs["z_p"] - layer.beta_neg)


def test_gradients_survive_a_zero_negative():
    layer, inputs = random_layer(positive=False), random_inputs()
    inputs["negative"].zero_()
    steered(layer, **inputs, heads=2).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_strength_scales_the_whole_effect():
    layer, inputs = random_layer(), random_inputs()
    assert steered(layer, **inputs, heads=2, strength=0.0) is inputs["z_p"]
    full = steered(layer, **inputs, heads=2) - inputs["z_p"]
    half = steered(layer, **inputs, heads=2, strength=0.5) - inputs["z_p"]
    torch.testing.assert_close(half, full / 2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_dtype_and_norms_in_float32(dtype):
    layer, inputs = random_layer(), random_inputs()
    inputs["z_p"] *= 3e3  # the squares overflow float16
    exact = steered(layer, **inputs, heads=2).detach()
    half = steered(layer.to(dtype), **{k: v.to(dtype) for k, v in inputs.items()}, heads=2)
    assert half.dtype == dtype
    torch.testing.assert_close(half.detach().float(), exact, rtol=0.03, atol=0.03 * float(exact.abs().max()))


def test_a_float32_adapter_serves_a_half_precision_query():
    layer, inputs = random_layer(), random_inputs()
    for name in ("query", "z_p"):
        inputs[name] = inputs[name].bfloat16()
    assert steered(layer, **inputs, heads=2).dtype == torch.bfloat16


def test_normalization_gives_the_negative_branch_the_positive_norm():
    z_n, z_p = torch.randn(2, 4, 6) * 10, torch.randn(2, 4, 6)
    g = attention_normalization(z_n, z_p, torch.ones(6), torch.zeros(6))
    torch.testing.assert_close(g.flatten(1).norm(dim=1), z_p.flatten(1).norm(dim=1))
    torch.testing.assert_close(g / g.norm(), (z_n / z_n.flatten(1).norm(dim=1)[:, None, None] * (
        z_p.flatten(1).norm(dim=1)[:, None, None])) / g.norm())  # fmt: skip


@pytest.mark.parametrize(("n", "p"), [(2e3, 1.0), (1.0, 2e3), (2e3, 2e3)])
def test_norms_beyond_float16_are_exact(n, p):
    z_n, z_p = (torch.randn(1, 64, 40).mul(scale).half() for scale in (n, p))  # norms near 100,000
    g = attention_normalization(z_n, z_p, torch.ones(40), torch.zeros(40))
    expected = z_n.double() * (z_p.double().norm() / z_n.double().norm())
    torch.testing.assert_close(g, expected.float(), rtol=1e-5, atol=0)


def test_attention_mask_hides_text_from_the_positive_branch_only():
    layer, inputs = random_layer(), random_inputs()
    mask = torch.zeros(2, 1, 1, 7)
    mask[..., 4:] = -1e9
    cut = {**inputs, "positive": inputs["positive"][:, :4]}
    torch.testing.assert_close(
        steered(layer, **inputs, heads=2, positive_mask=mask), steered(layer, **cut, heads=2), rtol=1e-5, atol=1e-6
    )


def test_positive_branch_asks_for_the_positive_text():
    inputs = random_inputs()
    del inputs["positive"]
    with pytest.raises(ValueError, match="positive"):
        steered(random_layer(), **inputs, heads=2)


def test_hosts_may_bring_their_own_linear_and_attention():
    built, attended = [], []

    class HostLinear(nn.Linear):
        def __init__(self, *args, **kwargs):
            built.append(kwargs["bias"])
            super().__init__(*args, **kwargs)

    def host_attend(query, key, value, heads):
        attended.append(heads)
        return attend(query, key, value, heads)

    layer = SunLayer(12, 10, True, linear=HostLinear)
    steered(layer, **random_inputs(), heads=4, attend=host_attend)
    assert built == [False] * 4
    assert attended == [4, 4]


def test_attention_that_is_trained_is_the_attention_that_is_used() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 32) for n in (9, 7, 7))
    used = attend(q, k, v, 4)
    trained = attend(q.requires_grad_(), k, v, 4)
    torch.testing.assert_close(trained, used)
    (gradient,) = torch.autograd.grad(trained.square().sum(), q)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        heads = [x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k, v)]
        kernel = torch.nn.functional.scaled_dot_product_attention(*heads)
    (expected,) = torch.autograd.grad(kernel.square().sum(), q)
    torch.testing.assert_close(gradient, expected)
