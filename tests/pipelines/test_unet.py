"""SUN on a bare diffusers U-Net: ``cross_attention_kwargs={"sun_negative": embeds}``."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models import attention_processor
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    CustomDiffusionAttnProcessor2_0,
    SlicedAttnProcessor,
)
from einops import einsum, rearrange
from peft import LoraConfig
from tiny import TEXT_WIDTH, make_adapter, make_short_unet, make_unet

import sun
from sun import SunAdapter, SunFileError, layers_of_unet
from sun.surgery import from_unet


@pytest.fixture
def unet() -> Any:
    return make_short_unet()


def inputs(rows: int = 2, tokens: int = 6, seed: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn((rows, 4, 8, 8), generator=generator),
        "timestep": torch.tensor(749),
        "encoder_hidden_states": torch.randn((rows, tokens, TEXT_WIDTH), generator=generator),
    }


def negatives(rows: int = 2, tokens: int = 9, seed: int = 6) -> torch.Tensor:
    return torch.randn((rows, tokens, TEXT_WIDTH), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def run(unet: Any, values: dict[str, torch.Tensor], negative: Any = None, **kwargs: Any) -> torch.Tensor:
    options = {} if negative is None else {"cross_attention_kwargs": {"sun_negative": negative}}
    return unet(**values, **options, **kwargs).sample


@contextmanager
def sun_by_hooks(unet: Any, adapter: SunAdapter, negative: torch.Tensor, strength: float = 1.0) -> Iterator[None]:
    """An independent SUN: catch the query and what goes into to_out, and compute Eq. 4-6 beside the host's code."""
    handles = []

    def softmax_attention(q: torch.Tensor, text: torch.Tensor, k: Any, v: Any, heads: int) -> torch.Tensor:
        q, k, v = (rearrange(x, "b t (h c) -> b h t c", h=heads) for x in (q, text @ k.weight.T, text @ v.weight.T))
        scores = einsum(q, k, "b h t c, b h l c -> b h t l") / q.shape[-1] ** 0.5
        return rearrange(einsum(scores.softmax(-1), v, "b h t l, b h l c -> b h t c"), "b h t c -> b t (h c)")

    def hook(attn: Any, layer: Any) -> None:
        seen: dict[str, torch.Tensor] = {}

        def normalized(z: torch.Tensor, zp: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
            norms = (rearrange(x, "b t c -> b (t c)").norm(dim=1) for x in (zp, z))
            return alpha * z * rearrange(operator.truediv(*norms), "b -> b 1 1") + beta

        def change(_module: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
            zp = args[0]
            zn = softmax_attention(seen["q"], negative, layer.to_k_neg, layer.to_v_neg, attn.heads)
            z = zp - strength * normalized(zn, zp, layer.alpha_neg, layer.beta_neg)
            if layer.positive:
                ze = softmax_attention(seen["q"], seen["text"], layer.to_k_pos, layer.to_v_pos, attn.heads)
                z = z + strength * normalized(ze, zp, layer.alpha_pos, layer.beta_pos)
            return (z,)

        handles.append(attn.to_q.register_forward_hook(lambda _m, _a, out: seen.update(q=out)))
        handles.append(attn.to_k.register_forward_pre_hook(lambda _m, a: seen.update(text=a[0])))
        handles.append(attn.to_out[0].register_forward_pre_hook(change))

    for layer, own in zip(layers_of_unet(unet), adapter.sun_layers(), strict=True):
        hook(unet.get_submodule(layer.diffusers), own)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def warnings_of_diffusers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What diffusers' attention says about options it does not know."""
    said: list[str] = []
    monkeypatch.setattr(attention_processor.logger, "warning", lambda message, *args: said.append(str(message)))
    return said


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_output_is_the_formulas(unet, positive, strength, warnings_of_diffusers):
    adapter, values, negative = make_adapter(unet, positive), inputs(), negatives()
    with sun_by_hooks(unet, adapter, negative, strength):
        expected = run(unet, values)
    plain = run(unet, values)
    assert (expected - plain).abs().max() > 0.01
    sun.attach(unet, adapter, strength=strength)
    torch.testing.assert_close(run(unet, values, negative), expected, rtol=1e-4, atol=1e-5)
    assert warnings_of_diffusers == []
    with torch.no_grad():  # positional arguments, as some scripts write
        out = unet(*values.values(), None, None, None, {"sun_negative": negative}).sample
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("processor", [AttnProcessor2_0, AttnProcessor, partial(SlicedAttnProcessor, 1)])
def test_strength_zero_and_no_negative_are_the_plain_unet_bit_for_bit(unet, adapter, processor):
    unet.set_attn_processor(processor())
    values = inputs()
    plain = run(unet, values)
    sun.attach(unet, adapter)
    assert torch.equal(run(unet, values), plain)
    assert torch.equal(run(unet, values, cross_attention_kwargs={}), plain)
    assert torch.equal(run(unet, values, cross_attention_kwargs={"sun_negative": None}), plain)
    assert not torch.equal(run(unet, values, negatives()), plain)
    sun.attach(unet, adapter, strength=0.0)
    assert torch.equal(run(unet, values, negatives()), plain)


def test_a_batch_item_equals_the_single_image(unet, adapter):
    sun.attach(unet, adapter)
    values, negative = inputs(rows=3), negatives(rows=3)
    together = run(unet, values, negative)
    for i in range(3):
        single = {k: v[i : i + 1] if v.ndim else v for k, v in values.items()}
        torch.testing.assert_close(together[i : i + 1], run(unet, single, negative[i : i + 1]), rtol=1e-4, atol=1e-5)


def test_rows_of_the_negative_are_fitted_to_the_batch(unet, adapter):
    sun.attach(unet, adapter)
    values, negative = inputs(rows=4), negatives(rows=2)
    full = run(unet, values, negative[[0, 0, 1, 1]])  # diffusers keeps the images of a prompt together
    assert torch.equal(run(unet, values, negative), full)
    assert torch.equal(run(unet, values, negative[:1]), run(unet, values, negative[:1].expand(4, -1, -1)))
    assert not torch.equal(run(unet, values, negative[:1]), full)


@pytest.mark.parametrize(
    ("negative", "error", "message"),
    [
        (torch.zeros(3, 5, TEXT_WIDTH), ValueError, "3 rows for a batch of 4. Pass 1, 4"),
        (torch.zeros(8, 5, TEXT_WIDTH), ValueError, "8 rows for a batch of 4"),
        (torch.zeros(0, 5, TEXT_WIDTH), ValueError, "0 rows"),
        (torch.zeros(4, 5, 768), ValueError, r"shape \[4, 5, 768\]; .*\[B, L, 16\]"),
        (torch.zeros(5, TEXT_WIDTH), ValueError, r"shape \[5, 16\]"),
        (torch.zeros(4, 5, TEXT_WIDTH, dtype=torch.int64), TypeError, "int64"),
        ("blurry", TypeError, "not str"),
    ],
)
def test_unusable_negatives_are_refused(unet, adapter, negative, error, message):
    sun.attach(unet, adapter)
    with pytest.raises(error, match=message):
        run(unet, inputs(rows=4), negative)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("late", [True, False])
def test_the_adapter_follows_the_unets_dtype(dtype, late):
    unet = make_short_unet()
    adapter, values, negative = make_adapter(unet), inputs(), negatives()
    sun.attach(unet, adapter)
    exact = run(unet, values, negative)
    if late:
        unet.to(dtype)
    else:
        sun.detach(unet)
        sun.attach(unet.to(dtype), adapter)
        assert {p.dtype for p in adapter.parameters()} == {dtype}
    values = {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()}
    half = run(unet, values, negative)  # a float32 negative is converted
    assert half.dtype == dtype
    assert {p.dtype for p in adapter.parameters()} == {dtype}
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1)


def test_an_adapter_in_training_keeps_its_precision():
    unet = make_short_unet().to(torch.bfloat16)
    adapter = from_unet(unet, dtype=torch.float32).train()
    sun.attach(unet, adapter)
    values = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs().items()}
    unet(**values, cross_attention_kwargs={"sun_negative": negatives()}).sample.float().square().mean().backward()
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapter.parameters())


def test_autocast_leaves_the_weights_alone(unet, adapter):
    sun.attach(unet, adapter)
    exact = run(unet, inputs(), negatives())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = run(unet, inputs(), negatives())
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_gradients_reach_every_part_of_the_adapter(unet, checkpointing):
    adapter = make_adapter(unet).train()
    unet.requires_grad_(False).train()
    if checkpointing:
        unet.enable_gradient_checkpointing()
    sun.attach(unet, adapter)
    out = unet(**inputs(), cross_attention_kwargs={"sun_negative": negatives()}).sample
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in unet.parameters())
    if checkpointing:  # the second forward, in backward, saw the negative as well
        gradients = [p.grad.clone() for p in adapter.parameters()]
        adapter.zero_grad()
        unet.disable_gradient_checkpointing()
        unet(**inputs(), cross_attention_kwargs={"sun_negative": negatives()}).sample.square().mean().backward()
        for before, p in zip(gradients, adapter.parameters(), strict=True):
            torch.testing.assert_close(before, p.grad)


def test_encoder_attention_mask_is_honoured(unet, adapter):
    sun.attach(unet, adapter)
    values, negative = inputs(tokens=8), negatives()
    mask = torch.tensor([[1] * 5 + [0] * 3] * 2)
    cut = {**values, "encoder_hidden_states": values["encoder_hidden_states"][:, :5]}
    masked = run(unet, values, negative, encoder_attention_mask=mask)
    torch.testing.assert_close(masked, run(unet, cut, negative), rtol=1e-4, atol=1e-4)


def snapshot(unet: Any) -> dict[str, Any]:
    """Everything attach could leave behind: attributes, hooks, processors, parameter names of every module."""
    return {
        name: (sorted(module.__dict__), dict(module._forward_pre_hooks), dict(module._forward_hooks),
               dict(module._forward_pre_hooks_with_kwargs), getattr(module, "processor", None))
        for name, module in unet.named_modules()
    }  # fmt: skip


def test_detach_restores_everything(unet, adapter):
    values = inputs()
    plain, before = run(unet, values), snapshot(unet)
    processors, keys = unet.attn_processors, list(unet.state_dict())
    sun.attach(unet, adapter)
    assert list(unet.state_dict()) == keys  # the adapter is no part of the U-Net: saving it stays possible
    run(unet, values, negatives())
    sun.detach(unet)
    assert snapshot(unet) == before
    assert all(unet.attn_processors[name] is processor for name, processor in processors.items())
    assert torch.equal(run(unet, values), plain)
    sun.detach(unet)  # twice is fine
    assert snapshot(unet) == before


def test_attaching_again_replaces(unet):
    first, second, values, negative = make_adapter(unet), make_adapter(unet, seed=8), inputs(), negatives()
    before = snapshot(unet)
    sun.attach(unet, second)
    only_second = run(unet, values, negative)
    sun.detach(unet)
    sun.attach(unet, first)
    assert not torch.equal(run(unet, values, negative), only_second)
    sun.attach(unet, second)
    sun.attach(unet, second)
    assert torch.equal(run(unet, values, negative), only_second)
    sun.detach(unet)
    assert snapshot(unet) == before


def test_nothing_of_a_run_stays_on_the_unet(unet, adapter):
    sun.attach(unet, adapter)
    values, negative = inputs(), negatives()
    before, expected = snapshot(unet), run(unet, values, negative)
    handle = unet.up_blocks[-1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(unet, values, negative)
    handle.remove()
    assert snapshot(unet) == before
    assert torch.equal(run(unet, values, negative), expected)
    options = {"sun_negative": negative}
    run(unet, values, cross_attention_kwargs=options)
    assert options == {"sun_negative": negative}
    assert options["sun_negative"] is negative


def test_wrong_base_models_are_refused_and_leave_no_trace(unet, tmp_path):
    other = from_unet(make_short_unet(text_width=12))
    other.save(tmp_path / "other.safetensors")
    before = snapshot(unet)
    with pytest.raises(SunFileError, match=r"other\.safetensors does not fit: .*text width 12, and this U-Net has 16"):
        sun.attach(unet, tmp_path / "other.safetensors")
    with pytest.raises(SunFileError, match=r"is 16 wide, and that of this U-Net is 12"):
        sun.attach(make_unet(stages=(8, 12, 24, 24)), make_adapter(make_unet()))
    assert snapshot(unet) == before


def test_a_refused_adapter_leaves_the_old_one_working(unet, adapter):
    sun.attach(unet, adapter)
    expected = run(unet, inputs(), negatives())
    with pytest.raises(SunFileError):
        sun.attach(unet, from_unet(make_short_unet(text_width=12)))
    assert torch.equal(run(unet, inputs(), negatives()), expected)


def test_attach_takes_a_path(unet, adapter, tmp_path):
    adapter.save(tmp_path / "a.safetensors")
    sun.attach(unet, adapter)
    expected = run(unet, inputs(), negatives())
    sun.attach(unet, str(tmp_path / "a.safetensors"))
    assert torch.equal(run(unet, inputs(), negatives()), expected)


def test_other_things_are_no_target(adapter):
    with pytest.raises(TypeError, match="not Linear"):
        sun.attach(torch.nn.Linear(2, 2), adapter)


def other_processors(unet: Any) -> dict[str, Any]:
    widths = {layer.diffusers: layer.channels for layer in layers_of_unet(unet)}
    return {
        name: CustomDiffusionAttnProcessor2_0(True, True, widths[name.removesuffix(".processor")], TEXT_WIDTH)
        if ".attn2." in name
        else AttnProcessor2_0()
        for name in unet.attn_processors
    }


def test_other_attention_is_refused_before_and_noticed_after(unet, adapter):
    plain = unet.attn_processors
    sun.attach(unet, adapter)
    unet.set_attn_processor(other_processors(unet))
    with pytest.raises(RuntimeError, match=r"replaced after sun\.attach"):
        run(unet, inputs(), negatives())
    with pytest.raises(ValueError, match=r"CustomDiffusionAttnProcessor2_0.*Take away"):
        sun.attach(unet, adapter)
    sun.detach(unet)  # leaves the newer processors
    with pytest.raises(ValueError, match="CustomDiffusionAttnProcessor2_0"):
        sun.attach(unet, adapter)
    unet.set_attn_processor(plain)
    sun.attach(unet, adapter)
    run(unet, inputs(), negatives())


def test_attention_slicing_before_is_fine_and_after_is_noticed(unet, adapter):
    values, negative = inputs(), negatives()
    sun.attach(unet, adapter)
    expected = run(unet, values, negative)
    unet.set_attention_slice("max")
    with pytest.raises(RuntimeError, match=r"sun\.attach again"):
        run(unet, values, negative)
    sun.attach(unet, adapter)
    torch.testing.assert_close(run(unet, values, negative), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["lora", "sun"])
def test_lora_before_or_after(unet, adapter, first):
    config = LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)
    values, negative = inputs(), negatives()
    sun.attach(unet, adapter)
    without = run(unet, values, negative)
    if first == "lora":
        sun.detach(unet)
    torch.manual_seed(3)
    unet.add_adapter(config)
    if first == "lora":
        sun.attach(unet, adapter)
    out = run(unet, values, negative)
    assert (out - without).abs().max() > 1e-3
    merged = make_short_unet()
    torch.manual_seed(3)
    merged.add_adapter(config)
    merged.fuse_lora()
    merged.unload_lora()
    with sun_by_hooks(merged, adapter, negative):
        torch.testing.assert_close(out, run(merged, values), rtol=1e-3, atol=1e-4)
    unet.unload_lora()
    torch.testing.assert_close(run(unet, values, negative), without)


def test_lora_scale_and_sun_share_cross_attention_kwargs(unet, adapter):
    sun.attach(unet, adapter)
    without = run(unet, inputs(), negatives())
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    scaled = run(unet, inputs(), cross_attention_kwargs={"sun_negative": negatives(), "scale": 0.0})
    torch.testing.assert_close(scaled, without)


def test_a_compiled_unet_is_attached_through_its_wrapper(unet, adapter):
    sun.attach(unet, adapter)
    expected = run(unet, inputs(), negatives())
    sun.detach(unet)
    compiled = torch.compile(unet, backend="eager")
    sun.attach(compiled, adapter)
    assert torch.equal(run(unet, inputs(), negatives()), expected)
    sun.detach(compiled)
    assert not hasattr(unet, "_sun")
