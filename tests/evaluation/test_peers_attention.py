"""NASA and NAG: their formulas against slow obvious versions, and that they come off without a trace."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import TEXT_WIDTH, make_adapter, make_unet
from torch import Tensor

from sun.evaluation.peers.nag import attach_nag, detach_nag, normalized_guidance
from sun.evaluation.peers.nasa import attach_nasa, detach_nasa, steer_away
from sun.layers import layers_of_unet
from sun.pipelines.attach import attach

METHODS = [pytest.param(attach_nasa, detach_nasa, id="nasa"), pytest.param(attach_nag, detach_nag, id="nag")]
Attach, Detach = Callable[..., None], Callable[[Any], None]


def slow_nasa(z_p: Tensor, z_n: Tensor, scale: float) -> Tensor:
    out = torch.zeros_like(z_p)
    for b in range(z_p.shape[0]):
        for token in range(z_p.shape[1]):
            for c in range(z_p.shape[2]):
                out[b, token, c] = float(z_p[b, token, c]) - scale * float(z_n[b, token, c])
    return out


def slow_nag(z_p: Tensor, z_n: Tensor, phi: float, tau: float, alpha: float) -> Tensor:
    out = torch.zeros_like(z_p)
    for b in range(z_p.shape[0]):
        for token in range(z_p.shape[1]):
            p, n = z_p[b, token].tolist(), z_n[b, token].tolist()
            guided = [x + phi * (x - y) for x, y in zip(p, n, strict=True)]
            ratio = sum(abs(g) for g in guided) / sum(abs(x) for x in p)
            limited = [g * min(ratio, tau) / ratio for g in guided]
            out[b, token] = torch.tensor([alpha * g + (1 - alpha) * x for g, x in zip(limited, p, strict=True)])
    return out


def slow_attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """softmax(q k / sqrt(d)) v of one image, [T, C], [L, C], [L, C], head by head and token by token."""
    out = torch.zeros_like(q)
    d = q.shape[1] // heads
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for token in range(len(q)):
            scores = torch.stack([(q[token, part] * key).sum() / math.sqrt(d) for key in k[:, part]])
            weights = scores.exp() / scores.exp().sum()
            out[token, part] = sum(w * value for w, value in zip(weights, v[:, part], strict=True))
    return out


def states(seed: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, TEXT_WIDTH, generator=torch.Generator().manual_seed(seed))


def inputs(batch: int = 2) -> dict[str, Tensor]:
    sample = torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(9))
    return {"sample": sample, "timestep": torch.tensor(499), "encoder_hidden_states": states(1, batch)}


@torch.no_grad()
def run(unet: Any, negative: Tensor | None = None, batch: int = 2) -> Tensor:
    kwargs = {} if negative is None else {"cross_attention_kwargs": {"negative": negative}}
    return unet(**inputs(batch), **kwargs).sample


def test_nasa_formula() -> None:
    z_p, z_n = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(steer_away(z_p, z_n, 0.1), slow_nasa(z_p, z_n, 0.1))


@pytest.mark.parametrize("tau", [0.5, 1.5, 2.5, 100.0])
def test_nag_formula_below_and_above_the_limit(tau: float) -> None:
    z_p, z_n = torch.randn(2, 2, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(normalized_guidance(z_p, z_n, 2.0, tau, 0.375), slow_nag(z_p, z_n, 2.0, tau, 0.375))


def test_nag_of_nothing_is_nothing() -> None:
    assert not normalized_guidance(*torch.zeros(2, 1, 2, 4), 2.0, 2.5, 0.375).any()


def test_nag_does_not_overflow_in_half_precision() -> None:
    z_p, z_n = torch.full((1, 1, 320), 1000.0).half(), torch.zeros(1, 1, 320).half()
    torch.testing.assert_close(normalized_guidance(z_p, z_n, 2.0, 2.5, 0.375), torch.full((1, 1, 320), 1562.5))


@pytest.mark.parametrize(
    ("install", "formula"),
    [
        (attach_nasa, lambda p, n: slow_nasa(p[None], n[None], 0.1)[0]),
        (attach_nag, lambda p, n: slow_nag(p[None], n[None], 2.0, 2.5, 0.375)[0]),
    ],
    ids=["nasa", "nag"],
)
@torch.no_grad()
def test_a_layer_computes_the_formula(install: Attach, formula: Callable[[Tensor, Tensor], Tensor]) -> None:
    unet = make_unet()
    layer = unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2").double()
    install(unet)
    hidden = torch.randn(2, 4, layer.to_q.in_features, generator=torch.Generator().manual_seed(2)).double()
    positive, negative = states(1).double(), states(3).double()
    out = layer(hidden, encoder_hidden_states=positive, negative=negative)
    for image in range(2):
        q = layer.to_q(hidden[image])
        z = [
            slow_attention(q, layer.to_k(text[image]), layer.to_v(text[image]), layer.heads)
            for text in (positive, negative)
        ]
        torch.testing.assert_close(out[image], layer.to_out[0](formula(*z)))


@pytest.mark.parametrize(("install", "remove"), METHODS)
def test_detach_restores_exactly(install: Attach, remove: Detach) -> None:
    unet = make_unet()
    before, processors = run(unet), dict(unet.attn_processors)
    install(unet)
    assert torch.equal(run(unet), before), "without a negative nothing changes"
    assert not torch.allclose(run(unet, states(3)), before, atol=1e-4)
    remove(unet)
    assert torch.equal(run(unet), before)
    assert all(a is b for a, b in zip(unet.attn_processors.values(), processors.values(), strict=True))
    assert not any(m._forward_pre_hooks for m in unet.modules())
    remove(unet)  # nothing there: nothing happens


@pytest.mark.parametrize(("install", "remove"), METHODS)
def test_a_picture_does_not_depend_on_its_batch_mates(install: Attach, remove: Detach) -> None:
    unet = make_unet()
    install(unet)
    both = run(unet, states(3))
    alone = {k: v[:1] if v.ndim else v for k, v in inputs().items()}
    with torch.no_grad():
        single = unet(**alone, cross_attention_kwargs={"negative": states(3)[:1]}).sample
    torch.testing.assert_close(both[:1], single, rtol=1e-4, atol=1e-5)


def test_one_negative_serves_the_batch() -> None:
    unet, negative = make_unet(), states(3)[:1]
    attach_nasa(unet)
    torch.testing.assert_close(run(unet, negative), run(unet, negative.expand(2, -1, -1)))


def test_the_conditional_unet_is_a_special_case() -> None:
    unet = make_unet()
    plain = run(unet)
    attach_nasa(unet, scale=0.0)
    torch.testing.assert_close(run(unet, states(3)), plain, rtol=1e-4, atol=1e-5)
    attach_nag(unet)
    torch.testing.assert_close(run(unet, states(1)), plain, rtol=1e-4, atol=1e-5)  # negative = positive
    attach_nag(unet, alpha=0.0)
    torch.testing.assert_close(run(unet, states(3)), plain, rtol=1e-4, atol=1e-5)


def test_one_method_replaces_the_other() -> None:
    unet = make_unet()
    before = run(unet)
    attach_nag(unet)
    alone = run(unet, states(3))
    attach_nasa(unet)
    attach_nag(unet)
    assert torch.equal(run(unet, states(3)), alone)
    detach_nasa(unet)  # not what is there
    assert torch.equal(run(unet, states(3)), alone)
    detach_nag(unet)
    assert torch.equal(run(unet), before)


def test_masked_tokens_of_the_positive_prompt_do_not_count() -> None:
    unet = make_unet()
    attach_nasa(unet)
    short, mask = inputs(), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :3]
    kwargs = {"cross_attention_kwargs": {"negative": states(3)}}
    with torch.no_grad():
        masked = unet(**inputs(), **kwargs, encoder_attention_mask=mask).sample
        torch.testing.assert_close(masked, unet(**short, **kwargs).sample, rtol=1e-4, atol=1e-5)


def test_every_cross_attention_layer_is_steered() -> None:
    unet = make_unet()
    attach_nag(unet)
    names = {layer.diffusers for layer in layers_of_unet(unet)}
    steered = {n for n, m in unet.named_modules() if type(getattr(m, "processor", None)).__name__.startswith("Negati")}
    assert steered == names
    assert len(names) == 16


def test_sun_and_training_free_methods_refuse_each_other() -> None:
    unet = make_unet()
    attach(unet, make_adapter(unet))
    with pytest.raises(ValueError, match=r"sun\.detach"):
        attach_nasa(unet)
    other = make_unet()
    attach_nag(other)
    with pytest.raises(ValueError, match="cannot be combined"):
        attach(other, make_adapter(other))


def test_mistakes_are_named() -> None:
    unet = make_unet()
    attach_nasa(unet)
    with pytest.raises(ValueError, match="negative has 3 rows for a batch of 2"):
        run(unet, states(3, batch=3))
    with pytest.raises(ValueError, match="text encoder of this model"):
        run(unet, torch.zeros(2, 5, TEXT_WIDTH + 1))
    with pytest.raises(ValueError, match="tau > 0"):
        attach_nag(unet, tau=0.0)
    with pytest.raises(TypeError, match="UNet2DConditionModel"):
        attach_nasa(torch.nn.Linear(1, 1))
