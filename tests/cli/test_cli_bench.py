"""``sun bench``: what it measures, what follows from the seconds, what it writes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from sun.evaluation.overhead import Times, figures, summary

Run = Callable[..., Result]


def test_bench_writes_every_case_and_the_figures_on_top(sun: Run, tmp_path: Path) -> None:
    target = tmp_path / "bench.json"
    result = sun("bench", "--emoji", "--size", 32, "--batch", "1,2", "--rounds", 1, "--device", "cpu", "--json", target)
    report = json.loads(target.read_text())
    assert list(report["cases"]) == ["cpu, eager, batch 1", "cpu, eager, batch 2"]
    first, second = report["cases"].values()
    assert (first["latent"], second["latent"]) == ([1, 4, 4, 4], [2, 4, 4, 4])
    for key in ("unet_call_ratio", "unet_speedup", "pipeline_speedup"):
        assert report[key] == first[key] > 0
    assert (first["steps"], report["unet_speedup_limit"]) == (4, 12.5)
    assert first["dtype"] == "float32"
    assert "cpu, eager, batch 2" in result.output
    assert "unet_call_ratio" in result.output


def test_the_calls_it_times_are_those_it_says(sun: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round of a 2-step run: 2 plain calls, 2 with SUN, whose K and V are made once, and one of two rows.

    An untimed plain call goes before, and in the next round the other kind is the first of the pairs.
    """
    from sun.adapter import SunAdapter
    from sun.evaluation import overhead
    from sun.pipelines import unet as hooks

    rows, made, timed = [], [], []
    texts, timer = SunAdapter.texts, overhead._timed
    monkeypatch.setattr(SunAdapter, "texts", lambda *args, **options: made.append(1) or texts(*args, **options))

    def counting(calls, device):
        timed.append(len(calls))
        return timer(calls, device)

    monkeypatch.setattr(overhead, "_timed", counting)
    original = hooks.before_call

    def seen(unet, args, kwargs):
        rows.append((args[0].shape[0], "cross_attention_kwargs" in kwargs))
        return original(unet, args, kwargs)

    monkeypatch.setattr(hooks, "before_call", seen)
    sun("bench", "--emoji", "--size", 32, "--batch", "1", "--rounds", 2, "--steps", 2, "--device", "cpu")
    plain, with_sun, guided = (1, False), (1, True), (2, False)
    warm_up = [plain, with_sun, guided]
    first = [plain, with_sun, with_sun, plain, guided]
    second = [with_sun, plain, plain, with_sun, guided]
    assert rows == [*warm_up, plain, *first, plain, *second]
    assert len(made) == 3  # the warm-up's and the rounds'
    assert timed == 2 * [2, 2, 1, 1, 1]  # the pairs, the guided call, text and decoder


def test_figures_follow_from_the_seconds() -> None:
    times = Times(
        plain=[[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [1.0, 1.0, 1.0, 1.0]],
        sun=[[1.3, 1.1, 1.1, 1.1], [2.2, 2.2, 2.2, 2.2], [1.0, 1.0, 1.0, 1.0]],
        guided=[2.0, 4.0, 2.0], text=[0.5, 0.5, 0.5], decode=[1.5, 1.5, 1.5],
    )  # fmt: skip
    found = figures(times)
    assert found["unet_call_ratio"] == pytest.approx(1.1)
    assert found["unet_call_ratio_interval"] == pytest.approx((1.0, 1.15))
    assert found["first_call_ratio"] == pytest.approx(1.1)
    assert found["sun_call_seconds"] == pytest.approx(1.15)
    assert found["unet_speedup"] == pytest.approx(25 * 4.0 / 8.8)  # the round between the slowest and the fastest
    assert found["unet_speedup_limit"] == 12.5
    assert found["pipeline_speedup"] == pytest.approx((2.0 + 50.0) / (2.0 + 4.0))


def test_the_headline_is_the_first_case_that_has_everything() -> None:
    broken = {"error": "no compiler"}
    full = {"unet_call_ratio": 1.01, "unet_speedup": 12.3, "unet_speedup_limit": 12.5, "pipeline_speedup": 10.0}
    report = summary({"a": broken, "b": full | {"device": "cpu"}, "c": full | {"unet_speedup": 1.0}})
    assert (report["unet_speedup"], report["device"]) == (12.3, "cpu")
    assert list(report["cases"]) == ["a", "b", "c"]


@pytest.mark.parametrize(("option", "value"), [("--batch", "one"), ("--batch", "0"), ("--size", "65")])
def test_bench_refuses_what_it_cannot_measure(sun: Run, option: str, value: str) -> None:
    assert option in sun("bench", "--emoji", option, value, code=2).output


def test_help_teaches(sun: Run) -> None:
    text = sun("bench", "--help").output
    for words in ("unet_call_ratio", "12.5", "--emoji", "--batch", "sun bench --json bench.json"):
        assert words in text


def test_compact_unets_are_measured_beside_the_original(sun: Run, tmp_path: Path) -> None:
    target = tmp_path / "compact.json"
    plans = "pair.1.1 pair.2.1,pair.1.1 pair.2.1+experts,bk-base"
    result = sun(
        "bench-compact", "--emoji", "--size", 64, "--rounds", 1, "--device", "cpu", "--plans", plans, "--json", target
    )
    report = json.loads(target.read_text())
    assert report["machine"]["latent"] == [2, 4, 8, 8]
    assert report["machine"]["seconds"] == "processor time"
    rows = report["unets"]
    assert list(rows) == ["original", *plans.split(",")]
    work = [rows[name]["speedup_in_arithmetic"] for name in rows]
    assert work[0] == 1.0 < work[2] < work[1] < work[3]  # experts cost a little arithmetic, the longer list saves more
    assert all(row["seconds"] > 0 and row["speedup"] > 0 for row in rows.values())
    assert "bk-base" in result.output


@pytest.mark.parametrize("plans", ["nothing", "pair.9.1", "none.json", "", "transformers.1+experts"])
def test_what_is_no_compact_unet_is_said(sun: Run, plans: str) -> None:
    result = sun("bench-compact", "--emoji", "--size", 64, "--plans", plans, code=2)
    assert "error" in result.output
