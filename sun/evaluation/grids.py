"""The pictures of a report side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from PIL import Image
from torch import Tensor

from ..pictures.png import grid, save_png, to_images
from .cells import Tensors
from .edits import Edits
from .measured import ModelEvaluation
from .names import REFERENCE, MethodCall

CELL = 192  # pixels a picture of a grid has at least, so that its labels can be read


def save_comparison(evaluation: ModelEvaluation, path: Path, count: int) -> None:
    """A grid of the first ``count`` prompts: the reference, then a row a method (``grid_methods``), same noise."""
    _save_rows(evaluation, evaluation.run, path, count, evaluation.methods_among(evaluation.config.grid_methods))


def save_edits(evaluation: ModelEvaluation, folder: Path, count: int) -> None:
    """``EDIT.png`` for every edit: the pictures it begins at, the reference's edit, then a row a method."""
    edits = Edits(evaluation)
    for name in evaluation.config.edits:
        file = folder / f"{name}.png"
        _save_rows(evaluation, partial(edits.run, name), file, count, edits.methods, edits.starts())


def _save_rows(
    evaluation: ModelEvaluation,
    run_of: Callable[[MethodCall], Tensors],
    path: Path,
    count: int,
    methods: Sequence[MethodCall],
    starts: Tensor | None = None,
) -> None:
    rows: list[list[Image.Image]] = []
    labels = []
    if starts is not None:
        rows.append(to_images(evaluation.pixels(starts[:count])))
        labels.append("begins at")
    for call in dict.fromkeys((REFERENCE, *methods)):
        run = run_of(call)
        rows.append(to_images(evaluation.pixels(run["latents"][:count])))
        kind = "reference: " if call == REFERENCE else ""
        labels.append(f"{kind}{call.title}, {float(run['unet_calls'].mean()):.3g} U-Net calls")
    pairs = list(zip(evaluation.prompts.positives, evaluation.prompts.negatives, strict=True))[: len(rows[0])]
    captions = [f"{positive} (without: {negative})" if negative else positive for positive, negative in pairs]
    sheet = grid(
        [image for row in rows for image in row],
        len(captions),
        labels,
        captions,
        scale=max(1, round(CELL / rows[0][0].width)),
        gap=8,
    )
    save_png(sheet, path)
