"""A ComfyUI server with this pack and its page in Chromium, shared by the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Server, serving


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.comfy)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """ComfyUI with the pack, an adapter file cut short, and step previews."""
    with serving(tmp_path_factory.mktemp("browser"), "--preview-method", "latent2rgb") as server:
        yield server


@pytest.fixture(scope="module")
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    """ComfyUI's page, open and ready."""
    pytest.importorskip("selenium", reason='the browser tests need selenium: pip install -e ".[dev]"')
    from page import Page, chromium, start

    if chromium() is None:
        pytest.skip("the browser tests need Chromium: apt-get install chromium chromium-driver")
    server: Server = request.getfixturevalue("server")  # not started where there is no browser
    folder = request.config.getoption("screenshots")
    driver = start(tmp_path_factory.mktemp("profile"))
    try:
        page = Page(driver, server.url, Path(folder) if folder else None)
        page.open()
        yield page
    finally:
        driver.quit()
