"""``sun generate --prompts``: any number of pictures from a file, by any number of processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from ..common.notes import note
from ..common.reading import printable
from ..pictures.bulk import prompts_file, run
from ..pictures.bulk.rows import Failure, unknown
from ..pictures.recipe import Recipe
from .app import INTERRUPTED
from .show import counted_pictures, err, out, progress_bar, spinner, write_json

SOME_FAILED = 3
CHECKED = 10_000
"""Rows that are read before the model loads, so that a wrong file costs no run."""
_LOOK = 5.0  # seconds between two looks at what other processes did


def generate_many(
    engine: Any,
    recipe: Recipe,
    file: Path,
    folder: Path | None,
    shards: int,
    together: int | None,
    seeded: bool,
    retry_failed: bool,
    figures: Path | None,
) -> None:
    """Draw a picture for every row of ``file``. ``together``, and the seed unless ``seeded``, are those of the run."""
    folder = folder or Path(f"sun-{file.stem}")
    with _shown_here():
        _own_gpu()
        base = _base(engine, recipe)
        prompts, known = _read(file, folder, shards)
        settings = run.Settings(
            asdict(base),
            engine.prints_of(base),
            _about(prompts),
            together or _together(base),
            shards,
            _made_with(engine, base),
        )
        settings = _as_begun(folder, settings, together is None, seeded)
        there, new = run.open_run(folder, settings, begin=False)
        if new:
            _check(prompts, base)
        for name, value in there["made_with"].items():
            if settings.made_with.get(name, value) != value:
                same = f" OMP_NUM_THREADS={value} keeps them." if name == "threads" else ""
                now = settings.made_with[name]
                note(f"{name} was {value} and is {now}: pictures may differ in their last bits.{same}")
        with spinner("loading"):
            # an exported model brings its ControlNet only where there is a picture for it
            loaded = engine.load(replace(base, control=base.control or ("each row's" if base.controlnet else "")))
            engine.complete(_without_pictures(base), loaded)
        settings = _begin(folder, settings, together is None, seeded)
        base = replace(base, seed=settings.recipe["seed"])
        if not known:
            prompts.keep(folder / run.STATE / "rows.npz")
        _draw(engine, loaded, run.RunFolder(folder, settings, prompts, base), retry_failed, figures)


def _base(engine: Any, recipe: Recipe) -> Recipe:
    """What all rows have in common, checked but for the pictures it starts from, which may come with each row."""
    base = replace(recipe, prompt="", batch=1, index=None)
    checked = engine.complete(_without_pictures(base))
    return replace(base, device=checked.device, dtype=checked.dtype, adapter=checked.adapter)


def _without_pictures(base: Recipe) -> Recipe:
    return replace(base, init="", mask="", control="", controlnet="")


def _draw(engine: Any, loaded: Any, folder: run.RunFolder, retry_failed: bool, figures: Path | None) -> None:
    from ..pictures.bulk.batches import Drawing

    rank, processes = _rank()
    threads = 1 if folder.base.device == "cpu" else min(8, os.cpu_count() or 1)
    drawing = Drawing(loaded, folder.base, folder.settings.together)
    process = run.Process(folder, drawing, threads, rank / processes if processes > 1 else None)
    began, first = time.monotonic(), None
    try:
        again = run.reopen_failed(process) if retry_failed else 0
        if retry_failed:
            err.print(f"{again:,} failed pictures are tried again", soft_wrap=True)
        first = run.totals(process)
        with counted_pictures(first.rows, first.done) as show:
            process.work(_looking(show) if rank == 0 else lambda _: None)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        if not run.is_full(error):
            raise
        raise run.BulkError(
            f"{folder.folder}: there is no space left. What is not whole does not count; make space, and the same "
            "command goes on."
        ) from error
    finally:
        ended = sys.exc_info()[0] is not None
        process.leave()
        _summary(process, first, time.monotonic() - began, ended, figures)
    if run.totals(process).failed:
        raise typer.Exit(SOME_FAILED)


def _looking(show: Callable[[int, int], None]) -> Callable[[run.Process], None]:
    """Shows what all processes did, looking into the folder now and then."""
    next_look = 0.0

    def progress(process: run.Process) -> None:
        nonlocal next_look
        began = time.monotonic()
        if began >= next_look:
            now = run.totals(process)
            show(now.done, now.failed)
            ended = time.monotonic()  # of millions of blocks on a slow file system a look takes long
            next_look = ended + max(_LOOK, 50 * (ended - began))

    return progress


def _summary(process: run.Process, first: run.Totals | None, seconds: float, ended: bool, figures: Path | None) -> None:
    """What there is now, and how to go on."""
    try:
        failed = run.write_failures(process)
        now = run.totals(process)
    except OSError:  # a full disk: its own sentence follows
        return
    folder = process.run.folder
    if ended:
        err.print(
            f"stopped: {now.done:,} of {now.rows:,} rows are done. The same command goes on.",
            style="yellow",
            soft_wrap=True,
        )
    else:
        rate = f", {process.made / seconds:.3g} pictures a second" if process.made else ""
        count = now.done - failed
        out.print(
            f"{count:,} picture{'s' * (count != 1)}; {process.made:,} drawn here in {seconds:.0f} s{rate}",
            soft_wrap=True,
        )
        out.print(str(folder), soft_wrap=True)
    if failed:
        err.print(
            f"[yellow]note:[/yellow] {failed:,} row{'s have' if failed > 1 else ' has'} no picture: "
            f"{escape(str(folder / run.FAILED))} says why. --retry-failed tries again what can succeed.",
            soft_wrap=True,
        )
    content = {"rows": now.rows, "done": now.done, "failed": failed, "drawn_here": process.made, "seconds": seconds}
    write_json(figures, {**content, "already_done": first.done if first else 0, "folder": str(folder)})


def _read(file: Path, folder: Path, shards: int) -> tuple[prompts_file.PromptsFile, bool]:
    """The file of prompts, and whether the run's folder knew where its rows are."""
    every = shards or run.FOLDER
    if known := prompts_file.PromptsFile.known(file, folder / run.STATE / "rows.npz", every):
        return known, True
    with progress_bar(f"reading {printable(file.name)}") as on_bytes:
        return prompts_file.PromptsFile.read(file, every, on_bytes), False


def _about(prompts: prompts_file.PromptsFile) -> dict[str, Any]:
    contents = prompts.contents
    return {"file": prompts.path.name, "sha256": contents.sha256, "bytes": contents.size, "rows": contents.rows}


def _as_begun(folder: Path, settings: run.Settings, together: bool, seeded: bool) -> run.Settings:
    """``settings`` with what was not given as the run in ``folder`` has it."""
    if not (folder / run.ABOUT).exists():
        return settings
    there = run.read_run(folder)
    if not seeded:
        settings = replace(settings, recipe={**settings.recipe, "seed": there["recipe"].get("seed", 0)})
    return replace(settings, together=there["together"]) if together else settings


def _begin(folder: Path, settings: run.Settings, together: bool, seeded: bool) -> run.Settings:
    """Begin the run or go on with it. Processes that begin at once have each drawn a seed, and one's holds for all."""
    try:
        run.open_run(folder, settings := _as_begun(folder, settings, together, seeded))
    except run.BulkError:
        run.open_run(folder, settings := _as_begun(folder, settings, together, seeded))
    return settings


def _check(prompts: prompts_file.PromptsFile, base: Recipe) -> None:
    """Say what is odd about the file; raise BulkError if nothing of its beginning can be drawn."""
    from ..pipelines.text import read_as_words

    contents, bad, others, words = prompts.contents, [], dict[str, None](), list[str]()
    checked = min(CHECKED, len(prompts))
    err.print(f"{contents.rows:,} rows in {escape(printable(prompts.path.name))}", soft_wrap=True)
    if contents.blank:
        lines = "line is" if contents.blank == 1 else "lines are"
        err.print(f"{contents.blank:,} blank {lines} left out", soft_wrap=True)
    for row in run.parsed(prompts, base, 0, checked):
        if isinstance(row, Failure):
            bad.append(row)
        elif found := read_as_words(f"{row.recipe.prompt}\n{row.recipe.negative}"):
            words.append(f"line {row.line}: {found[0]}")
    if words:
        note(f"{words[0]}{f' {len(words) - 1:,} more rows are like it.' if len(words) > 1 else ''}")
    for _, _, raw in islice(prompts.rows(0, checked), 100) if prompts.form.kind != "txt" else ():
        try:
            others |= dict.fromkeys(unknown(tuple(prompts.form.values(raw)))[1])
        except ValueError:
            continue
    if others:
        note(f"columns that are not read: {', '.join(map(repr, list(others)[:10]))}.")
    if contents.repeated:
        _tell_repeated(prompts)
    if not bad:
        return
    lines = "; ".join(f"line {failure.line}: {failure.reason}" for failure in bad[:3])
    of = f"of the first {checked:,}" if checked < len(prompts) else f"of {checked:,}"
    more = f"; and {len(bad) - 3:,} more" if len(bad) > 3 else ""
    if len(bad) == checked:
        raise run.BulkError(f"{printable(str(prompts.path))}: none {of} rows can be drawn. {lines}{more}.")
    note(f"{len(bad):,} {of} rows cannot be drawn and will be left out. {lines}{more}.")


def _tell_repeated(prompts: prompts_file.PromptsFile) -> None:
    contents = prompts.contents
    lines = [next(line for _, line, _ in prompts.rows(row, row + 1)) for row in contents.first_repeated]
    among = f" among the first {prompts_file.COMPARED:,}" if contents.rows > prompts_file.COMPARED else ""
    note(
        f"{contents.repeated:,} row{'s repeat' if contents.repeated > 1 else ' repeats'} an earlier one{among} (line "
        f"{', '.join(map(str, lines))}{', ...' if contents.repeated > len(lines) else ''}): drawn again, from another "
        "seed unless they name one."
    )


def _together(base: Recipe) -> int:
    """How many pictures at a time: on a CPU a batch gains nothing, and alone each is as `sun generate` makes it."""
    return 1 if base.device == "cpu" else 8


def _made_with(engine: Any, base: Recipe) -> dict[str, str]:
    import torch

    threads = {"threads": str(torch.get_num_threads())} if base.device == "cpu" else {}
    return {**engine.environment(base.device), **threads}


def _rank() -> tuple[int, int]:
    """Number of this process and of all that `accelerate launch`, `torchrun` or `srun` started, from the environment.

    Nothing else is asked of them. The processes share a folder and no connection, so that none waits for another.
    """
    for rank, processes in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        numbers = os.environ.get(rank, ""), os.environ.get(processes, "")
        if all(text.isdecimal() for text in numbers) and int(numbers[0]) < int(numbers[1]):
            return int(numbers[0]), int(numbers[1])
    return 0, 1


def _own_gpu() -> None:
    """Let ``cuda`` be the GPU of this process among those of its machine."""
    import torch

    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", ""))
    if local.isdecimal() and torch.cuda.is_available():
        torch.cuda.set_device(int(local) % torch.cuda.device_count())


@contextmanager
def _shown_here() -> Iterator[None]:
    """One process of several speaks; a machine that is taken away (SIGTERM) ends a run as Ctrl-C does."""
    quiet, before = err.quiet, None
    err.quiet = out.quiet = _rank()[0] > 0

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with suppress(ValueError):  # not the main thread: signals go elsewhere
        before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except Exception:
        err.quiet = False  # why this one ends is said by itself
        raise
    finally:
        out.quiet = quiet
        err.quiet = err.quiet and quiet
        if before is not None:
            signal.signal(signal.SIGTERM, before)
