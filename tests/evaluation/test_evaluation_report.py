"""Reports: several models, cells that are computed once, tables and plots."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState, debug_launcher
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from sun.common.settings import ConfigError, apply, read_config, without_folders
from sun.evaluation import EvaluateConfig, Sampler, report
from sun.evaluation import run as run_module
from sun.evaluation.cells import CellStore
from sun.evaluation.config import model_specs
from sun.evaluation.features import Features
from sun.evaluation.names import parse_methods
from sun.evaluation.prompts import calibration_pairs
from sun.evaluation.tables import markdown
from sun.surgery import from_unet


class Eye:
    """A feature network without training: thumbnails of the picture, letters of the text."""

    def image_features(self, pixels: Tensor) -> Tensor:
        small = torch.nn.functional.adaptive_avg_pool2d(pixels, 2).flatten(1)
        return torch.nn.functional.normalize(small, dim=1)

    def image_maps(self, pixels: Tensor) -> list[Tensor]:
        return [torch.nn.functional.avg_pool2d(pixels, 4)]

    def text_features(self, texts: list[str]) -> Tensor:
        rows = [torch.tensor([float(text.count(c)) + 0.1 for c in "abcdeghinort"]) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)


@pytest.fixture
def eye(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Eye()
    made = Features("eye", network, lambda pixels, _: network.image_features(pixels), "1", "eye")
    monkeypatch.setattr(run_module, "load_features", lambda *_, **__: made)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, short_reference: str) -> EvaluateConfig:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    from_unet(pipe.unet, alpha=0.5).save(tmp_path / "adapter.safetensors")
    (tmp_path / "prompts.txt").write_text("polar bear | snake\nred apple | \nowl | crab\nrocket\n")
    return EvaluateConfig(
        models={"base": str(tiny_model), "strong": {"model": str(tiny_model), "guidance_scale": 5.0, "style": "loud"}},
        adapter=str(tmp_path / "adapter.safetensors"), methods=("sun", "ddim"), steps=(2,), guidance_scale=3.0,
        prompts_file=str(tmp_path / "prompts.txt"), prompts=4, batch_size=2, negative_pairs=2, precision="fp32",
        negative_groups=("seen", "unseen"), negative_ceiling="ddim-3", set_draws=3, timing_batch=2, timing_rounds=1,
        output=str(tmp_path / "report"), grid_prompts=3,
    )  # fmt: skip


def test_a_report_is_complete_and_goes_on_where_it_stopped(
    config: EvaluateConfig, eye: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sun.common.devices.has_bf16", lambda _: False)
    config.precision = "auto"
    figures = report(config)
    folder = Path(config.output)
    written = json.loads((folder / "figures.json").read_text())
    assert list(written["models"]) == ["base", "strong"]
    assert written["settings"]["precision"] == "fp32"  # what auto stands for here
    for name, model in written["models"].items():
        assert {m: r["unet_calls"] for m, r in model["methods"].items()} == {"sun-2": 2, "ddim-2": 4}
        for row in model["methods"].values():
            for figure in ("seconds", "paired_mse", "paired_psnr", "paired_ssim", "feature_distance", "set_distance",
                           "positive_agreement", "negative_agreement"):  # fmt: skip
                low, high = row[f"{figure}_interval"]
                assert low <= row[figure] <= high
            assert {"kid", "speedup", "pipeline_seconds"} <= set(row)
            assert row["median_mse"] == row["paired_mse_median"] <= row["paired_mse_interval"][1] * 4
            assert row["psnr"] == row["paired_psnr"]
        assert model["floor"]["paired_mse"] > 0
        negative = model["negative_prompt"]
        assert negative["pairs"] == 2
        assert set(negative["groups"]) == {"seen", "unseen"}
        assert -1 <= negative["sun-2"]["cosine"] <= 1
        assert "negative_agreement_change" in negative["groups"]["unseen"]["sun-2"]
        assert set(negative["ceiling"]) == {"ddim-3", "other noise"}
        assert model["unet_call"]["cond"]["ratio"] == 1
        for picture in ("distance-vs-calls.png", "distance-vs-seconds.png", "grid.png"):
            assert Image.open(folder / name / picture).width > 100
    assert written["models"]["strong"]["guidance_scale"] == 5
    assert written["models"]["strong"]["model"]["style"] == "loud"
    assert str(folder.parent) not in (folder / "figures.json").read_text(), "no folder of this machine travels"
    assert "| sun |" in (folder / "tables.md").read_text()
    assert not list((folder / "cells").glob("*.part"))

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is sampled twice")

    monkeypatch.setattr(Sampler, "_run", never)
    again = report(config)
    assert json.loads(json.dumps(again)) == json.loads(json.dumps(figures))


def test_the_whole_report_is_checked_before_it_starts(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "load_sampler", lambda *_: pytest.fail("nothing may be loaded"))
    config.methods = ("sun-2", "lcm-lora-2")
    with pytest.raises(ConfigError, match=r"lcm-lora-2 on the model 'base' needs the setting lcm_lora"):
        report(config)
    config.methods = ("sun[late]-2",)
    with pytest.raises(ConfigError, match=r"adapters\.late"):
        report(config)
    config.methods, config.models["base"] = ("sun-2",), "missing"
    with pytest.raises(ConfigError, match=r"models\.base: model = missing does not exist"):
        report(config)
    config.precision = "fp8"
    with pytest.raises(ConfigError, match="precision"):
        report(config)


@pytest.mark.slow  # a second report; test_a_report_is_complete is the quick one
def test_experiments_can_be_given_to_some_models_and_methods(config: EvaluateConfig, eye: None) -> None:
    config.measure, config.edits, config.edit_prompts = ("distances", "negatives", "edits"), ("img2img-0.5",), 2
    config.models["strong"] |= {"measure": ["distances"], "methods": ["sun-1"]}
    config.negative_methods, config.edit_methods = ("sun-2",), ("ddim-2",)
    found = report(config)["models"]
    assert set(found["strong"]) & {"negative_prompt", "edits", "unet_call"} == set()
    assert set(found["strong"]["methods"]) == {"sun-1"}
    assert set(found["base"]["methods"]) == {"sun-2", "ddim-2"}
    assert set(found["base"]["negative_prompt"]["groups"]["seen"]) == {"dpmpp-5", "sun-2"}
    assert set(found["base"]["edits"]["img2img-0.5"]) == {"dpmpp-5", "ddim-2", "floor"}
    assert not (Path(config.output) / "strong" / "img2img-0.5.png").exists()
    sheet = Path(config.output) / "base" / "grid.png"
    whole = Image.open(sheet).height
    config.grid_methods = ("sun-2",)
    report(config)
    assert Image.open(sheet).height < whole
    config.negative_methods = ("sun-3",)
    with pytest.raises(ConfigError, match="sun-3 is not among methods"):
        report(config)
    config.negative_methods, config.models["strong"]["methods"] = (), ["sun-x"]
    with pytest.raises(ConfigError, match="unknown method 'sun-x"):
        report(config)


def test_calibration_takes_other_prompts_than_the_measured_ones(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"prompt {i} | negative {i}\n" for i in range(10)))
    config = EvaluateConfig(prompts_file=str(tmp_path / "p.txt"), prompts=6, calibration_prompts=3)
    assert calibration_pairs(config) == [(f"prompt {i}", f"negative {i}") for i in (6, 7, 8)]
    config.prompts = 10  # no others are left
    assert calibration_pairs(config) == [(f"prompt {i}", f"negative {i}") for i in (7, 8, 9)]


def test_methods_without_their_files_can_be_left_out(config: EvaluateConfig, eye: None) -> None:
    config.models.pop("strong")
    config.methods, config.skip_missing, config.measure = ("sun-2", "lcm-lora-2"), True, ("time",)
    found = report(config)["models"]["base"]
    assert list(found["methods"]) == ["sun-2"]
    assert found["methods"]["sun-2"]["unet_calls"] == 2
    assert "floor" not in found, "time alone samples no set"


def names_of(config: EvaluateConfig) -> list[str]:
    return [call.text for call in parse_methods(config.methods, config.steps)]


def test_settings_of_models_and_steps(config: EvaluateConfig) -> None:
    assert names_of(config) == ["sun-2", "ddim-2"]
    config.methods, config.steps = ("sun[a]", "nag[phi=3]", "cond-25"), (4, 8)
    assert names_of(config) == ["sun[a]-4", "sun[a]-8", "nag[phi=3]-4", "nag[phi=3]-8", "cond-25"]
    specs = model_specs(config)
    assert specs["base"].guidance_scale == 3
    assert specs["strong"].guidance_scale == 5
    assert specs["strong"].adapter == config.adapter
    config.model = "mine"
    with pytest.raises(ConfigError, match="model = mine would not be"):
        model_specs(config)
    config.model = "emoji"
    config.models["odd"] = {"modle": "x"}
    with pytest.raises(ConfigError, match=r"models\.odd: there is no setting 'modle'"):
        model_specs(config)


@pytest.mark.parametrize("name", ["emoji", "time", "sd15", "ablations", "guidance", "pictures"])
def test_the_configurations_in_the_repository_can_be_read(name: str) -> None:
    file = Path(__file__).parents[2] / "configs" / f"evaluate-{name}.toml"
    config = apply(EvaluateConfig(), read_config(file))
    assert names_of(config)
    assert all(asdict(spec)["model"] for spec in model_specs(config).values())


def test_settings_travel_without_folders(tmp_path: Path) -> None:
    config = EvaluateConfig(adapter=str(tmp_path / "a.safetensors"), output=str(tmp_path), models={"m": "runs/m"})
    kept = without_folders(config)
    assert kept["adapter"] == "a.safetensors"
    assert kept["models"] == {"m": "m"}
    assert "output" not in kept


# --- cells -----------------------------------------------------------------------------------------------------------


def counting(calls: list[slice]) -> Callable[[slice], dict[str, Tensor]]:
    def compute(rows: slice) -> dict[str, Tensor]:
        calls.append(rows)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return {"x": torch.arange(rows.start, rows.stop).float()}

    return compute


def test_an_interrupted_cell_keeps_its_parts(tmp_path: Path) -> None:
    calls: list[slice] = []
    key = {"seed": 1}
    with pytest.raises(KeyboardInterrupt):
        CellStore(tmp_path).get("a b/c", key, 7, 2, counting(calls))
    whole = CellStore(tmp_path).get("a b/c", key, 7, 2, counting(calls))
    assert whole["x"].tolist() == list(range(7))
    assert [(c.start, c.stop) for c in calls] == [(0, 2), (2, 4), (4, 6), (4, 6), (6, 7)]
    assert [file.suffix for file in tmp_path.iterdir()] == [".safetensors"]


def test_a_cell_is_made_again_when_anything_it_depends_on_changes(tmp_path: Path) -> None:
    def make(rows: slice) -> dict[str, Tensor]:
        return {"x": torch.zeros(rows.stop - rows.start)}

    first, other, damaged = CellStore(tmp_path), CellStore(tmp_path), CellStore(tmp_path)
    first.get("cell", {"w": 3.0}, 4, 2, make)
    other.get("cell", {"w": 3.0}, 4, 2, make)
    assert (first.computed, other.computed) == (2, 0)
    other.get("cell", {"w": 4.0}, 4, 2, make)
    assert other.computed == 2
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xff" * 20)
    damaged.get("cell", {"w": 3.0}, 4, 2, make)
    assert damaged.computed == 2
    anew = CellStore(tmp_path, resume=False)
    anew.get("cell", {"w": 3.0}, 4, 2, make)
    assert anew.computed == 2


def test_notes_are_made_once(tmp_path: Path) -> None:
    made: list[int] = []
    for _ in range(2):
        assert CellStore(tmp_path).note("times", {"a": 1}, lambda: made.append(1) or {"s": 0.5}) == {"s": 0.5}
    assert made == [1]


def _shared(folder: str) -> None:
    store = CellStore(Path(folder))
    whole = store.get("cell", {}, 5, 1, lambda rows: {"x": torch.tensor([float(rows.start)])})
    assert whole["x"].tolist() == [0, 1, 2, 3, 4]
    assert store.computed == (3 if PartialState().is_main_process else 2)
    process = store.note("who", {}, lambda: PartialState().process_index)
    assert process == 0, "the main process alone measures"
    Path(folder, f"done-{PartialState().process_index}").touch()


@pytest.mark.slow
def test_two_processes_share_the_prompts(tmp_path: Path) -> None:
    PartialState._reset_state()
    try:
        debug_launcher(_shared, (str(tmp_path),), num_processes=2)
    finally:
        PartialState._reset_state()
    assert {file.name for file in tmp_path.glob("done-*")} == {"done-0", "done-1"}
    assert len(list(tmp_path.glob("cell-*.safetensors"))) == 1


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_put_methods_down_and_models_across() -> None:
    def row(calls: int, distance: float) -> dict[str, Any]:
        return {"unet_calls": calls, "seconds": 0.1, "set_distance": distance, "paired_mse": distance / 10,
                "paired_mse_interval": (distance / 20, distance / 5)}  # fmt: skip

    def model(scale: float) -> dict[str, Any]:
        return {
            "reference": {"method": "dpmpp-25", "unet_calls": 50, "seconds": 1.0},
            "methods": {"sun-4": row(4, scale), "ddim-4": row(8, 2 * scale), "sun-8": row(8, scale / 2)},
            "floor": row(50, 0.5), "guidance_scale": 4.0, "pictures": 16, "set_features": "emoji",
        }  # fmt: skip

    text = markdown(
        {"reference": "dpmpp-25", "settings": {"seed": 1}, "models": {"base": model(1.0), "other": model(3.0)}}
    )
    assert "| method | base, 4 steps | base, 8 steps | other, 4 steps | other, 8 steps |" in text
    assert "| sun | **1.000** | 0.500 | **3.000** | 1.500 |" in text, "alone at 8 steps it is not the best of any"
    assert "| ddim | 2.000 |  | 6.000 |  |" in text
    assert "| base | ddim-4 | 8 : 4 | 2.00 | 2.00 |" in text
    assert "| sun-4 | 4 | 0.100 | **1.000** | **0.1000** (0.0500–0.2000) |" in text
