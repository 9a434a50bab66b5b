"""Train the image-text model ``EmojiContrast`` and measure it on combinations it never saw."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTokenizer

from ...common.atomic import write_json
from ...common.markdown import table
from ...shipped import EMOJI_DIFFUSION
from ...training.card import size_in_words, training_section, write_card
from ...training.config import RunConfig
from ...training.run import TrainingRun, start_run
from .cards import data_section, licence_of, settings_of
from .contrast import WEIGHTS, ContrastShape, EmojiContrast
from .pairs import Pair, ScenePool, full_caption
from .runs import emoji_run
from .scenes import BACKGROUNDS, PLACES, Scene
from .sources import load_metadata
from .vae import to_tensor

MAX_SCALE = 100.0  # of the cosines, as CLIP's


@dataclass
class ContrastConfig:
    """``held_out`` is the share of (emoji, background, size) combinations that training never shows, in any style."""

    run: RunConfig = field(
        default_factory=lambda: emoji_run(
            "runs/emoji-contrast", 1500, 1e-3, batch_size=128, warmup_steps=100, weight_decay=0.05, betas=(0.9, 0.98)
        )
    )
    shape: ContrastShape = field(default_factory=ContrastShape)
    styles: tuple[str, ...] = ("twemoji", "openmoji", "fluent", "google")
    emojis: str = "everyday"  # or "wide", "all": see sources.load_metadata
    tokenizer: str = ""  # folder of a CLIP tokenizer; empty: the shipped model's
    held_out: float = 0.1
    variations: float = 1.0  # see ScenePool.pairs
    phrased: float = 0.2
    check_scenes: int = 400  # held-out scenes a style
    candidates: int = 100  # texts to choose from


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, fits: Tensor) -> tuple[Tensor, Tensor]:
    """CLIP's symmetric cross-entropy over a batch, and the share of pictures that found their text.

    ``images``, ``texts`` [B, D] of length 1; ``fits`` [B, B] bool: text j is true of picture i. A text that is true
    of another's picture is no wrong answer there, so it is left out of that picture's choices, and the reverse.
    """
    targets = torch.arange(len(images), device=images.device)
    also = fits.to(images.device) & ~torch.eye(len(images), dtype=torch.bool, device=images.device)
    logits = (scale * images @ texts.T).masked_fill(also, -math.inf)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    return loss, (logits.argmax(1) == targets).float().mean().detach()


def fitting(pairs: list[Pair]) -> Tensor:
    """[B, B] bool: text j is true of picture i."""
    return torch.tensor([[text.says.true_of(picture.scene) for text in pairs] for picture in pairs])


def augment(pixels: Tensor) -> Tensor:
    """Blur, tint and noise, differently for each picture: what a small diffusion model does to its pictures.

    ``pixels`` [B, 3, H, W] in -1..1. Size, place and mirroring have names and stay.
    """
    count, device = len(pixels), pixels.device

    def uniform(low: float, high: float, channels: int = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, channels, 1, 1, device=device)

    blurred = F.avg_pool2d(F.avg_pool2d(pixels, 3, 1, 1, count_include_pad=False), 3, 1, 1, count_include_pad=False)
    pixels = torch.lerp(pixels, blurred, uniform(-1.0, 1.0).clamp(min=0.0))
    pixels = pixels * uniform(0.9, 1.1, 3) + uniform(-0.1, 0.1, 3)
    return (pixels + uniform(0.0, 0.1) * torch.randn_like(pixels)).clamp(-1, 1)


def train_contrast(config: ContrastConfig) -> Path:
    """Train and write ``<output>/contrast``: weights, tokenizer, figures.json and the card; returns that folder."""
    pool = ScenePool(config.styles, load_metadata(config.emojis), config.held_out)
    torch.manual_seed(config.run.seed)
    tokenizer = CLIPTokenizer.from_pretrained(config.tokenizer or EMOJI_DIFFUSION / "tokenizer")
    model = EmojiContrast(config.shape, tokenizer)
    run = start_run(config, {"contrast": model})
    device = run.accelerator.device
    sampled = run.progress.seconds
    for _ in run.steps():
        pairs = pool.pairs(config.run.batch_size, run.rng, config.variations, config.phrased)
        pixels = to_tensor([pool.render(p.style, p.scene, config.shape.size) for p in pairs]).to(device)
        with run.accelerator.autocast():
            images, texts, scale = run.modules["contrast"](
                augment(pixels).contiguous(memory_format=torch.channels_last),
                *model.tokenize([p.says.text for p in pairs]),
            )
        loss, found = contrastive_loss(images.float(), texts.float(), scale, fitting(pairs))
        run.update(loss, found=found)
        with torch.no_grad():
            model.log_scale.clamp_(max=math.log(MAX_SCALE))
        if run.progress.seconds - sampled > 60 * config.run.sample_minutes:
            sampled = run.progress.seconds
            save_contrast(config, run, pool)
    return save_contrast(config, run, pool)


def save_contrast(config: ContrastConfig, run: TrainingRun, pool: ScenePool) -> Path:
    """Write the averaged weights in fp16, and the figures and the card of what was written."""
    folder = run.folder / "contrast"
    if run.accelerator.is_main_process:
        with run.averaged():
            run.unwrapped("contrast").save(folder)
        model = EmojiContrast.load(folder).to(run.accelerator.device)
        figures = check_contrast(model, pool, config.check_scenes, config.candidates)
        write_json(folder / "figures.json", {**figures, "training": settings_of(config, run)})
        write_contrast_card(model, figures, config, run, folder)
        mean = ", ".join(f"{k} {v:.3f}" for k, v in figures["mean"].items())
        run.say(f"step {run.progress.step}: {run.average_losses()}; held out: {mean}")
    return folder


@torch.no_grad()
def check_contrast(model: EmojiContrast, pool: ScenePool, count: int, candidates: int, seed: int = 1) -> dict[str, Any]:
    """Shares of right answers on ``count`` held-out scenes of each style, with the share that guessing gets.

    ``image_to_text`` and ``text_to_image`` choose among ``candidates`` full captions or pictures; ``emoji`` among
    the names of all emoji; ``background``, ``size``, ``place`` and ``order`` (of a pair) among captions that differ
    in that alone.
    """
    rows = {}
    for style in pool.pictures:
        rng = random.Random(seed)
        scenes = [pool.scene(style, rng, held_out=True) for _ in range(count)]
        images = _image_features(model, pool, style, scenes)
        rows[style] = {
            **_retrieval(model, scenes, images, candidates),
            "emoji": _naming(model, pool, style, scenes, images),
        }
        for name, others in _ALTERNATIVES.items():
            rows[style][name] = _choosing(model, scenes, images, others)
    names = list(next(iter(rows.values())))
    mean = {n: sum(r[n] for r in rows.values()) / len(rows) for n in names}
    known = max(len(e) for e in pool.emojis.values())
    found = 1 / min(candidates, count)
    chance = {
        "image_to_text": found,
        "text_to_image": found,
        "emoji": 1 / known,
        "background": 1 / len(BACKGROUNDS),
        "size": 1 / 2,
        "place": 1 / 4,
        "order": 1 / 2,
    }
    return {"scenes": count, "candidates": candidates, "mean": mean, "chance": chance, "styles": rows}


_ALTERNATIVES: dict[str, Callable[[Scene], list[Scene]]] = {
    "background": lambda s: [replace(s, background=b) for b in BACKGROUNDS],
    "size": lambda s: [replace(s, size=v) for v in ("small", "large")] if s.size and not s.place else [],
    "place": lambda s: [replace(s, place=place) for place in PLACES if place] if s.place else [],
    "order": lambda s: [s, replace(s, emojis=s.emojis[::-1])] if len(s.emojis) == 2 else [],
}


def _image_features(model: EmojiContrast, pool: ScenePool, style: str, scenes: list[Scene]) -> Tensor:
    size, parts = model.shape.size, []
    for start in range(0, len(scenes), 64):
        pixels = to_tensor([pool.render(style, s, size) for s in scenes[start : start + 64]])
        parts.append(model.image_features(pixels))
    return torch.cat(parts)


def _text_features(model: EmojiContrast, texts: list[str]) -> Tensor:
    return torch.cat([model.text_features(texts[i : i + 256]) for i in range(0, len(texts), 256)])


def _retrieval(model: EmojiContrast, scenes: list[Scene], images: Tensor, candidates: int) -> dict[str, float]:
    said = [full_caption(s) for s in scenes]
    texts = _text_features(model, [s.text for s in said])
    right = {"image_to_text": 0, "text_to_image": 0}
    for start in range(0, len(scenes), candidates):
        rows = slice(start, start + candidates)
        fits = torch.tensor([[text.true_of(scene) for text in said[rows]] for scene in scenes[rows]])
        fits = (fits & ~torch.eye(len(fits), dtype=torch.bool)).to(images.device)
        cosines = (images[rows] @ texts[rows].T).masked_fill(fits, -math.inf)
        own = torch.arange(len(fits), device=images.device)
        right["image_to_text"] += int((cosines.argmax(1) == own).sum())
        right["text_to_image"] += int((cosines.argmax(0) == own).sum())
    return {k: v / len(scenes) for k, v in right.items()}


def _naming(model: EmojiContrast, pool: ScenePool, style: str, scenes: list[Scene], images: Tensor) -> float:
    """Share of pictures with one emoji whose name, alone, fits better than every other name."""
    emojis = pool.emojis[style]
    single = [i for i, s in enumerate(scenes) if len(s.emojis) == 1]
    guessed = (images[single] @ _text_features(model, [e.name for e in emojis]).T).argmax(1).tolist()
    right = [emojis[g].code == scenes[i].emojis[0].code for i, g in zip(single, guessed, strict=True)]
    return sum(right) / max(1, len(right))


def _choosing(
    model: EmojiContrast, scenes: list[Scene], images: Tensor, alternatives: Callable[[Scene], list[Scene]]
) -> float:
    """Share of pictures whose own caption fits better than those of its alternatives; those without any left out."""
    choices = [[full_caption(a).text for a in alternatives(s)] for s in scenes]
    features = iter(_text_features(model, [t for texts in choices for t in texts] or [""]))
    right = []
    for scene, image, texts in zip(scenes, images, choices, strict=True):
        if texts:
            scores = [float(image @ next(features)) for _ in texts]
            own = full_caption(scene).text
            right.append(texts[scores.index(max(scores))] == own)
    return sum(right) / max(1, len(right))


def write_contrast_card(
    model: EmojiContrast, figures: dict[str, Any], config: ContrastConfig, run: TrainingRun, folder: Path
) -> None:
    size = size_in_words(model.parameters(), folder / WEIGHTS)
    side = model.shape.size
    about = f"""\
Says how well a picture of emoji fits a text (`EmojiContrast.load().agreement(pixels, texts)`), and gives features to
compare pictures by. {size} in fp16; read at {side} x {side} pixels.
Trained with CLIP's symmetric loss; a text that is also true of another picture of the batch is left out there.

## Held-out combinations

{config.held_out:.0%} of the (emoji, background, size) combinations never occur in training. Share of right answers on
{figures["scenes"]} such scenes a style: among {figures["candidates"]} captions or pictures; among the names of all
emoji; among captions that differ in one thing alone."""
    names = list(figures["mean"])
    rows = {"guessing": figures["chance"], **figures["styles"], "**mean**": figures["mean"]}
    head = ["", *(name.replace("_", " ") for name in names)]
    command = "sun train-emoji contrast --config configs/emoji-contrast.toml"
    write_card(
        folder,
        "EmojiContrast",
        [
            about,
            table(head, ([row, *(f"{value[n]:.3f}" for n in names)] for row, value in rows.items())),
            data_section(config.styles),
            training_section(run, command),
            f"Sizes: {asdict(config.shape)}.",
        ],
        license=licence_of(config.styles),
        library_name="speedupnet-sun",
        pipeline_tag="zero-shot-image-classification",
    )
