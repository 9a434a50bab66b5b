"""The plots of a report: distance against cost, agreement against the guidance scale."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from ..common.atomic import write_atomically
from ..common.settings import ConfigError
from .agreement import PART_WORDS, PARTS
from .names import MethodCall, parse_method

PANELS = {"set_distance": "set distance to the reference", "paired_mse": "paired latent MSE"}
COSTS = {"unet_calls": "U-Net calls a picture", "seconds": "seconds a picture (U-Net loop)"}
EQUAL_TIME_PANELS = {
    "psnr": "PSNR, dB",
    "mse": "mean latent MSE",
    "median_mse": "median latent MSE",
    "feature_distance": "feature distance",
}
MARKERS = "osD^vP*"
Points = list[tuple[float, float, tuple[float, float] | None]]


def save_plots(name: str, model: dict[str, Any], folder: Path) -> list[Path]:
    """The plots that a model's figures have something for; returns their paths."""
    return [
        *save_distances(name, model, folder),
        *save_agreement(name, model, folder),
        *save_equal_time(name, model, folder),
    ]


def save_distances(name: str, model: dict[str, Any], folder: Path) -> list[Path]:
    """``distance-vs-calls.png`` and ``distance-vs-seconds.png`` of one model; a line joins a method's steps."""
    panels = {k: v for k, v in PANELS.items() if any(k in row for row in model["methods"].values())}
    if not panels:
        return []
    figure_class, canvas_class = import_matplotlib()
    paths = []
    for cost, label in COSTS.items():
        figure = figure_class(figsize=(6.4 * len(panels), 4.8), layout="constrained")
        canvas_class(figure)
        for axes, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _panel(axes, model, cost, key)
            axes.set(xscale="log", yscale="log", xlabel=label, ylabel=title, title=name)
            _ticks(axes, sorted({row[cost] for row in model["methods"].values() if key in row}), cost == "unet_calls")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8)
        paths.append(_save(figure, folder / f"distance-vs-{'calls' if cost == 'unet_calls' else 'seconds'}.png"))
    return paths


def save_agreement(name: str, model: dict[str, Any], folder: Path) -> list[Path]:
    """``agreement-vs-guidance.png``: the share of right pictures against w, whole and by part."""
    rows = model.get("agreement_by_guidance", {}).get("rows", {})
    if len(rows) < 2:
        return []
    figure_class, canvas_class = import_matplotlib()
    figure = figure_class(figsize=(6.4, 4.8), layout="constrained")
    canvas_class(figure)
    axes = figure.subplots()
    scales = [float(scale) for scale in rows]
    whole = [row["agreement"] for row in rows.values()]
    low, high = zip(*(row["agreement_interval"] for row in rows.values()), strict=True)
    axes.fill_between(scales, low, high, color="black", alpha=0.12, linewidth=0)
    axes.plot(scales, whole, marker="o", color="black", linewidth=2.5, label="right in all of it")
    for number, part in enumerate(PARTS):
        shares = [(scale, row["agreement_parts"][part]) for scale, row in zip(scales, rows.values(), strict=True)]
        if all(share is not None for _, share in shares):
            x, y = zip(*shares, strict=True)
            axes.plot(x, y, marker=MARKERS[number], color=_color(number), linewidth=1.2, label=PART_WORDS[part])
    axes.set(xscale="log", xlabel="guidance scale w", ylabel="share of pictures", title=name, ylim=(None, 1.01))
    _ticks(axes, scales, True)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return [_save(figure, folder / "agreement-vs-guidance.png")]


def save_equal_time(name: str, model: dict[str, Any], folder: Path) -> list[Path]:
    """``equal-time-SAMPLER.png``: a row a full run, PSNR and distances against the speed-up, the front dotted."""
    groups = model.get("equal_time", {}).get("groups", {})
    if not groups:
        return []
    figure_class, canvas_class = import_matplotlib()
    families = {_without_scheduler(parse_method(m)) for g in groups.values() for m in g["rows"]}
    colours = {family: number for number, family in enumerate(sorted(families))}
    paths = []
    for sampler in dict.fromkeys(parse_method(reference).family for reference in groups):
        chosen = {n: g["rows"] for n, g in groups.items() if parse_method(n).family == sampler}
        figure = figure_class(figsize=(4.0 * len(EQUAL_TIME_PANELS) + 2.2, 3.6 * len(chosen)), layout="constrained")
        canvas_class(figure)
        grid = figure.subplots(len(chosen), len(EQUAL_TIME_PANELS), squeeze=False)
        for line, (reference, rows) in zip(grid, chosen.items(), strict=True):
            for axes, (key, title) in zip(line, EQUAL_TIME_PANELS.items(), strict=True):
                _equal_time_panel(axes, rows, key, colours, sampler)
                axes.set(xlabel=f"times as fast as {reference}", ylabel=title)
        handles = {label: h for axes in grid.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7)
        paths.append(_save(figure, folder / f"equal-time-{sampler}.png"))
    return paths


def _without_scheduler(call: MethodCall) -> str:
    """A method's family, the same for all samplers."""
    return re.sub(r"\[?,?scheduler=\w+\]?$", lambda m: "" if m[0].startswith("[") else "]", call.family)


def _equal_time_panel(axes: Any, rows: dict[str, Any], key: str, colours: dict[str, int], sampler: str) -> None:
    """One figure of every row of a group against its speed-up; fewer steps are a black line."""
    points = {parse_method(n): (row["speedup"], row[key]) for n, row in rows.items() if key in row}
    plain = sorted(point for call, point in points.items() if call.family == sampler)
    if plain:
        axes.plot(*zip(*plain, strict=True), color="black", marker=".", linewidth=1, label=f"{sampler}, fewer steps")
    for call, (x, y) in points.items():
        if call.family != sampler:
            family = _without_scheduler(call)
            number = colours[family]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot([x], [y], marker=marker, color=_color(number), linestyle="", label=family)
    if key != "psnr":
        axes.set_yscale("log")
    sign = -1 if key == "psnr" else 1
    front = best_front([(-x, sign * y) for x, y in points.values()])
    axes.plot([-x for x, _ in front], [sign * y for _, y in front], "k:", linewidth=1, zorder=1, label="best front")
    axes.grid(True, which="both", alpha=0.25)


def _ticks(axes: Any, values: list[float], exactly: bool) -> None:
    """Plain numbers on both axes; below, exactly ``values`` or what a logarithmic axis has."""
    from matplotlib import ticker

    plain = "{x:g}"
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(plain)
    if exactly:
        axes.set_xticks(values)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.xaxis.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
        axes.xaxis.set_minor_formatter(plain)
    axes.yaxis.set_minor_formatter("")
    axes.tick_params(axis="x", which="minor", labelsize=7)
    axes.grid(True, which="both", alpha=0.25)


def _save(figure: Any, path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=120, format="png")
    return write_atomically(path, lambda handle: handle.write(buffer.getvalue()))


def _panel(axes: Any, model: dict[str, Any], cost: str, key: str) -> None:
    calls = {parse_method(name): row for name, row in model["methods"].items()}
    # SUN is black; the others have the same colour in every plot of the model
    families = sorted({call.family for call in calls} - {"sun"})
    lines: dict[str, Points] = {}
    for call, row in calls.items():
        if cost == "unet_calls" and call.method.inside:
            continue  # what they save is inside of a call
        if row.get(key, 0) > 0:
            lines.setdefault(call.family, []).append((row[cost], row[key], row.get(f"{key}_interval")))
    for family, points in lines.items():
        _line(axes, family, sorted(points), families.index(family) if family in families else -1)
    every = [(x, y) for points in lines.values() for x, y, _ in points]
    if len(every) > 2:
        front = best_front(every)
        axes.plot(*zip(*front, strict=True), color="black", linestyle=":", linewidth=1, zorder=1, label="best front")
    if model.get("floor", {}).get(key, 0) > 0:
        axes.axhline(model["floor"][key], linestyle="--", color="gray", linewidth=1, label="reference, other noise")


def _line(axes: Any, family: str, points: Points, number: int) -> None:
    """One method's steps with their intervals; ``number`` below 0 is black."""
    ours = family.startswith("sun")
    below = [max(0.0, y - interval[0]) if interval else 0.0 for _, y, interval in points]
    above = [max(0.0, interval[1] - y) if interval else 0.0 for _, y, interval in points]
    axes.errorbar(
        [x for x, _, _ in points],
        [y for _, y, _ in points],
        yerr=[below, above],
        label=family,
        capsize=2,
        marker=MARKERS[number % len(MARKERS)],
        color=_color(number) if number >= 0 else "black",
        ecolor=(0.5, 0.5, 0.5, 0.45),
        elinewidth=0.6,
        linewidth=2.5 if ours else 1.2,
        zorder=3 if ours else 2,
    )


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
