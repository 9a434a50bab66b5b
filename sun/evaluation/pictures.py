"""The pictures of a report: plots of distance against cost, and grids."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ..common.atomic import write_atomically
from ..common.settings import ConfigError
from ..pictures.png import grid, save_png, to_images
from .cells import Tensors
from .edits import Edits
from .methods import REFERENCE, parse_method
from .model import ModelEvaluation

PANELS = {"set_distance": "set distance to the reference", "paired_mse": "paired latent MSE"}
COSTS = {"unet_calls": "U-Net calls a picture", "seconds": "seconds a picture (U-Net loop)"}
MARKERS = "osD^vP*"
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
    evaluation: ModelEvaluation, run_of: Callable[[str], Tensors], path: Path, count: int,
    methods: Sequence[str], starts: Tensor | None = None,
) -> None:  # fmt: skip
    rows: list[list[Image.Image]] = []
    labels = []
    if starts is not None:
        rows.append(to_images(evaluation.pixels(starts[:count])))
        labels.append("begins at")
    for method in dict.fromkeys((REFERENCE, *methods)):
        run = run_of(method)
        rows.append(to_images(evaluation.pixels(run["latents"][:count])))
        call = parse_method(method)
        inside = method[len(call.method.name) : -len(f"-{call.steps}")]
        kind = "reference: " if method == REFERENCE else ""
        calls = f"{float(run['unet_calls'].mean()):g} U-Net calls"
        labels.append(f"{kind}{call.method.title}{inside}, {call.steps} steps, {calls}")
    pairs = list(zip(evaluation.prompts.positives, evaluation.prompts.negatives, strict=True))[: len(rows[0])]
    captions = [f"{positive} (without: {negative})" if negative else positive for positive, negative in pairs]
    sheet = grid(
        [image for row in rows for image in row], len(captions), labels, captions,
        scale=max(1, round(CELL / rows[0][0].width)), gap=8,
    )  # fmt: skip
    save_png(sheet, path)


def save_plots(name: str, model: dict[str, Any], folder: Path) -> list[Path]:
    """``distance-vs-calls.png`` and ``distance-vs-seconds.png`` of one model; a line joins a method's steps."""
    panels = {k: v for k, v in PANELS.items() if any(k in row for row in model["methods"].values())}
    if not panels:
        return []
    figure_class, canvas_class = import_matplotlib()
    from matplotlib import ticker

    formatter = "{x:g}"
    paths = []
    for cost, label in COSTS.items():
        figure = figure_class(figsize=(6.4 * len(panels), 4.8), layout="constrained")
        canvas_class(figure)
        for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _panel(axes, model, cost, key)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=title, title=name)
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(formatter)
            if cost == "unet_calls":
                axes.set_xticks(sorted({row[cost] for row in model["methods"].values() if key in row}))
                axes.xaxis.set_minor_locator(ticker.NullLocator())
            else:
                axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
                axes.xaxis.set_minor_formatter(formatter)
            axes.yaxis.set_minor_formatter("")
            axes.tick_params(axis="x", which="minor", labelsize=7)
            axes.grid(True, which="both", alpha=0.25)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120, format="png")
        path = folder / f"distance-vs-{'calls' if cost == 'unet_calls' else 'seconds'}.png"
        paths.append(_write(path, buffer.getvalue()))
    return paths


def _write(path: Path, data: bytes) -> Path:
    return write_atomically(path, lambda handle: handle.write(data))


def _panel(axes: Any, model: dict[str, Any], cost: str, key: str) -> None:
    # SUN is black; the others have the same colour in every plot of the model
    families = sorted({parse_method(m).family for m in model["methods"]} - {"sun"})
    lines: dict[str, list[tuple[float, float, Any]]] = {}
    for method, row in model["methods"].items():
        call = parse_method(method)
        if cost == "unet_calls" and call.method.inside:
            continue  # what they save is inside of a call
        if row.get(key, 0) > 0:
            lines.setdefault(call.family, []).append((row[cost], row[key], row.get(f"{key}_interval")))
    for family, points in lines.items():
        number = families.index(family) if family in families else -1
        color, marker = _color(number) if number >= 0 else "black", MARKERS[number % len(MARKERS)]
        points.sort(key=lambda point: point[0])
        ours = family.startswith("sun")
        x, y = [p[0] for p in points], [p[1] for p in points]
        below = [max(0.0, p[1] - p[2][0]) if p[2] else 0.0 for p in points]
        above = [max(0.0, p[2][1] - p[1]) if p[2] else 0.0 for p in points]
        axes.errorbar(x, y, yerr=[below, above], marker=marker, color=color, capsize=2, label=family,
                      ecolor=(0.5, 0.5, 0.5, 0.45), elinewidth=0.6, linewidth=2.5 if ours else 1.2,
                      zorder=3 if ours else 2)  # fmt: skip
    every = [(x, y) for points in lines.values() for x, y, _ in points]
    if len(every) > 2:
        front = best_front(every)
        axes.plot(*zip(*front, strict=True), color="black", linestyle=":", linewidth=1, zorder=1, label="best front")
    if model.get("floor", {}).get(key, 0) > 0:
        axes.axhline(model["floor"][key], linestyle="--", color="gray", linewidth=1, label="reference, other noise")


def _color(number: int) -> Any:
    """Twenty colours, the strong ones first."""
    from matplotlib import colormaps

    return colormaps["tab20"]((2 * number + number // 10) % 20)


def best_front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, distance) points to which no other is both cheaper and nearer, by cost."""
    front: list[tuple[float, float]] = []
    for cost, distance in sorted(points):
        if not front or distance < front[-1][1]:
            front.append((cost, distance))
    return front


def import_matplotlib() -> tuple[Any, Any]:
    """Figure and a canvas that needs no display. Raises ConfigError with what to install."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ConfigError(
            'the plots of a report need matplotlib: pip install -e ".[eval]" in a clone of the repository.'
        ) from error
    return Figure, FigureCanvasAgg
