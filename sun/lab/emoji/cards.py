"""Data and licences of everything trained on emoji pictures, for its cards."""

from __future__ import annotations

from typing import Any

from ...common.settings import without_folders
from ...training.run import TrainingRun
from .sources import METADATA_PACKAGE, STYLES


def licence_of(styles: tuple[str, ...]) -> str:
    """Identifier of the licence that weights made from these styles may carry: share-alike wins, then attribution."""
    return "cc-by-sa-4.0" if any("CC-BY-SA" in STYLES[s].licence for s in styles) else "cc-by-4.0"


def data_section(styles: tuple[str, ...]) -> str:
    """Markdown: the packages the pictures come from, and what follows for the weights."""
    rows = [f"- Pictures: `{STYLES[s].package}` (npm). {STYLES[s].attribution}. {STYLES[s].licence}.\n" for s in styles]
    return (
        "## Data and licences\n\n"
        + "".join(rows)
        + f"- Names and categories: `{METADATA_PACKAGE}` (npm), MIT.\n"
        + "- Captions are written by `sun/lab/emoji/scenes.py`.\n\n"
        + f"The weights are derived from the pictures and are licensed {licence_of(styles).upper()}.\n"
    )


def settings_of(config: Any, run: TrainingRun) -> dict[str, Any]:
    """Settings and progress of a run for a file that travels: folders of this machine by their last name alone."""
    return {**without_folders(config), **run.facts()}
