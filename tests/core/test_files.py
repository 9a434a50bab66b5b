"""Adapter files: both layouts, conversion without loss, and errors that name the file, the problem and the cure."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import STAGES, TEXT_WIDTH

from sun import SunAdapter, SunFileError, SunInfo
from sun.files import parse
from sun.layers import layers_from_structure

CHANNELS = tuple(layer.channels for layer in layers_from_structure(STAGES))
INDICES = tuple(range(1, 32, 2))


def official_tensors(
    positive: bool = True, text_width: int = TEXT_WIDTH, dtype=torch.float16
) -> dict[str, torch.Tensor]:
    """A file as the authors' release has it, with other widths."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, channels in zip(INDICES, CHANNELS, strict=True):
        for kind in ("neg", "extra_pos") if positive else ("neg",):
            for part in ("k", "v"):
                tensors[f"{index}.to_{part}_{kind}.weight"] = (channels, text_width)
            tensors[f"{index}.to_k_{kind}_alpha"] = tensors[f"{index}.to_k_{kind}_beta"] = (channels,)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in tensors.items()}


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata=metadata)
    return path


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def header(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata()


INFO = SunInfo(
    base_model="Tiny Diffusion",
    guidance_scale=8.0,
    stage_length=0.25,
    training={"steps": 5, "lr": 1e-4},
    notes={"a": "b"},
)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_official_to_ours_and_back_loses_nothing(tmp_path, positive, dtype):
    tensors = official_tensors(positive, dtype=dtype)
    adapter = SunAdapter.load(write(tmp_path / "official.safetensors", tensors))
    assert adapter.positive is positive
    assert adapter.channels == CHANNELS
    assert adapter.text_width == TEXT_WIDTH
    assert adapter.info.layout == "official"
    assert adapter.info.path == tmp_path / "official.safetensors"
    adapter.save(tmp_path / "ours.safetensors")
    ours = SunAdapter.load(tmp_path / "ours.safetensors")
    assert ours.info.layout == "sun"
    assert ours.info.branches == ("negative+positive" if positive else "negative")
    ours.save(tmp_path / "back.safetensors", layout="official")
    assert_same(load_file(tmp_path / "back.safetensors"), tensors)


def test_tensors_land_where_their_names_say(tmp_path):
    tensors = official_tensors()
    adapter = SunAdapter.load(write(tmp_path / "a.safetensors", tensors))
    layer = adapter.sun_layers()[4]  # index 9
    for ours, theirs in {
        "to_k_neg.weight": "to_k_neg.weight", "to_v_neg.weight": "to_v_neg.weight",
        "alpha_neg": "to_k_neg_alpha", "beta_neg": "to_k_neg_beta",
        "to_k_pos.weight": "to_k_extra_pos.weight", "to_v_pos.weight": "to_v_extra_pos.weight",
        "alpha_pos": "to_k_extra_pos_alpha", "beta_pos": "to_k_extra_pos_beta",
    }.items():  # fmt: skip
        assert torch.equal(layer.state_dict()[ours], tensors[f"9.{theirs}"]), ours
    adapter.save(tmp_path / "ours.safetensors")
    assert torch.equal(
        load_file(tmp_path / "ours.safetensors")["down_blocks.2.attentions.0.alpha_neg"], tensors["9.to_k_neg_alpha"]
    )
    assert adapter.names[-1] == "mid_block.attentions.0"


def test_mixed_dtypes_are_kept(tmp_path):
    tensors = official_tensors()
    tensors = {k: v.float() if k.endswith(("alpha", "beta")) else v for k, v in tensors.items()}
    SunAdapter.load(write(tmp_path / "a.safetensors", tensors)).save(tmp_path / "b.safetensors", layout="official")
    assert_same(load_file(tmp_path / "b.safetensors"), tensors)


@pytest.mark.parametrize("layout", ["sun", "official"])
def test_metadata_travels_in_both_layouts(tmp_path, layout):
    adapter = SunAdapter(CHANNELS, TEXT_WIDTH, info=INFO)
    adapter.save(tmp_path / "a.safetensors", layout=layout)
    info = SunAdapter.load(tmp_path / "a.safetensors").info
    assert (info.base_model, info.guidance_scale, info.stage_length) == ("Tiny Diffusion", 8.0, 0.25)
    assert info.training == {"steps": 5, "lr": 1e-4}
    assert info.notes == {"a": "b"}
    assert info.branches == "negative+positive"
    assert header(tmp_path / "a.safetensors")["format"] == "sun-adapter-1"


def test_saving_as_another_dtype(tmp_path):
    adapter = SunAdapter(CHANNELS, TEXT_WIDTH)
    adapter.save(tmp_path / "a.safetensors", dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "a.safetensors").values()} == {torch.bfloat16}
    assert adapter.sun_layers()[0].alpha_neg.dtype == torch.float32
    assert (
        SunAdapter.load(tmp_path / "a.safetensors", dtype=torch.float32).sun_layers()[0].beta_pos.dtype == torch.float32
    )
    with pytest.raises(SunFileError, match="float16"):
        adapter.save(tmp_path / "b.safetensors", dtype=torch.float64)


def test_structures_other_than_stable_diffusion_15(tmp_path):
    for channels in ((8, 16, 24), (8, 8, 8, 8, 8, 8, 8, 8)):
        SunAdapter(channels, 4).save(tmp_path / "a.safetensors")
        assert SunAdapter.load(tmp_path / "a.safetensors").channels == channels
        SunAdapter(channels, 4).save(tmp_path / "b.safetensors", layout="official")
        assert SunAdapter.load(tmp_path / "b.safetensors").channels == channels
    many = tuple(range(1, 31))  # layers.10 comes after layers.2
    SunAdapter(many, 4).save(tmp_path / "c.safetensors")
    assert SunAdapter.load(tmp_path / "c.safetensors").channels == many


def test_names_of_deep_transformers_keep_their_order(tmp_path):
    layers = layers_from_structure((8, 12), attention=(True, True), depth=(1, 11))
    adapter = SunAdapter([la.channels for la in layers], 4, names=[la.name for la in layers])
    adapter.save(tmp_path / "a.safetensors")
    assert SunAdapter.load(tmp_path / "a.safetensors").names == adapter.names


def test_a_pickle_of_tensors_loads(tmp_path):
    tensors = official_tensors()
    for name, content in {"a.pt": tensors, "b.bin": {"state_dict": tensors}, "misnamed.safetensors": tensors}.items():
        torch.save(content, tmp_path / name)
        SunAdapter.load(tmp_path / name).save(tmp_path / "c.safetensors", layout="official")
        assert_same(load_file(tmp_path / "c.safetensors"), tensors)


class Exploit:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.pt"])
@pytest.mark.parametrize("kind", ["pickle", "legacy", "zip"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, kind, name):
    target, file = tmp_path / "pwned", tmp_path / name
    content = {**official_tensors(), "x": Exploit(target)}
    if kind == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(SunFileError, match=r"adapter\.\w+ is a pickle .*safetensors"):
        SunAdapter.load(file)
    assert not target.exists()


def without(*keys: str):
    return lambda tensors: {k: v for k, v in tensors.items() if k not in keys}


def without_layer(index: int):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(f"{index}.")}


def with_tensor(key: str, *shape: int, dtype=torch.float16, first: float = 0.0):
    value = torch.zeros(shape, dtype=dtype)
    if value.numel():
        value.view(-1)[0] = first
    return lambda tensors: tensors | {key: value}


NAN, INF = float("nan"), float("-inf")
BROKEN = {
    "missing key": (without("5.to_v_neg.weight"), r"incomplete: 1 key .*'5\.to_v_neg\.weight'.*again"),
    "missing alpha": (without("1.to_k_neg_alpha"), r"'1\.to_k_neg_alpha'"),
    "missing layer": (without_layer(9), r"8 keys .*'9\.to_k_neg\.weight'"),
    "missing first layer": (without_layer(1), r"'1\.to_k_neg\.weight'"),
    "half a branch": (without("7.to_k_extra_pos.weight"), r"'7\.to_k_extra_pos\.weight'"),
    "extra key": (with_tensor("1.to_q.weight", 2), r"1 key that .*'1\.to_q\.weight'.*remove"),
    "extra layer": (with_tensor("33.to_k_neg.weight", 8, 16), r"'33\.to_v_neg\.weight'"),
    "even layer": (with_tensor("2.to_k_neg.weight", 8, 16), "incomplete"),
    "not an adapter": (lambda t: {"model.diffusion_model.x": torch.zeros(1)}, r"not a SUN adapter.*Choose"),
    "nothing": (lambda t: {}, "not a SUN adapter"),
    "K width": (with_tensor("3.to_k_neg.weight", 9, 16), r"3\.to_\w+(\.weight)? has shape"),
    "V width": (with_tensor("3.to_v_neg.weight", 9, 16), r"3\.to_v_neg\.weight has shape \[9, 16\] where \[8, 16\]"),
    "one text width": (with_tensor("3.to_v_neg.weight", 8, 17), r"\[8, 17\] where \[8, 16\]"),
    "alpha length": (with_tensor("31.to_k_neg_alpha", 23), r"31\.to_k_neg_alpha has shape \[23\] where \[24\]"),
    "scalar": (with_tensor("1.to_k_neg.weight"), r"1\.to_k_neg\.weight has shape \[\]"),
    "empty": (with_tensor("1.to_k_neg.weight", 0, 16), r"shape \[0, 16\]"),
    "NaN": (with_tensor("1.to_k_neg_beta", 8, first=NAN), r"1\.to_k_neg_beta holds NaN or infinity.*again"),
    "infinity": (with_tensor("1.to_k_extra_pos_beta", 8, first=INF), r"1\.to_k_extra_pos_beta holds NaN or infinity"),
    "integers": (with_tensor("1.to_k_neg_beta", 8, dtype=torch.int32), r"1\.to_k_neg_beta is stored as int32"),
    "float64": (with_tensor("1.to_k_neg_beta", 8, dtype=torch.float64), "float64"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_content_is_refused_with_a_sentence(tmp_path, case):
    change, message = BROKEN[case]
    file = write(tmp_path / "adapter.safetensors", change(official_tensors()))
    with pytest.raises(SunFileError, match=message) as error:
        SunAdapter.load(file)
    assert str(error.value).startswith(str(file))
    assert len(str(error.value)) < 600
    torch.save(change(official_tensors()), tmp_path / "adapter.pt")
    with pytest.raises(SunFileError, match=message):
        SunAdapter.load(tmp_path / "adapter.pt")


@pytest.mark.parametrize(("width", "family"), [(1024, r"Stable Diffusion 2\.x"), (2048, "SDXL")])
def test_other_families_are_refused(tmp_path, width, family):
    file = write(tmp_path / "sd2.safetensors", official_tensors(positive=False, text_width=width))
    with pytest.raises(SunFileError, match=rf"sd2\.safetensors .*{width} \({family}\).*1\.x \(768\)"):
        SunAdapter.load(file)


def test_our_layout_refuses_what_its_header_denies(tmp_path):
    SunAdapter(CHANNELS, TEXT_WIDTH).save(tmp_path / "a.safetensors")
    tensors, metadata = load_file(tmp_path / "a.safetensors"), header(tmp_path / "a.safetensors")
    cut = {k: v for k, v in tensors.items() if not k.startswith("up_blocks.2.attentions.1.")}
    with pytest.raises(SunFileError, match=r"layers = '16'.*has 15"):
        SunAdapter.load(write(tmp_path / "b.safetensors", cut, metadata))
    negative = {k: v for k, v in tensors.items() if "_pos" not in k}
    with pytest.raises(SunFileError, match="branches = 'negative\\+positive'"):
        SunAdapter.load(write(tmp_path / "c.safetensors", negative, metadata))
    with pytest.raises(SunFileError, match="text_width = '768'"):
        SunAdapter.load(write(tmp_path / "d.safetensors", tensors, metadata | {"text_width": "768"}))
    with pytest.raises(SunFileError, match=r"'sun-adapter-9'.*Update"):
        SunAdapter.load(write(tmp_path / "e.safetensors", tensors, metadata | {"format": "sun-adapter-9"}))
    for key in ("w", "training"):
        with pytest.raises(SunFileError, match=key):
            SunAdapter.load(write(tmp_path / "f.safetensors", tensors, metadata | {key: "[x"}))
    assert SunAdapter.load(write(tmp_path / "g.safetensors", tensors, {"format": "pt"})).info.notes == {"format": "pt"}


def raw_files(tmp_path: Path) -> dict[str, bytes]:
    good = write(tmp_path / "good.safetensors", official_tensors()).read_bytes()
    length = int.from_bytes(good[:8], "little")
    body = json.loads(good[8 : 8 + length])
    body["1.to_k_neg.weight"]["data_offsets"] = [0, 10**12]
    lie = json.dumps(body).encode()
    return {
        "truncated in the data": good[:-7],
        "truncated in the header": good[:200],
        "truncated at the header": good[: 8 + length],
        "cut to the length": good[:5],
        "garbage": b"garbage " * 100,
        "a web page": b"<!DOCTYPE html><html></html>",
        "empty": b"",
        "zeros": bytes(1000),
        "huge header": (2**63).to_bytes(8, "little") + b"{}" + bytes(100),
        "lying offsets": len(lie).to_bytes(8, "little") + lie + good[8 + length :],
        "no json": (20).to_bytes(8, "little") + b"{" + b"x" * 19,
        "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
        "half a zip": b"PK\x03\x04" + bytes(50),
    }


SAYS = {
    "truncated in the data": "truncated safetensors file.*again",
    "truncated in the header": "truncated",
    "truncated at the header": "truncated",
    "cut to the length": "not a safetensors file",
    "empty": "is empty",
    "garbage": "not a safetensors file",
    "Git LFS pointer": "git lfs pull",
    "half a zip": "pickle",
    "lying offsets": "damaged|truncated",
}


def test_files_that_are_not_safetensors_are_refused_with_a_sentence(tmp_path):
    for case, content in raw_files(tmp_path).items():
        file = tmp_path / "adapter.safetensors"
        file.write_bytes(content)
        with pytest.raises(SunFileError) as error:
            SunAdapter.load(file)
        assert str(error.value).startswith(str(file)), case
        assert re.search(SAYS.get(case, "safetensors"), str(error.value)), (case, str(error.value))


def test_paths_that_are_no_files(tmp_path):
    with pytest.raises(SunFileError, match=r"none\.safetensors does not exist"):
        SunAdapter.load(tmp_path / "none.safetensors")
    with pytest.raises(SunFileError, match="is a folder"):
        SunAdapter.load(str(tmp_path))


def test_a_state_dict_is_checked_as_well():
    with pytest.raises(SunFileError, match=r"^The weights has 1 key that"):
        parse({**official_tensors(), "x": torch.zeros(1)}, where="The weights")
    with pytest.raises(SunFileError, match="is a list, not a tensor"):
        parse({**official_tensors(), "1.to_k_neg.weight": [1.0]})


def test_saving_is_all_or_nothing(tmp_path, monkeypatch):
    file = tmp_path / "deep" / "adapter.safetensors"
    adapter = SunAdapter(CHANNELS, TEXT_WIDTH)
    adapter.save(file)
    before = file.read_bytes()

    def fails(tensors, metadata=None):
        half = next(p for p in file.parent.iterdir() if p != file)  # it is being written beside the file
        half.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("sun.files.save", fails)
    with pytest.raises(KeyboardInterrupt):
        adapter.save(file)
    assert file.read_bytes() == before
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_a_loaded_adapter_can_be_saved_over_its_own_file(tmp_path):
    file = write(tmp_path / "a.safetensors", official_tensors())
    SunAdapter.load(file).save(file)
    assert SunAdapter.load(file).info.layout == "sun"


def test_a_diverged_adapter_is_not_written(tmp_path):
    adapter = SunAdapter(CHANNELS, TEXT_WIDTH)
    with torch.no_grad():
        adapter.sun_layers()[2].alpha_pos[0] = float("nan")
    with pytest.raises(SunFileError, match=r"not written.*down_blocks\.1\.attentions\.0\.alpha_pos"):
        adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(SunFileError, match="layout 'other'"):
        SunAdapter(CHANNELS, TEXT_WIDTH).save(tmp_path / "a.safetensors", layout="other")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_saved_files_have_ordinary_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    SunAdapter(CHANNELS, TEXT_WIDTH).save(tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
