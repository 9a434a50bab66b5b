"""``sun generate --prompts``: the set is what single commands make, and what goes wrong is said in a sentence."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import Result

from sun.cli.bulk import _rank
from sun.cli.show import pace
from sun.pictures import draw
from sun.pictures.bulk import batches
from sun.pictures.recipe import read_recipe

Run = Callable[..., Result]
CSV = """prompt,negative,seed,size,steps,init,strength
a cat,a dog,3,,2,,
a bird,,,,,,
"bad, bad",,x,,,,
a fish,,9,64x32,1,,
a cat,,,,,photo.png,1
a dog,,,,,gone.png,1
"""


def said(result: Result) -> str:
    return " ".join(result.output.split())


def pngs(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.rglob("*.png"))}


@pytest.fixture
def rows(tmp_path: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.csv").write_text(CSV)
    return tmp_path / "rows.csv"


def test_every_row_is_the_picture_of_a_single_command_bit_for_bit(tiny: Run, rows: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = tiny(
        "generate",
        "--prompts",
        rows,
        "--seed",
        100,
        "--negative",
        "x",
        "--steps",
        1,
        "--out",
        out,
        "--json",
        "f.json",
        code=3,
    )
    assert "1 of 6 rows cannot be drawn and will be left out. line 4: seed" in said(result)
    assert "4 pictures; 4 drawn here" in said(result)
    made = pngs(out)
    assert list(made) == [f"{i:09d}.png" for i in (0, 1, 3, 4)]
    single = {
        0: ("a cat", "--negative", "a dog", "--seed", 3, "--steps", 2),
        4: ("a cat", "--negative", "x", "--seed", 104, "--steps", 1, "--init", "photo.png", "--strength", 1),
    }
    for index, options in single.items():
        tiny("generate", *options, "--out", "x.png")
        assert Path("x.png").read_bytes() == made[f"{index:09d}.png"]
    recipe = read_recipe(out / "000" / "000" / "000000003.png")[0]
    assert (recipe.width, recipe.height, recipe.seed, recipe.batch, recipe.index) == (64, 32, 9, 1, 0)
    failed = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [(row["index"], row["line"], row["kind"], row["prompt"]) for row in failed] == [
        (2, 4, "row", "bad, bad"),
        (5, 7, "picture", "a dog"),
    ]
    figures = json.loads(Path("f.json").read_text())
    assert {key: figures[key] for key in ("rows", "done", "failed", "drawn_here")} == {
        "rows": 6, "done": 6, "failed": 2, "drawn_here": 4,
    }  # fmt: skip
    again = tiny(
        "generate", "--prompts", rows, "--steps", 1, "--negative", "x", "--out", out, "--retry-failed", code=3
    )  # its seed
    assert "1 failed pictures are tried again" in said(again)
    assert "4 pictures; 0 drawn here" in said(again)
    refused = tiny("generate", "--prompts", rows, "--steps", 1, "--negative", "y", "--seed", 7, "--out", out, code=2)
    assert "holds another run: negative was x and is y; seed was 100 and is 7." in said(refused)
    rows.write_text(CSV.replace("fish", "crab"))
    refused = tiny("generate", "--prompts", rows, "--steps", 1, "--negative", "x", "--out", out, code=2)
    assert "the file of prompts has another content" in said(refused)
    assert pngs(out) == made


def test_batches_are_the_same_however_a_run_was_divided(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sun: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{'long ' * 30 * (i == 4)}p {i}", "negative": "n", "steps": 1 + (i % 3 == 0)} for i in range(9)]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("generate", "--prompts", "x.jsonl", "--seed", 5, "--batch", 3)
    tiny(*common, "--out", "whole")
    stops: list[int] = []
    usual = batches.Drawing.draw

    def stop(self: Any, batch: Any) -> Any:
        stops.append(len(batch))
        if len(stops) == 3:
            raise KeyboardInterrupt
        return usual(self, batch)

    monkeypatch.setattr(batches.Drawing, "draw", stop)
    result = tiny(*common, "--out", "parts", code=130)
    assert "stopped: " in said(result)
    assert "of 9 rows are done. The same command goes on." in said(result)
    result = tiny("generate", "--prompts", "x.jsonl", "--out", "parts")  # seed and batch are those of the run
    assert max(stops) > 1
    assert pngs(Path("parts")) == pngs(Path("whole"))
    beside = next(path for path in sorted(Path("whole").rglob("*.png")) if "drawn_together" in _made_with(path))
    told = sun("generate", "--from", beside, "--out", "alone.png")
    assert "it was drawn together with others" in said(told)
    assert np.abs(_pixels(Path("alone.png")) - _pixels(beside)).max() <= 1


def _made_with(path: Path) -> dict[str, str]:
    return read_recipe(path)[1]["made_with"]


def _pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_repeated_texts_are_encoded_once_and_shards_written(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a\nb\na\nb\na\n")
    encoded: list[int] = []
    usual = draw.encode_prompts
    monkeypatch.setattr(draw, "encode_prompts", lambda *a: encoded.append(1) or usual(*a))
    result = tiny("generate", "--prompts", "x.txt", "--steps", 1, "--shards", 3, "--negative", "b", "--seed", 0)
    assert len(encoded) == 2
    assert "3 rows repeat an earlier one (line 3, 4, 5)" in said(result)
    assert [f.name for f in sorted(Path("sun-x").glob("*.tar"))] == ["000000.tar", "000001.tar"]


def test_pictures_to_start_from_and_to_steer_by_come_with_each_row(
    tiny: Run, tmp_path: Path, photo: Path, controlnet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (64, 64), 255).save("mask.png")
    rows = [
        {"prompt": "a (cat:1.3)", "control": "photo.png"},
        {"prompt": "a", "control": "photo.png", "control_scale": 0.5, "init": "photo.png", "strength": 1},
        {"prompt": "a", "control": "photo.png", "init": "photo.png", "mask": "mask.png"},
        {"prompt": "a"},
    ]
    Path("x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = ("--steps", 1, "--controlnet", controlnet_folder)
    result = tiny("generate", "--prompts", "x.jsonl", "--seed", 5, *common, "--out", "out", code=3)
    assert "line 1: '(cat:1.3)' in the prompt is read as words" in said(result)
    assert json.loads(Path("out/failures.jsonl").read_text())["line"] == 4
    made = pngs(Path("out"))
    tiny("generate", "a", "--seed", 7, *common, "--control", "photo.png", "--init", "photo.png", "--mask", "mask.png",
         "--out", "x.png")  # fmt: skip
    assert Path("x.png").read_bytes() == made["000000002.png"]
    assert len(made) == 3


def test_the_cache_of_texts_is_bounded(make_pipeline: Callable[..., Any]) -> None:
    one = 77 * 16 * 4
    cache = batches.TextCache(make_pipeline(), most=3 * one)
    states = [cache.states(text) for text in "abcdab"]
    assert cache.encoded == 6
    assert torch.equal(states[0], states[4])
    assert cache.states("b") is states[5]
    assert len(cache._kept) == 3
    first, second = cache.pair("x " * 100, "a")
    assert first.shape == second.shape == (2 * 77, 16)


def test_a_picture_of_nan_and_a_full_memory_cost_only_their_rows(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a\nnan\nmemory\nb\n")
    usual = draw.draw_rows

    def fails(loaded: Any, rows: Any, texts: Any) -> Any:
        if "memory" in [row.prompt for row in rows]:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        for i, row in enumerate(rows):
            if row.prompt == "nan":
                texts[0][i] *= float("nan")
        return usual(loaded, rows, texts)

    monkeypatch.setattr(draw, "draw_rows", fails)
    common = ("generate", "--prompts", "x.txt", "--steps", 1, "--seed", 1, "--out", "out")
    result = tiny(*common, "--batch", 4, code=3)
    assert "do not fit into the memory: they are drawn one by one" in said(result)
    failed = [json.loads(line) for line in Path("out/failures.jsonl").read_text().splitlines()]
    assert [(row["line"], row["kind"]) for row in failed] == [(2, "numbers"), (3, "memory")]
    assert "NaN" in failed[0]["reason"]
    assert list(pngs(Path("out"))) == ["000000000.png", "000000003.png"]
    monkeypatch.setattr(draw, "draw_rows", usual)
    tiny(*common, "--retry-failed")
    assert len(pngs(Path("out"))) == 4
    assert not Path("out/failures.jsonl").exists()

    def breaks(*_: Any) -> Any:
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(draw, "draw_rows", breaks)
    result = tiny(*common[:-1], "other", code=1)  # no fault of the prompts: nothing is recorded as failed
    assert "unspecified launch failure" in said(result)
    assert "0 of 4 rows are done" in said(result)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a cat", "--prompts", "x.txt"], "not both"),
        (["--prompts", "x.txt", "--out", "x.png"], "it is a folder"),
        (["--prompts", "gone.txt"], "gone.txt: No such file"),
        (["--prompts", "."], ".txt (one a line)"),
        (["--prompts", "d.csv"], "is a folder"),
        (["--prompts", "pipe.txt"], "not a regular file"),
        (["--prompts", "columns.csv"], "is called negative here"),
        (["--prompts", "bad.csv"], "none of 2 rows can be drawn. line 2: seed"),
        (["--prompts", "x.txt", "--out", "photos"], "holds other files"),
        (["--prompts", "x.txt", "--guidance", "0"], "guides nothing"),
        (["--prompts", "x.txt", "--init", "gone.png"], "gone.png (init)"),
        (["a cat", "--shards", "3"], "belong to --prompts"),
        (["a cat", "--retry-failed"], "belong to --prompts"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence_before_a_model_loads(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(draw, "load", None)
    Path("x.txt").write_text("a cat\n")
    Path("columns.csv").write_text("prompt,negativ\na,b\n")
    Path("bad.csv").write_text("prompt,seed\na,x\nb,y\n")
    Path("d.csv").mkdir()
    os.mkfifo("pipe.txt")
    Path("photos").mkdir()
    Path("photos/x.jpg").touch()
    result = tiny("generate", *arguments, code=2)
    assert words in said(result).replace("│ ", "")
    assert not Path("sun-x").exists()
    assert os.listdir("photos") == ["x.jpg"]


def test_an_adapter_that_does_not_fit_stops_the_run_and_records_nothing(
    sun: Run, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a cat\nb\n")
    result = sun(
        "generate", "--prompts", "x.txt", "--model", model_folder, code=2
    )  # with the adapter of Emoji Diffusion
    assert "does not fit" in said(result)
    assert not Path("sun-x/failures.jsonl").exists()


def test_weights_without_their_library_stop_the_run_and_record_nothing(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "compel", None)
    Path("x.txt").write_text("a cat\nb\n")
    result = tiny("generate", "--prompts", "x.txt", "--prompt-weights", "compel", code=2)
    assert "pip install compel" in said(result)
    assert not Path("sun-x/failures.jsonl").exists()


def test_processes_of_a_launcher_speak_once(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a cat\n")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "sun-x" not in said(tiny("generate", "--prompts", "x.txt", "--steps", 1))
    Path("x.txt").write_text("another cat\n")
    assert "another content" in said(tiny("generate", "--prompts", "x.txt", code=2))


@pytest.mark.parametrize(
    ("environment", "rank"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2)),
        ({"RANK": "8", "WORLD_SIZE": "8"}, (0, 1)),
        ({"RANK": "x", "WORLD_SIZE": ""}, (0, 1)),
    ],
)
def test_a_launcher_says_which_process_this_is(
    environment: dict[str, str], rank: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert _rank() == rank


def test_of_processes_that_begin_at_once_without_a_seed_one_s_holds(
    tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a cat\nb\n")
    usual = os.link

    def late(source: Path, target: Path) -> None:
        content = json.loads(Path(source).read_text())
        content["recipe"]["seed"] = 77
        target.write_text(json.dumps(content))  # the other process
        usual(source, target)

    monkeypatch.setattr(os, "link", late)
    tiny("generate", "--prompts", "x.txt", "--steps", 1)
    assert [read_recipe(path)[0].seed for path in sorted(Path("sun-x").rglob("*.png"))] == [77, 78]


@pytest.mark.parametrize(
    ("made", "seconds", "left", "text"),
    [
        (0, 5, 9, ""),
        (10, 5, 9, "2 pictures/s, 4 s left"),
        (1, 60, 9, "0.0167 pictures/s, 9 min 0 s left"),
        (10, 10, 7500, "1 pictures/s, 2 h 5 min left"),
        (10, 10, 10**6, "1 pictures/s, 11 d 13 h left"),
    ],
)
def test_the_time_left_is_told_in_its_own_units(made: int, seconds: float, left: int, text: str) -> None:
    assert pace(made, seconds, left) == text


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_a_sentence(tiny: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from sun.pictures.bulk import outputs

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "x.png")

    monkeypatch.chdir(tmp_path)
    Path("x.txt").write_text("a cat\n")
    usual = outputs.write_atomically
    monkeypatch.setattr(outputs, "write_atomically", full)
    result = tiny("generate", "--prompts", "x.txt", "--steps", 1, code=2)
    assert (
        "there is no space left. What is not whole does not count; make space, and the same command goes on."
        in said(result)
    )
    monkeypatch.setattr(outputs, "write_atomically", usual)
    tiny("generate", "--prompts", "x.txt", "--steps", 1)
    assert list(pngs(Path("sun-x"))) == ["000000000.png"]
