"""``sun calibrate``: the table it writes is the one a pipeline finds."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from sun.cli import app
from sun.ltc import load_table


def test_calibrate_writes_a_table(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        ["calibrate", "polar bear", "ghost", "--negative", "red", "--steps", "8", "--tau", "0", "--guidance", "4",
         "--out", str(tmp_path / "tables"), "--json", str(tmp_path / "figures.json")],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "6 of 8 steps call the model" in done.output
    (path,) = (tmp_path / "tables").glob("*.json")
    table = load_table(path)
    assert tuple(table.coefficients) == (3, 5)
    assert (table.key.sampler, table.key.w, table.pictures, table.error_aware) == ("dpmpp_2m", 4.0, 2, True)
    assert json.loads((tmp_path / "figures.json").read_text())["calls"] == 6


def test_a_tau_that_leaves_nothing_says_so(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["calibrate", "ghost", "--steps", "6", "--tau", "0.000001", "--out", str(tmp_path)]
    )  # fmt: skip
    assert done.exit_code == 2
    assert "Raise tau" in done.output
