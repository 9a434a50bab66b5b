"""Tables as Markdown, without a line break at their end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    return _table(head, rows, "---")


def number_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """All columns but the first to the right."""
    return _table(head, rows, "---:")


def _table(head: Sequence[object], rows: Iterable[Sequence[object]], rule: str) -> str:
    first, *others = (f"| {' | '.join(map(str, row))} |" for row in (head, *rows))
    return "\n".join([first, "|---" + f"|{rule}" * (len(head) - 1) + "|", *others])
