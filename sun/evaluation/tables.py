"""The figures of a report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .methods import parse_method

# figure -> (head, format, what is better)
COLUMNS = {
    "unet_calls": ("U-Net calls", "g", ""),
    "seconds": ("s / picture", ".3f", ""),
    "pipeline_seconds": ("pipeline s", ".3f", ""),
    "speedup": ("U-Net speed-up", ".2f", ""),
    "set_distance": ("set distance", ".3f", "least"),
    "kid": ("KID", ".5f", ""),
    "paired_mse": ("paired MSE", ".4f", "least"),
    "paired_mse_median": ("median", ".5f", "least"),
    "paired_psnr": ("PSNR, dB", ".2f", "most"),
    "paired_ssim": ("SSIM", ".3f", "most"),
    "feature_distance": ("feature distance", ".4f", "least"),
    "positive_agreement": ("with prompt", ".3f", ""),
    "negative_agreement": ("with negative", ".3f", ""),
}
KID_PICTURES = 256  # of fewer the KID is noise: it is in figures.json alone
NEGATIVE_COLUMNS = {
    "cosine": ("cosine", ".3f", "most"),
    "cosine_with_other_pairs_change": ("another pair's", ".3f", ""),
    "relative_size": ("relative size", ".2f", ""),
    "positive_agreement_change": ("with prompt", "+.3f", ""),
    "negative_agreement_change": ("with negative", "+.3f", ""),
}


def markdown(figures: dict[str, Any]) -> str:
    """``tables.md``: an overview of distances over models and steps, then each model in full."""
    models = figures["models"]
    parts = ["# Evaluation", _preface(figures)]
    for key in ("set_distance", "paired_mse"):
        if any(key in row for model in models.values() for row in model["methods"].values()):
            head = COLUMNS[key][0]
            parts.append(f"## {head[0].upper()}{head[1:]} to the reference\n\n{_overview(models, key)}")
    if beside := _beside_sun(models):
        parts.append(
            "## Beside SUN\n\nDistance of a method over SUN's with the same number of steps, set and paired: above 1 "
            f"SUN is nearer to the reference.\n\n{beside}"
        )
    parts += [_model(name, model) for name, model in models.items()]
    return "\n\n".join(parts) + "\n"


def _preface(figures: dict[str, Any]) -> str:
    settings, models = figures["settings"], figures["models"].values()
    pictures = sorted({m["pictures"] for m in models})
    sets = sorted({m["set_features"] for m in models})
    return (
        f"Reference: {figures['reference']} with classifier-free guidance, the same prompts, negatives and noise for "
        f"every method. {', '.join(map(str, pictures))} pictures a method, seed {settings['seed']}; set distance is "
        f"FID on {', '.join(sets)} features, KID on the same. Floor: the reference again with other noise. "
        "Best of the same number of steps in bold; 95 % intervals in brackets."
    )


def _overview(models: dict[str, Any], key: str) -> str:
    """Kinds of methods down, models and steps across: the layout of the paper's Table 2."""
    columns = [
        (name, steps)
        for name, model in models.items()
        for steps in sorted({parse_method(m).steps for m in model["methods"]})
    ]
    families = dict.fromkeys(parse_method(m).family for model in models.values() for m in model["methods"])
    best = {
        (name, steps): min(
            (
                row.get(key)
                for m, row in models[name]["methods"].items()
                if parse_method(m).steps == steps and key in row
            ),
            default=None,
        )
        for name, steps in columns
        if sum(parse_method(m).steps == steps for m in models[name]["methods"]) > 1
    }
    rows = []
    for family in families:
        cells = [models[name]["methods"].get(f"{family}-{steps}", {}).get(key) for name, steps in columns]
        rows.append(
            [
                family,
                *(_cell(v, COLUMNS[key][1], v == best.get(c, object())) for v, c in zip(cells, columns, strict=True)),
            ]
        )
    floors = [models[name].get("floor", {}).get(key) for name, _ in columns]
    rows.append(["floor", *(_cell(v, COLUMNS[key][1]) for v in floors)])
    return table(["method", *(f"{name}, {steps} steps" for name, steps in columns)], rows)


def _beside_sun(models: dict[str, Any]) -> str:
    """Ratios of every method that shares its number of steps with SUN, a row a model and method."""
    rows = []
    for name, model in models.items():
        methods = model["methods"]
        for method, row in methods.items():
            ours = methods.get(f"sun-{_steps(method)}", {})
            if method.startswith("sun-") or not ours.get("set_distance") or "set_distance" not in row:
                continue
            ratios = [row[key] / ours[key] for key in ("set_distance", "paired_mse")]
            rows.append(
                [name, method, f"{row['unet_calls']:g} : {ours['unet_calls']:g}", *(f"{r:.2f}" for r in ratios)]
            )
    return table(["model", "method", "calls, theirs : SUN's", "set distance", "paired MSE"], rows) if rows else ""


def _model(name: str, model: dict[str, Any]) -> str:
    reference = model["reference"]
    rows = {reference["method"]: reference, **model["methods"]}
    if "floor" in model:
        rows["floor"] = model["floor"]
    columns = {key: c for key, c in COLUMNS.items() if key != "kid" or model["pictures"] >= KID_PICTURES}
    parts = [f"## {name}", f"Guidance scale w = {model['guidance_scale']:g}.", _figures(rows, columns)]
    for group, found in model.get("negative_prompt", {}).get("groups", {}).items():
        parts.append(
            f"Negative prompts, {group}: with and without, {model['negative_prompt']['pairs']} pairs. Cosine of the "
            "change of latents and the reference's; change of agreement with prompt and negative.\n\n"
            + _figures(found, NEGATIVE_COLUMNS)
        )
    if ceiling := model.get("negative_prompt", {}).get("ceiling"):
        parts.append("The reference against itself (ceiling):\n\n" + _figures(ceiling, NEGATIVE_COLUMNS))
    for name, found in model.get("edits", {}).items():
        parts.append(
            f"Editing, {name}: distance to the reference's edit of the same picture.\n\n" + _figures(found, COLUMNS)
        )
    if "unet_call" in model:
        calls = [[n, f"{r['seconds']:.4f}", f"{r['ratio']:.3f}"] for n, r in model["unet_call"].items()]
        machine = ", ".join(f"{k} {v}" for k, v in model["machine"].items())
        parts.append(f"One step ({machine}):\n\n" + table(["method", "s / picture", "of a plain call"], calls))
    return "\n\n".join(parts)


def _figures(rows: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str, str]]) -> str:
    shown = [key for key in columns if any(key in row for row in rows.values())]
    best = {(key, steps): value for key in shown for steps, value in _best(rows, key, columns[key][2])}
    body = []
    for name, row in rows.items():
        steps = _steps(name)
        body.append(
            [name, *(_cell(row.get(k), columns[k][1], row.get(k) == best.get((k, steps), object()), _interval(row, k))
                     for k in shown)]
        )  # fmt: skip
    return table(["method", *(columns[key][0] for key in shown)], body)


def _best(rows: dict[str, dict[str, Any]], key: str, better: str) -> Iterable[tuple[int, float]]:
    """(steps, best value) for the numbers of steps that several methods share."""
    if not better:
        return
    by_steps: dict[int, list[float]] = {}
    for name, row in rows.items():
        if key in row and (steps := _steps(name)):
            by_steps.setdefault(steps, []).append(row[key])
    for steps, values in by_steps.items():
        if len(values) > 1:
            yield steps, (min if better == "least" else max)(values)


def _steps(name: str) -> int:
    tail = name.rpartition("-")[2]
    return int(tail) if tail.isdigit() else 0


def _interval(row: dict[str, Any], key: str) -> tuple[float, float] | None:
    if key in ("seconds", "speedup"):
        return None  # the range of rounds; the table would be hard to read
    return row.get("interval" if key == "cosine" else f"{key}_interval")


def _cell(value: float | None, form: str, best: bool = False, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return ""
    text = f"**{value:{form}}**" if best else f"{value:{form}}"
    return f"{text} ({interval[0]:{form}}–{interval[1]:{form}})" if interval else text


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
