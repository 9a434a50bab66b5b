"""A 9-channel inpainting U-Net for Emoji Diffusion: noisy latents, the mask, and the masked picture's latents.

It ships as a change of low rank to the base's U-Net and a whole new first layer, 4.1 MB of fp16 at rank 16 instead of
the 21 MB of a whole U-Net; it is put together when it is loaded.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...common.atomic import write_json
from ...pictures.png import save_png
from ...shipped import EMOJI_INPAINTING
from ...shipped.lowrank import add_low_rank, changes_of, merge
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
    draw,
    draw_scenes,
    figure_table,
    inpainting_figures,
    sheet,
)
from .latents import encode_pictures, encode_scenes
from .runs import emoji_run
from .scenes import Scene, render_scene, subject_mask
from .sources import load_metadata, load_pictures
from .tuning import AdditionConfig, load_start, styles_of, train_conditioned

COMMAND = "sun train-emoji inpainting --config configs/emoji-inpainting.toml"
FIRST_LAYER = ("conv_in",)
MASK_KINDS = ("box", "ellipse", "subject", "half", "everything")


@dataclass
class InpaintingConfig(AdditionConfig):
    """The low rank is the U-Net's; each of the ``scenes`` gets one mask for the whole run."""

    run: RunConfig = field(default_factory=lambda: emoji_run("runs/emoji-inpainting", 1000, 1e-3))
    scenes: int = 6000
    check_scenes: int = 24


def widen(unet: Any) -> Any:
    """A copy of a 4-channel U-Net with 9 input channels; the new ones have no effect yet."""
    wide = UNet2DConditionModel.from_config(dict(unet.config), in_channels=9)
    weights = dict(unet.state_dict())
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(first.shape[0], 5, *first.shape[2:])], dim=1)
    wide.load_state_dict(weights)
    return wide


def load_inpainting_unet(unet: Any, file: str | Path = EMOJI_INPAINTING) -> Any:
    """The 9-channel U-Net that ``file`` makes of the base's, with its dtype and device, for diffusers' inpainting
    pipeline. Raises ValueError if the file is for another base."""
    wide = UNet2DConditionModel.from_config(dict(unet.config), in_channels=9)
    wide.load_state_dict(merge(unet.state_dict(), load_file(str(file)), Path(file).name))
    return wide.to(device=unet.device, dtype=unet.dtype).eval()


def draw_mask(scene: Scene, pictures: dict[str, Image.Image], size: int, rng: random.Random) -> Image.Image:
    """A random mask, white where the picture is to be made anew; mode L, ``size`` x ``size`` pixels."""
    kind = rng.choices(MASK_KINDS, (0.35, 0.2, 0.25, 0.12, 0.08))[0]
    if kind == "everything":
        return Image.new("L", (size, size), 255)
    if kind == "subject":
        # A little larger than the emoji: its outline must not be seen in what is left.
        mask = subject_mask(scene, pictures, size, rng.randrange(len(scene.emojis)))
        return mask.filter(ImageFilter.MaxFilter(2 * rng.randint(1, max(1, size // 20)) + 1))
    mask = Image.new("L", (size, size))
    if kind == "half":
        mask.paste(255, rng.choice(((0, 0, size // 2, size), (0, 0, size, size // 2))))
        return mask if rng.random() < 0.5 else ImageChops.invert(mask)
    width, height = (rng.randint(size // 4, 3 * size // 4) for _ in range(2))
    x, y = rng.randint(0, size - width), rng.randint(0, size - height)
    shape = ImageDraw.Draw(mask)
    (shape.rectangle if kind == "box" else shape.ellipse)((x, y, x + width - 1, y + height - 1), fill=255)
    return mask


def masked(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """``picture`` with grey under the mask, as diffusers' and ComfyUI's inpainting show it to the U-Net."""
    return Image.composite(Image.new("RGB", picture.size, (128, 128, 128)), picture, mask)


def latent_masks(masks: list[Image.Image]) -> Tensor:
    """[N, 1, h/8, w/8] of 0 and 1: what most of the middle of each 8 x 8 pixels is, as hosts scale masks down."""
    rows = [torch.frombuffer(bytearray(m.tobytes()), dtype=torch.uint8).view(1, m.height, m.width) for m in masks]
    pixels = torch.stack(rows).float() / 255
    return F.interpolate(pixels, scale_factor=1 / 8, mode="bilinear").round()


class MaskedScenes:
    """Scenes of one size with their latents, a mask for each, and the latents of the scenes under their masks."""

    def __init__(self, config: InpaintingConfig, vae: Any, pictures: dict[str, Image.Image], size: int):
        seed = config.run.seed
        emojis = load_metadata(config.emojis)
        self.scenes, self.latents = encode_scenes(vae, emojis, config.style, size, config.scenes, seed)
        scenes = self.scenes
        drawn = [draw_mask(scene, pictures, size, random.Random(f"{seed}/{i}")) for i, scene in enumerate(scenes)]
        identity = hashlib.sha256(repr([scene.caption for scene in scenes]).encode())
        for mask in drawn:
            identity.update(mask.tobytes())

        def picture(i: int) -> Image.Image:
            return masked(render_scene(scenes[i], pictures, size), drawn[i])

        self.masks = latent_masks(drawn)
        self.masked = encode_pictures(vae, f"masked-{config.style}-{size}", identity.hexdigest(), len(scenes), picture)

    def condition(self, numbers: list[int]) -> Tensor:
        """[B, 5, h, w]: the masks and the masked scenes' latents."""
        return torch.cat([self.masks[numbers], self.masked[numbers]], dim=1)


def train_inpainting(config: InpaintingConfig) -> Path:
    """Train, and write ``<output>/inpainting`` (weights, card, pictures); returns that folder."""
    pipe, folder = load_start(config, config.model), Path(config.run.output) / "inpainting"
    torch.manual_seed(config.run.seed)
    unet = widen(pipe.unet)
    add_low_rank(unet, config.rank, leave=FIRST_LAYER)
    pictures = load_pictures(config.style, load_metadata(config.emojis), 128)

    def predict(trained: Any, x_t: Tensor, t: Tensor, context: Tensor, hidden: Tensor) -> Tensor:
        return trained(torch.cat([x_t, hidden], dim=1), t, context).sample

    def write(trained: Any) -> None:
        save_inpainting(trained, folder / EMOJI_INPAINTING.name, name_of(config.model))

    run = train_conditioned(
        config, pipe, "unet", unet, lambda size: MaskedScenes(config, pipe.vae, pictures, size), predict, write
    )
    if run.accelerator.is_main_process:
        finish(config, run, pipe, folder)
    return folder


def save_inpainting(unet: Any, file: Path, base: str) -> Path:
    """Write what was trained on the 9-channel U-Net, in fp16; returns the file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(changes_of(unet), file, metadata={"format": "pt", "base_model": base})
    return file


def finish(config: InpaintingConfig, run: TrainingRun, pipe: Any, folder: Path) -> None:
    """Inpaint with the file that was written, and write pictures, figures, settings and card beside it."""
    file = folder / EMOJI_INPAINTING.name
    size = config.stages[-1][0]
    checked = draw_scenes(config.style, config.emojis, config.check_scenes, size)
    drawn = [draw_mask(s, checked.pictures, size, random.Random(f"check/{i}")) for i, s in enumerate(checked.scenes)]
    masks = torch.stack([_mask_tensor(m) for m in drawn])
    rows = draw_inpainted(config, run, pipe, file, checked, masks)
    figures = inpainting_figures(rows, checked.pixels, masks)
    shown = {"scene": checked.pixels, "masked": checked.pixels * (1 - masks), **rows}
    save_png(sheet(shown, 6), folder / "samples.png")
    write_json(folder / "settings.json", {**settings_of(config, run), "errors": figures})
    write_inpainting_card(config, run, file, figures)


def draw_inpainted(
    config: InpaintingConfig, run: TrainingRun, pipe: Any, file: Path, checked: Scenes, masks: Tensor
) -> dict[str, Tensor]:
    """The check's pictures [N, 3, h, w] by method: the autoencoder alone, the base, the 9-channel U-Net, and SUN on
    it where there is an adapter for this base."""
    wide = load_inpainting_unet(pipe.unet, file)
    use_fast_attention(wide, run.accelerator.device)
    base = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    inpainting = StableDiffusionInpaintPipeline(**{**pipe.components, "unet": wide}, requires_safety_checker=False)
    size, guidance = config.stages[-1][0], config.sample_guidance
    given: dict[str, Any] = {
        "image": checked.pixels / 2 + 0.5,
        "mask_image": masks,
        "strength": 1.0,
        "width": size,
        "height": size,
    }
    with torch.no_grad(), run.accelerator.autocast():
        pixels = checked.pixels.to(run.accelerator.device)
        rows = {"autoencoder alone": pipe.vae.decode(pipe.vae.encode(pixels).latents).sample.float().cpu()}
        rows[f"base, {REFERENCE_STEPS} steps"] = draw(base, checked.captions, guidance, **given)
        rows[f"inpainting, {REFERENCE_STEPS} steps"] = draw(inpainting, checked.captions, guidance, **given)
        if adapter := adapter_for(config.model):
            rows[f"inpainting, SUN, {SUN_STEPS} steps"] = draw(inpainting, checked.captions, 1.0, adapter, **given)
    return rows


def _mask_tensor(mask: Image.Image) -> Tensor:
    """[1, h, w] of 0 and 1."""
    return torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, mask.height, mask.width) / 255


def write_inpainting_card(
    config: InpaintingConfig, run: TrainingRun, file: Path, figures: dict[str, dict[str, float]]
) -> None:
    """Write the card beside ``file``."""
    about = f"""\
The base's U-Net with 9 input channels (noisy latents, mask, latents of the masked picture). The file holds what
differs from the base: the first layer and changes of rank {config.rank},
{size_in_words(run.parameters, file)}.

![scene, masked scene, and what each method made of it](samples.png)

- ComfyUI: the node Load Emoji Diffusion with variant `inpainting`, and InpaintModelConditioning.
- Python: `sun.lab.emoji.inpainting.load_inpainting_unet(pipe.unet)` for diffusers' `StableDiffusionInpaintPipeline`.

## Figures

Mean absolute difference from the true scene in grey levels of 255 on {config.check_scenes} scenes with random masks;
`seam` is the part of the inside within 4 pixels of the outside. The base is blended into the picture at every step, the
inpainting model is not; what the autoencoder alone changes is the least either can reach outside."""
    choice = """\
The base, whose kept parts are put back at every step, needs no training to leave the outside alone: compare the rows
before you choose this model over Set Latent Noise Mask."""
    write_card(
        file.parent,
        f"Inpainting model of {name_of(config.model)}",
        [
            about,
            figure_table(figures, "", "{:.1f}".format),
            choice,
            data_section(styles_of(config)),
            training_section(run, COMMAND),
        ],
        license=licence_of(styles_of(config)),
        tags="[inpainting]",
    )
