"""What tooltips and help pages promise of LTC-Accel's presets is what a run of theirs calls."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sun.ltc import PRESETS, SkipRun
from sun.ltc.presets import SHOWN_STEPS, tooltip

ROOT = Path(__file__).resolve().parents[2]
TABLES = ("docs/accelerators.md", "web/docs/SUN_ApplyLtcAccel.md", "web/docs/SUN_ApplyLtcAccel/zh.md")
Promises = dict[str, dict[int, int]]


def counted(preset: str, steps: int) -> int:
    """Calls of a model in a run of a picture that turns nowhere."""
    levels = tuple(14 * (1 - i / steps) ** 2 for i in range(steps + 1))
    run, x = SkipRun(levels, PRESETS[preset], noisy=False), torch.full((1, 4), 3.0)
    for sigma, following in pairwise(levels):
        denoised = run.denoised(sigma, x, lambda x=x, sigma=sigma: x - sigma * (0.2 + 0.01 * sigma))  # type: ignore[misc]
        x = denoised + (x - denoised) * following / sigma
    return run.counts.calls


@pytest.fixture(scope="module")
def truth() -> Promises:
    return {name: {steps: counted(name, steps) for steps in (15, 20, 25, 30, 50)} for name in PRESETS}


def told(text: str, pair: str) -> Promises:
    """Preset -> steps -> calls, of a text that names each preset ahead of its pairs."""
    parts = re.split(rf"\b({'|'.join(PRESETS)})\b", text)
    found = zip(parts[1::2], parts[2::2], strict=True)
    return {name: {int(m["steps"]): int(m["calls"]) for m in re.finditer(pair, words)} for name, words in found}


def tabled(page: str) -> Promises:
    """The same, of a table whose head holds the steps and whose rows begin with the presets."""
    found: Promises = {}
    steps: list[int] = []
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if numbers := [int(cell) for cell in cells[1:] if cell.isdecimal()]:
            if cells[0] in PRESETS:
                found[cells[0]] = dict(zip(steps, numbers, strict=True))
            else:
                steps = numbers
    return found


def test_the_tooltip_of_the_node_and_the_web_uis(truth: Promises) -> None:
    assert SHOWN_STEPS == (15, 20, 25, 30, 50)
    assert told(tooltip(), r"(?P<calls>\d+) of (?P<steps>\d+)") == truth


def test_the_files_of_texts_have_the_same_tooltip(truth: Promises) -> None:
    """English is what the node says (another test compares them); Chinese, of node and web UIs, is read."""
    english = json.loads((ROOT / "locales/en/nodeDefs.json").read_text(encoding="utf-8"))["SUN_ApplyLtcAccel"]
    assert english["inputs"]["preset"]["tooltip"] == tooltip()
    pair = r"(?P<steps>\d+) 步调用 (?P<calls>\d+) 次"
    web = json.loads((ROOT / "localizations/zh_CN.json").read_text(encoding="utf-8"))
    assert told(web[tooltip()], pair) == truth
    node = json.loads((ROOT / "locales/zh/nodeDefs.json").read_text(encoding="utf-8"))["SUN_ApplyLtcAccel"]
    assert told(node["inputs"]["preset"]["tooltip"], pair) == truth


@pytest.mark.parametrize("page", TABLES)
def test_tables_of_the_pages(page: str, truth: Promises) -> None:
    assert tabled((ROOT / page).read_text(encoding="utf-8")) == truth
