"""What a reproduction leaves in the package, or in a folder of its own with the same layout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ..evaluation.demo import run as draw_demo
from ..pictures.recipe import Recipe
from ..shipped import (
    EMOJI_CONTRAST,
    EMOJI_CONTROLNET,
    EMOJI_DIFFUSION,
    EMOJI_INPAINTING,
    EMOJI_LORA,
    EMOJI_SUN,
    MODELS_DIR,
)
from .emoji.ship import add_agreement, ship_adapter, ship_base, ship_folder, ship_lora

ROOT = MODELS_DIR.parents[1]
REPORTS = Path("reports") / "emoji"


@dataclass(frozen=True)
class Release:
    """The folders of the finished runs, and w. Without ``base`` the model was there before, and keeps its files."""

    model: Path  # what all of it was made for
    base: Path | None
    autoencoder: tuple[Path, ...]  # its runs in order: anew, its latents, its decoder
    contrast: Path
    adapter: Path
    lora: Path
    controlnet: Path
    inpainting: Path
    agreement: Path
    evaluation: Path
    guidance: float


def release(made: Release, folder: Path | None = None) -> list[Path]:
    """Write weights with their cards, docs/demo.png, the reports and, into the package itself, the thumbnails of the
    workflows; returns what was written. ``folder`` takes all of it in place of the package."""

    def to(path: Path) -> Path:
        return path if folder is None else folder / path.relative_to(ROOT)

    base, written = made.model, []
    if made.base is not None:
        base = ship_base(made.base, to(EMOJI_DIFFUSION), made.guidance, vae_runs=made.autoencoder)
        add_agreement(base, made.agreement)
        written.append(base)
    written += [
        ship_adapter(made.adapter, to(EMOJI_SUN)),
        ship_folder(made.contrast, to(EMOJI_CONTRAST)),
        ship_lora(made.lora, to(EMOJI_LORA)),
        ship_folder(made.controlnet, to(EMOJI_CONTROLNET.parent)),
        ship_folder(made.inpainting, to(EMOJI_INPAINTING.parent)),
        *_reports(made, to(ROOT / REPORTS)),
    ]
    recipe = Recipe(model=str(base), adapter=str(to(EMOJI_SUN)))
    pictures = (folder or ROOT / "build") / "demo"
    target = to(ROOT / "docs" / "demo.png")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(draw_demo(pictures, recipe=recipe).grid, target)
    written.append(target)
    if folder is None:
        written += _thumbnails()
    return written


def _reports(made: Release, target: Path) -> list[Path]:
    """The figures, tables and pictures of both evaluations, without their cells; a picture as JPEG where that is what
    the repository keeps."""
    written = []
    for source, place in ((made.evaluation, target), (made.agreement, target / "agreement")):
        for file in sorted(source.rglob("*")):
            if file.is_file() and file.relative_to(source).parts[0] != "cells":
                destination = place / file.relative_to(source)
                destination.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, destination)
                written.append(destination)
    return written


def _thumbnails() -> list[Path]:
    """Draw every example workflow on a ComfyUI and keep its picture, by the repository's own tools."""
    tools, pictures = ROOT / "tests" / "comfy", ROOT / "build" / "workflows"
    pictures.mkdir(parents=True, exist_ok=True)
    tests = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", str(tools / "test_comfy_workflows.py"), "-q"]
    subprocess.run(tests, cwd=ROOT, env={**os.environ, "SUN_PICTURES": str(pictures)}, check=True)
    pairs = [f"{file.stem}={file}" for file in sorted(pictures.glob("*.png"))]
    subprocess.run([sys.executable, str(tools / "make_thumbnails.py"), *pairs], cwd=ROOT, check=True)
    return [ROOT / "example_workflows"]
