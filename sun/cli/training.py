"""``sun train``, ``sun train-emoji``, ``sun train-peer``: every trainer has the same options and a few of its own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.settings import ConfigError, configured, read_config
from ..shipped import EMOJI_GUIDANCE
from .app import app, emoji_app
from .options import ConfigFile, Json, Settings
from .show import out, write_json

peer_app = typer.Typer(no_args_is_help=True, help="Train the methods SUN is measured against.")
app.add_typer(peer_app, name="train-peer")

RUN_OPTIONS = {
    "output": Annotated[str | None, typer.Option(help="Folder of the run: checkpoints, samples, result.")],
    "steps": Annotated[int | None, typer.Option(help="Length in steps.", min=1)],
    "minutes": Annotated[float | None, typer.Option(help="Length in minutes, if that ends it sooner.", min=0.0)],
    "batch_size": Annotated[int | None, typer.Option(help="Pictures a step and process.", min=1)],
    "lr": Annotated[float | None, typer.Option(help="Learning rate.")],
    "resume": Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on from the run's last checkpoint.")
    ],
}
MODEL = Annotated[
    str | None,
    typer.Option(help="Diffusers folder or SD 1.5 checkpoint (.safetensors) to start from. (emoji: the shipped one)"),
]
DATA = Annotated[str | None, typer.Option(help="Folder of pictures and captions, webdataset shards, or emoji:STYLE.")]
COMMANDS = Annotated[
    bool | None, typer.Option("--allow-commands", help="Let --data run a command of yours: pipe:COMMAND.")
]
STYLE = Annotated[str | None, typer.Option(help="openmoji, fluent, google, blob, streamline or twemoji.")]

PLAN = Annotated[
    str | None, typer.Option(help="What to remove: shallow, bk-base, bk-small, bk-tiny, or a plan's file.")
]
CAPTIONS = Annotated[
    str | None,
    typer.Option(help="Instead of pictures: captions, one a line, or emoji; the original draws the latents."),
]

ON_PICTURES = {"model": MODEL, "data": DATA, "allow_commands": COMMANDS}


def check_commands(config: Any, data: str | None, assignments: list[str] | None) -> None:
    """Raise ConfigError where a command was allowed that was not written on the command line itself: a file of settings
    may be a stranger's."""
    typed = data is not None or any(text.partition("=")[0].strip() == "data" for text in assignments or [])
    if config.allow_commands and not typed:
        raise ConfigError("--allow-commands goes with --data on the command line: data from a file runs no command.")


def add_trainer(
    group: typer.Typer,
    name: str,
    help: str,
    trains: str,
    module: str,
    config: str,
    function: str,
    *,
    options: Mapping[str, Any] | None = None,
    product: str = "",
    examples: tuple[str, ...] = (),
) -> None:
    """Register a command that reads ``module.config`` (of this package) from its options and calls ``module.function``.

    ``options`` name settings of the configuration; ``trains`` and ``product`` say what lies where, at the end.
    The module is imported when the command runs: ``--help`` should not wait for torch.
    """
    kinds = {**(options or {}), "config": ConfigFile, **RUN_OPTIONS, "settings": Settings}

    def command(**given: Any) -> None:
        trainer = import_module(f"..{module}", __package__)
        run = {key: given[key] for key in RUN_OPTIONS}
        chosen = {key: given[key] for key in options or {}}
        commands = chosen.pop("allow_commands", None)
        wanted = configured(getattr(trainer, config)(), given["config"], chosen, run, given["settings"])
        if "allow_commands" in kinds:
            wanted.allow_commands = wanted.allow_commands or bool(commands)
            check_commands(wanted, given["data"], given["settings"])
        out.print(f"{trains}: {getattr(trainer, function)(wanted) / product}", soft_wrap=True)

    command.__doc__ = help
    command.__annotations__ = kinds
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=k) for key, k in kinds.items()]
    )
    title = "Examples" if len(examples) > 1 else "Example"
    group.command(name, epilog=f"{title}:\n\n" + "\n\n".join(examples) if examples else None)(command)


add_trainer(
    app,
    "train",
    "Train a SUN adapter for a frozen Stable Diffusion 1.x model (Algorithm 1 of the paper).",
    "adapter",
    "training.sun",
    "SunTrainConfig",
    "train_sun",
    options=ON_PICTURES,
    examples=(
        "sun train --output runs/sun --minutes 30",
        "sun train --model sd15-folder --data pictures/ --batch-size 8 --set guidance_scale=7.5",
        "accelerate launch -m sun train --config sun.toml",
    ),
)
add_trainer(
    app,
    "train-compact",
    "Train a compact U-Net assembled from a model's own: incubate its slimmed stages, then distil the whole.",
    "compact U-Net",
    "training.compact.distillation",
    "CompactTrainConfig",
    "train_compact",
    options={**ON_PICTURES, "plan": PLAN, "captions": CAPTIONS},
    product="unet",
    examples=(
        "sun train-compact --config configs/compact-emoji.toml",
        "sun train-compact --config configs/compact-sd15-24gb.toml --model sd15-folder --data pictures/",
        "sun train-compact --model sd15-folder --captions captions.txt --plan plan.json",
    ),
)
add_trainer(
    emoji_app,
    "vae",
    "Train its autoencoder (TAESD layout).",
    "autoencoder",
    "lab.emoji.vae",
    "VaeConfig",
    "train_vae",
)
add_trainer(
    emoji_app,
    "recode",
    "Give a trained autoencoder latents whose colours survive guidance, in minutes.",
    "autoencoder",
    "lab.emoji.recoding",
    "RecodeConfig",
    "recode",
    examples=("sun train-emoji recode --config configs/emoji-recode.toml",),
)
add_trainer(
    emoji_app,
    "base",
    "Train its text encoder and U-Net on a trained autoencoder.",
    "model",
    "lab.emoji.base",
    "BaseConfig",
    "train_base",
)
add_trainer(
    emoji_app,
    "contrast",
    "Train the image-text model that evaluation judges its pictures by.",
    "image-text model",
    "lab.emoji.contrast_training",
    "ContrastConfig",
    "train_contrast",
)
add_trainer(
    emoji_app,
    "style",
    "Fine-tune its whole U-Net on another style of emoji.",
    "model",
    "lab.emoji.style",
    "StyleConfig",
    "train_style",
    options={"style": STYLE, "model": MODEL},
    examples=("sun train-emoji style --style fluent --config configs/emoji-style.toml",),
)
add_trainer(
    emoji_app,
    "lora",
    "Train a LoRA of another style of emoji, for diffusers, ComfyUI and A1111.",
    "LoRA",
    "lab.emoji.style",
    "LoraStyleConfig",
    "train_lora",
    options={"style": STYLE, "model": MODEL},
    examples=("sun train-emoji lora --style google --config configs/emoji-lora.toml",),
)
add_trainer(
    emoji_app,
    "controlnet",
    "Train a small ControlNet that draws along the edges of another picture.",
    "ControlNet",
    "lab.emoji.controlnet",
    "ControlNetConfig",
    "train_controlnet",
    options={"style": STYLE, "model": MODEL},
    examples=("torchrun --nproc_per_node 2 -m sun train-emoji controlnet --config configs/emoji-controlnet.toml",),
)
add_trainer(
    emoji_app,
    "inpainting",
    "Train its 9-channel inpainting U-Net.",
    "inpainting model",
    "lab.emoji.inpainting",
    "InpaintingConfig",
    "train_inpainting",
    options={"style": STYLE, "model": MODEL},
    examples=("torchrun --nproc_per_node 2 -m sun train-emoji inpainting --config configs/emoji-inpainting.toml",),
)
add_trainer(
    peer_app,
    "lcm-lora",
    "Train an LCM-LoRA: latent consistency distillation; it takes no negative prompt.",
    "LoRA",
    "lab.peers.lcm_lora",
    "LcmLoraConfig",
    "train_lcm_lora",
    options=ON_PICTURES,
    product="pytorch_lora_weights.safetensors",
    examples=("sun train-peer lcm-lora --config configs/peers-lcm-lora.toml --model my-model --data emoji:fluent",),
)
add_trainer(
    peer_app,
    "guided-distill",
    "Train the full U-Net on SUN's stage targets; to be done again for every model.",
    "U-Net",
    "lab.peers.guided_distillation",
    "GuidedDistillConfig",
    "train_guided_distillation",
    options=ON_PICTURES,
    product="unet",
    examples=(
        "sun train-peer guided-distill --config configs/peers-guided-distill.toml --model my-model --data emoji:fluent",
    ),
)


@app.command(
    "train-variants",
    epilog="""Example:

sun train-variants --config configs/ablations-emoji.toml --minutes 6""",
)
def train_variants_command(
    config: Annotated[Path, typer.Option(help="TOML or JSON file: settings, and tables variants.NAME with changes.")],
    only: Annotated[str, typer.Option(help="Names of the variants wanted, separated by commas. (default: all)")] = "",
    minutes: Annotated[float | None, typer.Option(help="Length of each run in minutes.", min=0.0)] = None,
    settings: Settings = None,
) -> None:
    """Train several SUN adapters that differ in a few settings, one after the other; goes on where it stopped."""
    from ..training.variants import train_variants, variant_configs

    names = [name.strip() for name in only.split(",") if name.strip()]
    configs = variant_configs(read_config(config), names, str(config), settings or [])
    for variant in configs.values():
        check_commands(variant, None, settings)
        if minutes is not None:
            variant.run.minutes = minutes
    for name, adapter in train_variants(configs):
        out.print(f"{name}: {adapter}", soft_wrap=True)


@emoji_app.command(
    "colours",
    epilog="""Example:

sun train-emoji colours runs/emoji-vae/vae --json colours.json""",
)
def train_emoji_colours(
    model: Annotated[str, typer.Argument(help="Folder of a model or of an autoencoder, or emoji: the shipped one.")],
    style: Annotated[str, typer.Option(help="Whose objects' colours and held-out scenes.")] = "twemoji",
    emojis: Annotated[str, typer.Option(help="everyday, wide or all.")] = "wide",
    figures: Json = None,
) -> None:
    """Measure in a minute whether colours survive guidance: flat colours whose latents are scaled and noisy."""
    found = import_module("..lab.emoji.checks", __package__).colour_figures(model, style, emojis)
    out.print(import_module("..lab.emoji.colours", __package__).table(found), soft_wrap=True, markup=False)
    write_json(figures, found.as_json())


@emoji_app.command("ship")
def train_emoji_ship(
    base: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji base` run.")] = None,
    vae: Annotated[
        list[Path] | None,
        typer.Option(help="Folders of its autoencoder's runs, in order: the last decoder ships."),
    ] = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of a finished `sun train` run.")] = None,
    contrast: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji contrast` run.")] = None,
    lora: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji lora` run.")] = None,
    controlnet: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji controlnet` run.")] = None,
    inpainting: Annotated[Path | None, typer.Option(help="Folder of a finished `train-emoji inpainting` run.")] = None,
    guidance: Annotated[float, typer.Option(help="Guidance scale of the card's pictures.")] = EMOJI_GUIDANCE,
    notes: Annotated[Path | None, typer.Option(help="Markdown to put at the end of the card.")] = None,
) -> None:
    """Write finished runs into the package, as fp16 with a model card."""
    ship_runs = import_module("..lab.emoji.ship", __package__).ship_runs
    runs = {
        "model": base,
        "adapter": adapter,
        "image-text model": contrast,
        "LoRA": lora,
        "ControlNet": controlnet,
        "inpainting model": inpainting,
    }
    text = notes.read_text() if notes else ""
    for name, written in ship_runs({k: run for k, run in runs.items() if run}, guidance, text, vae or ()):
        out.print(f"{name}: {written}", soft_wrap=True)
