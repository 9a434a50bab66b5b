"""ComfyUI's page in a headless Chromium, driven as a user would: drop a file, press Run, read what is shown."""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.actions.action_builder import ActionBuilder
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

PATIENCE = 180  # seconds until a thing awaited counts as never coming; two busy cores take long
SIZE = (1600, 900)
# No page may reach anything but this machine, and Chromium is to start nothing of its own.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-dev-shm-usage",
    "--hide-scrollbars", "--force-device-scale-factor=1", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


def chromium() -> tuple[str, str] | None:
    """The programs chromium and chromedriver, if this machine has both."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    return (browser, driver) if browser and driver else None


def start(profile: Path) -> webdriver.Chrome:
    """A new Chromium with an empty profile."""
    found = chromium()
    assert found
    options = webdriver.ChromeOptions()
    options.binary_location = found[0]
    for flag in (*FLAGS, f"--user-data-dir={profile}", "--window-size={},{}".format(*SIZE)):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(executable_path=found[1]))
    driver.set_script_timeout(PATIENCE)
    width, height = SIZE
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    # ComfyUI's banner for its other way to draw nodes would lie over the page.
    dismiss = "try { localStorage.setItem('vueNodesBannerDismissed', 'true') } catch {}"
    driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": dismiss})
    return driver


class Page:
    """One opened page of ComfyUI. `screenshots` is a folder for pictures of it, or None for none."""

    def __init__(self, driver: webdriver.Chrome, url: str, screenshots: Path | None) -> None:
        self.driver, self.url, self.screenshots = driver, url, screenshots

    def open(self) -> None:
        """Loads the page anew and waits until ComfyUI is ready."""
        self.driver.get(self.url)
        self.wait(
            lambda: self.js("return Boolean(window.app?.extensionManager && app.canvas && app.graph)"), "be ready"
        )
        self.wait(
            lambda: self.js("return document.querySelector('.p-progress-spinner, .comfy-loading') === null"), "load"
        )
        self.js(
            """
            window.seen = {previews: 0, errors: []};
            app.api.addEventListener('b_preview_with_metadata', () => window.seen.previews++);
            window.addEventListener('error', (event) => window.seen.errors.push(event.message));
            """
        )

    def js(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def wait(self, done: Callable[[], Any], what: str) -> Any:
        """Waits until `done()` is true and returns what it gave."""
        end = time.monotonic() + PATIENCE
        while not (result := done()):
            if time.monotonic() > end:
                self.shoot("failed")
                raise AssertionError(f"The page did not {what} within {PATIENCE} s.\n{self.said()}")
            time.sleep(0.2)
        return result

    def said(self) -> str:
        """What the page wrote to its console."""
        return "\n".join(entry["message"] for entry in self.driver.get_log("browser"))

    def element(self, selector: str) -> WebElement:
        """The first visible element, awaited."""
        return self.wait(
            lambda: next((e for e in self.driver.find_elements(By.CSS_SELECTOR, selector) if e.is_displayed()), None),
            f"show {selector}",
        )

    # ------------------------------------------------------------------------------------------------------- workflows

    def drop(self, workflow: dict[str, Any], name: str) -> None:
        """Drops a workflow's file on the window and waits until its graph is there, seen whole."""
        self.js(
            """
            const transfer = new DataTransfer();
            transfer.items.add(new File([arguments[0]], arguments[1], {type: 'application/json'}));
            document.dispatchEvent(new DragEvent('drop', {dataTransfer: transfer, bubbles: true, cancelable: true}));
            """,
            json.dumps(workflow),
            f"{name}.json",
        )
        kinds = sorted(node["type"] for node in workflow["nodes"])
        self.wait(lambda: sorted(self.js("return app.graph.nodes.map(node => node.type)")) == kinds, f"load {name}")
        self.fit()

    def fit(self) -> None:
        """Brings the whole graph into view."""
        self.js("app.canvas.deselectAll?.(); app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        time.sleep(0.6)  # it glides there
        self.js("app.canvas.draw(true, true)")

    def node(self, kind: str, expression: str, *arguments: Any) -> Any:
        """Value of a JavaScript expression of `node`, the first node of a type."""
        script = f"const node = app.graph.nodes.find(n => n.type === arguments[0]); return {expression}"
        return self.js(script, kind, *arguments)

    def set(self, kind: str, widget: str, value: Any) -> None:
        """Sets a widget of the first node of a type as a click would."""
        script = "(w => { w.value = arguments[2]; w.callback?.(w.value); app.canvas.draw(true, true); })"
        self.node(kind, f"{script}(node.widgets.find(w => w.name === arguments[1]))", widget, value)

    def badges(self, kind: str) -> list[str]:
        """What stands over the first node of a type."""
        return self.node(kind, "node.badges.map(badge => (typeof badge === 'function' ? badge() : badge).text)")

    def run(self) -> None:
        """Presses Run, and takes the pointer away from it, for its tooltip would stay."""
        self.element("[data-testid='queue-button'] button, button[data-testid='queue-button']").click()
        pointer = ActionBuilder(self.driver)
        pointer.pointer_action.move_to_location(SIZE[0] - 5, SIZE[1] // 2)
        pointer.perform()

    def error(self) -> WebElement:
        """Where the page tells of an error: a dialog or, in newer pages, a panel that a notice leads to."""
        shown = self.element(".p-dialog .comfy-error-report, [data-testid='error-overlay-see-errors']")
        if not shown.get_attribute("data-testid"):
            return shown
        shown.click()
        return self.element("[data-testid='properties-panel'] [data-testid^='error-group-']")

    def close_errors(self) -> None:
        """Closes what `error` opened."""
        for _ in range(3):
            if not self.js("return document.querySelector('.p-dialog') !== null"):
                break
            self.js("document.querySelector('.p-dialog-close-button')?.click()")
            self.wait(lambda: self.js("return !document.querySelector('.p-dialog-leave-active')"), "close a dialog")
        if self.js("return document.querySelector(\"[data-testid='properties-panel']\") !== null"):
            self.js("return app.extensionManager.setting.set('Comfy.RightSidePanel.IsOpen', false)")

    def focus(self, *kinds: str) -> None:
        """Brings the nodes of these types into view at full size."""
        self.js(
            """
            const nodes = app.graph.nodes.filter(node => arguments[0].includes(node.type)), {ds} = app.canvas;
            const left = Math.min(...nodes.map(n => n.pos[0])), top = Math.min(...nodes.map(n => n.pos[1]));
            ds.scale = 1.25;
            [ds.offset[0], ds.offset[1]] = [130 - left, 180 - top];
            app.canvas.draw(true, true);
            """,
            kinds,
        )
        time.sleep(0.3)

    # ------------------------------------------------------------------------------------------------------ screenshots

    def shoot(self, name: str, nodes: list[str] | None = None) -> None:
        """Writes a PNG of the window, or of the part of it with nodes of these types."""
        if self.screenshots is None:
            return
        self.screenshots.mkdir(parents=True, exist_ok=True)
        image = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        if nodes:
            image = image.crop(self.area(nodes))
        image.save(self.screenshots / f"{name}.png", optimize=True)

    def area(self, kinds: list[str]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) in pixels of the window around the nodes of these types, title and badges too."""
        boxes = self.js(
            """
            const {scale, offset} = app.canvas.ds, at = app.canvas.canvas.getBoundingClientRect();
            return app.graph.nodes.filter(n => arguments[0].includes(n.type)).map(({pos, size}) => [
                at.left + (pos[0] + offset[0]) * scale, at.top + (pos[1] + offset[1] - 62) * scale,
                at.left + (pos[0] + size[0] + offset[0]) * scale, at.top + (pos[1] + size[1] + offset[1]) * scale]);
            """,
            kinds,
        )
        left, top = (min(box[i] for box in boxes) - 15 for i in (0, 1))
        right, bottom = (max(box[i] for box in boxes) + 15 for i in (2, 3))
        return max(0, int(left)), max(0, int(top)), min(SIZE[0], int(right)), min(SIZE[1], int(bottom))
