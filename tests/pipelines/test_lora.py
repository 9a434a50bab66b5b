"""LoRA files of every program and kind on a pipeline; what they change is peft's word where peft knows the kind."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import Tensor

from sun.common.notes import SunWarning
from sun.pipelines.loading import ModelError
from sun.pipelines.lora import apply_lora, layer_names

RANK = 3


def _r(*shape: int) -> Tensor:
    return torch.randn(*shape) * 0.1


def _linears(unet: Any) -> dict[str, Any]:
    return {n: m for n, m in unet.named_modules() if n.endswith(("attn2.to_q", "attn2.to_k", "attn1.to_out.0"))}


def _kohya(name: str) -> str:
    return "lora_unet_" + name.replace(".", "_")


def _plain(
    unet: Any, name: Callable[[str], str] = _kohya, down: str = "lora_down", up: str = "lora_up"
) -> dict[str, Tensor]:
    torch.manual_seed(0)
    found = {}
    for n, m in _linears(unet).items():
        found[f"{name(n)}.{down}.weight"] = _r(RANK, m.in_features)
        found[f"{name(n)}.{up}.weight"] = _r(m.out_features, RANK)
    return found


def _processor(name: str) -> str:
    """As diffusers named the layers of its attention processors until 0.20; "@" is no dot."""
    layer, _, projection = name.replace(".to_out.0", ".to_out").rpartition(".")
    return f"unet.{layer}.processor.{projection}_lora@"


def _saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, path, metadata=metadata)
    return path


def _weights(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def _applied(pipe: Any, *arguments: Any) -> tuple[dict[str, Tensor], list[str]]:
    """The U-Net's weights with a LoRA, and what was told."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        apply_lora(pipe, *arguments)
    return _weights(pipe.unet), [str(w.message) for w in told if issubclass(w.category, SunWarning)]


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=1e-5), name


def _differs(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("strength", [1.0, 0.5, -1.0])
def test_a_lora_changes_the_weights_as_diffusers_and_peft_do(pipe, tmp_path, strength):
    file = _saved(
        {**_plain(pipe.unet), **{f"{_kohya(n)}.alpha": torch.tensor(6.0) for n in _linears(pipe.unet)}},
        tmp_path / "x.safetensors",
    )
    theirs = copy.deepcopy(pipe)
    theirs.load_lora_weights(file, adapter_name="x")
    theirs.set_adapters(["x"], [strength])
    theirs.fuse_lora()
    theirs.unload_lora_weights()
    ours, told = _applied(pipe, file, strength)
    _same(ours, _weights(theirs.unet))
    assert not told  # nothing is left out of a usual file


@pytest.mark.parametrize(
    ("name", "down", "up"),
    [
        (lambda n: f"unet.{n}", "lora_A", "lora_B"),
        (lambda n: f"unet.{n}", "lora.down", "lora.up"),
        (_processor, "down", "up"),
        (lambda n: f"base_model.model.{n}", "lora_A", "lora_B"),
        (lambda n: f"base_model.model.{n}", "lora_A.default", "lora_B.default"),
        (lambda n: f"unet._orig_mod.{n}", "lora_A", "lora_B"),
        (lambda n: f"module._orig_mod.unet.{n}", "lora_A", "lora_B"),
        (lambda n: f"_orig_mod.{_kohya(n)}", "lora_down", "lora_up"),
        (lambda n: n, "lora_A", "lora_B"),
    ],
    ids=["diffusers", "diffusers 0.20", "attention processors", "peft", "peft with a name", "compiled", "wrapped twice",
         "kohya compiled", "bare"],
)  # fmt: skip
def test_the_names_of_every_program_mean_the_same_layers(make_pipeline, tmp_path, name, down, up):
    tensors = {k.replace("@.", "."): v for k, v in _plain(make_pipeline().unet, name, down, up).items()}
    expected, _ = _applied(make_pipeline(), _saved(_plain(make_pipeline().unet), tmp_path / "kohya.safetensors"))
    found, _ = _applied(make_pipeline(), _saved(tensors, tmp_path / "x.safetensors"))
    _same(found, expected)


def test_names_of_the_original_model_mean_the_same_layers(make_pipeline, tmp_path):
    from sun.layers import layers_of_unet

    unet = make_pipeline().unet
    layer = layers_of_unet(unet)[0]
    width = unet.get_submodule(layer.diffusers).to_q.in_features
    pair = {"lora_down.weight": _r(2, width), "lora_up.weight": _r(width, 2)}
    results = []
    for name in (_kohya(f"{layer.diffusers}.to_q"), _kohya(f"{layer.ldm}.to_q")):
        file = _saved({f"{name}.{k}": v for k, v in pair.items()}, tmp_path / "x.safetensors")
        results.append(_applied(make_pipeline(), file)[0])
    _same(*results)
    assert _differs(results[0], _weights(unet)) == {f"{layer.diffusers}.to_q.weight"}


PEFT = [
    LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q", "conv1"], init_lora_weights=False),
    LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q"], init_lora_weights=False, use_rslora=True),
    LoraConfig(r=RANK, lora_alpha=5, target_modules=["to_q", "to_v"], init_lora_weights=False, use_dora=True),
    LoHaConfig(r=RANK, alpha=5, target_modules=["to_q", "conv1"], init_weights=False),
    LoHaConfig(r=RANK, alpha=5, target_modules=["to_q", "conv1"], init_weights=False, use_effective_conv2d=True),
    LoKrConfig(r=RANK, alpha=5, target_modules=["to_q", "conv1"], init_weights=False),
    LoKrConfig(r=RANK, alpha=5, target_modules=["conv1"], init_weights=False, use_effective_conv2d=True),
    LoKrConfig(r=RANK, alpha=5, target_modules=["to_q"], init_weights=False, decompose_both=True),
]


@pytest.mark.parametrize("config", PEFT, ids=lambda c: f"{c.peft_type.value} {getattr(c, 'use_dora', '')}")
def test_what_peft_saves_is_what_peft_applies(make_pipeline, tmp_path, config):
    pipe, donor = make_pipeline(), make_pipeline().unet
    torch.manual_seed(1)
    trained = get_peft_model(donor, copy.deepcopy(config))
    for name, parameter in trained.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1.3
    trained.save_pretrained(tmp_path)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 7, donor.config.cross_attention_dim)
    with torch.no_grad():
        plain = pipe.unet(x, t, text).sample
        expected = trained(x, t, text).sample
        _, told = _applied(pipe, tmp_path)  # a folder, as peft writes it
        found = pipe.unet(x, t, text).sample
    assert (expected - plain).abs().max() > 1e-3
    assert torch.allclose(found, expected, atol=1e-4)
    assert all("not applied" not in sentence for sentence in told)


def test_a_dora_at_half_strength_is_half_of_its_change(make_pipeline, tmp_path):
    """Not peft's way, where the magnitudes act in full at any strength, 0 among them."""
    unet = make_pipeline().unet
    tensors = {
        **_plain(unet),
        **{f"{_kohya(n)}.dora_scale": torch.full((m.out_features, 1), 0.7) for n, m in _linears(unet).items()},
    }
    file, before = _saved(tensors, tmp_path / "x.safetensors"), _weights(unet)
    whole, half, none = (_applied(make_pipeline(), file, s)[0] for s in (1.0, 0.5, 0.0))
    for name in (f"{n}.weight" for n in _linears(unet)):
        assert torch.allclose(whole[name].norm(dim=1), torch.tensor(0.7), atol=1e-5)
        assert torch.allclose(half[name], (whole[name] + before[name]) / 2, atol=1e-6)
    _same(none, before)


def test_dora_of_columns_is_read_by_its_shape(make_pipeline, tmp_path):
    pipe = make_pipeline()
    name = next(n for n in _linears(pipe.unet) if n.endswith("attn2.to_k"))
    layer = pipe.unet.get_submodule(name)
    tensors = {
        f"{_kohya(name)}.lora_down.weight": _r(2, layer.in_features),
        f"{_kohya(name)}.lora_up.weight": _r(layer.out_features, 2),
        f"{_kohya(name)}.dora_scale": torch.full((1, layer.in_features), 0.6),
    }
    _applied(pipe, _saved(tensors, tmp_path / "x.safetensors"))
    assert torch.allclose(layer.weight.norm(dim=0), torch.tensor(0.6), atol=1e-5)


def test_norms_biases_and_whole_differences_are_added(make_pipeline, tmp_path):
    pipe, before = make_pipeline(), _weights(make_pipeline().unet)
    change = {
        "lora_unet_conv_norm_out.w_norm": ("conv_norm_out.weight", 1.0),
        "lora_unet_conv_norm_out.b_norm": ("conv_norm_out.bias", 2.0),
        "lora_unet_conv_in.diff": ("conv_in.weight", 3.0),
        "lora_unet_conv_in.diff_b": ("conv_in.bias", 4.0),
    }
    file = _saved({k: torch.full_like(before[n], v) for k, (n, v) in change.items()}, tmp_path / "x.safetensors")
    found, told = _applied(pipe, file, 0.5)
    for name, value in change.values():
        assert torch.allclose(found[name], before[name] + value / 2)
    assert _differs(found, before) == {name for name, _ in change.values()}
    assert "no keys of it left out" in told[0]


def test_a_conv_lora_with_a_core_is_its_tensor_product(make_pipeline, tmp_path):
    pipe, before = make_pipeline(), _weights(make_pipeline().unet)
    weight = before["conv_in.weight"]
    up, mid, down = _r(len(weight), 2, 1, 1), _r(2, 3, 3, 3), _r(3, weight.shape[1], 1, 1)
    tensors = {f"lora_unet_conv_in.lora_{k}.weight": v for k, v in {"up": up, "mid": mid, "down": down}.items()}
    found, _ = _applied(
        pipe, _saved({**tensors, "lora_unet_conv_in.alpha": torch.tensor(6.0)}, tmp_path / "x.safetensors")
    )
    expected = (
        sum(
            up[:, r, 0, 0].view(-1, 1, 1, 1) * mid[r, s] * down[s, :, 0, 0].view(-1, 1, 1)
            for r in range(2)
            for s in range(3)
        )
        * 2
    )
    assert torch.allclose(found["conv_in.weight"], weight + expected, atol=1e-6)


@pytest.mark.parametrize(
    "name",
    ["lora_te_text_model_{flat}", "lora_te1_text_model_{flat}", "text_encoder.text_model.{dots}", "text_encoder.{dots}",
     "base_model.model.text_model.{dots}"],
)  # fmt: skip
def test_the_text_encoders_layers_are_found_by_any_name(make_pipeline, tmp_path, name):
    pipe = make_pipeline()
    place = next(n for n, _ in pipe.text_encoder.named_modules() if n.endswith("layers.1.self_attn.q_proj"))
    layer, inner = pipe.text_encoder.get_submodule(place), place.removeprefix("text_model.")
    given = name.format(flat=inner.replace(".", "_"), dots=inner)
    down, up = _r(2, layer.in_features), _r(layer.out_features, 2)
    expected = layer.weight + up @ down
    _applied(pipe, _saved({f"{given}.lora_A.weight": down, f"{given}.lora_B.weight": up}, tmp_path / "x.safetensors"))
    assert torch.allclose(layer.weight, expected, atol=1e-6)


def test_alpha_in_diffusers_header_counts(make_pipeline, tmp_path):
    plain = _plain(make_pipeline().unet, lambda n: f"unet.{n}", "lora_A", "lora_B")
    header = {"lora_adapter_metadata": json.dumps({"unet.r": RANK, "unet.lora_alpha": 2 * RANK})}
    one, _ = _applied(make_pipeline(), _saved(plain, tmp_path / "a.safetensors"), 2.0)
    two, _ = _applied(make_pipeline(), _saved(plain, tmp_path / "b.safetensors", header), 1.0)
    _same(one, two)


def test_layers_the_model_lacks_are_told_with_their_count(pipe, tmp_path):
    tensors = _plain(pipe.unet)
    count = len(tensors) // 2
    for n in range(3):
        tensors |= {
            f"lora_unet_mid_block_{n}_9_to_q.lora_down.weight": _r(2, 8),
            f"lora_unet_mid_block_{n}_9_to_q.lora_up.weight": _r(8, 2),
        }
    _, told = _applied(pipe, _saved(tensors, tmp_path / "x.safetensors"))
    assert len(told) == 1
    assert f"3 of {count + 3} layers are not of this model and not applied" in told[0]


@pytest.mark.parametrize(
    ("end", "kind"),
    [("oft_blocks", "OFT"), ("oft_diag", "OFT"), ("a1.weight", "GLoRA"), ("on_input", "IA3"),
     ("lora_B.bias", "LoRA biases"), ("set_weight", "replaced weights"), ("something", "no known kind")],
)  # fmt: skip
def test_kinds_that_cannot_be_applied_are_named(make_pipeline, tmp_path, end, kind):
    pipe = make_pipeline()
    name = _kohya(next(iter(_linears(pipe.unet))))
    with pytest.raises(ModelError, match=f"could not be loaded as a LoRA: it holds 1 tensor of {kind}"):
        apply_lora(pipe, _saved({f"{name}.{end}": _r(4, 4)}, tmp_path / "alone.safetensors"))
    _, told = _applied(pipe, _saved({**_plain(pipe.unet), f"{name}.{end}": _r(4, 4)}, tmp_path / "x.safetensors"))
    assert any(f"1 tensor of {kind} are not applied" in sentence for sentence in told)


def test_a_lora_that_does_not_fit_leaves_in_a_sentence(pipe, tmp_path):
    name = _kohya(next(n for n in _linears(pipe.unet) if n.endswith("attn2.to_k")))
    wide = {f"{name}.lora_down.weight": _r(2, 1024), f"{name}.lora_up.weight": _r(8, 2)}
    with pytest.raises(ModelError, match="for another base model"):
        apply_lora(pipe, _saved(wide, tmp_path / "wide.safetensors"))
    flat = {f"{name}.lora_{end}.weight": torch.tensor(1.0) for end in ("down", "up")}
    with pytest.raises(ModelError, match="could not be loaded as a LoRA"):
        apply_lora(pipe, _saved(flat, tmp_path / "flat.safetensors"))
    with pytest.raises(ModelError, match="lacks its 'up'"):
        apply_lora(pipe, _saved({f"{name}.lora_down.weight": _r(2, 8)}, tmp_path / "half.safetensors"))
    sdxl = {f"lora_te2_text_model_x.lora_{e}.weight": _r(2, 2) for e in ("down", "up")} | {
        "lora_unet_x.lora_down.weight": _r(2, 2),
        "lora_unet_x.lora_up.weight": _r(2, 2),
    }
    with pytest.raises(ModelError, match="SDXL"):
        apply_lora(pipe, _saved(sdxl, tmp_path / "sdxl.safetensors"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_diverged_lora_and_a_weight_that_is_no_number_are_refused(pipe, tmp_path, value):
    before = _weights(pipe.unet)
    tensors = _plain(pipe.unet)
    good = _saved(tensors, tmp_path / "good.safetensors")
    tensors[next(iter(tensors))][0, 0] = value
    with pytest.raises(ModelError, match="NaN or infinity"):
        apply_lora(pipe, _saved(tensors, tmp_path / "x.safetensors"))
    with pytest.raises(ModelError, match="weight"):
        apply_lora(pipe, good, value)
    _same(_weights(pipe.unet), before)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "core"])
def test_a_small_file_that_multiplies_to_gigabytes_is_refused_before_it_does(pipe, tmp_path, kind, monkeypatch):
    side = 60_000
    name = _kohya(next(iter(_linears(pipe.unet))))
    column, row = torch.zeros(side, 1), torch.zeros(1, side)
    parts = {
        "lora": {"lora_up.weight": column, "lora_down.weight": row},
        "loha": {"hada_w1_a": column, "hada_w1_b": row, "hada_w2_a": column, "hada_w2_b": row},
        "lokr": {"lokr_w1": torch.zeros(250, 250), "lokr_w2": torch.zeros(250, 250)},
        "core": {
            "lora_up.weight": torch.zeros(side, 1),
            "lora_mid.weight": torch.zeros(1, 1, 3, 3),
            "lora_down.weight": torch.zeros(1, side),
        },
    }[kind]
    for function in ("kron", "einsum"):
        monkeypatch.setattr(torch, function, lambda *_: pytest.fail("it was multiplied"))
    with pytest.raises(ModelError, match="for another base model"):
        apply_lora(pipe, _saved({f"{name}.{k}": v for k, v in parts.items()}, tmp_path / "x.safetensors"))


@pytest.mark.parametrize(
    "content", [b"", b"\x08\0\0\0\0\0\0\0{}      ", b"PK\x03\x04", b"version https://git-lfs.github.com/spec/v1\n"]
)
def test_what_is_no_lora_file_is_refused(pipe, tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        apply_lora(pipe, tmp_path / "x.safetensors")
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"no \.safetensors file"):
        apply_lora(pipe, tmp_path / "x.pt")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        apply_lora(pipe, tmp_path / "gone.safetensors")


def test_no_two_layers_share_a_name(pipe):
    """Flattened names could collide: down_blocks_1_0 is that of down_blocks.1_0 and of down_blocks.1.0."""
    names = layer_names(pipe)
    flat = [
        f"lora_unet_{n.replace('.', '_')}"
        for n, m in pipe.unet.named_modules()
        if getattr(m, "weight", None) is not None
    ]
    assert len(flat) == len(set(flat))
    assert all(name in names for name in flat)


def test_a_lora_of_integers_is_refused(pipe, tmp_path):
    tensors = {name: (tensor * 100).to(torch.int8) for name, tensor in _plain(pipe.unet).items()}
    with pytest.raises(ModelError, match="quantised"):
        apply_lora(pipe, _saved(tensors, tmp_path / "x.safetensors"))


def test_half_of_an_sdxl_lora_is_not_applied(pipe, tmp_path):
    tensors = _plain(pipe.unet)
    for part in ("down", "up"):
        tensors[f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{part}.weight"] = _r(RANK, RANK)
    before = _weights(pipe.unet)
    with pytest.raises(ModelError, match="SDXL"):
        apply_lora(pipe, _saved(tensors, tmp_path / "x.safetensors"))
    _same(_weights(pipe.unet), before)


@pytest.mark.parametrize("columns", [False, True])
def test_dora_leaves_a_row_or_column_of_zeros_at_zero(make_pipeline, tmp_path, columns):
    pipe = make_pipeline()
    name = next(n for n in _linears(pipe.unet) if n.endswith("attn2.to_k"))
    layer = pipe.unet.get_submodule(name)
    down, up = _r(2, layer.in_features), _r(layer.out_features, 2)
    with torch.no_grad():
        (layer.weight[:, 0] if columns else layer.weight[0]).zero_()
    (down[:, 0] if columns else up[0]).zero_()
    shape = (1, layer.in_features) if columns else (layer.out_features, 1)
    tensors = {
        f"{_kohya(name)}.lora_down.weight": down,
        f"{_kohya(name)}.lora_up.weight": up,
        f"{_kohya(name)}.dora_scale": torch.full(shape, 0.6),
    }
    _applied(pipe, _saved(tensors, tmp_path / "x.safetensors"))
    assert torch.isfinite(layer.weight).all()
    assert not (layer.weight[:, 0] if columns else layer.weight[0]).any()
