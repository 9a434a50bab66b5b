"""A file of settings is data, not a program: what it may not ask for, and in what shape it may come."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from sun.cli import app
from sun.common.settings import ConfigError, apply, read_config
from sun.lab.peers.guided_distillation import GuidedDistillConfig
from sun.lab.peers.lcm_lora import LcmLoraConfig
from sun.training.config import SunTrainConfig


def train(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["train", *arguments])


@pytest.mark.parametrize("form", ["toml", "json", "kept with a run", "set", "variants"])
def test_a_settings_file_runs_no_command(tiny_model: Path, tmp_path: Path, form: str) -> None:
    mark = tmp_path / "RAN"
    command = f"pipe:touch {mark}; cat /dev/null #.tar"
    settings: dict[str, Any] = {
        "model": str(tiny_model),
        "data": command,
        "run": {"steps": 1, "output": str(tmp_path / "r")},
    }
    file = tmp_path / ("x.toml" if form == "toml" else "config.json")
    if form == "toml":
        file.write_text(
            f'model = "{tiny_model}"\ndata = "{command}"\n[run]\nsteps = 1\noutput = "{tmp_path / "r"}"\n', "utf-8-sig"
        )
    else:
        file.write_text(json.dumps({**settings, "variants": {"a": {}}} if form == "variants" else settings))
    if form == "set":
        file.write_text(json.dumps({**settings, "data": "nowhere"}))
        done = train("--config", str(file), "--set", f"data={command}")
    elif form == "variants":
        done = CliRunner().invoke(app, ["train-variants", "--config", str(file)])
    else:
        done = train("--config", str(file))
    assert done.exit_code == 2, done.output
    assert "--allow-commands" in done.output
    assert not mark.exists()


def test_the_switch_is_for_what_was_written_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps({"data": "pipe:touch x #.tar"}))
    done = train("--config", str(file), "--allow-commands")
    assert done.exit_code == 2
    assert "data from a file runs no command" in " ".join(done.output.split())


@pytest.mark.parametrize("config", [SunTrainConfig, LcmLoraConfig, GuidedDistillConfig])
def test_the_switch_is_not_taken_from_a_file(config: type[Any]) -> None:
    for value in (True, "yes", 1, ["x"]):
        with pytest.raises(ConfigError, match="belongs on the command line"):
            apply(config(), {"allow_commands": value})
    assert apply(config(), {"allow_commands": False}).allow_commands is False


@pytest.mark.parametrize("name", ["x.toml", "x.json"])
def test_files_of_settings_with_a_byte_order_mark(tmp_path: Path, name: str) -> None:
    text = 'model = "ä"' if name.endswith("toml") else '{"model": "ä"}'
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / name).write_text(text, encoding=encoding)
        assert read_config(tmp_path / name) == {"model": "ä"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.json", b"[" * 300_000), ("x.json", b'{"a":' * 100_000), ("x.json", b'{"run": {"lr": NaN}}'),
        ("x.json", b'{"run": {"steps": 1e999}}'), ("x.json", b'{"a": ' + b"9" * 10_000 + b"}"), ("x.json", b"[]"),
        ("x.toml", b"a = " + b"[" * 300_000), ("x.toml", b"a = nan"), ("x.toml", b"a = inf"), ("x.toml", b"a = \xff"),
        ("x.toml", b"a." * 50_000 + b"b = 1"), ("x.toml", b"a = " + b"9" * 10_000), ("x.toml", b"\x00"),
        ("x.json", b""),
    ],
)  # fmt: skip
def test_settings_that_are_none_say_so(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as raised:
        read_config(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_a_pipe_is_no_settings_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.toml")
    with pytest.raises(ConfigError, match="not a regular file"):
        read_config(tmp_path / "x.toml")


@pytest.mark.parametrize(
    ("setting", "value"),
    [("lr", "nan"), ("lr", "inf"), ("minutes", "-inf"), ("steps", "1e400"), ("steps", "nan"), ("betas", "[" * 50_000),
     ("seed", "18446744073709551616"), ("seed", "-1"), ("steps", "-5"), ("unet_calls", "-1"), ("weight_decay", "-1"),
     ("warmup_steps", "-1"), ("minutes", "-1"), ("checkpoint_minutes", "-1")],
)  # fmt: skip
def test_numbers_of_a_run_outside_their_range_are_refused(tmp_path: Path, setting: str, value: str) -> None:
    done = train("--output", str(tmp_path / "run"), "--set", f"run.{setting}={value}", "--data", str(tmp_path))
    assert done.exit_code == 2, done.output
    assert setting in done.output
