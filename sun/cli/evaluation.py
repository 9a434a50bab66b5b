"""``sun evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..common.settings import configured
from .app import app
from .options import MAX_SEED, ConfigFile, Json, Settings
from .show import figures_table, out, write_json


@app.command(
    epilog="""Examples:

sun evaluate --prompts 512 --json figures.json

sun evaluate --config configs/evaluate-sd15.toml

sun evaluate --model sd15-folder --adapter adapter.safetensors --prompts-file pairs.txt --output report
--set methods=sun-4,dpmpp-4 --set features=clip --set clip_model=clip-folder

accelerate launch -m sun evaluate --config evaluate.toml"""
)
def evaluate(
    config: ConfigFile = None,
    prompts: Annotated[int | None, typer.Option(help="Number of prompts.", min=2)] = None,
    prompts_file: Annotated[str | None, typer.Option(help="File with one 'prompt | negative' a line.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder. (emoji: the shipped one)")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter file. (default: the shipped one)")] = None,
    output: Annotated[
        str | None, typer.Option(help="Folder for a report: figures, tables, plots, grids; goes on where it stopped.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures at a time.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the prompts and the noise.", min=0, max=MAX_SEED)] = None,
    settings: Settings = None,
    figures: Json = None,
) -> None:
    """Measure SUN and its rivals against the 25-step reference: U-Net calls, seconds, distances, negative prompts."""
    from .. import evaluation
    from ..evaluation.cells import processes

    given = {
        "prompts": prompts,
        "prompts_file": prompts_file,
        "model": model,
        "adapter": adapter,
        "output": output,
        "batch_size": batch_size,
        "seed": seed,
    }
    wanted = configured(evaluation.EvaluateConfig(), config, given, {}, settings)
    several = bool(wanted.output or wanted.models)
    result = evaluation.report(wanted) if several else evaluation.evaluate(wanted)
    if not processes().is_main_process:
        return
    for name, found in (result["models"] if several else {"": result}).items():
        _show(name, found)
    if several:
        out.print(f"report: {wanted.output}", soft_wrap=True)
    if several and len(result["models"]) == 1:
        result = {**result, **next(iter(result["models"].values()))}
    write_json(figures, result)


def _show(name: str, found: dict[str, Any]) -> None:
    rows = {found["reference"]["method"]: found["reference"], **found["methods"]}
    if "floor" in found:
        rows["floor"] = found["floor"]
    title = "distance to the reference; floor: the reference again with other noise"
    if any(set(row) - {"method"} for row in rows.values()):
        out.print(figures_table(rows, f"{name}: {title}" if name else title))
    for reference, group in found.get("equal_time", {}).get("groups", {}).items():
        out.print(figures_table(group["rows"], f"distance to {reference} at equal time"))
    for method, row in found.get("negative_prompt", {}).items():
        if isinstance(row, dict) and "cosine" in row:
            out.print(
                f"negative prompt alone changed: cosine of {method}'s change and the reference's {row['cosine']:+.3f}"
            )
