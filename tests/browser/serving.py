"""A ComfyUI server for the browser: the pack, an adapter file cut short, step previews, no welcome and no news."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[1] / "comfy"))
from comfyui_host import obtain_comfyui
from comfyui_server import Server, copy_pack

from sun.shipped import EMOJI_SUN

# What a user has who has seen the welcome and does not look for updates.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.InstalledVersion": "1.32.9",
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Locale": "en",
    "Comfy.Workflow.Persist": False,
    "Comfy.Workflow.ConfirmDelete": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "LiteGraph.Canvas.MinFontSizeForLOD": 0,  # text is drawn however far away
}


@contextlib.contextmanager
def serving(base: Path, *arguments: str) -> Iterator[Server]:
    """A running ComfyUI with the base folder `base`, which is made. `arguments` go to its command line."""
    for folder in ("custom_nodes", "input", "output", "temp", "user/default", "models/checkpoints", "models/sun"):
        (base / folder).mkdir(parents=True)
    copy_pack(base / "custom_nodes" / "SUN")
    (base / "models/sun/broken.safetensors").write_bytes(EMOJI_SUN.read_bytes()[:100_000])
    (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
    (base / "extra_model_paths.yaml").write_text("{}\n")
    server = Server(obtain_comfyui(), base, *arguments)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()
