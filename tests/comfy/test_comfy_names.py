"""Names of adapters come from workflow files, and so from anyone: none leads out of the model folders."""

from __future__ import annotations

import os
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
EXAMPLES = int(os.environ.get("SUN_FUZZ_EXAMPLES", "400"))
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
    assert host.part("nodes.details").facts_of(name).keys() == {"error"}


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
    facts = host.part("nodes.details").facts_of
    assert facts("inside.safetensors") == facts(host.part("nodes.folders").SHIPPED)
    adapter = host.part("sun.adapter").SunAdapter.load(secret)
    assert facts("inside.safetensors") == {
        "base_model": adapter.info.base_model,
        "positive": adapter.positive,
        "layers": len(adapter.channels),
        "parameters": sum(parameter.numel() for parameter in adapter.parameters()),
        "guidance_scale": adapter.info.guidance_scale,
        "takes_guidance_scale": adapter.guided,
        "steps": 4,
    }
    (host.base / "models" / "sun" / "inside.safetensors").write_bytes(b"something else")
    said = facts("inside.safetensors")["error"]
    assert said.startswith("inside.safetensors is not a safetensors file")
    assert str(host.base) not in said
