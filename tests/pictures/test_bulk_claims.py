"""Blocks of work that processes take from a folder: one owner each, dead owners replaced, no clock compared."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sun.pictures.bulk import claims as module
from sun.pictures.bulk.claims import Claims, Watch, Worker

Make = Callable[..., Claims]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    (tmp_path / "workers").mkdir()

    def new(count: int = 5, start: float = 0.0, stale: float = 60.0, **where: Any) -> Claims:
        worker = Worker(tmp_path / "workers", beat=1000)
        worker._where.update(where)
        worker._beat()
        return Claims(tmp_path / "blocks", count, worker, Watch(tmp_path / "workers", stale), start)

    return new


def take_all(claims: Claims) -> list[int]:
    return list(iter(claims.take, None))


def test_every_block_has_one_owner(make: Make) -> None:
    first, second = make(), make(start=0.5)
    taken = [first.take(), second.take(), first.take(), second.take(), first.take()]
    assert sorted(taken) == [0, 1, 2, 3, 4]
    assert first.take() is None
    assert second.take() is None
    assert not first.finished()


def test_done_blocks_stay_done_for_processes_that_come_later(make: Make) -> None:
    first = make(2500)
    for _ in range(2500):
        first.finish(first.take())  # type: ignore[arg-type]
    late = make(2500, start=0.7)
    assert late.take() is None
    assert late.finished()
    assert sum(map(len, late.done())) == 2500
    assert not list(first.folder.rglob("*.0"))


def test_a_block_that_was_finished_after_somebody_looked_is_not_taken_again(make: Make) -> None:
    first, second = make(2), make(2)
    block = first.take()
    second._look_at(0)
    second._candidates.append((block, 0))  # as it was before
    first.finish(block)
    assert second.take() == 1
    assert second.take() is None


def test_what_is_given_back_or_left_is_free_at_once(make: Make) -> None:
    first, second = make(2), make(2)
    a, b = first.take(), first.take()
    first.give_back(a)
    assert second.take() == a
    first.worker.leave()
    assert second.take() == b
    assert second.taken_over(b)
    assert not first.owns(b)


def test_a_process_killed_on_this_machine_is_known_to_be_dead(make: Make, tmp_path: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from sun.pictures.bulk.claims import *\n"
        "f = Path(sys.argv[1]); w = Worker(f / 'workers'); c = Claims(f / 'blocks', 5, w, Watch(f / 'workers'), 0.0)\n"
        "c.take(); c.take(); os.kill(os.getpid(), 9)"
    )
    (tmp_path / "blocks").mkdir()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    if not Path("/proc/self/stat").exists():
        pytest.skip("this system does not tell which processes there are")
    assert sorted(take_all(make())) == [0, 1, 2, 3, 4]


def test_a_silent_process_of_another_machine_is_dead_after_a_while_by_the_watcher_s_clock(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    far = make(1, boot="another machine")
    near = make(1)
    assert far.take() == 0
    os.utime(far.worker.file, (4e9, 4e9))  # its clock is decades ahead
    for _ in range(5):  # alive while it changes its file
        now[0] += 50
        far.worker._beat()
        assert near.take() is None
    now[0] += 50
    assert near.take() is None
    now[0] += 20
    other = make(1)
    assert near.take() == 0
    assert other.take() is None  # the new owner lives, of a process of this machine
    assert not far.owns(0)
    near.finish(0)
    far.finish(0)  # it was only slow: nothing is harmed
    assert other.finished()


def test_a_process_number_that_is_used_again_is_another_process(make: Make) -> None:
    dead = make(1, started="1")
    assert dead.take() == 0
    assert make(1).take() == 0


@pytest.mark.parametrize("content", [b"", b"\xff", b"../../etc", b"nobody"])
def test_a_claim_that_says_nothing_of_its_owner_is_taken_over_in_time(
    make: Make, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    claims = make(1)
    path = claims._path(0, "0")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    found = claims.take()
    now[0] += 61
    assert (claims.take() if found is None else found) == 0


def test_damaged_files_of_other_processes_are_no_error(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    for content in ("", "{", "[]", json.dumps({"boot": 3}), json.dumps({"boot": "x", "pids": "y", "pid": "z"})):
        far = make(1)
        far.take()
        far.worker.file.write_text(content)
        near = make(1)
        assert near.take() is None
        now[0] += 61
        assert near.take() == 0
        near.give_back(0)


def test_failures_are_kept_by_block_until_it_is_drawn_again(make: Make) -> None:
    claims = make(3)
    for failures in ([{"index": 0}], [], [{"index": 20}, {"index": 21}]):
        claims.finish(claims.take(), failures)  # type: ignore[arg-type]
    assert claims.failed_rows() == 3
    assert [json.loads(line)["index"] for _, text in claims.failures() for line in text.splitlines()] == [0, 20, 21]
    later = make(3)
    later.reopen(2)
    assert not later.finished()
    block = later.take()
    assert block == 2
    later.finish(block)
    assert make(3).failed_rows() == 1
