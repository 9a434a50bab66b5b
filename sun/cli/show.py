"""What the commands print: tables, spinners, progress bars, and the file of ``--json``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..common.atomic import write_json as write_json_file
from ..common.reading import printable


class SafeConsole(Console):
    """A console on which texts from files cannot act: control characters in what is printed are written out."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text, lines=True), **options)


out = SafeConsole(highlight=False)
err = SafeConsole(stderr=True, highlight=False)


def figures_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """Figures by method as a table; a column appears when any row has it."""
    heads = {"unet_calls": ("U-Net calls", "g"), "seconds": ("seconds", ".3f"), "paired_mse": ("latent MSE", ".4f"),
             "set_distance": ("set distance", ".3f"), "kid": ("KID", ".5f"), "psnr": ("PSNR, dB", ".2f")}  # fmt: skip
    shown = [key for key in heads if any(row.get(key) is not None for row in rows.values())]
    table = Table("method", title=title)
    for key in shown:
        table.add_column(heads[key][0], justify="right")
    for name, row in rows.items():
        table.add_row(name, *("" if row.get(key) is None else format(row[key], heads[key][1]) for key in shown))
    return table


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path:
        write_json_file(path, content)


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
