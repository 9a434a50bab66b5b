"""``sun assemble``: a plan, a folder and a checkpoint of a compact U-Net from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from diffusers import UNet2DConditionModel
from safetensors import safe_open
from typer.testing import Result

from sun.compact import assemble, experts_for, plan, read_experts, write_experts

Run = Callable[..., Result]


def test_plan_assemble_and_write(sun: Run, full_depth_folder: Path, tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    captions.write_text("a\n\nb\n")
    planned = sun("assemble", "--model", full_depth_folder, "--budget", 0.9, "--states", 2, "--captions", captions,
                  "--steps", 2, "--plan-only", tmp_path / "plan.json")  # fmt: skip
    assert "add up to" in planned.output
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["chosen"] == "knapsack"
    assert written["remove"]
    assert written["share"] <= 0.9
    done = sun("assemble", "--model", full_depth_folder, "--plan", tmp_path / "plan.json", "--out", tmp_path / "unet",
               "--single-file", tmp_path / "x.safetensors", "--dtype", "float16")  # fmt: skip
    assert "U-Net alone" in done.output
    small = UNet2DConditionModel.from_pretrained(tmp_path / "unet")
    with safe_open(tmp_path / "x.safetensors", "pt") as content:
        names = list(content.keys())
        assert content.get_slice(names[0]).get_dtype() == "F16"
    assert len(names) == len(small.state_dict())


def test_experts_of_a_training_lie_beside_what_is_written(sun: Run, full_depth_folder: Path, tmp_path: Path) -> None:
    sun("assemble", "--model", full_depth_folder, "--plan", "bk-base", "--out", tmp_path / "run" / "unet")
    unet = UNet2DConditionModel.from_pretrained(full_depth_folder / "unet")
    chosen = plan(unet, named="bk-base")
    experts = experts_for(unet, assemble(unet, chosen), chosen)
    write_experts(experts, tmp_path / "run" / "experts.safetensors")
    done = sun("assemble", "--model", full_depth_folder, "--plan", "bk-base", "--trained", tmp_path / "run" / "unet",
               "--single-file", tmp_path / "small.safetensors", "--out", tmp_path / "folder")  # fmt: skip
    assert done.output.count("its experts") == 2
    for file in (tmp_path / "small.experts.safetensors", tmp_path / "folder" / "experts.safetensors"):
        assert {name for name, _ in read_experts(file).by_name()} == {name for name, _ in experts.by_name()}


def test_wrong_input_is_a_sentence(sun: Run, full_depth_folder: Path, tmp_path: Path) -> None:
    common = ("assemble", "--model", full_depth_folder)
    assert "say what to write" in sun(*common, code=2).output
    assert "--captions" in sun(*common, "--states", 2, "--plan-only", tmp_path / "p.json", code=2).output
    assert "cannot be met" in sun(*common, "--budget", 0.01, "--plan-only", tmp_path / "p.json", code=2).output
    assert "none.json" in sun(*common, "--plan", tmp_path / "none.json", "--out", tmp_path / "u", code=2).output
    assert ".safetensors" in sun(*common, "--single-file", tmp_path / "x.ckpt", code=2).output
    planning = (*common, "--plan-only", tmp_path / "p.json")
    for budget in (0, 1, -1, 2, "nan", "inf"):
        assert "between 0 and 1" in sun(*planning, "--budget", budget, code=2).output
    for size in (-8, 4, 100):
        assert "multiple of 8 pixels" in sun(*planning, "--size", size, code=2).output
    assert "guides nothing" in sun(*planning, "--guidance", "nan", code=2).output
    assert "give one" in sun(*planning, "--plan", "shallow", "--trained", tmp_path, code=2).output
    assert "Give a list (shallow," in sun(*planning, "--plan", "shalow", code=2).output
    assert not (tmp_path / "p.json").exists()
    sun(*common, "--plan", "shallow", "--out", tmp_path / "shallow")
    other = sun(*common, "--plan", "bk-base", "--trained", tmp_path / "shallow", "--out", tmp_path / "o", code=2)
    assert "another plan or model" in other.output
    again = sun("assemble", "--model", tmp_path / "shallow", "--plan", "bk-base", "--plan-only", tmp_path / "q.json")
    assert "pair.2.1" in again.output  # what is left can be made smaller still
    file = tmp_path / "for-the-original.json"
    sun(*common, "--plan", "shallow", "--plan-only", file)
    refused = sun("assemble", "--model", tmp_path / "shallow", "--plan", file, "--out", tmp_path / "o", code=2)
    assert "compact already: give the original" in refused.output
