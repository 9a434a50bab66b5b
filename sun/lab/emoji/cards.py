"""What the model cards of everything trained on emoji pictures have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...common.settings import without_folders
from ...training.run import TrainingRun
from ...training.state import describe_machine
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


def training_section(run: TrainingRun, command: str) -> str:
    """Markdown: the command and what the run says of itself."""
    progress, config = run.progress, run.config
    losses = ", ".join(f"{k} {v:.4f}" for k, v in progress.losses.items())
    return (
        f"## Training\n\n    {command}\n\n"
        f"{progress.step} steps of batch {run.accelerator.num_processes} x {config.batch_size}, "
        f"{progress.seconds / 60:.0f} minutes, learning rate {config.lr:g} ({config.lr_schedule}), seed {config.seed}, "
        f"{run.precision}, on: {describe_machine()}. At the end: {losses}.\n"
    )


def settings_of(config: Any, run: TrainingRun) -> dict[str, Any]:
    """Settings and progress of a run for a file that travels: folders of this machine by their last name alone."""
    return {**without_folders(config), **run.facts()}


def write_json(path: Path, content: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    return path
