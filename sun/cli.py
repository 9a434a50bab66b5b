"""The command line: ``sun`` or ``python -m sun``. Commands are thin; heavy imports wait until one runs."""

from __future__ import annotations

import json
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperGroup

from . import __version__
from .config import ConfigError
from .files import SunFileError
from .recipe import Recipe, RecipeError

BAD_INPUT, INTERRUPTED = 2, 130
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class SunGroup(TyperGroup):
    """Turns exceptions of any command into one sentence and an exit code; ``--debug`` keeps the traceback."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            err.print("stopped", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:
            # Typer's own exceptions (wrong usage, exit codes) are shown by Typer.
            if (
                ctx.params.get("debug")
                or isinstance(error, (typer.Exit, typer.Abort))
                or hasattr(error, "format_message")
            ):
                raise
            expected = isinstance(error, (RecipeError, SunFileError, ConfigError, OSError))
            text = (
                str(error) if expected else f"{type(error).__name__}: {error}\nThis is unexpected; --debug shows where."
            )
            err.print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)
            raise typer.Exit(BAD_INPUT if expected else 1) from None


app = typer.Typer(cls=SunGroup, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="rich")
emoji_app = typer.Typer(no_args_is_help=True, help="Train Emoji Diffusion, the small model that is shipped.")
app.add_typer(emoji_app, name="train-emoji")


def main() -> None:
    """Entry point of the console script."""
    app()


def _version(value: bool) -> None:
    if value:
        out.print(f"sun {__version__}")
        raise typer.Exit()


@app.callback(epilog='Start with: [bold]sun generate "large polar bear, yellow background"[/bold]')
def _options(
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error and the libraries' messages.")
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """SUN (SpeedUpNet): Stable Diffusion 1.x pictures in 4 U-Net calls, negative prompts included.

    Without --model and --adapter every command uses the small model and the adapter that come with the package.
    """
    # The commands read local files only; a library must not wait for a network that nobody asked for.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not debug:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        warnings.filterwarnings("ignore", category=FutureWarning)


# --- options that several commands share -------------------------------------------------------------------------


class Scheduler(str, Enum):
    """Same names as sun.schedulers.SCHEDULERS, which needs diffusers."""

    ddim = "ddim"
    dpmpp_2m = "dpmpp_2m"
    unipc = "unipc"
    euler = "euler"


class DenoiseMode(str, Enum):
    trained = "trained"
    respaced = "respaced"


class Dtype(str, Enum):
    auto = "auto"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Layout(str, Enum):
    sun = "sun"
    official = "official"


Model = Annotated[
    str, typer.Option(help="Diffusers folder or single-file SD 1.5 checkpoint (.safetensors). (emoji: the shipped one)")
]
ConfigDir = Annotated[
    str, typer.Option("--config", help="Diffusers folder that describes an unusual single-file checkpoint.")
]
Adapter = Annotated[str, typer.Option(help="SUN adapter file; none runs the plain model. (emoji: the shipped one)")]
Lora = Annotated[list[str] | None, typer.Option(help="LoRA as PATH or PATH:WEIGHT; may be given several times.")]
Size = Annotated[str, typer.Option(help="Pixels, as 512 or 512x768. (default: the model's own)")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the first picture; the next use seed + 1, ... (default: random)", min=0)
]
Strength = Annotated[float, typer.Option("--sun-strength", help="1 is the trained adapter, 0 the plain model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps or auto.")]
Precision = Annotated[Dtype, typer.Option(help="Number format; auto is float32 on a CPU and float16 elsewhere.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="Any setting as KEY=VALUE; may be given several times.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML or JSON file with settings.")]


# --- pictures ----------------------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

sun generate "large polar bear, yellow background" --seed 7 --out bear.png

sun generate "cat face next to fish" --negative "gray background" --batch 4

sun generate "a castle" --model dreamshaper.safetensors --adapter sun_adapter.safetensors --lora ink.safetensors:0.8

sun generate "a cat in a hat" --init cat.png --strength 0.5

sun generate --from bear.png --out same-bear.png"""
)
def generate(
    ctx: typer.Context,
    prompt: Annotated[str, typer.Argument(help="What to draw.", show_default=False)] = "",
    negative: Annotated[str, typer.Option(help="What to keep out of the picture.")] = "",
    target: Annotated[
        Path | None,
        typer.Option("--out", help="PNG to write; a batch becomes NAME-0.png, NAME-1.png, ... (default: sun-SEED.png)"),
    ] = None,
    steps: Annotated[
        int, typer.Option(help="Steps, one U-Net call each; 4 is what SUN is trained for.", min=1, max=1000)
    ] = 4,
    seed: Seed = None,
    batch: Annotated[int, typer.Option(help="Number of pictures.", min=1)] = 1,
    size: Size = "",
    scheduler: Annotated[Scheduler, typer.Option(help="ddim is what SUN is trained for.")] = Scheduler.ddim,
    sun_strength: Strength = 1.0,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance scale; only with --adapter none.")] = 7.5,
    init: Annotated[str, typer.Option(help="Picture to start from.", metavar="IMAGE")] = "",
    strength: Annotated[
        float | None,
        typer.Option(help="How much of --init to repaint, 0 to 1. (default: 0.5; 1 with --mask)", min=0.0, max=1.0),
    ] = None,
    mask: Annotated[str, typer.Option(help="White where --init is to be repainted.", metavar="IMAGE")] = "",
    denoise_mode: Annotated[
        DenoiseMode, typer.Option(help="trained drops the first steps (fewer calls); respaced keeps the number.")
    ] = DenoiseMode.trained,
    control: Annotated[str, typer.Option(help="Control picture for --controlnet.", metavar="IMAGE")] = "",
    control_scale: Annotated[float, typer.Option(help="How strongly the ControlNet steers.")] = 1.0,
    controlnet: Annotated[str, typer.Option(help="ControlNet in diffusers format.", metavar="FOLDER")] = "",
    model: Model = "emoji",
    config: ConfigDir = "",
    adapter: Adapter = "emoji",
    lora: Lora = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    source: Annotated[
        Path | None, typer.Option("--from", help="Take all settings from a PNG made by sun; other options change them.")
    ] = None,
    figures: Json = None,
) -> None:
    """Make pictures from a prompt. The PNG carries everything needed to make it again."""
    recipe, content = _recipe(ctx, source)
    if source is None and not prompt:
        raise typer.BadParameter('give a prompt, as in: sun generate "a red apple"', ctx=ctx)
    numbered(target or Path("sun.png"), 1)  # a wrong name should not cost a run
    from . import generate as engine

    for change in engine.changes_since(recipe, content) if content else []:
        err.print(f"[yellow]note:[/yellow] {escape(change)}; the picture may differ")
    recipe = engine.complete(recipe)
    with _status("loading"):
        loaded = engine.load(recipe)
        recipe = engine.complete(recipe, loaded)
    with _steps("drawing") as on_step:
        drawn = engine.generate(loaded, recipe, on_step)
    target = target or Path(f"sun-{recipe.seed + (recipe.index or 0)}.png")
    from .images import save_png

    paths = numbered(target, len(drawn.images))
    for image, path, text in zip(drawn.images, paths, engine.png_texts(recipe), strict=True):
        save_png(image, path, text)
    each = " a picture" if recipe.batch > 1 else ""
    out.print(
        f"{drawn.unet_calls:g} U-Net calls{each}, {drawn.seconds:.2f} s, seed {recipe.seed + (recipe.index or 0)}"
    )
    for path in paths:
        out.print(str(path), soft_wrap=True)
    _write_json(
        figures,
        {
            "unet_calls": drawn.unet_calls,
            "seconds": drawn.seconds,
            "seed": recipe.seed,
            "pictures": [str(p) for p in paths],
        },
    )


@app.command(
    epilog="""Examples:

sun compare "large polar bear, yellow background" "ghost, orange background" --out beside.png

sun compare "a castle" --negative blurry --model model-folder --adapter adapter.safetensors --also ddim-4 --json figures.json"""
)
def compare(
    prompts: Annotated[list[str], typer.Argument(help="One picture a prompt.")],
    negative: Annotated[str, typer.Option(help="What to keep out of the pictures.")] = "",
    target: Annotated[Path, typer.Option("--out", help="PNG to write: a row a method.")] = Path("compare.png"),
    steps: Annotated[int, typer.Option(help="SUN's steps.", min=1, max=1000)] = 4,
    also: Annotated[
        list[str] | None, typer.Option(help="Another method: ddim-4, dpmpp-8, unipc-4, euler-4, cond-25, sun-8.")
    ] = None,
    seed: Seed = 0,
    size: Size = "",
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale w of the reference. (default: the adapter's own)", min=1.0)
    ] = None,
    sun_strength: Strength = 1.0,
    model: Model = "emoji",
    config: ConfigDir = "",
    adapter: Adapter = "emoji",
    lora: Lora = None,
    dtype: Precision = Dtype.auto,
    device: Device = "auto",
    figures: Json = None,
) -> None:
    """Put SUN beside the model's own 25-step pictures: same noise, same prompts, calls counted, distances measured."""
    from . import generate as engine
    from .compare import compare as run
    from .compare import picture
    from .images import save_png

    methods = [f"sun-{steps}", *(also or [])]
    _check_methods(methods)
    numbered(target, 1)
    width, height = _size(size)
    recipe = Recipe(
        seed=seed or 0, width=width, height=height, sun_strength=sun_strength, model=model, config=config,
        adapter=adapter, loras=tuple(lora or ()), dtype=dtype.value, device=device,
    )  # fmt: skip
    with _status("loading") as status:
        loaded = engine.load(recipe)
        recipe = engine.complete(recipe, loaded)
        pairs = [(prompt, negative) for prompt in prompts]
        rows = run(loaded, recipe, pairs, methods, guidance, lambda method: status(f"running {method}"))
    save_png(picture(rows, pairs), target)
    out.print(figures_table({row.method: row.figures() for row in rows}, f"{len(pairs)} pictures, reference first"))
    out.print(str(target), soft_wrap=True)
    _write_json(
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
    from .demo import run

    with _status("loading") as status:
        done = run(folder, lambda method: status(f"running {method}"))
    out.print(
        figures_table(
            {row.method: row.figures() for row in done.rows},
            f"{len(done.pictures)} pictures on {done.device}, reference first",
        )
    )
    first, sun = done.rows[0], done.rows[1]
    out.print(
        f"SUN made each picture with {sun.unet_calls:g} U-Net calls instead of {first.unet_calls:g}, {first.seconds / sun.seconds:.1f} times faster."
    )
    out.print(f"side by side: {done.grid}", soft_wrap=True)
    out.print(f"single pictures: {folder}/{done.pictures[0].name} ... {done.pictures[-1].name}", soft_wrap=True)
    _write_json(figures, {"methods": {row.method: row.figures() for row in done.rows}})


# --- adapter files -----------------------------------------------------------------------------------------------


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="Adapter, or any model file.")],
    layers: Annotated[bool, typer.Option("--layers/--no-layers", help="Show alpha and beta of each layer.")] = True,
    figures: Json = None,
) -> None:
    """Tell what a file is; of a SUN adapter its base, branches, guidance scale, size and learned scales."""
    from .inspection import describe

    report = describe(file)
    for key, value in report.items():
        if key != "layers" and value not in ("", None, {}):
            out.print(f"[bold]{key.replace('_', ' ')}[/bold]: {escape(_plain(value))}", soft_wrap=True)
    if layers and "layers" in report:
        table = Table("layer", "width", title="alpha and beta, mean and standard deviation")
        branches = [b for b in ("neg", "pos") if f"alpha_{b}" in report["layers"][0]]
        for branch in branches:
            table.add_column(f"alpha {branch}", justify="right")
            table.add_column(f"beta {branch}", justify="right")
        for row in report["layers"]:
            cells = [
                f"{row[f'{p}_{b}'][0]:+.4f} ± {row[f'{p}_{b}'][1]:.4f}" for b in branches for p in ("alpha", "beta")
            ]
            table.add_row(row["name"], str(row["width"]), *cells)
        out.print(table)
    _write_json(figures, report)


@app.command(
    epilog="""Examples:

sun convert sun_adapter_sdv15_4step_addpos.safetensors adapter.safetensors

sun convert adapter.safetensors for-the-authors-code.safetensors --layout official --dtype float16"""
)
def convert(
    source: Annotated[Path, typer.Argument(help="Adapter file of either layout.")],
    target: Annotated[Path, typer.Argument(help="File to write.")],
    layout: Annotated[Layout, typer.Option(help="sun: readable names; official: the authors' names.")] = Layout.sun,
    dtype: Annotated[Dtype, typer.Option(help="Number format; auto keeps the file's.")] = Dtype.auto,
) -> None:
    """Write an adapter in the other layout or another number format; nothing is lost between layouts."""
    import torch

    from .adapter import SunAdapter

    kind = None if dtype is Dtype.auto else getattr(torch, dtype.value)
    if target.suffix.lower() != ".safetensors":
        raise typer.BadParameter(f"{target} should end in .safetensors")
    SunAdapter.load(source).save(target, layout=layout.value, dtype=kind)
    out.print(f"{target} ({layout.value} layout, {target.stat().st_size:,} bytes)", soft_wrap=True)


# --- training and measuring --------------------------------------------------------------------------------------


@app.command(
    epilog="""Examples:

sun train --output runs/sun --minutes 30

sun train --model sd15-folder --data pictures/ --batch-size 8 --set guidance_scale=7.5

accelerate launch -m sun train --config sun.toml"""
)
def train(
    config: ConfigFile = None,
    model: Annotated[
        str | None, typer.Option(help="Diffusers folder of the frozen model. (emoji: the shipped one)")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of pictures and captions, or webdataset shards.")] = None,
    output: Annotated[str | None, typer.Option(help="Folder of the run: checkpoints, samples, adapter.")] = None,
    steps: Annotated[int | None, typer.Option(help="Length in steps.", min=1)] = None,
    minutes: Annotated[float | None, typer.Option(help="Length in minutes, if that ends it sooner.", min=0.0)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures a step and process.", min=1)] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on from the run's last checkpoint.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Train a SUN adapter for a frozen Stable Diffusion 1.x model (Algorithm 1 of the paper)."""
    from .training.sun import SunTrainConfig, train_sun

    given = {"model": model, "data": data}
    run = {"output": output, "steps": steps, "minutes": minutes, "batch_size": batch_size, "lr": lr, "resume": resume}
    out.print(f"adapter: {train_sun(_configured(SunTrainConfig(), config, given, run, settings))}", soft_wrap=True)


Output = Annotated[str | None, typer.Option(help="Folder of the run.")]
Steps = Annotated[int | None, typer.Option(help="Length in steps.", min=1)]
Minutes = Annotated[float | None, typer.Option(help="Length in minutes, if that ends it sooner.", min=0.0)]
Resume = Annotated[bool | None, typer.Option("--resume/--no-resume", help="Go on from the run's last checkpoint.")]


@emoji_app.command("vae")
def train_emoji_vae(
    config: ConfigFile = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train its autoencoder (TAESD layout)."""
    from .emoji.vae import VaeConfig, train_vae

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    out.print(f"autoencoder: {train_vae(_configured(VaeConfig(), config, {}, run, settings))}", soft_wrap=True)


@emoji_app.command("base")
def train_emoji_base(
    config: ConfigFile = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train its text encoder and U-Net on a trained autoencoder."""
    from .emoji.base import BaseConfig, train_base

    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    out.print(f"model: {train_base(_configured(BaseConfig(), config, {}, run, settings))}", soft_wrap=True)


@app.command(
    epilog="""Examples:

sun evaluate --prompts 512 --json figures.json

sun evaluate --prompts-file pairs.txt --model sd15-folder --adapter adapter.safetensors --set methods=sun-4,dpmpp-4"""
)
def evaluate(
    config: ConfigFile = None,
    prompts: Annotated[int | None, typer.Option(help="Number of prompts.", min=2)] = None,
    prompts_file: Annotated[str | None, typer.Option(help="File with one 'prompt | negative' a line.")] = None,
    model: Annotated[str | None, typer.Option(help="Diffusers folder. (emoji: the shipped one)")] = None,
    adapter: Annotated[str | None, typer.Option(help="Adapter file. (default: the shipped one)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures at a time.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the prompts and the noise.", min=0)] = None,
    settings: Settings = None,
    figures: Json = None,
) -> None:
    """Measure SUN and its rivals against the 25-step reference: U-Net calls, seconds, distances."""
    from .evaluation import EvaluateConfig
    from .evaluation import evaluate as run

    given = {
        "prompts": prompts,
        "prompts_file": prompts_file,
        "model": model,
        "adapter": adapter,
        "batch_size": batch_size,
        "seed": seed,
    }
    result = run(_configured(EvaluateConfig(), config, given, {}, settings))
    rows = {result["reference"]["method"]: result["reference"], **result["methods"], "floor": result["floor"]}
    out.print(figures_table(rows, "distance to the reference; floor: the reference again with other noise"))
    for method, row in result["negative_prompt"].items():
        if isinstance(row, dict) and "cosine" in row:
            out.print(
                f"changing only the negative prompt: cosine of {method} with the reference's change {row['cosine']:+.3f}"
            )
    _write_json(figures, result)


# --- helpers -----------------------------------------------------------------------------------------------------


def numbered(path: Path, count: int) -> list[Path]:
    """``x.png`` for one picture, ``x-0.png``, ``x-1.png``, ... for several. Raises BadParameter unless PNG."""
    if path.suffix.lower() != ".png":
        raise typer.BadParameter(f"{path} should end in .png, the format that keeps the settings", param_hint="--out")
    return [path] if count == 1 else [path.with_name(f"{path.stem}-{i}{path.suffix}") for i in range(count)]


def figures_table(rows: dict[str, dict[str, Any]], title: str) -> Table:
    """Figures by method as a table; a column appears when any row has it."""
    heads = {"unet_calls": ("U-Net calls", "g"), "seconds": ("seconds", ".3f"), "paired_mse": ("latent MSE", ".4f"),
             "set_distance": ("set distance", ".3f"), "kid": ("KID", ".5f"), "psnr": ("PSNR, dB", ".2f")}  # fmt: skip
    shown = [key for key in heads if any(row.get(key) is not None for row in rows.values())]
    table = Table("method", title=title)
    for key in shown:
        table.add_column(heads[key][0], justify="right")
    for name, row in rows.items():
        table.add_row(name, *("" if row.get(key) is None else format(row[key], heads[key][1]) for key in shown))
    return table


def _recipe(ctx: typer.Context, source: Path | None) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of the options: all of them, or on top of a PNG's those that were given."""
    from .recipe import read_recipe

    base, content = read_recipe(source) if source else (Recipe(), {})
    known = {f.name for f in fields(Recipe)}
    given: dict[str, Any] = {}
    for name, value in ctx.params.items():
        explicit = getattr(ctx.get_parameter_source(name), "name", "") in ("COMMANDLINE", "ENVIRONMENT")
        if not source or explicit:
            given[name] = value.value if isinstance(value, Enum) else value
    if "size" in given:
        given["width"], given["height"] = _size(given["size"])
    if "lora" in given:
        given["loras"] = tuple(given["lora"] or ())
    if source and {"seed", "batch"} & given.keys():
        given["index"] = None
    if given.get("seed", 0) is None:
        given["seed"] = random.SystemRandom().randrange(2**32)
    return replace(base, **{k: v for k, v in given.items() if k in known}), content


def _size(text: str) -> tuple[int, int]:
    """``512`` or ``512x768`` -> (width, height); empty -> (0, 0), the model's own."""
    if not text:
        return 0, 0
    width, _, height = text.lower().partition("x")
    try:
        sides = int(width), int(height or width)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a size; write 512 or 512x768", param_hint="--size") from None
    if min(sides) < 8 or any(side % 8 for side in sides):
        raise typer.BadParameter(f"{text!r}: both sides must be multiples of 8", param_hint="--size")
    return sides


def _check_methods(methods: list[str]) -> None:
    for method in methods:
        name, _, steps = method.rpartition("-")
        if (
            name not in ("sun", "ddim", "dpmpp", "unipc", "euler", "cond")
            or not steps.isdigit()
            or not 1 <= int(steps) <= 1000
        ):
            raise typer.BadParameter(
                f"{method!r} is no method; write for example ddim-4, dpmpp-8 or cond-25", param_hint="--also"
            )


def _configured(
    config: Any, file: Path | None, given: dict[str, Any], run: dict[str, Any], settings: list[str] | None
) -> Any:
    """Defaults, then the file, then the options, then ``--set``: the later wins."""
    from .config import apply, assign, read_config

    if file:
        apply(config, read_config(file), str(file))
    apply(config, {k: v for k, v in given.items() if v is not None}, "options")
    if run:
        apply(config.run, {k: v for k, v in run.items() if v is not None}, "options")
    return assign(config, settings or [])


def _write_json(path: Path | None, content: dict[str, Any]) -> None:
    if path:
        from .images import write_atomically

        write_atomically(
            path, lambda handle: handle.write((json.dumps(content, indent=2, default=str) + "\n").encode())
        )


def _plain(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, (dict, list, tuple)) else str(value)


@contextmanager
def _status(text: str) -> Iterator[Callable[[str], None]]:
    """A spinner on standard error; yields a function that changes its text."""
    with err.status(text) as status:
        yield status.update


@contextmanager
def _steps(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error; yields the function to report (done, total) to."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


if __name__ == "__main__":
    sys.exit(main())
