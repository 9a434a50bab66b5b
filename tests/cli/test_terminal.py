"""Nothing in a file reaches the terminal as a control sequence, whichever command prints it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rich.table import Table
from safetensors.torch import load_file, save_file
from typer.testing import Result

from sun import files
from sun.cli.show import SafeConsole

Run = Callable[..., Result]
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202eevil"


def test_a_console_prints_texts_tables_and_cells_without_control_characters(capsys: pytest.CaptureFixture[str]):
    console = SafeConsole(highlight=False, width=200)
    table = Table(EVIL, title=EVIL, caption=EVIL)
    table.add_row(EVIL)
    inner = Table(EVIL)
    inner.add_row(EVIL)
    table.add_row(inner)
    console.print(EVIL, table, EVIL)
    console.print([EVIL], {"a": EVIL}, EVIL.encode())
    printed = capsys.readouterr().out
    assert "evil" in printed
    assert not set("\x1b\x07\x9b\u202e") & set(printed)


def test_inspect_prints_hostile_metadata_as_text(sun: Run, adapter_file: Path, tmp_path: Path):
    path = tmp_path / "x.safetensors"
    header = files.header_of(adapter_file)
    more = {"base_model": EVIL, EVIL: EVIL, "note": EVIL + "\nkind: SUN adapter", "training": json.dumps({EVIL: EVIL})}
    save_file(load_file(adapter_file), path, metadata={**header.metadata, **more})
    output = sun("inspect", path).output
    assert "evil" in output
    assert not set("\x1b\x07\x9b\u202e") & set(output)
    assert output.count("\nkind: ") <= 1
    save_file({EVIL + ".lora_A": torch.zeros(1)}, path)
    sun("inspect", path)
    save_file({EVIL + ".to_k_neg.weight": torch.zeros(1, 1)}, path)
    assert not set("\x1b\x07\x9b\u202e") & set(sun("inspect", path, code=2).output)


def test_inspect_refuses_pipes_devices_and_broken_folders(sun: Run, tmp_path: Path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path / "pipe.safetensors", "/dev/zero", "/dev/tty"):
        assert "Unexpected" not in sun("inspect", path, code=2).output
    (tmp_path / "model").mkdir()
    for content in ("[]", "{", "[" * 10**5, '{"_class_name": 3}', '{"_class_name": {"a": []}}', "3", "\xff"):
        (tmp_path / "model" / "model_index.json").write_text(content, encoding="latin-1")
        output = sun("inspect", tmp_path / "model", code=2).output
        assert "model_index.json" in output
        assert "Unexpected" not in output
    (tmp_path / "model" / "model_index.json").write_text(json.dumps({"_class_name": EVIL}))
    assert not set("\x1b\x07\x9b\u202e") & set(sun("inspect", tmp_path / "model").output)
    (tmp_path / "model" / "model_index.json").unlink()
    os.mkfifo(tmp_path / "model" / "model_index.json")
    sun("inspect", tmp_path / "model", code=2)


def test_inspect_of_a_compressed_archive_unpacks_nothing(sun: Run, tmp_path: Path):
    import gzip

    (tmp_path / "shard.tar").write_bytes(gzip.compress(bytes(50_000_000)))
    assert "not a safetensors file" in sun("inspect", tmp_path / "shard.tar", code=2).output


def test_convert_on_a_full_disk_and_onto_a_folder_says_so(sun: Run, adapter_file: Path, tmp_path: Path):
    import resource
    import signal

    target = tmp_path / "new.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, before[1]))
    try:
        output = sun("convert", adapter_file, target, code=2).output
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "new.safetensors: File too large" in output
    assert not list(tmp_path.iterdir())
    target.mkdir()
    assert "folder" in sun("convert", adapter_file, target, code=2).output
