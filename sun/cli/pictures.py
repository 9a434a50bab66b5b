"""``sun generate``, ``sun compare``, ``sun demo``."""

from __future__ import annotations

import random
from dataclasses import asdict, fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from ..pictures.png import save_png
from ..pictures.recipe import Recipe, check_files, read_recipe
from ..shipped import SHIPPED
from .app import app
from .options import (
    Adapter,
    ConfigDir,
    ControlNet,
    DenoiseMode,
    Device,
    Dtype,
    Inherit,
    Json,
    Lora,
    Ltc,
    Model,
    Negative,
    Precision,
    PromptWeights,
    Scheduler,
    Seed,
    Size,
    Strength,
    SwitchOrder,
    check_folder,
    check_target,
    parse_size,
    read_prompt,
    recipe_of,
)
from .show import err, figures_table, out, progress_bar, spinner, write_json

# The options of `sun generate` alone.
Prompt = Annotated[str, typer.Argument(help="What to draw; - is standard input.", show_default=False)]
Weights = Annotated[
    PromptWeights,
    typer.Option(help="Who reads weights in both prompts: compel (pip install compel), as (red)1.3 or blurry++."),
]
Target = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="PNG to write; a batch becomes NAME-0.png, NAME-1.png, ... (default: sun-SEED.png). "
        "With --prompts a folder. (default: sun-FILE)",
    ),
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        help="Draw a picture for every row of a file: .txt (a prompt a line), .csv or .jsonl with the columns "
        "prompt, negative, seed, size, steps, guidance and others. The same command goes on with a run "
        "that stopped, and given in several processes or on several machines they share the work.",
        metavar="FILE",
    ),
]
Shards = Annotated[
    int,
    typer.Option(help="With --prompts: webdataset tar files of this many rows, not PNGs.", min=0, max=1_000_000),
]
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help="With --prompts: draw again what failed before.")]
Steps = Annotated[int, typer.Option(help="Steps, one U-Net call each; 4 is what SUN is trained for.", min=1, max=1000)]
Batch = Annotated[
    int,
    typer.Option(
        help="Number of pictures. With --prompts how many are drawn together. (default there: 1 on a CPU, else 8)",
        min=1,
    ),
]
Solver = Annotated[Scheduler, typer.Option(help="ddim is what SUN is trained for.")]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale: with --adapter none (7.5; Emoji Diffusion 1.5), or an adapter that takes it (its own).",
        min=0.0,
    ),
]
Init = Annotated[str, typer.Option(help="Picture to start from.", metavar="IMAGE")]
Repaint = Annotated[
    float | None,
    typer.Option(help="How much of --init to repaint, 0 to 1. (default: 0.5; 1 with --mask)", min=0.0, max=1.0),
]
Mask = Annotated[str, typer.Option(help="White where --init is to be repainted.", metavar="IMAGE")]
Denoise = Annotated[
    DenoiseMode, typer.Option(help="trained drops the first steps (fewer calls); respaced keeps the number.")
]
Control = Annotated[str, typer.Option(help="Control picture for --controlnet.", metavar="IMAGE")]
ControlScale = Annotated[float, typer.Option(help="How strongly the ControlNet steers.")]
Switch = Annotated[
    str,
    typer.Option(help="A compact model whose U-Net makes a share of the steps: its diffusers folder.", metavar="PATH"),
]
Share = Annotated[float, typer.Option(help="Of the steps, with --switch.", min=0.0, max=1.0)]
Order = Annotated[SwitchOrder, typer.Option(help="Which U-Net makes the first steps, with --switch.")]
Skipping = Annotated[
    Ltc,
    typer.Option(
        help="Skip steps by LTC-Accel, for 15 steps and more: balanced calls the model in 13 of 20. paper, the "
        "published method, needs --ltc-table."
    ),
]
LtcTable = Annotated[
    str, typer.Option(help="Table of `sun calibrate` for these settings, with --ltc paper.", metavar="FILE")
]
Inheritance = Annotated[
    Inherit, typer.Option(help="Leave out inner parts of the U-Net in some calls (feature inheritance).")
]
Source = Annotated[
    Path | None, typer.Option("--from", help="Take all settings from a PNG made by sun; other options change them.")
]


@app.command(
    epilog="""Examples:

sun generate "large polar bear, yellow background" --seed 7 --out bear.png

sun generate "cat face next to fish" --negative "gray background" --batch 4

sun generate "a castle" --model dreamshaper.safetensors --adapter sun_adapter.safetensors --lora ink.safetensors:0.8

sun generate "snake, purple background" --init bear.png --strength 0.75

sun generate "ghost" --adapter none --steps 25 --scheduler dpmpp_2m --switch compact-folder --share 0.4

sun generate "ghost" --adapter none --steps 20 --scheduler dpmpp_2m --ltc balanced

sun generate --from bear.png --out same-bear.png

sun generate --prompts prompts.csv --out pictures"""
)
def generate(
    ctx: typer.Context,
    prompt: Prompt = "",
    negative: Negative = "",
    prompt_weights: Weights = PromptWeights.none,
    target: Target = None,
    prompts: PromptsFile = None,
    shards: Shards = 0,
    retry_failed: RetryFailed = False,
    steps: Steps = 4,
    seed: Seed = None,
    batch: Batch = 1,
    size: Size = "",
    scheduler: Solver = Scheduler.ddim,
    sun_strength: Strength = 1.0,
    guidance: Guidance = None,
    init: Init = "",
    strength: Repaint = None,
    mask: Mask = "",
    denoise_mode: Denoise = DenoiseMode.trained,
    control: Control = "",
    control_scale: ControlScale = 1.0,
    controlnet: ControlNet = "",
    model: Model = SHIPPED,
    config: ConfigDir = "",
    adapter: Adapter = SHIPPED,
    lora: Lora = None,
    switch: Switch = "",
    share: Share = 0.4,
    switch_order: Order = SwitchOrder.small,
    ltc: Skipping = Ltc.none,
    ltc_table: LtcTable = "",
    inherit: Inheritance = Inherit.none,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    source: Source = None,
    figures: Json = None,
) -> None:
    """Make pictures from a prompt. The PNG carries everything needed to make it again."""
    if prompts is not None:
        _generate_many(ctx, prompts, target, source, figures)
        return
    if shards or retry_failed:
        raise typer.BadParameter("--shards and --retry-failed belong to --prompts FILE", ctx=ctx)
    ctx.params["prompt"] = prompt = read_prompt(prompt)
    recipe, content = _recipe(ctx, source)
    if source is None and not prompt:
        raise typer.BadParameter('give a prompt, as in: sun generate "a red apple"', ctx=ctx)
    target = target or Path(f"sun-{recipe.seed + (recipe.index or 0)}.png")
    for path in numbered(target, recipe.batch if recipe.index is None else 1):
        check_target(path)  # a wrong name should not cost a run
    if source:  # before the libraries load: what another's picture names may be anything
        check_files(recipe.files())
    _generate_one(recipe, content, target, figures)


@app.command(
    epilog="""Examples:

sun compare "large polar bear, yellow background" "ghost, orange background" --out beside.png

sun compare "a castle" --negative blurry --model model-folder --adapter adapter.safetensors --also ddim-4"""
)
def compare(
    prompts: Annotated[list[str], typer.Argument(help="One picture a prompt.")],
    negative: Negative = "",
    target: Annotated[Path, typer.Option("--out", help="PNG to write: a row a method.")] = Path("compare.png"),
    steps: Annotated[int, typer.Option(help="SUN's steps.", min=1, max=1000)] = 4,
    also: Annotated[
        list[str] | None, typer.Option(help="Another method: ddim-4, dpmpp-8, unipc-4, nag-4, lcm-lora-4, sun-8.")
    ] = None,
    lcm_lora: Annotated[str, typer.Option(help="Folder of an LCM-LoRA, for the methods lcm-lora.")] = "",
    seed: Seed = 0,
    size: Size = "",
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale w of the reference. (default: the adapter's own)", min=1.0)
    ] = None,
    sun_strength: Strength = 1.0,
    model: Model = SHIPPED,
    config: ConfigDir = "",
    adapter: Adapter = SHIPPED,
    lora: Lora = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    figures: Json = None,
) -> None:
    """Put SUN beside the model's own 25-step pictures: same noise, same prompts, calls counted, distances measured."""
    engine = _engine()
    from ..evaluation import parse_method
    from ..evaluation.compare import compare as run
    from ..evaluation.compare import picture

    methods = [parse_method(name) for name in (f"sun-{steps}", *(also or []))]
    check_target(numbered(target, 1)[0])
    prompts = [read_prompt(prompt) for prompt in prompts]
    recipe = recipe_of(
        size,
        lora,
        dtype,
        seed=seed or 0,
        sun_strength=sun_strength,
        model=model,
        config=config,
        adapter=adapter,
        device=device,
    )
    with spinner("loading") as status:
        loaded = engine.load(recipe)
        recipe = engine.complete(recipe, loaded)
        pairs = [(prompt, negative) for prompt in prompts]
        rows = run(loaded, recipe, pairs, methods, guidance, lambda name: status(f"running {name}"), lcm_lora=lcm_lora)
    save_png(picture(rows, pairs), target)
    out.print(figures_table({row.method: row.figures() for row in rows}, f"{len(pairs)} pictures, reference first"))
    out.print(str(target), soft_wrap=True)
    write_json(
        figures,
        {
            "reference": rows[0].method,
            "methods": {row.method: row.figures() for row in rows},
            "seed": recipe.seed,
            "picture": str(target),
        },
    )


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--out", help="Folder for the pictures.")] = Path("demo"),
    figures: Json = None,
) -> None:
    """Four-step pictures of the shipped model beside its 25-step reference."""
    check_folder(folder)
    _engine()
    from ..evaluation.demo import run

    with spinner("loading") as status:
        done = run(folder, lambda method: status(f"running {method}"))
    out.print(
        figures_table(
            {row.method: row.figures() for row in done.rows},
            f"{len(done.pictures)} pictures on {done.device}, reference first",
        )
    )
    first, sun = done.rows[0], done.rows[1]
    calls = f"{sun.unet_calls:g} U-Net calls instead of {first.unet_calls:g}"
    # One run of each, after one another: what else the machine did then is in it. What is saved at most are the calls.
    took = f"{sun.seconds:.2f} s instead of {first.seconds:.2f} s"
    out.print(f"SUN made each picture with {calls}, {took} (one run; sun bench --emoji takes several)", soft_wrap=True)
    out.print(f"side by side: {done.grid}", soft_wrap=True)
    out.print(f"single pictures: {folder}/{done.pictures[0].name} ... {done.pictures[-1].name}", soft_wrap=True)
    write_json(figures, {"methods": {row.method: row.figures() for row in done.rows}})


def _generate_one(recipe: Recipe, content: dict[str, Any], target: Path, figures: Path | None) -> None:
    """Draw the pictures of ``recipe``, write them and say what they cost. content: of the PNG it was read from."""
    engine = _engine()
    for change in engine.changes_since(recipe, content) if content else []:
        err.print(f"[yellow]note:[/yellow] {escape(change)}; the picture may differ")
    recipe = engine.complete(recipe)
    with spinner("loading"):
        loaded = engine.load(recipe)
        recipe = engine.complete(recipe, loaded)
    with progress_bar("drawing") as on_step:
        drawn = engine.generate(loaded, recipe, on_step)
    paths = numbered(target, len(drawn.images))
    for image, path, text in zip(drawn.images, paths, engine.png_texts(recipe), strict=True):
        save_png(image, path, text)
    each = " a picture" if recipe.batch > 1 else ""
    each += f" ({drawn.small_calls:g} of them of the small one)" if recipe.switch else ""
    out.print(
        f"{drawn.unet_calls:g} U-Net calls{each}, {drawn.seconds:.2f} s, seed {recipe.seed + (recipe.index or 0)}"
    )
    if drawn.skipping:
        out.print(drawn.skipping.sentence, soft_wrap=True)
    for path in paths:
        out.print(str(path), soft_wrap=True)
    write_json(
        figures,
        {
            "unet_calls": drawn.unet_calls,
            "seconds": drawn.seconds,
            "seed": recipe.seed,
            "pictures": [str(p) for p in paths],
            **({"ltc": asdict(drawn.skipping)} if drawn.skipping else {}),
        },
    )


def _generate_many(
    ctx: typer.Context, file: Path, target: Path | None, source: Path | None, figures: Path | None
) -> None:
    """``sun generate --prompts``: see :mod:`sun.cli.bulk`."""
    if ctx.params["prompt"]:
        raise typer.BadParameter("give a prompt or --prompts FILE, not both", ctx=ctx)
    if target is not None:
        if target.suffix.lower() == ".png":
            raise typer.BadParameter(f"{target}: with --prompts it is a folder", param_hint="--out")
        check_folder(target)
    together = ctx.params["batch"] if _is_given(ctx, "batch") else None
    seeded = _is_given(ctx, "seed") or source is not None
    ctx.params["batch"] = 1
    recipe, _ = _recipe(ctx, source)
    check_files(recipe.files())
    engine = _engine()
    from .bulk import generate_many

    shards, retry_failed = ctx.params["shards"], ctx.params["retry_failed"]
    generate_many(engine, recipe, file, target, shards, together, seeded, retry_failed, figures)


def _is_given(ctx: typer.Context, name: str) -> bool:
    return getattr(ctx.get_parameter_source(name), "name", "") in ("COMMANDLINE", "ENVIRONMENT")


def _engine() -> Any:
    """The module that draws, imported now; diffusers' own progress bars would disturb ours."""
    from diffusers.utils import logging

    from ..pictures import draw as generate

    logging.disable_progress_bar()
    return generate


def numbered(path: Path, count: int) -> list[Path]:
    """``x.png`` for one picture, ``x-0.png``, ``x-1.png``, ... for several. Raises BadParameter unless PNG."""
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} should end in .png, the format that keeps the settings", param_hint="--out")
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def _recipe(ctx: typer.Context, source: Path | None) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the options: all of them, or on top of a PNG's those that were given."""
    base, content = read_recipe(source) if source else (Recipe(), {})
    known = {f.name for f in fields(Recipe)}
    given: dict[str, Any] = {}
    for name, value in ctx.params.items():
        if not source or _is_given(ctx, name):
            given[name] = value.value if isinstance(value, Enum) else value
    if "size" in given:
        given["width"], given["height"] = parse_size(given["size"])
    if "lora" in given:
        given["loras"] = tuple(given["lora"] or ())
    if source and given.get("ltc", "paper") != "paper":
        given.setdefault("ltc_table", "")  # that of the picture's own preset
    if source and {"seed", "batch"} & given.keys():
        given["index"] = None
    if given.get("seed", 0) is None:
        given["seed"] = random.SystemRandom().randrange(2**32)
    recipe = replace(base, **{k: v for k, v in given.items() if k in known})
    _check_used(ctx, recipe)
    return recipe, content


_ACT_ON = {  # options that do nothing without another one: what that is, and the recipe's field of it
    "strength": ("--init", "init"),
    "denoise_mode": ("--init", "init"),
    "control_scale": ("--control", "control"),
    "share": ("--switch", "switch"),
    "switch_order": ("--switch", "switch"),
}


def _check_used(ctx: typer.Context, recipe: Recipe) -> None:
    """Raise BadParameter for an option that was given and would do nothing. Rows of a file may have its other half."""
    for name, (other, field) in _ACT_ON.items():
        in_rows = ctx.params.get("prompts") is not None and field != "switch"
        if _is_given(ctx, name) and not in_rows and not getattr(recipe, field):
            raise typer.BadParameter(
                f"it acts on {other} alone. Give that too, or leave it out", param_hint=_option(name)
            )
    if _is_given(ctx, "sun_strength") and recipe.adapter == "none":
        raise typer.BadParameter(
            "there is no SUN with --adapter none. Leave one of them out", param_hint=_option("sun_strength")
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
