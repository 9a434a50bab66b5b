"""What is written beside trained weights: ``README.md``, a model card, and ``training.json`` with every setting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from ..common.atomic import write_json, write_text
from ..common.markdown import table
from ..common.reading import ReadError, read_json
from ..common.settings import last_name, without_folders
from ..shipped import SHIPPED
from .run import TrainingRun
from .state import describe_machine

EMOJI_NAME = "Emoji Diffusion"
_NAME = "_sun_name"  # in model_index.json, where diffusers passes over what begins so


def name_of(model: str) -> str:
    """What a card calls the model of a setting: its name (see :func:`put_name`; the shipped one has one), else that of
    its folder or file."""
    if model == SHIPPED:
        return EMOJI_NAME
    index = Path(model) / "model_index.json"
    try:
        found = read_json(index).get(_NAME) if index.is_file() else None
    except (ReadError, AttributeError):
        found = None
    return found if isinstance(found, str) and found else last_name(model)


def put_name(folder: Path, name: str) -> None:
    """Call the model of a diffusers folder ``name`` in the cards of what is trained on it."""
    index = folder / "model_index.json"
    write_json(index, {**read_json(index), _NAME: name})


def card(title: str, parts: Iterable[str], **front: str) -> str:
    """Markdown: the ``front`` matter that model hubs read, the title, and those of the parts that are not empty."""
    matter = "".join(f"{name}: {value}\n" for name, value in front.items())
    sections = [f"---\n{matter}---"] if front else []
    sections += [f"# {title}", *(part.strip("\n") for part in parts)]
    return "\n\n".join(filter(None, sections)) + "\n"


def write_card(folder: Path, title: str, parts: Iterable[str], **front: str) -> Path:
    """Write a :func:`card` as ``README.md``; returns the file. Raises OSError."""
    return write_text(folder / "README.md", card(title, parts, **front))


def write_table_card(
    run: TrainingRun, config: Any, title: str, facts: Mapping[str, Any], rows: Mapping[str, object], usage: str
) -> None:
    """Write ``training.json`` (``facts``, every setting, how far the run came) and a card that is a table (``rows``,
    how far the run came) and ``usage``. Raises OSError."""
    base = {"base_model": name_of(config.model)}
    settings, progress = without_folders(config), run.progress
    write_json(run.folder / "training.json", {**base, **facts, "settings": settings, "progress": progress_of(run)})
    told = {
        **rows,
        "steps": f"{progress.step} of {batch_in_words(asdict(run.config), run.accelerator.num_processes)}",
        "minutes": f"{progress.seconds / 60:.1f}",
        "U-Net calls of training (forward 1, backward 2)": progress.unet_calls,
        "seed": run.config.seed,
        "losses at the end": losses_in_words(progress.losses),
    }
    write_card(run.folder, title, [table(["", ""], told.items()), usage, "All settings are in `training.json`."])


def progress_of(run: TrainingRun) -> dict[str, Any]:
    """How far a run came, in which precision and on what machine."""
    return {**run.facts(), "machine": describe_machine()}


def training_section(run: TrainingRun, command: str) -> str:
    """Markdown: the command and what became of the run."""
    progress, config = run.progress, run.config
    batch = batch_in_words(asdict(config), run.accelerator.num_processes)
    return (
        f"## Training\n\n    {command}\n\n{progress.step} steps of {batch}, {progress.seconds / 60:.0f} minutes, "
        f"learning rate {config.lr:g} ({config.lr_schedule}), seed {config.seed}, {run.precision}, "
        f"on: {describe_machine()}. At the end: {losses_in_words(progress.losses)}.\n"
    )


def batch_in_words(run: Mapping[str, Any], processes: int) -> str:
    """Pictures of a step by the settings ``run``: processes x pictures at a time, x batches of each where several."""
    accumulate = run.get("accumulate", 1)
    return f"batch {processes} x {run['batch_size']}" + (f" x {accumulate}" if accumulate > 1 else "")


def losses_in_words(losses: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in losses.items())


def size_in_words(parameters: Iterable[Tensor], file: Path) -> str:
    """Millions of parameters, and the megabytes of their file."""
    count = sum(parameter.numel() for parameter in parameters)
    return f"{count / 1e6:.2f} M parameters, {file.stat().st_size / 1e6:.2f} MB"
