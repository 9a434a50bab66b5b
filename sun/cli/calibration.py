"""``sun calibrate``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from ..pictures.recipe import Recipe
from ..shipped import SHIPPED, guidance_of
from .app import app
from .options import (
    MAX_SEED,
    Adapter,
    ConfigDir,
    Device,
    Dtype,
    Json,
    Lora,
    Model,
    Precision,
    Size,
    check_folder,
    read_prompt,
    recipe_of,
)
from .show import out, spinner, write_json


class Sampler(StrEnum):
    """Samplers of sun.pipelines.schedulers that LTC-Accel works with."""

    dpmpp_2m = "dpmpp_2m"
    ddim = "ddim"
    euler = "euler"


@app.command(
    epilog="""Examples:

sun calibrate --steps 30 --out tables

sun calibrate "a castle" "two cats" --negative blurry --model sd15-folder --steps 25 --guidance 7.5 --out tables

sun calibrate --adapter emoji --scheduler ddim --steps 8 --last 0 --out tables"""
)
def calibrate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts to measure on; the shipped model has its own.")
    ] = None,
    negative: Annotated[str, typer.Option(help="Negative prompt of them all.")] = "",
    target: Annotated[Path, typer.Option("--out", help="Folder for the table.")] = Path("ltc-tables"),
    steps: Annotated[int, typer.Option(help="Steps of the runs to accelerate.", min=4, max=1000)] = 25,
    scheduler: Annotated[Sampler, typer.Option(help="Sampler of the runs to accelerate.")] = Sampler.dpmpp_2m,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="Guidance scale of these runs, if they state one. (7.5; Emoji Diffusion 1.5; SUN's own)", min=0.0
        ),
    ] = None,
    tau: Annotated[
        float, typer.Option(help="Skip where transitions turn by less than this (radians); 0: by position.", min=0.0)
    ] = 0.1,
    every: Annotated[int, typer.Option(help="Skip one step of this many there.", min=2)] = 2,
    last: Annotated[int, typer.Option(help="Steps at the end that are never skipped.", min=0)] = 2,
    terms: Annotated[int, typer.Option(help="Transitions a skip is made of.", min=1, max=2)] = 1,
    bias: Annotated[bool, typer.Option("--bias", help="Also look for one factor on all coefficients.")] = False,
    batch: Annotated[int, typer.Option(help="Pictures at a time.", min=1)] = 4,
    seed: Annotated[int, typer.Option(help="Seed of the first picture.", min=0, max=MAX_SEED)] = 0,
    size: Size = "",
    model: Model = SHIPPED,
    config: ConfigDir = "",
    adapter: Adapter = "none",
    lora: Lora = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    figures: Json = None,
) -> None:
    """Measure a table for LTC-Accel: which steps of a sampler may be skipped, and with which coefficients."""
    check_folder(target)
    recipe = recipe_of(
        size, lora, dtype, seed=seed, steps=steps, model=model, config=config, adapter=adapter, device=device
    )
    if guidance is None and adapter == "none":
        guidance = guidance_of(model)
    pairs = [(read_prompt(prompt), negative) for prompt in prompts or ()]
    if not pairs and model != SHIPPED:
        raise typer.BadParameter('give prompts this model knows, as in: sun calibrate "a castle" "two cats"')
    with spinner("loading") as status:
        from .. import ltc

        pairs = pairs or _pairs_of_shipped()
        pipe, recipe = _pipeline(recipe, scheduler)
        _tell_cut(pipe, [negative, *(prompt for prompt, _ in pairs)])
        settings = ltc.LtcSettings(tau=tau, every=every, last=last, terms=terms)
        ltc.attach(pipe, settings=settings, folder=target)
        table = ltc.calibrate(
            pipe,
            [p for p, _ in pairs],
            [n for _, n in pairs],
            batch=batch,
            seed=seed,
            find_bias=bias,
            progress=status,
            num_inference_steps=steps,
            width=recipe.width,
            height=recipe.height,
            **({} if guidance is None else {"guidance_scale": guidance}),
        )
    _tell(table, target / table.key.file_name(settings), steps, figures)


def _pairs_of_shipped() -> list[tuple[str, str]]:
    from ..evaluation.config import EvaluateConfig
    from ..evaluation.prompts import calibration_pairs

    return calibration_pairs(EvaluateConfig())


def _pipeline(recipe: Recipe, scheduler: Sampler) -> tuple[Any, Recipe]:
    """The pipeline of the runs to accelerate, and the recipe with what the model makes of its defaults."""
    from ..pictures import draw
    from ..pipelines.attach import attach
    from ..pipelines.loading import require_text_to_image
    from ..pipelines.schedulers import make_scheduler

    loaded = draw.load(recipe)
    recipe = draw.complete(recipe, loaded)
    pipe = loaded.pipe
    require_text_to_image(pipe, recipe.model)
    if loaded.adapter is not None:
        attach(pipe, loaded.adapter)
    pipe.scheduler = make_scheduler(scheduler.value, pipe.scheduler.config)
    return pipe, recipe


def _tell_cut(pipe: Any, texts: list[str]) -> None:
    from ..common.notes import note
    from ..pipelines.text import cut_by_encoder

    for text in texts:
        if cut := cut_by_encoder(pipe.tokenizer, text):
            note(f"calibrating reads 75 tokens of a text; this end of one is left out: {cut!r}")


def _tell(table: Any, path: Path, steps: int, figures: Path | None) -> None:
    skipped = ", ".join(
        f"{i} (c {', '.join(f'{c:.3f}' for c in factors)})" for i, factors in table.coefficients.items()
    )
    out.print(f"{table.calls} of {steps} steps call the model; skipped are {skipped}", soft_wrap=True)
    out.print(f"table: {path}", soft_wrap=True)
    write_json(figures, {"table": str(path), "calls": table.calls, **table.to_json()})
