"""A run over a file of prompts: the folder that says what it makes, and the loop of each of its processes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...common.atomic import write_text
from ...common.reading import ReadError, printable, read_json
from ...common.settings import ConfigError
from ..png import write_png
from ..recipe import Recipe, split_lora
from .claims import Claims, Watch, Worker
from .outputs import FOLDER, Output, PictureFolder, Shards, about
from .prompts_file import PromptsFile
from .rows import Failure, Row, RowError, recipe_of

FORMAT = "sun-bulk-1"
ABOUT, FAILED, STATE = "run.json", "failures.jsonl", ".sun"
POLL = 1.0
"""Seconds between two looks at what others do, when nothing is left to take."""
_MOST_FAILURES = 50
_BLOCKS, _LONGEST_BLOCK = 4096, 1000


class BulkError(ConfigError):
    """A run that cannot begin or go on; the message says why and what to do."""


@dataclass(frozen=True)
class Plan:
    """How the rows are divided: ``shard`` rows a folder or tar file, each in blocks of ``block`` rows."""

    rows: int
    shard: int
    block: int

    @property
    def blocks_a_shard(self) -> int:
        """Blocks in each shard but perhaps the last."""
        return -(-self.shard // self.block)

    @property
    def blocks(self) -> int:
        """Blocks in all."""
        whole, rest = divmod(self.rows, self.shard)
        return whole * self.blocks_a_shard + -(-rest // self.block)

    def rows_of(self, block: int) -> range:
        """The rows of a block."""
        shard, part = divmod(block, self.blocks_a_shard)
        first = shard * self.shard + part * self.block
        return range(first, min(first + self.block, (shard + 1) * self.shard, self.rows))

    def blocks_of(self, shard: int) -> range:
        """The blocks of a shard."""
        first = shard * self.blocks_a_shard
        return range(first, min(first + self.blocks_a_shard, self.blocks))


def plan(rows: int, together: int, shard: int = FOLDER) -> Plan:
    """Blocks small enough that nobody waits long for the last one, and large enough that there are not too many."""
    least = together * max(1, min(8, rows // (64 * together))) if together > 1 else 1
    return Plan(rows, shard, min(max(least, -(-rows // _BLOCKS)), _LONGEST_BLOCK, shard))


@dataclass
class Settings:
    """What makes a run the same run: the pictures depend on nothing else."""

    recipe: dict[str, Any]
    files: dict[str, str]
    prompts: dict[str, Any]
    together: int
    shards: int
    """Rows of a tar shard; 0: a folder of PNGs."""
    made_with: dict[str, str] = field(default_factory=dict)
    """Versions, and what else may change last bits: told of, never refused."""

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """What of ``other``, the settings of the run that is there, is not as here; each a part of a sentence."""
        found = []
        if self.prompts.get("sha256") != other["prompts"].get("sha256"):
            found.append("the file of prompts has another content")
        mine, theirs = _comparable(self.recipe, self.files), _comparable(other["recipe"], other["files"])
        for name in mine.keys() | theirs.keys():
            if mine.get(name) != theirs.get(name):
                found.append(f"{name} was {_shown(theirs.get(name))} and is {_shown(mine.get(name))}")
        for name in ("together", "shards"):
            if getattr(self, name) != other[name]:
                found.append(f"{_OPTION[name]} was {_shown(other[name])} and is {_shown(getattr(self, name))}")
        return sorted(found)


_OPTION = {"together": "--batch", "shards": "--shards"}
_PLACES = ("model", "adapter", "controlnet", "config", "init", "mask", "control", "loras", "switch", "ltc_table")
_HERE_ALONE = ("device", "batch", "index", "prompt")


def _comparable(recipe: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The settings by name; of a file what is in it and not where it is, which differs between machines."""
    weights = [split_lora(str(lora))[1] for lora in recipe.get("loras", ())]
    kept = {name: value for name, value in recipe.items() if name not in (*_PLACES, *_HERE_ALONE)}
    plain = {name: recipe.get(name) for name in ("model", "adapter", "controlnet") if name not in files}
    return {**kept, **plain, **files, **({"weights of LoRAs": weights} if weights else {})}


@dataclass
class Totals:
    """What there is of a run: rows with a picture or a failure, of all processes."""

    rows: int
    done: int = 0
    failed: int = 0
    made_here: int = 0
    failed_here: int = 0


class RunFolder:
    """The folder of a run: its settings, its rows, and what of them is done. Raises BulkError, OSError."""

    def __init__(self, folder: Path, settings: Settings, prompts: PromptsFile, base: Recipe):
        self.folder, self.settings, self.prompts, self.base = folder, settings, prompts, base
        self.state = folder / STATE
        self.plan = plan(len(prompts), settings.together, settings.shards or FOLDER)

    def rows(self, block: int) -> tuple[list[Row], list[Failure]]:
        """The rows of a block, and those that are none."""
        good: list[Row] = []
        bad: list[Failure] = []
        inside = self.plan.rows_of(block)
        for row in parsed(self.prompts, self.base, inside.start, inside.stop):
            (good if isinstance(row, Row) else bad).append(row)  # type: ignore[arg-type]
        return good, bad

    def output(self, worker: Worker) -> Output:
        """Where a process of the run puts its pictures."""
        if not self.settings.shards:
            return PictureFolder(self.folder)
        return Shards(self.folder, self.state / "parts", worker.name, self.plan.blocks_a_shard)

    def claims(self, worker: Worker, start: float | None = None, watch: Watch | None = None) -> Claims:
        """What a process takes its blocks from. start: where it looks first, as a share of them (default: anywhere)."""
        watch = watch or Watch(self.state / "workers")
        return Claims(self.state / "blocks", self.plan.blocks, worker, watch, start)


def open_run(folder: Path, settings: Settings, begin: bool = True) -> tuple[dict[str, Any], bool]:
    """The settings of the run in ``folder``, which must be ``settings``, and whether it is new.

    begin: make the folder if there is none; else nothing is written. Raises BulkError where the folder holds something
    else or another run.
    """
    file = folder / ABOUT
    if begin:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.exists():
        return asdict(settings), True
    if not file.exists():
        if others := [name for name in os.listdir(folder) if not name.startswith(".")]:
            raise BulkError(
                f"{printable(str(folder))} holds other files ({printable(sorted(others)[0])}). Name a new folder "
                "with --out, or that of a run to go on with."
            )
        if not begin or _create(file, json.dumps({"format": FORMAT, **asdict(settings)}, indent=2) + "\n"):
            return asdict(settings), True
    there = read_run(folder)
    if differences := settings.differences(there):
        raise BulkError(
            f"{printable(str(folder))} holds another run: {'; '.join(differences)}. Give the same file and options to "
            "go on with it, or a new folder with --out."
        )
    return there, False


def read_run(folder: Path) -> dict[str, Any]:
    """The settings in a run's folder. Raises BulkError."""
    file = folder / ABOUT
    try:
        there = read_json(file)
        if there["format"] != FORMAT:
            raise BulkError(
                f"{printable(str(file))} has format {_shown(there['format'])}; this version reads {FORMAT}."
            )
        for name, kind in (("recipe", dict), ("files", dict), ("prompts", dict), ("together", int), ("shards", int)):
            if not isinstance(there[name], kind):
                raise TypeError(name)
        return dict(there)
    except (ReadError, KeyError, TypeError, OSError) as error:
        raise BulkError(
            f"{printable(str(file))} does not say what the run in its folder is ({printable(str(error))}). "
            "Name another folder with --out."
        ) from error


def parsed(prompts: PromptsFile, base: Recipe, first: int, last: int) -> Iterator[Row | Failure]:
    """The rows from ``first`` to before ``last``, or why they are none."""
    for index, line, raw in prompts.rows(first, last):
        values: dict[str, Any] = {}
        try:
            values = prompts.form.values(raw)
            yield Row(index, line, recipe_of(values, base, index))
        except RowError as error:
            prompt = values.get("prompt")
            yield Failure(index, line, "row", printable(str(error)), prompt if isinstance(prompt, str) else "")


class Drawer(Protocol):
    """What draws; :class:`sun.pictures.bulk.batches.Drawing` does."""

    def complete(self, rows: Sequence[Row]) -> tuple[list[Row], list[Failure]]:
        """The rows with every default filled in, and those that cannot be drawn."""

    def batches(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The complete rows of a block as they are drawn together: the same whoever asks."""

    def draw(self, batch: Sequence[Row]) -> tuple[list[Any], list[Failure]]:
        """Pictures of a batch, and the rows of which there is none."""


class Process:
    """One process of a run: takes blocks and draws them until all are done, by whomever. Raises BulkError, OSError."""

    def __init__(self, run: RunFolder, drawer: Drawer, threads: int = 1, start: float | None = None, **watch: float):
        self.run, self.drawer = run, drawer
        workers = run.state / "workers"
        self.worker = Worker(workers)
        self.claims = run.claims(self.worker, start, Watch(workers, **watch))
        self.output = run.output(self.worker)
        self.made, self.failed, self.in_block, self._unlucky = 0, 0, 0, 0
        self._threads = threads

    def work(self, on_progress: Callable[[Process], None] = lambda _: None) -> None:
        """Until everything is done. ``on_progress`` is called after each batch, and while nothing is left to take."""
        with ThreadPoolExecutor(self._threads, "write") as pool:
            while True:
                if (block := self.claims.take()) is not None:
                    self._block(block, pool, on_progress)
                elif self.claims.finished():
                    break
                else:
                    on_progress(self)
                    time.sleep(POLL)
        for shard in self.output.waiting():  # whose last process died before it did
            self.output.join(shard)
        self.output.tidy()
        on_progress(self)

    def leave(self) -> None:
        """Stop taking part; what was claimed and is not finished is free for others."""
        self.output.leave()
        for block in list(self.claims.mine()):
            with contextlib.suppress(OSError):
                self.claims.give_back(block)
        with contextlib.suppress(OSError):
            self.worker.leave()

    def _block(self, block: int, pool: ThreadPoolExecutor, on_progress: Callable[[Process], None]) -> None:
        self.in_block = 0
        try:
            failures = self._draw(block, pool, on_progress)
            self.output.finish()
            self.claims.finish(block, [asdict(failure) for failure in failures])
            self.failed += len(failures)
        except FileNotFoundError:
            # Somebody took us for dead, did the same work and tidied up. Otherwise it is what it says.
            if self.claims.owns(block):
                raise
            self.output.leave()
            return
        finally:
            self.in_block = 0
        if self.run.settings.shards:
            shard = block // self.run.plan.blocks_a_shard
            if self.claims.all_done(self.run.plan.blocks_of(shard)):
                self.output.join(shard)

    def _draw(self, block: int, pool: ThreadPoolExecutor, on_progress: Callable[[Process], None]) -> list[Failure]:
        inside = self.run.plan.rows_of(block)
        there = self.output.begin(block, inside, self.claims.taken_over(block))
        rows, failures = self.run.rows(block)
        good, bad = self.drawer.complete(rows)
        failures += bad
        self.in_block = len(failures)
        waiting: list[Future[None]] = []
        try:
            for batch in self.drawer.batches(good):
                missing = [row for row in batch if row.index not in there]
                if missing:
                    pictures, failed = self.drawer.draw(batch)
                    wanted = {row.index for row in missing}
                    pictures = [picture for picture in pictures if picture.row.index in wanted]
                    failures += (lost := [failure for failure in failed if failure.index in wanted])
                    self._count(len(pictures), lost)
                    waiting += [pool.submit(self._write, picture) for picture in pictures]
                    while len(waiting) > 4 * self._threads:
                        waiting.pop(0).result()
                self.in_block += len(batch)
                on_progress(self)
        finally:  # what is drawn is kept, whatever happened after it
            errors = [error for future in waiting if (error := future.exception())]
        if errors:
            raise errors[0]
        return sorted(failures, key=lambda failure: failure.index)

    def _count(self, made: int, failed: list[Failure]) -> None:
        """Raise BulkError when nothing but failures comes: then it is not the prompts."""
        self.made += made
        self._unlucky = 0 if made else self._unlucky + len(failed)
        if self._unlucky >= _MOST_FAILURES and not self.made:
            raise BulkError(
                f"of the first {self._unlucky} pictures none could be drawn; the last, of line {failed[-1].line}: "
                f"{failed[-1].reason} Mend that, and give the same command with --retry-failed."
            )

    def _write(self, picture: Any) -> None:
        content = io.BytesIO()
        write_png(picture.image, content, picture.text)
        recipe = picture.row.recipe
        self.output.write(picture.row.index, content.getvalue(), about(picture.text, recipe.prompt))


def totals(process: Process) -> Totals:
    """Of all processes, by what is in the folder. Looks into every folder of blocks that is not yet complete."""
    run = process.run
    done = sum(sum(len(run.plan.rows_of(block)) for block in blocks) for blocks in process.claims.done())
    return Totals(
        len(run.prompts),
        min(done + process.in_block, len(run.prompts)),
        process.claims.failed_rows(),
        process.made,
        process.failed,
    )


def write_failures(process: Process) -> int:
    """Write the failures of all processes to ``failures.jsonl``, in the order of the rows. How many there are."""
    lines = [line for _, text in process.claims.failures() for line in text.splitlines()]
    file = process.run.folder / FAILED
    if lines:
        write_text(file, "".join(f"{line}\n" for line in lines))
    else:
        file.unlink(missing_ok=True)
    return len(lines)


def reopen_failed(process: Process) -> int:
    """Let what failed be drawn again, where that can help: bad rows stay bad in a file that must not change."""
    count = 0
    for block, text in list(process.claims.failures()):
        again = [line for line in text.splitlines() if json.loads(line)["kind"] != "row"]
        if again:
            process.claims.reopen(block)
            count += len(again)
    return count


def is_full(error: OSError) -> bool:
    """Whether an error says that no more can be written there."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def _create(file: Path, text: str) -> bool:
    """Write a new file in one piece; False if somebody else just made it. Raises OSError."""
    temporary = file.with_name(f".{file.name}-{secrets.token_hex(6)}.part")
    temporary.write_text(text)
    try:
        os.link(temporary, file)
        return True
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with open(file, "x") as handle:
                handle.write(text)
            return True
        except FileExistsError:
            time.sleep(1)  # until it is written
            return False
    finally:
        temporary.unlink(missing_ok=True)


def _shown(value: Any) -> str:
    text = printable(str(value))
    return text if len(text) <= 80 else text[:80] + "..."
