"""What the commands print: tables, spinners, progress bars, and the file of ``--json``."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..common.atomic import write_json as write_json_file
from ..common.notes import SunWarning
from ..common.reading import printable

STDOUT = "-"


class SafeConsole(Console):
    """A console on which texts from files cannot act: control characters in what is printed are written out."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)


out = SafeConsole(highlight=False)
err = SafeConsole(stderr=True, highlight=False)


def figures_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """Figures by method as a table; a column appears when any row has it."""
    heads = {
        "unet_calls": ("U-Net calls", "g"),
        "seconds": ("seconds", ".3f"),
        "paired_mse": ("latent MSE", ".4f"),
        "set_distance": ("set distance", ".3f"),
        "kid": ("KID", ".5f"),
        "psnr": ("PSNR, dB", ".2f"),
    }
    shown = [key for key in heads if any(row.get(key) is not None for row in rows.values())]
    table = Table("method", title=title)
    for key in shown:
        table.add_column(heads[key][0], justify="right")
    for name, row in rows.items():
        table.add_row(escape(name), *("" if row.get(key) is None else format(row[key], heads[key][1]) for key in shown))
    return table


def write_json(path: Path | None, content: dict[str, Any], last: bool = True) -> None:
    """The figures into the file of ``--json``; ``-`` is standard output, where only the ``last`` of several goes."""
    if path is None:
        return
    if str(path) != STDOUT:
        write_json_file(path, content)
    elif last:
        print(json.dumps(content, indent=2, default=str))


@contextmanager
def notes_shown() -> Iterator[None]:
    """What the library has to tell of a run (:class:`SunWarning`), each once, as notes on standard error."""
    told: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", SunWarning)
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if not issubclass(category, SunWarning):
                usual(message, category, *place)
            elif str(message) not in told:
                told.add(str(message))
                err.print(f"[yellow]note:[/yellow] {escape(printable(str(message)))}", soft_wrap=True)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


@contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error; yields a function that changes its text."""
    with err.status(text) as status:
        yield status.update


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function to report (done, total) to."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


LINE_EVERY = 60.0
"""Seconds between two lines of progress where no bar can be drawn: in a file, in a cluster's log."""


@contextmanager
def counted_pictures(total: int, done: int) -> Iterator[Callable[[int, int], None]]:
    """Progress of many pictures on standard error, with pictures a second and the time left.

    ``done`` are there already. Yields the function to report (done, failed) to.
    """
    began, first, last = time.monotonic(), done, -LINE_EVERY
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}"))
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as progress:
        task = progress.add_task("drawing", total=total, completed=done, pace="")

        def report(done: int, failed: int) -> None:
            nonlocal last
            now = time.monotonic()
            text = pace(done - first, now - began, total - done) + (f", {failed:,} failed" if failed else "")
            progress.update(task, completed=done, pace=escape(text))
            if not err.is_terminal and now - last >= LINE_EVERY:
                err.print(f"{done:,} of {total:,} pictures{', ' if text else ''}{text}", soft_wrap=True)
                last = now

        yield report


def pace(made: int, seconds: float, left: int) -> str:
    """``3.1 pictures/s, 2 h 5 min left``; empty before there is anything to say."""
    if made <= 0 or seconds <= 0:
        return ""
    rest = round(left * seconds / made)
    hours, minutes = rest // 3600, rest // 60 % 60
    if hours >= 48:
        time_left = f"{hours // 24} d {hours % 24} h"
    elif hours:
        time_left = f"{hours} h {minutes} min"
    else:
        time_left = f"{minutes} min {rest % 60} s" if minutes else f"{rest} s"
    return f"{made / seconds:.3g} pictures/s, {time_left} left"
