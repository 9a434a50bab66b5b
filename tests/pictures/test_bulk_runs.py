"""Runs over a file of prompts: shared, killed, interrupted and gone on with, without anything lost or made twice."""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import random
import shutil
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sun.pictures.bulk import outputs
from sun.pictures.bulk.outputs import picture_path, samples_in
from sun.pictures.bulk.prompts_file import PromptsFile
from sun.pictures.bulk.rows import Failure, Row
from sun.pictures.bulk.run import (
    BulkError,
    Plan,
    Process,
    RunFolder,
    Settings,
    open_run,
    plan,
    read_run,
    reopen_failed,
    totals,
    write_failures,
)
from sun.pictures.recipe import Recipe, png_text

BASE = Recipe(width=8, height=8, seed=1000)


@dataclass
class Made:
    row: Row
    image: Image.Image
    text: dict[str, str]


class Painter:
    """Draws noise from a row's seed; a prompt with ``bad`` fails, unless ``mended``."""

    def __init__(self, mended: bool = False, together: int = 2, pause: float = 0.0):
        self.mended, self.together, self.pause, self.drawn = mended, together, pause, list[list[int]]()

    def complete(self, rows: Sequence[Row]) -> tuple[list[Row], list[Failure]]:
        return list(rows), []

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        groups = [[r for r in rows if r.recipe.steps == steps] for steps in sorted({r.recipe.steps for r in rows})]
        return [group[i : i + self.together] for group in groups for i in range(0, len(group), self.together)]

    def draw(self, batch: Sequence[Row]) -> tuple[list[Made], list[Failure]]:
        time.sleep(self.pause)
        self.drawn.append([row.index for row in batch])
        made, failed = [], []
        for row in batch:
            if "bad" in row.recipe.prompt and not self.mended:
                failed.append(Failure(row.index, row.line, "numbers", "NaN", row.recipe.prompt))
                continue
            pixels = np.random.default_rng([row.recipe.seed, len(batch)]).integers(0, 256, (8, 8, 3), np.uint8)
            made.append(Made(row, Image.fromarray(pixels), png_text(row.recipe, 0, {}, {})))
        return made, failed


def rows_file(path: Path, count: int = 24, bad: Sequence[int] = ()) -> Path:
    rows = [{"prompt": "bad" if i in bad else f"p{i % 5}", "steps": 1 + i % 3} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def begin(file: Path, folder: Path, shards: int = 0, block: int = 4, **recipe: Any) -> RunFolder:
    prompts = PromptsFile.read(file, shards or outputs.FOLDER)
    base = replace(BASE, **recipe)
    settings = Settings(asdict(base), {}, {"sha256": prompts.contents.sha256}, 2, shards)
    open_run(folder, settings)
    run = RunFolder(folder, settings, prompts, base)
    run.plan = Plan(len(prompts), shards or outputs.FOLDER, min(block, shards or block))
    return run


def work(run: RunFolder, painter: Any = None, start: float = 0.0) -> Process:
    process = Process(run, painter or Painter(), start=start)
    try:
        process.work()
    finally:
        process.leave()
    return process


def contents(folder: Path) -> dict[str, bytes]:
    """All that a run gives away, by name."""
    files = [f for f in folder.rglob("*") if f.is_file() and ".sun" not in f.parts]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name != "run.json"}


@pytest.mark.parametrize("shards", [0, 10])
def test_two_processes_in_any_order_make_what_one_makes(tmp_path: Path, shards: int) -> None:
    file = rows_file(tmp_path / "x.jsonl", bad=[3])
    one = begin(file, tmp_path / "one", shards)
    work(one)
    two = begin(file, tmp_path / "two", shards)
    first, second = Process(two, Painter(), start=0.5), Process(two, Painter(), start=0.0)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(Process.work, (first, second)))
    assert min(first.made, second.made) > 0
    for process in (first, second):
        write_failures(process)
        process.leave()
    write_failures(Process(one, Painter()))
    made = contents(tmp_path / "one")
    assert made == contents(tmp_path / "two")
    assert [json.loads(line)["line"] for line in made["failures.jsonl"].splitlines()] == [4]
    if shards:
        assert sorted(made) == ["000000.tar", "000001.tar", "000002.tar", "failures.jsonl"]
        assert {row for tar in (tmp_path / "one").glob("*.tar") for row in samples_in(tar)} == set(range(24)) - {3}
    else:
        assert set(made) == {picture_path(i) for i in range(24) if i != 3} | {"failures.jsonl"}


def test_a_shard_holds_pictures_and_recipes_in_the_order_of_the_rows(tmp_path: Path) -> None:
    work(begin(rows_file(tmp_path / "x.jsonl"), tmp_path / "out", 10))
    with tarfile.open(tmp_path / "out" / "000001.tar") as tar:
        names = tar.getnames()
        recipe = json.load(tar.extractfile("000000012.json"))  # type: ignore[arg-type]
        picture = Image.open(io.BytesIO(tar.extractfile("000000012.png").read()))  # type: ignore[union-attr]
    assert names == [f"{i:09d}.{suffix}" for i in range(10, 20) for suffix in ("json", "png")]
    assert (recipe["caption"], recipe["recipe"]["seed"]) == ("p2", 1012)
    assert json.loads(picture.text["sun"])["recipe"] == recipe["recipe"]  # type: ignore[attr-defined]


def test_shards_are_read_by_training(tmp_path: Path) -> None:
    from sun.training.data.samples import Skipped
    from sun.training.data.shards import decode
    from sun.training.data.tars import read_samples

    work(begin(rows_file(tmp_path / "x.jsonl"), tmp_path / "out", 10))
    skipped = Skipped()
    read = [decode(raw, 8, skipped) for raw in read_samples(str(tmp_path / "out" / "000000.tar"), skipped)]
    assert [sample[1] for sample in read if sample] == [f"p{i % 5}" for i in range(10)]
    assert not skipped


@pytest.mark.parametrize("shards", [0, 10])
def test_what_was_made_before_a_process_died_is_not_drawn_again(tmp_path: Path, shards: int) -> None:
    file = rows_file(tmp_path / "x.jsonl")
    work(begin(file, tmp_path / "whole", shards, block=10))
    run = begin(file, tmp_path / "out", shards, block=10)

    def dies(process: Process) -> None:
        if process.made >= 6:
            while written() < process.made:  # by the thread that writes
                time.sleep(0.01)
            os._exit(9)

    def written() -> int:
        spools = list((tmp_path / "out").rglob("*.spool"))
        return len(samples_in(spools[0])) if spools else len(list((tmp_path / "out").rglob("*.png")))

    def child() -> None:
        Process(run, Painter(), start=0.0).work(dies)

    worker = multiprocessing.get_context("fork").Process(target=child)
    worker.start()
    worker.join()
    assert worker.exitcode == 9
    process = work(run)
    assert process.made <= 24 - 6
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: data[:50] + bytes(len(data) - 50)]
)
def test_half_a_picture_counts_as_none(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    file = rows_file(tmp_path / "x.jsonl", 4)
    work(begin(file, tmp_path / "whole"))
    run = begin(file, tmp_path / "out")
    process = Process(run, Painter())
    block = process.claims.take()
    shutil.copytree(tmp_path / "whole" / "000", tmp_path / "out" / "000")
    half = tmp_path / "out" / picture_path(1)
    half.write_bytes(damage(half.read_bytes()))
    (half.parent / ".000000002.png-0123456789ab.part").write_bytes(b"half")
    process.worker.leave()  # it died
    assert block == 0
    assert work(run).made == 1
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def kill_at_random(run: RunFolder, drawer: Any, seconds: tuple[float, float], rounds: int) -> int:
    """Start two processes and kill them with SIGKILL after a random time, again and again. How many were killed."""
    rng = random.Random(int(os.environ.get("KILL_SEED", "0")))
    fork = multiprocessing.get_context("fork")
    kills = 0
    for _ in range(rounds):
        workers = [fork.Process(target=work, args=(run, drawer, start)) for start in (0.0, 0.5)]
        for worker in workers:
            worker.start()
        time.sleep(rng.uniform(*seconds))
        kills += sum(worker.is_alive() for worker in workers)
        for worker in workers:
            worker.kill()
            worker.join()
    return kills


@pytest.mark.parametrize("shards", [0, 12])
def test_killed_at_random_moments_nothing_is_lost_and_nothing_twice(tmp_path: Path, shards: int) -> None:
    """``KILL_SEED=1 pytest -rP -k random_moments`` takes other moments and prints how many."""
    file = rows_file(tmp_path / "x.jsonl", 96, bad=[5, 50])
    whole = work(begin(file, tmp_path / "whole", shards))
    run = begin(file, tmp_path / "killed", shards)
    kills = kill_at_random(run, Painter(pause=0.005), (0.01, 0.06), 8)
    last = work(run)
    print(f"{kills} kills survived; {96 - 2 - last.made} pictures were kept")
    assert kills > 2
    assert write_failures(whole) == write_failures(last) == 2
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.slow  # a dozen pictures of the tiny model, twice and some, in processes that are killed
def test_killed_while_a_model_draws_the_set_is_the_same_bit_for_bit(
    tmp_path: Path, make_pipeline: Callable[..., Any]
) -> None:
    from tiny import make_adapter

    from sun.pictures.bulk.batches import Drawing
    from sun.pictures.draw import Loaded, complete

    pipe = make_pipeline()
    loaded = Loaded(pipe, make_adapter(pipe.unet))
    file = rows_file(tmp_path / "x.jsonl", 12)

    def new(name: str) -> tuple[RunFolder, Drawing]:
        run = begin(file, tmp_path / name, 6, 3, width=64, height=64, device="cpu")
        run.base = complete(run.base, loaded)
        return run, Drawing(loaded, run.base, 2)

    began = time.monotonic()
    work(*new("whole"))
    picture = (time.monotonic() - began) / 12
    run, drawing = new("killed")
    assert kill_at_random(run, drawing, (picture, 5 * picture), 5) > 2
    work(run, drawing)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


@pytest.mark.parametrize("shards", [0, 10])
def test_failures_are_recorded_and_tried_again_on_request(tmp_path: Path, shards: int) -> None:
    file = rows_file(tmp_path / "x.jsonl", bad=[3, 11])
    text = file.read_text().splitlines()
    text[20] = '{"steps": 3}'
    file.write_text("\n".join(text))
    work(begin(file, tmp_path / "well", shards), Painter(mended=True))
    run = begin(file, tmp_path / "out", shards)
    process = work(run)
    assert write_failures(process) == 3
    told = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [(row["index"], row["line"], row["kind"]) for row in told] == [
        (3, 4, "numbers"), (11, 12, "numbers"), (20, 21, "row"),
    ]  # fmt: skip
    assert totals(process).done == 24
    assert work(run).made == 0  # the same command draws nothing more
    painter = Painter(mended=True)
    process = Process(run, painter)
    assert reopen_failed(process) == 2
    process.work()
    assert process.made == 2
    assert write_failures(process) == 1
    for folder in ("out", "well"):
        (tmp_path / folder / "failures.jsonl").unlink(missing_ok=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "well")


def test_when_nothing_can_be_drawn_it_is_not_the_prompts(tmp_path: Path) -> None:
    run = begin(rows_file(tmp_path / "x.jsonl", 200, bad=range(200)), tmp_path / "out", block=100)
    with pytest.raises(BulkError, match=r"of the first 5. pictures none could be drawn; the last, of line .*NaN"):
        work(run)
    assert not totals(Process(run, Painter())).done


@pytest.mark.parametrize("shards", [0, 10])
def test_a_full_disk_stops_the_run_and_half_a_file_counts_for_nothing(
    tmp_path: Path, shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = rows_file(tmp_path / "x.jsonl")
    work(begin(file, tmp_path / "whole", shards))
    run = begin(file, tmp_path / "out", shards)
    left = [8]

    def full(*args: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return usual(*args)

    place = (outputs, "_append") if shards else (outputs, "write_atomically")
    usual = getattr(*place)
    monkeypatch.setattr(*place, full)
    with pytest.raises(OSError, match="No space left"):
        work(run)
    monkeypatch.undo()
    assert totals(Process(run, Painter())).done < 24
    work(run)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_interrupted_process_frees_its_block_and_the_next_one_goes_on(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "x.jsonl")
    work(begin(file, tmp_path / "whole"))
    run = begin(file, tmp_path / "out")

    def interrupted(process: Process) -> None:
        if process.made >= 6:
            raise KeyboardInterrupt

    process = Process(run, Painter())
    with pytest.raises(KeyboardInterrupt):
        process.work(interrupted)
    process.leave()
    assert not [name for name in os.listdir(run.state / "blocks" / "000000") if name[-1].isdigit()]
    assert process.made < 10
    assert work(run).made == 24 - process.made
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_process_that_was_taken_for_dead_harms_nothing(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "x.jsonl")
    for shards in (0, 12):
        work(begin(file, tmp_path / f"whole{shards}", shards))
        run = begin(file, tmp_path / f"out{shards}", shards)
        slow = Process(run, Painter())
        taken = []

        def others(process: Process, run: RunFolder = run, taken: list[int] = taken) -> None:
            if not taken:
                process.worker.file.unlink()  # as if it were dead
                taken.append(work(run).made)

        slow.work(others)
        assert taken[0] > 12
        slow.leave()
        assert contents(tmp_path / f"out{shards}") == contents(tmp_path / f"whole{shards}")


def test_another_file_other_options_and_other_folders_are_refused(tmp_path: Path) -> None:
    file = rows_file(tmp_path / "x.jsonl")
    begin(file, tmp_path / "out")
    before = read_run(tmp_path / "out")
    with pytest.raises(BulkError, match=r"steps was 4 and is 8.*new folder"):
        begin(file, tmp_path / "out", steps=8)
    with pytest.raises(BulkError, match="--shards was 0 and is 10"):
        begin(file, tmp_path / "out", shards=10)
    with pytest.raises(BulkError, match="file of prompts has another content"):
        begin(rows_file(tmp_path / "y.jsonl", 25), tmp_path / "out")
    assert read_run(tmp_path / "out") == before
    begin(file.rename(tmp_path / "z.jsonl"), tmp_path / "out", device="cpu")  # elsewhere, on another device: the same
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "x.jpg").touch()
    with pytest.raises(BulkError, match=r"holds other files \(x.jpg\)"):
        begin(tmp_path / "z.jsonl", tmp_path / "photos")
    for content in ("", "{", "[]", '{"format": "sun-bulk-9"}', '{"format": "sun-bulk-1", "recipe": 3}'):
        (tmp_path / "out" / "run.json").write_text(content)
        with pytest.raises(BulkError, match=r"another folder|reads sun-bulk-1"):
            begin(tmp_path / "z.jsonl", tmp_path / "out")


def test_of_two_runs_that_begin_at_once_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = rows_file(tmp_path / "x.jsonl")
    usual = os.link

    def first(source: Any, target: Any) -> None:
        monkeypatch.setattr(os, "link", usual)
        begin(file, tmp_path / "out", steps=7)
        usual(source, target)

    monkeypatch.setattr(os, "link", first)
    with pytest.raises(BulkError, match="steps was 7 and is 4"):
        begin(file, tmp_path / "out")
    assert read_run(tmp_path / "out")["recipe"]["steps"] == 7
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["run.json"]


@pytest.mark.parametrize(
    ("rows", "together", "shard"),
    [(1, 1, 1000), (40, 1, 1000), (999, 8, 1000), (10_001, 8, 300), (10**6, 8, 1000), (5, 8, 3)],
)
def test_blocks_cover_every_row_once(rows: int, together: int, shard: int) -> None:
    made = plan(rows, together, shard)
    position = 0
    for block in range(made.blocks):
        inside = made.rows_of(block)
        assert inside.start == position
        assert 0 < len(inside) <= 1000
        assert inside.start // shard == (inside.stop - 1) // shard == block // made.blocks_a_shard
        assert block in made.blocks_of(inside.start // shard)
        position = inside.stop
    assert position == rows
    assert made.blocks <= max(2 * 4096, 2 * rows // shard)


def test_a_hundred_million_rows_are_a_hundred_thousand_blocks() -> None:
    made = plan(10**8, 8)
    assert (made.block, made.blocks) == (1000, 10**5)
    assert picture_path(10**8 - 1) == "099/999/099999999.png"
