"""Emoji Diffusion in other styles: full fine-tunes of its U-Net, and LoRAs.

They are what users of Stable Diffusion have: models that a SUN adapter trained on the base never saw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from ...common.atomic import write_json
from ...shipped import EMOJI_GUIDANCE
from ...training.card import name_of, size_in_words, training_section, write_card
from ...training.config import RunConfig
from ...training.run import TrainingRun, start_run
from .base import SceneConfig, save_base, save_samples, train_on_scenes
from .cards import data_section, licence_of, settings_of
from .runs import emoji_run
from .ship import make_portable
from .tuning import AdditionConfig, load_start, save_averaged, styles_of

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name load_lora_weights looks for in a folder
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class StyleConfig(SceneConfig):
    """A full fine-tune of ``model``. Without ``stages`` it trains at the model's own size.

    The text encoder is frozen unless ``train_text_encoder``, so that prompts keep their meaning, and text states
    their place, for an adapter that was trained on the base.
    """

    run: RunConfig = field(default_factory=lambda: emoji_run("", 2000, 3e-4, ema_decay=0.995))
    style: str = "openmoji"
    stages: tuple[tuple[int, float], ...] = ()
    sample_guidance: float = EMOJI_GUIDANCE
    model: str = "emoji"
    train_text_encoder: bool = False


@dataclass
class LoraStyleConfig(AdditionConfig):
    """A LoRA (Hu et al. 2021, arXiv 2106.09685) on the U-Net's attention layers, alpha = rank."""

    run: RunConfig = field(default_factory=lambda: emoji_run("", 1500, 1e-3))
    style: str = "openmoji"


def train_style(config: StyleConfig) -> Path:
    """Train, and write ``<output>/model`` (a StableDiffusionPipeline folder with a card); returns that folder."""
    pipe = load_start(config, config.model)
    config.run.output = config.run.output or f"runs/emoji-{config.style}"
    modules: dict[str, torch.nn.Module] = {"unet": pipe.unet.requires_grad_(True).train()}
    if config.train_text_encoder:
        modules["text_encoder"] = pipe.text_encoder.requires_grad_(True).train()
    run = start_run(config, modules)

    def save(size: int) -> None:
        folder = save_base(config, run, pipe, size)
        if run.accelerator.is_main_process:
            make_portable(folder)

    train_on_scenes(config, run, pipe, save)
    folder = run.folder / "model"
    if run.accelerator.is_main_process:
        write_json(run.folder / "settings.json", settings_of(config, run))
        write_style_card(config, run, folder)
    return folder


def train_lora(config: LoraStyleConfig) -> Path:
    """Train, and write ``<output>/lora`` (the weights, a card); returns that folder."""
    pipe = load_start(config, config.model)
    config.run.output = config.run.output or f"runs/emoji-lora-{config.style}"
    torch.manual_seed(config.run.seed)
    pipe.unet.add_adapter(
        LoraConfig(r=config.rank, lora_alpha=config.rank, init_lora_weights="gaussian", target_modules=LORA_TARGETS)
    )
    for name, parameter in pipe.unet.named_parameters():
        parameter.requires_grad_("lora_" in name)
    run = start_run(config, {"unet": pipe.unet.train()})

    folder = run.folder / "lora"

    def write(size: int) -> None:
        save_lora(pipe.unet, folder, {"base_model": name_of(config.model), "style": config.style})
        save_samples(config, run, pipe, size)

    train_on_scenes(config, run, pipe, lambda size: save_averaged(run, lambda: write(size)))
    if run.accelerator.is_main_process:
        write_json(folder / "settings.json", settings_of(config, run))
        write_lora_card(config, run, folder)
    return folder


def save_lora(unet: Any, folder: Path, metadata: dict[str, str] | None = None) -> Path:
    """Write the peft LoRA of a diffusers U-Net as fp16; returns the file.

    The keys are kohya's (``lora_unet_…``, with alpha): diffusers' ``load_lora_weights``, ComfyUI and A1111 all read
    these, while ComfyUI leaves out peft's own keys of a Stable Diffusion 1.x U-Net without an error.
    """
    layers = {f"unet.{name}": weight for name, weight in get_peft_model_state_dict(unet).items()}
    weights = convert_state_dict_to_kohya(layers)
    folder.mkdir(parents=True, exist_ok=True)
    half = {k: (v.half() if v.is_floating_point() else v.float()).cpu().contiguous() for k, v in weights.items()}
    save_file(half, folder / LORA_WEIGHTS, metadata={"format": "pt", **(metadata or {})})
    return folder / LORA_WEIGHTS


def write_style_card(config: StyleConfig, run: TrainingRun, folder: Path) -> None:
    trained = "U-Net and text encoder" if config.train_text_encoder else "U-Net"
    about = f"""\
All weights of the {trained} trained on {config.scenes} scenes in this style; the other parts are the base
model's."""
    command = f"sun train-emoji style --style {config.style} --config configs/emoji-style.toml"
    write_card(
        folder,
        f"{name_of(config.model)}, fine-tuned on {config.style}",
        [about, data_section(styles_of(config)), training_section(run, command)],
        license=licence_of(styles_of(config)),
        library_name="diffusers",
        pipeline_tag="text-to-image",
    )


def write_lora_card(config: LoraStyleConfig, run: TrainingRun, folder: Path) -> None:
    size = size_in_words(run.parameters, folder / LORA_WEIGHTS)
    about = f"""\
Rank {config.rank} on the U-Net's attention layers, alpha = rank; {size}.
Load it with `pipe.load_lora_weights(folder)`, `sun generate "owl, pink background" --lora {LORA_WEIGHTS}` or
ComfyUI's node Load LoRA."""
    command = f"sun train-emoji lora --style {config.style} --config configs/emoji-lora.toml"
    write_card(
        folder,
        f"LoRA of {name_of(config.model)}: {config.style}",
        [about, data_section(styles_of(config)), training_section(run, command)],
        license=licence_of(styles_of(config)),
        library_name="diffusers",
        tags="[lora]",
    )
