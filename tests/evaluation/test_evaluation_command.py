"""``sun evaluate``: figures of one model, or a report when there is a folder for it."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from sun import evaluation
from sun.cli import app
from sun.common.settings import ConfigError
from sun.evaluation.checks import check
from sun.evaluation.config import EvaluateConfig
from sun.evaluation.names import REFERENCE
from sun.shipped import EMOJI_GUIDANCE

ROW = {"unet_calls": 4.0, "seconds": 0.1, "paired_mse": 0.05, "set_distance": 1.5}
MODEL = {
    "reference": {"method": "dpmpp-25", "unet_calls": 50.0, "seconds": 1.0},
    "methods": {"sun-4": ROW},
    "negative_prompt": {"pairs": 2, "sun-4": {"cosine": 0.5}, "groups": {}},
}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(evaluation, "evaluate", lambda config: calls.append(("evaluate", config)) or MODEL)
    monkeypatch.setattr(
        evaluation, "report", lambda config: calls.append(("report", config)) or {"models": {"b": MODEL}}
    )
    return calls


def test_a_configuration_with_models_makes_a_report(seen: list[tuple[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "e.toml").write_text(
        'methods = ["sun"]\nsteps = [4]\n[models.b]\nmodel = "emoji"\n[adapters]\nlate = "x"\n'
    )
    target = tmp_path / "out.json"
    arguments = [
        "evaluate",
        "--config",
        str(tmp_path / "e.toml"),
        "--output",
        str(tmp_path / "r"),
        "--json",
        str(target),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    kind, config = seen[0]
    assert (kind, config.models, config.adapters) == ("report", {"b": {"model": "emoji"}}, {"late": "x"})
    assert "sun-4" in result.output
    assert "+0.500" in result.output
    assert json.loads(target.read_text())["models"]["b"]["methods"]["sun-4"] == ROW


def test_json_of_one_model_is_the_same_with_a_report(seen: list[tuple[str, Any]], tmp_path: Path) -> None:
    for name, more in (("alone", []), ("report", ["--output", str(tmp_path / "r")])):
        result = CliRunner().invoke(app, ["evaluate", "--json", str(tmp_path / name), *more])
        assert result.exit_code == 0, result.output
    assert [kind for kind, _ in seen] == ["evaluate", "report"]
    alone, report = (json.loads((tmp_path / name).read_text()) for name in ("alone", "report"))
    assert {key: report[key] for key in alone} == alone
    assert report["models"]["b"] == alone


def test_json_of_several_models_keeps_them_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluation, "report", lambda config: {"models": {"a": MODEL, "b": MODEL}})
    CliRunner().invoke(app, ["evaluate", "--output", str(tmp_path / "r"), "--json", str(tmp_path / "f.json")])
    assert set(json.loads((tmp_path / "f.json").read_text())) == {"models"}


@pytest.mark.parametrize(
    ("settings", "package", "missing"),
    [
        ({"measure": ("distances",)}, "torchmetrics", True),
        ({"measure": ("edits",)}, "torchmetrics", True),
        ({"measure": ("time",)}, "torchmetrics", False),
        ({"measure": ("time",), "output": "report"}, "matplotlib", True),
        ({"measure": ("time",)}, "matplotlib", False),
    ],
)
def test_a_package_that_is_missing_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], package: str, missing: bool
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    config = EvaluateConfig(**settings)
    with pytest.raises(ConfigError, match=rf'{package}: pip install -e "\.\[eval\]"') if missing else nullcontext():
        check(config)


def test_without_a_folder_there_are_figures_alone(seen: list[tuple[str, Any]]) -> None:
    assert CliRunner().invoke(app, ["evaluate", "--prompts", "8"]).exit_code == 0
    assert seen[0][0] == "evaluate"


def test_a_table_is_no_text() -> None:
    result = CliRunner().invoke(app, ["evaluate", "--set", "models=emoji"])
    assert result.exit_code == 2
    assert "--config file" in result.output


DEFAULT_CALLS = {"ddim-4": 8, "dpmpp-4": 8, "cond-25": 25, "sun-4": 4, "sun-8": 8}
"""U-Net calls a picture of the methods that are measured when none is named."""


def test_what_is_measured_by_default() -> None:
    """tests/evaluation/test_evaluation.py measures a tiny model."""
    settings = EvaluateConfig()
    assert settings.methods == tuple(DEFAULT_CALLS)
    assert (settings.model, REFERENCE.text) == ("emoji", "dpmpp-25")


@pytest.mark.slow  # five methods of the shipped model, 25 steps among them
def test_the_shipped_model_is_measured_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_reference: str
) -> None:
    """The README's command, on fewer prompts, where nothing can be downloaded."""
    monkeypatch.setenv("SUN_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PATH", "")
    target = tmp_path / "figures.json"
    arguments = ["evaluate", "--prompts", "4", "--json", str(target), "--set", "negative_pairs=1",
                 "--set", "timing_rounds=1", "--set", "timing_batch=1"]  # fmt: skip
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(target.read_text())
    assert {name: row["unet_calls"] for name, row in found["methods"].items()} == DEFAULT_CALLS
    for row in found["methods"].values():
        assert {"seconds", "paired_mse", "set_distance"} <= set(row)
    assert found["guidance_scale"] == EMOJI_GUIDANCE
    assert -1 <= found["negative_prompt"]["sun-4"]["cosine"] <= 1
