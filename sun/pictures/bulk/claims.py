"""Who draws what: blocks of rows that processes take from a folder they share, on however many machines.

Nobody directs. A claim is a file that only one process can create, named after its block and a generation:
``000123.0``. The owner is who created the highest generation. A process shows that it is alive by changing its own file
now and then; whoever sees that file stay the same for ``stale`` seconds of *its own* clock takes the owner for dead
and creates the next generation, which again only one can. No two clocks are compared, nothing is locked, nothing has
to be deleted in time. A process that was only slow then does the same work a second time, which harms nothing: it
makes the same bytes, and files appear whole.

A block is done when ``000123.done`` is there. It appears after all that it stands for.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ...common.atomic import write_text

BEAT = 10.0
"""Seconds between two signs of life."""
STALE = 60.0
"""Seconds without one after which a process of another machine counts as dead; NFS may show files 30 s late."""
SHELF = 1000
"""Blocks of a folder of claims."""


class Worker:
    """This process among those that share ``folder``: its file there, which a thread keeps changing."""

    def __init__(self, folder: Path, beat: float = BEAT):
        self.name = f"{socket.gethostname()[:60]}-{os.getpid()}-{secrets.token_hex(4)}"
        self.file = folder / self.name
        self._where, self._beats, self._every = _this_process(), 0, beat
        self._stop = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self._beats += 1
        write_text(self.file, json.dumps({**self._where, "beat": self._beats}))

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._every):
            with contextlib.suppress(OSError):  # a full disk: the run itself finds out, with a sentence
                self._beat()

    def leave(self) -> None:
        """Stop, and take the file away: what this process may still have claimed is free."""
        self._stop.set()
        self._thread.join()
        self.file.unlink(missing_ok=True)


class Watch:
    """Whether the other processes are alive, by what their files show."""

    def __init__(self, folder: Path, stale: float = STALE):
        self.folder, self.stale, self._here = folder, stale, _this_process()
        self._seen: dict[str, tuple[str, float]] = {}

    def alive(self, name: str) -> bool:
        """Whether a process lives: known of this machine's, and of others by whether their files still change."""
        try:
            text = (self.folder / name).read_text() if name else ""
        except FileNotFoundError:
            return False  # it left; it makes its file before it claims anything
        except (OSError, ValueError):
            text = ""
        if (known := self._known_here(text)) is not None:
            return known
        now = time.monotonic()
        before, since = self._seen.get(name, ("", -1.0))
        if since < 0 or before != text:
            self._seen[name] = (text, now)
            return True
        return now - since < self.stale

    def _known_here(self, text: str) -> bool | None:
        """What this machine knows of a process of its own; None of others."""
        try:
            there = json.loads(text)
            same = all(there[key] and there[key] == self._here[key] for key in ("boot", "pids"))
            return _started(int(there["pid"])) == there["started"] if same else None
        except (ValueError, TypeError, KeyError, AttributeError):
            return None


class Claims:
    """The blocks 0 to ``count`` - 1: take one, finish it or give it back. Raises OSError."""

    def __init__(self, folder: Path, count: int, worker: Worker, watch: Watch, start: float | None = None):
        self.folder, self.count, self.worker, self.watch = folder, count, worker, watch
        self.shelves = -(-count // SHELF)
        begin = int((random.random() if start is None else start) * count) % max(count, 1)
        self._position, self._begin = begin // SHELF, begin
        self._candidates: list[tuple[int, int]] = []  # (block, generation to create), the next one last
        self._complete: set[int] = set()
        self._counted: set[int] = set()
        self._failed: dict[int, int] = {}
        self._mine: dict[int, int] = {}

    def take(self) -> int | None:
        """A block that is this process's now; None: all are done, or in hands that are alive."""
        for _ in range(self.shelves + 1):
            while self._candidates:
                block, generation = self._candidates.pop()
                if self._create(block, generation):
                    return block
            self._look_at(self._position)
            self._position = (self._position + 1) % self.shelves
        return None

    def owns(self, block: int) -> bool:
        """Whether nobody took the block over."""
        if (mine := self._mine.get(block)) is None:
            return False
        return self._path(block, f"{mine}").exists() and not self._path(block, f"{mine + 1}").exists()

    def taken_over(self, block: int) -> bool:
        """Whether somebody else had begun the block that is ours now."""
        return self._mine.get(block, 0) > 0

    def finish(self, block: int, failures: Sequence[dict[str, Any]] = ()) -> None:
        """Say that all of the block is there, but for ``failures``. Raises OSError."""
        failed = self._path(block, "failed")
        if failures:
            write_text(failed, "".join(json.dumps(failure) + "\n" for failure in failures))
        else:
            failed.unlink(missing_ok=True)
        self._path(block, "done").touch()
        self.give_back(block)

    def give_back(self, block: int) -> None:
        """Let others have a block. Generations before ours go first: an old one must not come to the top."""
        for generation in range(self._mine.pop(block, -1) + 1):
            self._path(block, str(generation)).unlink(missing_ok=True)

    def mine(self) -> list[int]:
        """The blocks that this process has and did not finish."""
        return list(self._mine)

    def all_done(self, blocks: range) -> bool:
        """Whether all of neighbouring blocks are done."""
        shelves = range(blocks.start // SHELF, (blocks.stop - 1) // SHELF + 1)
        return all(shelf in self._complete or not self._open_on(shelf) & set(blocks) for shelf in shelves)

    def finished(self) -> bool:
        """Whether every block is done. Looks at the folders that were not yet complete."""
        return all(shelf in self._complete or not self._open_on(shelf) for shelf in range(self.shelves))

    def done(self) -> Iterator[range]:
        """The blocks that are done, in ranges and single."""
        for shelf in range(self.shelves):
            if shelf in self._complete or not (left := self._open_on(shelf)):
                yield self._blocks(shelf)
                continue
            yield from (range(block, block + 1) for block in self._blocks(shelf) if block not in left)

    def failures(self) -> Iterator[tuple[int, str]]:
        """(block, lines of JSON) of the blocks that are done but for some rows."""
        for shelf in range(self.shelves):
            names = sorted(name for name in self._names(shelf) if name.endswith(".failed"))
            yield from ((int(name.partition(".")[0]), self._failures(name)) for name in names)

    def failed_rows(self) -> int:
        """How many rows of blocks that are done have no picture. Of folders that are complete it looks once."""
        for shelf in range(self.shelves):
            if shelf in self._counted:
                continue
            if shelf in self._complete:
                self._counted.add(shelf)
            texts = [self._failures(name) for name in self._names(shelf) if name.endswith(".failed")]
            self._failed[shelf] = sum(text.count("\n") for text in texts)
        return sum(self._failed.values())

    def _failures(self, name: str) -> str:
        try:
            return self._path(int(name.partition(".")[0]), "failed").read_text()
        except FileNotFoundError:  # drawn meanwhile
            return ""

    def reopen(self, block: int) -> None:
        """Let a block that is done be drawn again."""
        self._path(block, "done").unlink(missing_ok=True)
        self._complete.discard(block // SHELF)
        self._counted.discard(block // SHELF)

    def _open_on(self, shelf: int) -> set[int]:
        """Blocks of a shelf that are not done."""
        done = {int(name.partition(".")[0]) for name in self._names(shelf) if name.endswith(".done")}
        left = set(self._blocks(shelf)) - done
        if not left:
            self._complete.add(shelf)
        return left

    def _look_at(self, shelf: int) -> None:
        """Make the free blocks of a shelf the candidates."""
        if shelf in self._complete:
            return
        done = set[int]()
        generations, owners = dict[int, int](), dict[int, str]()
        for name in self._names(shelf):
            number, _, what = name.partition(".")
            if what == "done":
                done.add(int(number))
            elif what.isdigit():
                generations[int(number)] = max(int(what), generations.get(int(number), -1))
        left = [block for block in self._blocks(shelf) if block not in done]
        if not left:
            self._complete.add(shelf)
        for block, generation in generations.items():
            owners[block] = self._owner(block, generation)
        free = [b for b in left if b not in owners or not (b in self._mine or self.watch.alive(owners[b]))]
        ahead = [b for b in free if b >= self._begin] + [b for b in free if b < self._begin]
        self._candidates = [(block, generations.get(block, -1) + 1) for block in reversed(ahead)]

    def _owner(self, block: int, generation: int) -> str:
        """Name of the process that made a claim. An empty one is of a process that just makes or made it."""
        try:
            return self._path(block, str(generation)).read_text().strip().replace("/", "_")
        except (OSError, ValueError):
            return ""

    def _create(self, block: int, generation: int) -> bool:
        path = self._path(block, str(generation))
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            return self._create(block, generation)
        with os.fdopen(handle, "w") as file:
            file.write(self.worker.name)
        self._mine[block] = generation
        if self._path(block, "done").exists():  # finished since we looked: its owner took its claims away
            self.give_back(block)
            return False
        return True

    def _blocks(self, shelf: int) -> range:
        return range(shelf * SHELF, min((shelf + 1) * SHELF, self.count))

    def _names(self, shelf: int) -> list[str]:
        try:
            names = os.listdir(self.folder / f"{shelf:06d}")
        except FileNotFoundError:
            return []
        return [name for name in names if name.partition(".")[0].isdigit()]

    def _path(self, block: int, what: str) -> Path:
        return self.folder / f"{block // SHELF:06d}" / f"{block:09d}.{what}"


def _this_process() -> dict[str, Any]:
    """What tells a process from all others: boot, namespace of process numbers, number, start; "" where unknown."""
    boot, pids = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        pids = os.readlink("/proc/self/ns/pid")
    return {"boot": boot, "pids": pids, "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine started, in the system's ticks; None if there is none, or a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]
