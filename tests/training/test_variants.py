"""Several adapters from one file: what differs differs, the rest is common, and nothing is trained twice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sun.adapter import SunAdapter
from sun.cli import app
from sun.common.settings import ConfigError, read_config
from sun.evaluation import parse_method
from sun.shipped import EMOJI_GUIDANCE
from sun.training.variants import variant_configs

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SETTINGS = {
    "substeps": 2, "run": {"output": "runs/x", "lr": 0.1},
    "variants": {"plain": {}, "one": {"positive_branch": False}, "slow": {"run": {"lr": 0.01}}},
}  # fmt: skip


def test_a_variant_changes_what_it_names_and_nothing_else() -> None:
    configs = variant_configs(SETTINGS)
    assert [c.run.output for c in configs.values()] == ["runs/x/plain", "runs/x/one", "runs/x/slow"]
    assert [c.positive_branch for c in configs.values()] == [True, False, True]
    assert [c.run.lr for c in configs.values()] == [0.1, 0.1, 0.01]
    assert {c.substeps for c in configs.values()} == {2}
    assert list(variant_configs(SETTINGS, ["one"])) == ["one"]
    moved = variant_configs(SETTINGS, assignments=["run.output=elsewhere"])
    assert len({Path(config.run.output) for config in moved.values()}) == len(moved)
    assert {Path(config.run.output).parent for config in moved.values()} == {Path("elsewhere")}


@pytest.mark.parametrize(
    ("settings", "only", "says"),
    [
        (SETTINGS, ["two"], "no variant two; there are: plain, one, slow"),
        ({"substeps": 2}, [], "has no variants. Add tables"),
        ({"variants": {"a": {"sub_steps": 1}}}, [], r"variants\.a.*sub_steps.*substeps"),
    ],
)
def test_what_is_wrong_is_named(settings: dict, only: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        variant_configs(settings, only)


def test_the_ablations_can_be_read() -> None:
    configs = variant_configs(read_config(CONFIGS / "ablations-emoji.toml"))
    paper = {"no-normalization", "negative-only", "p-0", "stage-12"}  # what its ablations are of
    assert {"ours", "virtual", *paper} == set(configs)
    assert len({config.run.unet_calls for config in configs.values()}) == 1, "equal calls of training"
    shipped = read_config(CONFIGS / "emoji-sun.toml")
    recipe = {k: v for k, v in shipped.items() if k not in ("run", "guidance_scale")}  # at one scale, the model's own
    ours = configs["ours"]
    assert {k: getattr(ours, k) for k in recipe} == recipe
    assert ours.guidance_scale == EMOJI_GUIDANCE
    evaluation = read_config(CONFIGS / "evaluate-ablations.toml")
    assert set(evaluation["adapters"]) == set(configs)
    named = {parse_method(method).variant for method in evaluation["methods"]}
    assert named - {""} == set(configs)  # "" is the shipped adapter


def test_the_command_trains_each_once(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    run = {"output": str(tmp_path / "runs"), "steps": 2, "batch_size": 2, "precision": "fp32", "sample_minutes": 60}
    file = tmp_path / "variants.json"
    settings = {"model": str(tiny_model), "data": str(pictures), "resolution": 64, "substeps": 1, "run": run}
    file.write_text(json.dumps({**settings, "variants": {"both": {}, "one": {"positive_branch": False}}}))
    for _ in range(2):
        result = CliRunner().invoke(app, ["train-variants", "--config", str(file)])
        assert result.exit_code == 0, result.output
    adapters = {name: SunAdapter.load(tmp_path / "runs" / name / "adapter.safetensors") for name in ("both", "one")}
    assert {name: a.positive for name, a in adapters.items()} == {"both": True, "one": False}
    assert {a.info.training["step"] for a in adapters.values()} == {2}
