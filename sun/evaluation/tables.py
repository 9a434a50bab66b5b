"""The figures of a report as Markdown."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

from ..common.markdown import number_table
from ..common.settings import ConfigError
from .agreement import PART_WORDS, PARTS, SET_WORDS
from .equal_time import TIMED_APART
from .names import parse_method

# figure -> (head, format, what is better)
COLUMNS = {
    "unet_calls": ("U-Net calls", "g", ""),
    "seconds": ("s / picture", ".3f", ""),
    "pipeline_seconds": ("pipeline s", ".3f", ""),
    "speedup": ("U-Net speed-up", ".2f", ""),
    "set_distance": ("set distance", ".3f", "least"),
    "kid": ("KID", ".5f", ""),
    "paired_mse": ("paired MSE", ".4f", "least"),
    "median_mse": ("median", ".5f", "least"),
    "paired_psnr": ("PSNR, dB", ".2f", "most"),
    "paired_ssim": ("SSIM", ".3f", "most"),
    "feature_distance": ("feature distance", ".4f", "least"),
    "agreement": ("right", ".3f", "most"),
    "positive_agreement": ("with prompt", ".3f", ""),
    "negative_agreement": ("with negative", ".3f", ""),
}
EQUAL_TIME = {
    "unet_calls": ("U-Net calls", ".1f"),
    "seconds": ("s / picture", ".3f"),
    "speedup": ("speed-up", ".2f"),
    "psnr": ("PSNR, dB", ".2f"),
    "mse": ("mean MSE", ".5f"),
    "median_mse": ("median", ".6f"),
    "feature_distance": ("feature distance", ".5f"),
    "agreement": ("right", ".3f"),
    "psnr_gain": ("dB", "+.1f"),
    "mse_ratio": ("MSE", ".2f"),
    "median_ratio": ("median", ".2f"),
    "feature_ratio": ("features", ".2f"),
    "calls_psnr_gain": ("at as many calls: dB", "+.1f"),
    "calls_mse_ratio": ("MSE", ".2f"),
    "calls_median_ratio": ("median", ".2f"),
    "calls_feature_ratio": ("features", ".2f"),
}
GUIDANCE_PARTS = ("cosine", "relative_size", "explained")
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
    said = [
        f"Reference: {figures['reference']} with classifier-free guidance, the same prompts, negatives and noise for "
        f"every method. Seed {settings['seed']}."
    ]
    if any("set_distance" in row for model in models for row in model["methods"].values()):
        pictures = ", ".join(map(str, sorted({m["pictures"] for m in models})))
        sets = ", ".join(sorted({m["set_features"] for m in models}))
        said.append(
            f"{pictures} pictures a method; set distance is FID on {sets} features, KID on the same. "
            "Floor: the reference again with other noise."
        )
    return " ".join((*said, "Best of the same number of steps in bold; 95 % intervals in brackets."))


def _overview(models: dict[str, Any], key: str) -> str:
    """Kinds of methods down, models and steps across: the layout of the paper's Table 2."""
    by_model = {name: {parse_method(m): row for m, row in model["methods"].items()} for name, model in models.items()}
    columns = [(name, steps) for name, calls in by_model.items() for steps in sorted({call.steps for call in calls})]
    families = dict.fromkeys(call.family for calls in by_model.values() for call in calls)
    found = {
        (name, call.family, call.steps): row[key]
        for name, calls in by_model.items()
        for call, row in calls.items()
        if key in row
    }
    best: dict[tuple[str, int], float] = {}
    for name, steps in columns:
        if sum(call.steps == steps for call in by_model[name]) > 1:
            values = [value for (n, _, s), value in found.items() if (n, s) == (name, steps)]
            best |= {(name, steps): min(values)} if values else {}
    form = COLUMNS[key][1]
    rows = []
    for family in families:
        cells = []
        for column in columns:
            value = found.get((column[0], family, column[1]))
            cells.append(_cell(value, form, value is not None and value == best.get(column)))
        rows.append([family, *cells])
    rows.append(["floor", *(_cell(models[name].get("floor", {}).get(key), form) for name, _ in columns)])
    return number_table(["method", *(f"{name}, {steps} steps" for name, steps in columns)], rows)


def _beside_sun(models: dict[str, Any]) -> str:
    """Ratios of every method that shares its number of steps with SUN, a row a model and method."""
    rows = []
    for name, model in models.items():
        methods = model["methods"]
        for method, row in methods.items():
            call = parse_method(method)
            ours = methods.get(f"sun-{call.steps}", {})
            if call.family == "sun" or not ours.get("set_distance") or "set_distance" not in row:
                continue
            ratios = [row[key] / ours[key] for key in ("set_distance", "paired_mse")]
            rows.append(
                [name, method, f"{row['unet_calls']:g} : {ours['unet_calls']:g}", *(f"{r:.2f}" for r in ratios)]
            )
    head = ["model", "method", "calls, theirs : SUN's", "set distance", "paired MSE"]
    return number_table(head, rows) if rows else ""


def _model(name: str, model: dict[str, Any]) -> str:
    reference = model["reference"]
    rows = {reference["method"]: reference, **model["methods"]}
    if "floor" in model:
        rows["floor"] = model["floor"]
    columns = {key: c for key, c in COLUMNS.items() if key != "kid" or model["pictures"] >= KID_PICTURES}
    parts = [f"## {name}", f"Guidance scale w = {model['guidance_scale']:g}."]
    if any(key in row for row in rows.values() for key in columns):
        parts.append(_figures(rows, columns))
    parts += agreement_tables(model)
    parts += equal_time_tables(model)
    for group, found in model.get("negative_prompt", {}).get("groups", {}).items():
        parts.append(
            f"Negative prompts, {group}: with and without, {model['negative_prompt']['pairs']} pairs. Cosine of the "
            "change of latents and the reference's; change of agreement with prompt and negative.\n\n"
            + _figures(found, NEGATIVE_COLUMNS)
        )
    if ceiling := model.get("negative_prompt", {}).get("ceiling"):
        parts.append("The reference against itself (ceiling):\n\n" + _figures(ceiling, NEGATIVE_COLUMNS))
    if found := model.get("guidance", {}).get("methods"):
        parts.append(guidance_table(model["guidance"]["timesteps"], found))
    for name, found in model.get("edits", {}).items():
        parts.append(
            f"Editing, {name}: distance to the reference's edit of the same picture.\n\n" + _figures(found, COLUMNS)
        )
    if "unet_call" in model:
        calls = [[n, f"{r['seconds']:.4f}", f"{r['ratio']:.3f}"] for n, r in model["unet_call"].items()]
        machine = ", ".join(f"{k} {v}" for k, v in model["machine"].items())
        parts.append(f"One step ({machine}):\n\n" + number_table(["method", "s / picture", "of a plain call"], calls))
    return "\n\n".join(parts)


def guidance_table(timesteps: list[int], methods: dict[str, dict[str, list[Any]]]) -> str:
    """Markdown of what ``guidance`` measured of one model."""
    text = (
        "What a method adds to the prediction of the prompt beside what guidance adds, at the same states: cosine, "
        "size in parts of guidance's, and the share of guidance's change (squared) that it makes."
    )
    body = [
        [
            name,
            *(" / ".join(f"{v:.2f}" for v in found) for found in zip(*(row[p] for p in GUIDANCE_PARTS), strict=True)),
        ]
        for name, row in methods.items()
    ]
    return f"{text}\n\n" + number_table(["method", *(f"t = {t}" for t in timesteps)], body)


def equal_time_tables(model: dict[str, Any]) -> list[str]:
    """Markdown of what ``equal_time`` measured of one model: a table a full run, its rivals by speed."""
    found = model.get("equal_time")
    if not found:
        return []
    clock = "processor time" if found["processor"] else "time"
    parts = [
        f"Equal time, {found['pictures']} pictures a row. Distances are to the full run that heads a table; speed-ups "
        f"are medians over blocks of pictures of the full run's {clock} over the row's, one block after the other. "
        "Then come comparisons with plain fewer steps of the same sampler, interpolated to the same speed-up, and last "
        "to as many calls, which no clock disturbs: PSNR gained in dB, and ratios of mean MSE, median MSE and feature "
        "distance, below 1 where the row is nearer. Empty: no fewer steps were measured on both sides."
    ]
    if not found.get("timed_together", True):
        parts.append(TIMED_APART)
    for name, group in found["groups"].items():
        rows = dict(sorted(group["rows"].items(), key=lambda item: item[1]["speedup"]))
        shown = {key: c for key, c in EQUAL_TIME.items() if any(key in row for row in rows.values())}
        body = [
            [method, *(_cell(row.get(key), form, False) for key, (_, form) in shown.items())]
            for method, row in rows.items()
        ]
        parts.append(f"### Against {name}\n\n" + number_table(["method", *(head for head, _ in shown.values())], body))
    return parts


def agreement_tables(model: dict[str, Any], methods: bool = True) -> list[str]:
    """Markdown of what ``agreement`` measured of one model: the methods, and the reference at every guidance scale.
    Without ``methods`` they are left out where there are scales."""
    rows = {model["reference"]["method"]: model["reference"], **model["methods"]}
    scales = model.get("agreement_by_guidance", {}).get("rows", {})
    rows = {name: row for name, row in rows.items() if "agreement" in row and (methods or not scales)}
    if not rows and not scales:
        return []
    some = next(iter({**rows, **scales}.values()))
    unseen = [PART_WORDS[part] for part in PARTS if some["agreement_parts"][part] is None]
    text = (
        f"Agreement: share of {model['agreement_pictures']} pictures, half of them with negatives, that show what was "
        "asked for" + (f". Not judged, for want of an image-text model: {', '.join(unseen)}" if unseen else "")
    )
    tables = [f"{text}. w = {model['guidance_scale']:g}.\n\n{_agreement('method', rows)}"] if rows else []
    if scales:
        best = model["agreement_by_guidance"]["best"]
        tables.append(
            f"{'The same of the' if rows else text + '. The'} reference by guidance scale; most are right at "
            f"w = {best:g}.\n\n{_agreement('w', scales)}"
        )
    return tables


def _agreement(head: str, rows: dict[str, dict[str, Any]]) -> str:
    body = []
    for name, row in rows.items():
        whole = _cell(row["agreement"], ".3f", False, row.get("agreement_interval"))
        shares = [*row["agreement_sets"].values(), *(row["agreement_parts"][part] for part in PARTS)]
        body.append([name, whole, *(_cell(share, ".3f") for share in shares)])
    sets = [SET_WORDS[kind] for kind in next(iter(rows.values()))["agreement_sets"]]
    return number_table([head, "right in all", *sets, *(PART_WORDS[part] for part in PARTS)], body)


def _figures(rows: dict[str, dict[str, Any]], columns: dict[str, tuple[str, str, str]]) -> str:
    shown = [key for key in columns if any(key in row for row in rows.values())]
    best = {(key, steps): value for key in shown for steps, value in _best(rows, key, columns[key][2])}
    body = []
    for name, row in rows.items():
        cells = []
        for key in shown:
            value = row.get(key)
            leads = value is not None and value == best.get((key, _steps(name)))
            cells.append(_cell(value, columns[key][1], leads, _interval(row, key)))
        body.append([name, *cells])
    return number_table(["method", *(columns[key][0] for key in shown)], body)


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


@cache
def _steps(name: str) -> int:
    """The steps of the method that a row is of; 0 for rows of something else."""
    try:
        return parse_method(name).steps
    except ConfigError:
        return 0


def _interval(row: dict[str, Any], key: str) -> tuple[float, float] | None:
    if key in ("seconds", "speedup"):
        return None  # the range of rounds; the table would be hard to read
    return row.get("interval" if key == "cosine" else f"{key}_interval")


def _cell(value: float | None, form: str, best: bool = False, interval: tuple[float, float] | None = None) -> str:
    if value is None:
        return ""
    text = f"**{value:{form}}**" if best else f"{value:{form}}"
    return f"{text} ({interval[0]:{form}}–{interval[1]:{form}})" if interval else text
