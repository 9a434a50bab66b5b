"""Names of adapters come from workflow files, and so from anyone: none leads out of the model folders."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

PARTS = st.sampled_from(
    ["..", ".", "", "~", "/", "\\", "C:", "C:\\", "\0", "%2e%2e", "secret.safetensors", "inside.safetensors", "sun",
     "models", "//", "file:", "folder", "\u2024\u2024", "a" * 300]
)  # fmt: skip
EXAMPLES = int(os.environ.get("SUN_FUZZ_EXAMPLES", "100"))
NAMES = st.one_of(
    st.lists(PARTS, max_size=6).map("/".join),
    st.lists(PARTS, max_size=6).map("\\".join),
    st.lists(PARTS, max_size=6).map("".join),
    st.text(max_size=30),
)


@pytest.fixture
def secret(host: SimpleNamespace, adapter_file: Path) -> Path:
    """A good adapter beside the model folder, and one in it."""
    secret = host.base / "models" / "secret.safetensors"
    inside = host.base / "models" / "sun" / "inside.safetensors"
    for path in (secret, inside):
        path.write_bytes(adapter_file.read_bytes())
    yield secret
    secret.unlink()
    inside.unlink()


@settings(
    max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(NAMES)
def test_no_name_opens_a_file_elsewhere(host: SimpleNamespace, secret: Path, name: str) -> None:
    folders, loader = host.part("nodes.folders"), host.nodes["SUN_LoadAdapter"]
    if name in folders.names():
        assert folders.find(name).is_relative_to(host.base / "models" / "sun")
        return
    with pytest.raises(FileNotFoundError, match="No SUN adapter named"):
        folders.find(name)
    assert "No SUN adapter named" in loader.validate_inputs(name)
    assert host.part("nodes.facts_route").facts_of(name).keys() == {"error"}


@pytest.mark.parametrize("path", ["../secret.safetensors", "sun/../../secret.safetensors", "./inside.safetensors"])
def test_ways_round_the_list_are_closed(host: SimpleNamespace, secret: Path, path: str) -> None:
    """Files that exist, by names that are not in the list."""
    assert (host.base / "models" / "sun" / path).resolve().exists() or path.startswith("sun/")
    absolute = str(secret)
    for name in (path, absolute, f"/{path}"):
        with pytest.raises(FileNotFoundError, match="No SUN adapter named"):
            host.part("nodes.folders").find(name)


@pytest.mark.parametrize("value", [None, 3, ["inside.safetensors"], {"a": 1}, True])
def test_values_that_are_no_text_are_refused_alike(host: SimpleNamespace, secret: Path, value: Any) -> None:
    with pytest.raises(FileNotFoundError, match="No SUN adapter named"):
        host.part("nodes.folders").find(value)


def test_facts_of_a_file_are_those_of_the_file(host: SimpleNamespace, secret: Path) -> None:
    facts = host.part("nodes.facts_route").facts_of
    assert facts("inside.safetensors") == facts(host.part("nodes.folders").SHIPPED)
    adapter = host.part("sun.adapter").SunAdapter.load(secret)
    assert facts("inside.safetensors") == {
        "base_model": adapter.info.base_model,
        "positive": adapter.positive,
        "layers": len(adapter.channels),
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "guidance_scale": adapter.info.guidance_scale,
        "takes_guidance_scale": adapter.guided,
        "guidance_range": adapter.guidance_range,
        "steps": 4,
    }
    (host.base / "models" / "sun" / "inside.safetensors").write_bytes(b"something else")
    said = facts("inside.safetensors")["error"]
    assert said.startswith("inside.safetensors is not a safetensors file")
    assert str(host.base) not in said


STRANGE = [
    "", "null", "[]", "{}", "abc", "1e400", "-1", "0", "NaN", "[1, 2]", "\x1b[2J", "9" * 5000, '"' * 50, "true",
    "[" * 3000, '{"guidance_range": "x"}', '{"guidance_range": [null, {}]}',
]  # fmt: skip


@pytest.mark.parametrize(
    "key", ["w", "stage_length", "training", "base_model", "layers", "branches", "format", "notes"]
)
def test_metadata_of_any_kind_breaks_neither_the_route_nor_the_info_node(
    host: SimpleNamespace, short: SimpleNamespace, key: str
) -> None:
    """A stranger's file gives facts or a sentence, both of which the page's JSON can carry."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = host.base / "models" / "sun" / "strange.safetensors"
    tensors = load_file(short.adapter_file)
    with safe_open(short.adapter_file, "pt") as content:
        metadata = content.metadata()
    load, info = host.nodes["SUN_LoadAdapter"], host.nodes["SUN_AdapterInfo"]
    try:
        for value in STRANGE:
            save_file(tensors, path, {**metadata, key: value})
            said = json.dumps(host.part("nodes.facts_route").facts_of(path.name), allow_nan=False)
            assert "\x1b" not in said
            assert "cannot be described" not in said
            if "error" in json.loads(said):
                with pytest.raises(host.part("sun.files").SunFileError, match=r"strange\.safetensors"):
                    load.execute(path.name)
            else:
                text, facts = info.execute(load.execute(path.name).result[0]).result
                assert json.loads(facts)["name"] == path.name
                assert "\x1b" not in text
    finally:
        path.unlink(missing_ok=True)


def test_the_route_answers_whatever_happens(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    details = host.part("nodes.facts_route")
    monkeypatch.setattr(details, "_read", lambda *_: 1 / 0)
    said = details.facts_of(host.part("nodes.folders").SHIPPED)
    assert said["error"].endswith("cannot be described (ZeroDivisionError); ComfyUI's log says more.")


def test_a_checkpoint_in_the_folder_is_not_read_whole(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 4 GB by its header, of which nothing but the header is touched."""
    header = {"model.diffusion_model.w": {"dtype": "F16", "shape": [2**31], "data_offsets": [0, 2**32]}}
    text = json.dumps(header).encode()
    path = host.base / "models" / "sun" / "checkpoint.safetensors"
    try:
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + 2**32)  # sparse: takes no room
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        said = host.part("nodes.facts_route").facts_of(path.name)["error"]
        assert "is not a SUN adapter" in said
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB
    finally:
        path.unlink(missing_ok=True)
