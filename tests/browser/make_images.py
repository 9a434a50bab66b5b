"""Makes docs/images/comfyui-*.png from the real page: python tests/browser/make_images.py"""

from __future__ import annotations

import io
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(1, str(Path(__file__).parents[2]))  # this folder is first already: it is the script's
from page import Page, start
from PIL import Image
from serving import serving

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "docs" / "images"
WORKFLOW = json.loads((ROOT / "example_workflows" / "SUN text to image.json").read_text(encoding="utf-8"))


def save(page: Page, name: str, box: tuple[int, int, int, int], width: int = 1000) -> None:
    """Part of the window, in pixels, as a small PNG at most `width` wide."""
    image = Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB").crop(box)
    if image.width > width:
        image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
    image = image.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    image.save(IMAGES / f"{name}.png", optimize=True)
    print(f"{name}: {image.width} x {image.height}, {(IMAGES / f'{name}.png').stat().st_size:,} bytes")


def run_and_help(page: Page) -> None:
    page.drop(WORKFLOW, "SUN text to image")
    page.run()
    page.wait(lambda: page.node("SaveImage", "(node.imgs ?? []).length"), "show the picture")
    page.wait(lambda: any("U-Net" in text for text in page.badges("SUN_Sampler")), "tell of the run")
    page.fit()
    time.sleep(8)  # the page's note of a finished run goes away
    left, top, right, bottom = page.area(["SUN_LoadEmojiDiffusion", "SUN_Apply", "SUN_Sampler", "SaveImage"])
    save(page, "comfyui-run", (left - 15, top - 40, right + 15, bottom + 15), width=1200)
    page.js("app.canvas.selectNode(app.graph.nodes.find(n => n.type === 'SUN_Sampler')); app.canvas.draw(true)")
    page.element("[data-testid='info-button']").click()
    page.element(".node-help-content h1")
    time.sleep(1)
    save(page, "comfyui-help", (0, 0, 1250, 900))
    page.element("[data-testid='info-button']").click()


def settings(page: Page) -> None:
    page.drop(WORKFLOW, "settings")
    page.js(
        """
        const apply = app.graph.nodes.find(node => node.type === 'SUN_Apply'), node = LiteGraph.createNode('KSampler');
        node.pos = [apply.pos[0] + apply.size[0] + 90, apply.pos[1] - 60];
        for (const id of [...app.graph.reroutes.keys()]) app.graph.removeReroute(id);
        app.graph.add(node);
        apply.connect(0, node, 0);
        for (const other of [...app.graph.nodes]) if (other !== node && other !== apply) app.graph.remove(other);
        for (const group of [...app.graph.groups]) app.graph.remove(group);
        """
    )
    page.set("KSampler", "cfg", 7.0)
    page.set("KSampler", "scheduler", "karras")
    page.focus("SUN_Apply", "KSampler")
    save(page, "comfyui-settings", page.area(["SUN_Apply", "KSampler"]), width=700)


def errors(page: Page) -> None:
    page.drop(WORKFLOW, "errors")
    page.set("SUN_LoadAdapter", "adapter_name", "broken.safetensors")
    about = "node.widgets.find(w => w.name === 'sun_text')?.value"
    page.wait(lambda: "broken" in (page.node("SUN_LoadAdapter", about) or ""), "tell of the file")
    page.focus("SUN_LoadAdapter")
    save(page, "comfyui-broken", page.area(["SUN_LoadAdapter"]))
    page.fit()
    page.run()
    page.error()
    time.sleep(1)
    save(page, "comfyui-error", (240, 220, 1360, 680), width=800)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch) / "ComfyUI") as server:
        driver = start(Path(scratch) / "profile")
        try:
            page = Page(driver, server.url, None)
            page.open()
            run_and_help(page)
            settings(page)
            errors(page)
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
