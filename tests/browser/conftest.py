"""A ComfyUI server with this pack and its page in Chromium, shared by the tests of this folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.comfy)
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with the pack, an adapter file cut short, and step previews."""
    base = tmp_path_factory.mktemp("browser")
    for folder in ("custom_nodes", "input", "output", "temp", "user/default", "models/checkpoints", "models/sun"):
        (base / folder).mkdir(parents=True)
    copy_pack(base / "custom_nodes" / "SUN")
    (base / "models/sun/broken.safetensors").write_bytes(EMOJI_SUN.read_bytes()[:100_000])
    (base / "user/default/comfy.settings.json").write_text(json.dumps(SETTINGS))
    (base / "extra_model_paths.yaml").write_text("{}\n")
    server = Server(obtain_comfyui(), base, "--preview-method", "latent2rgb")
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def page(server: Server, tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Iterator:
    """ComfyUI's page, open and ready."""
    pytest.importorskip("selenium", reason='the browser tests need selenium: pip install -e ".[dev]"')
    from page import Page, chromium, start

    if chromium() is None:
        pytest.skip("the browser tests need Chromium: apt-get install chromium chromium-driver")
    folder = pytestconfig.getoption("screenshots")
    driver = start(tmp_path_factory.mktemp("profile"))
    try:
        page = Page(driver, server.url, Path(folder) if folder else None)
        page.open()
        yield page
    finally:
        driver.quit()
