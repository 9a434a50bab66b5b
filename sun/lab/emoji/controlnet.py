"""A small edge ControlNet for Emoji Diffusion, trained on rendered scenes and the edges of their pictures.

It ships as a Control-LoRA: the layers only a ControlNet has, and a change of low rank to the U-Net's own encoder. A
whole copy of that encoder is 9.3 MB in fp16 and would not leave room for the other models of the repository; of rank 16
the file is 2.9 MB, and ComfyUI's own loader reads it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from safetensors.torch import save_file
from torch import Tensor

from ...common.atomic import write_json
from ...pictures.png import save_png, to_images
from ...shipped import EMOJI_CONTROLNET
from ...shipped.control_lora import OWN_LAYERS, controlnet_from_unet, to_control_lora
from ...shipped.edges import find_edges
from ...shipped.lowrank import add_low_rank, changes_of
from ...training.card import name_of, size_in_words, training_section, write_card
from ...training.config import RunConfig
from ...training.models import use_fast_attention
from ...training.run import TrainingRun
from .cards import data_section, licence_of, settings_of
from .checks import (
    REFERENCE_STEPS,
    SUN_STEPS,
    Scenes,
    adapter_for,
    control_figures,
    draw,
    draw_scenes,
    figure_table,
    sheet,
)
from .latents import encode_pictures, scenes_in_style
from .runs import emoji_run
from .scenes import posed, render_scene
from .sources import load_metadata
from .tuning import AdditionConfig, load_start, styles_of, train_conditioned
from .vae import to_tensor

COMMAND = "sun train-emoji controlnet --config configs/emoji-controlnet.toml"


@dataclass
class ControlNetConfig(AdditionConfig):
    """The low rank is the encoder's; ``check_scenes`` are drawn at the end for the card's figures."""

    run: RunConfig = field(default_factory=lambda: emoji_run("runs/emoji-controlnet", 1000, 1e-3))
    scenes: int = 2500
    # Without a caption only the edges say what is there: that is how a ControlNet learns to read them.
    empty_captions: float = 0.5
    check_scenes: int = 24


def build_controlnet(unet: Any, rank: int) -> Any:
    """A ControlNetModel of ``unet`` with low-rank changes on its encoder and its own layers to be trained whole."""
    controlnet = ControlNetModel.from_unet(unet)
    add_low_rank(controlnet, rank, leave=OWN_LAYERS)
    return controlnet


class PosedScenes:
    """The scenes of a stage turned and stretched: latents [N, 4, h, w] and edges, white on black [N, 1, H, W].

    As they are rendered the base knows an emoji's shape by heart, and edges would tell it nothing.
    """

    def __init__(self, config: ControlNetConfig, vae: Any, size: int) -> None:
        seed = config.run.seed
        self.scenes, pictures = scenes_in_style(load_metadata(config.emojis), config.style, config.scenes, seed)
        drawn = [
            posed(render_scene(scene, pictures, size), scene, random.Random(f"{seed}/{i}"))
            for i, scene in enumerate(self.scenes)
        ]
        identity = hashlib.sha256(b"".join(picture.tobytes() for picture in drawn)).hexdigest()
        self.latents = encode_pictures(vae, f"posed-{config.style}-{size}", identity, len(drawn), drawn.__getitem__)
        self.edges = torch.cat([as_control(to_tensor([picture]))[:, :1] > 0.5 for picture in drawn])

    def condition(self, numbers: list[int]) -> Tensor:
        """[B, 3, H, W] in 0..1."""
        return self.edges[numbers].float().expand(-1, 3, -1, -1)


def train_controlnet(config: ControlNetConfig) -> Path:
    """Train, and write ``<output>/controlnet`` (weights, card, pictures); returns that folder."""
    pipe, folder = load_start(config, config.model), Path(config.run.output) / "controlnet"
    torch.manual_seed(config.run.seed)
    controlnet = build_controlnet(pipe.unet, config.rank)

    def predict(trained: Any, x_t: Tensor, t: Tensor, context: Tensor, edges: Tensor) -> Tensor:
        down, mid = trained(x_t, t, context, controlnet_cond=edges, return_dict=False)
        return pipe.unet(
            x_t, t, context, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample

    def write(trained: Any) -> None:
        save_controlnet(trained, folder / EMOJI_CONTROLNET.name, name_of(config.model))

    run = train_conditioned(
        config, pipe, "controlnet", controlnet, lambda size: PosedScenes(config, pipe.vae, size), predict, write
    )
    if run.accelerator.is_main_process:
        finish(config, run, pipe, folder)
    return folder


def as_control(pixels: Tensor) -> Tensor:
    """The control pictures [B, 3, h, w] in 0..1 of pictures [B, 3, h, w] in -1..1."""
    return find_edges(pixels / 2 + 0.5).expand(-1, 3, -1, -1)


def save_controlnet(controlnet: Any, file: Path, base: str) -> Path:
    """Write the trained weights as a Control-LoRA in fp16; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(to_control_lora(changes_of(controlnet)), file, metadata={"format": "pt", "base_model": base})
    return file


def finish(config: ControlNetConfig, run: TrainingRun, pipe: Any, folder: Path) -> None:
    """Draw with the file that was written, and write pictures, figures, settings and card beside it."""
    file = folder / EMOJI_CONTROLNET.name
    checked = draw_scenes(config.style, config.emojis, config.check_scenes, config.stages[-1][0], pose=True)
    rows = draw_controlled(config, run, pipe, file, checked)
    figures = control_figures(rows, checked.pixels)
    control = as_control(checked.pixels)
    save_png(sheet({"scene": checked.pixels, "control": control * 2 - 1, **rows}, 6), folder / "samples.png")
    for i, image in enumerate(to_images(control[:2] * 2 - 1)):
        save_png(image, folder / f"edges-{i}.png")
    write_json(folder / "settings.json", {**settings_of(config, run), "edge_agreement": figures})
    write_controlnet_card(config, run, file, figures)


def draw_controlled(
    config: ControlNetConfig, run: TrainingRun, pipe: Any, file: Path, checked: Scenes
) -> dict[str, Tensor]:
    """The check's pictures [N, 3, h, w] by method: the base alone, with the ControlNet and, where there is one for
    this base, with SUN."""
    controlnet = controlnet_from_unet(pipe.unet, file)
    use_fast_attention(controlnet, run.accelerator.device)
    steered = StableDiffusionControlNetPipeline(
        **{**pipe.components, "controlnet": controlnet}, requires_safety_checker=False
    )
    size, control = config.stages[-1][0], as_control(checked.pixels)
    with run.accelerator.autocast():
        rows = {
            f"without it, {REFERENCE_STEPS} steps": draw(
                pipe, checked.captions, config.sample_guidance, width=size, height=size
            ),
            f"with it, {REFERENCE_STEPS} steps": draw(steered, checked.captions, config.sample_guidance, image=control),
        }
        if adapter := adapter_for(config.model):
            rows[f"with it and SUN, {SUN_STEPS} steps"] = draw(steered, checked.captions, 1.0, adapter, image=control)
    return rows


def write_controlnet_card(config: ControlNetConfig, run: TrainingRun, file: Path, figures: dict[str, float]) -> None:
    """Write the card beside ``file``."""
    about = f"""\
Draws a prompt along given edges (white on black). A Control-LoRA of rank {config.rank}:
{size_in_words(run.parameters, file)}; the rest of its encoder is the base model's own.

![scene, control, and what each method drew](samples.png)

- ComfyUI: the node Load Emoji ControlNet, with Apply ControlNet; it finds the edges of any picture by itself. The file
  also works in the stock node Load ControlNet Model, from `models/controlnet`.
- Command line: `sun generate "cloud with rain, orange background" --controlnet emoji --control
  sun/models/emoji-controlnet/edges-0.png`; Python:
  `sun.shipped.control_lora.controlnet_from_unet(pipe.unet, file)` gives diffusers' `ControlNetModel`.
- The control is made by `sun.shipped.edges.find_edges` (tensors) or `edge_picture` (PIL): Canny's detector on colours,
  smoothed by 1 pixel, thresholds 0.05 and 0.12.

## Figures

Agreement of the edges of {config.check_scenes} drawn pictures with the control, F1 within 2 pixels (1 is best). The
scenes are turned and stretched in ways their captions do not tell:"""
    write_card(
        file.parent,
        f"Edge ControlNet for {name_of(config.model)}",
        [
            about,
            figure_table(figures, "edge agreement", "{:.3f}".format),
            data_section(styles_of(config)),
            training_section(run, COMMAND),
        ],
        license=licence_of(styles_of(config)),
        tags="[controlnet, control-lora]",
    )
