"""The measure ``equal_time``: groups, what is gained on fewer steps, and a report on a tiny model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sun.common.notes import SunWarning
from sun.evaluation import EvaluateConfig, parse_method, report
from sun.evaluation.equal_time import TIMED_APART, beside_fewer_steps, groups_of
from sun.evaluation.names import MethodCall
from sun.evaluation.plots import _without_scheduler
from sun.evaluation.sampler import Sampler


def test_every_full_run_serves_the_groups_of_its_sampler() -> None:
    names = (
        "dpmpp-6",
        "spectrum-8",
        "sada[scheduler=euler]-8",
        "euler-5",
        "dpmpp-8",
        "ltc-10",
        "sun+ltc-8",
        "sun-5",
        "lcm-lora+ltc[balanced]-8",
        "lcm-lora-5",
        "ltc[scheduler=ddim]-4",
    )
    groups = groups_of([parse_method(name) for name in names])
    assert {str(reference): [str(call) for call in calls] for reference, calls in groups.items()} == {
        "dpmpp-8": ["spectrum-8", "dpmpp-6"],
        "euler-8": ["sada[scheduler=euler]-8", "euler-5"],
        "dpmpp-10": ["ltc-10", "dpmpp-8", "dpmpp-6"],
        "sun-8": ["sun+ltc-8", "sun-5"],
        "lcm-lora-8": ["lcm-lora+ltc[balanced]-8", "lcm-lora-5"],
        "ddim-4": ["ltc[scheduler=ddim]-4"],
    }


def test_the_gain_on_fewer_steps_is_at_the_same_time() -> None:
    fewer = [
        {"speedup": 1.0},  # the full run, which is no distance away
        {"speedup": 2.0, "psnr": 30.0, "mse": 0.04, "median_mse": 0.04, "feature_distance": 0.4},
        {"speedup": 1.5, "psnr": 36.0, "mse": 0.01, "median_mse": 0.01, "feature_distance": 0.1},
    ]
    row = {"speedup": 1.75, "psnr": 34.0, "mse": 0.01, "median_mse": 0.04, "feature_distance": 0.2}
    gained = beside_fewer_steps(row, fewer)
    assert gained["psnr_gain"] == pytest.approx(1.0)
    assert gained["mse_ratio"] == pytest.approx(0.5)
    assert gained["median_ratio"] == pytest.approx(2.0)
    assert math.isclose(gained["feature_ratio"], 1.0)
    assert beside_fewer_steps({**row, "speedup": 1.2}, fewer) == {}
    calls = [{**point, "unet_calls": 60 / point["speedup"]} for point in fewer]
    assert beside_fewer_steps({**row, "unet_calls": 35}, calls, "unet_calls")["psnr_gain"] == pytest.approx(1.0)


def test_a_method_has_one_colour_with_every_sampler() -> None:
    for name, label in (
        ("ltc[balanced,scheduler=euler]-20", "ltc[balanced]"),
        ("sada[scheduler=unipc]-20", "sada"),
        ("ltc[terms=2]-20", "ltc[terms=2]"),
    ):
        assert _without_scheduler(parse_method(name)) == label


def test_a_report_at_equal_time(tiny_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("polar bear | snake\nred apple | \nowl | crab\nrocket | \n")
    config = EvaluateConfig(
        model=str(tiny_model),
        prompts=4,
        prompts_file=str(prompts),
        batch_size=2,
        measure=("equal_time",),
        methods=("dpmpp-4", "lazycache[threshold=9]-6", "inherit[fast]-6"),
        features="none",
        output=str(tmp_path / "report"),
        device="cpu",
        precision="fp32",
    )
    found = report(config)["models"][tiny_model.name]["equal_time"]
    assert found["pictures"] == 4
    assert found["processor"]
    rows = found["groups"]["dpmpp-6"]["rows"]
    assert list(rows) == ["dpmpp-6", "lazycache[threshold=9]-6", "inherit[fast]-6", "dpmpp-4"]
    assert rows["dpmpp-6"]["speedup"] == 1 and "psnr" not in rows["dpmpp-6"]  # noqa: PT018
    assert [row["unet_calls"] for row in rows.values()] == [12, 4, 12, 8]
    assert all(row["psnr"] > 0 and row["mse"] > 0 for name, row in rows.items() if name != "dpmpp-6")
    report_folder = tmp_path / "report"
    assert "### Against dpmpp-6" in (report_folder / "tables.md").read_text()
    assert (report_folder / tiny_model.name / "equal-time-dpmpp.png").stat().st_size > 10_000
    parts = {path.name for path in (report_folder / "cells").iterdir()}
    again = report(config)["models"][tiny_model.name]["equal_time"]
    assert {path.name for path in (report_folder / "cells").iterdir()} == parts  # all of it was there
    assert json.loads((report_folder / "figures.json").read_text())["models"]
    assert found["timed_together"] and again["timed_together"]  # noqa: PT018
    assert TIMED_APART not in (report_folder / "tables.md").read_text()
    more = replace(config, methods=(*config.methods, "inherit[fine]-6"))
    with pytest.warns(SunWarning, match="timed in one session"):
        assert not report(more)["models"][tiny_model.name]["equal_time"]["timed_together"]
    assert TIMED_APART in (report_folder / "tables.md").read_text()
    anew = report(replace(more, output=str(tmp_path / "anew")))["models"][tiny_model.name]["equal_time"]
    assert anew["timed_together"]


def test_times_of_another_device_are_not_taken_again_and_other_samples_are(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("polar bear | snake\nred apple | \n")
    drawn: list[str] = []
    sample = Sampler.__call__

    def watched(self: Sampler, call: MethodCall, *args: Any) -> Any:
        drawn.append(str(call))
        return sample(self, call, *args)

    monkeypatch.setattr(Sampler, "__call__", watched)

    def draws(**more: Any) -> list[str]:
        config = EvaluateConfig(
            model=str(tiny_model),
            prompts=2,
            prompts_file=str(prompts),
            batch_size=2,
            methods=("dpmpp-4", "inherit[fast]-6"),
            features="none",
            output=str(tmp_path / "report"),
            device="cpu",
            precision="fp32",
        )
        del drawn[:]
        report(replace(config, **more))
        return list(drawn)

    of_distances, of_times = draws(measure=("distances",)), draws(measure=("equal_time",))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert of_distances
    assert draws(measure=("distances",)) == []
    assert draws(measure=("equal_time",)) == of_times
    assert len(draws(measure=("equal_time",))) == 1  # warms up
