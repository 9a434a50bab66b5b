"""Makes the thumbnails ComfyUI's template browser shows for example_workflows/.

python tests/comfy/make_thumbnails.py                                     draws every workflow that has no thumbnail
python tests/comfy/make_thumbnails.py SUN text to image=picture.png ...   takes the picture as thumbnail

SUN_PICTURES=FOLDER pytest -c tests/pytest.ini tests/comfy/test_comfy_workflows.py leaves each workflow's picture there.
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
SIDE = 512
TITLE = 26
LINK_COLORS = {
    "MODEL": "#b39ddb", "CLIP": "#ffd500", "VAE": "#ff6e6e", "CONDITIONING": "#ffa931", "LATENT": "#ff9cf9",
    "IMAGE": "#64b5f6", "MASK": "#81c784", "CONTROL_NET": "#00d78d", "NOISE": "#b0b0b0", "GUIDER": "#66ffff",
    "SAMPLER": "#ecb4b4", "SIGMAS": "#cdffcd", "SUN_ADAPTER": "#ffffff",
}  # fmt: skip
TITLES = {
    "SUN_LoadAdapter": "Load SUN Adapter", "SUN_Apply": "Apply SUN to Model", "SUN_Sampler": "SUN 4-step Sampler",
    "SUN_LoadEmojiDiffusion": "Load Emoji Diffusion", "EmptyLatentImage": "Empty Latent Image",
    "CheckpointLoaderSimple": "Load Checkpoint", "VAEDecode": "VAE Decode", "SaveImage": "Save Image",
    "SUN_LoadEmojiControlNet": "Load Emoji ControlNet", "SUN_Scheduler": "SUN Scheduler", "SUN_Guider": "SUN Guider",
    "PreviewImage": "Preview Image", "VAEEncode": "VAE Encode", "SolidMask": "Solid Mask", "RandomNoise": "Noise",
    "SetLatentNoiseMask": "Set Latent Noise Mask", "ControlNetApplyAdvanced": "Apply ControlNet",
    "LoraLoaderModelOnly": "Load LoRA", "ConditioningSetArea": "Set Area", "ConditioningSetMask": "Set Mask",
    "ConditioningCombine": "Combine", "LatentUpscale": "Upscale Latent", "KSamplerSelect": "Sampler Select",
}  # fmt: skip


def from_picture(picture: Path) -> Image.Image:
    """A square of SIDE pixels; small pictures are enlarged, wide ones get margins."""
    image = Image.open(picture).convert("RGB")
    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color="#1e1e1e")


def from_graph(workflow: dict) -> Image.Image:
    """The workflow as a drawing: a box a node, a line a link."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    boxes = [(*node["pos"], node["pos"][0] + node["size"][0], node["pos"][1] + node["size"][1])
             for node in nodes.values()]  # fmt: skip
    boxes += [(x, y + TITLE, x + width, y + height) for x, y, width, height in _bounds(workflow)]
    left, top = min(box[0] for box in boxes), min(box[1] - TITLE for box in boxes)
    right, bottom = max(box[2] for box in boxes), max(box[3] for box in boxes)
    scale = 2 * (SIDE - 24) / max(right - left, bottom - top)
    shift = (SIDE - (right + left) * scale / 2, SIDE - (bottom + top) * scale / 2)
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), "#1e1e1e")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=22 * scale)

    def at(x: float, y: float) -> tuple[float, float]:
        return x * scale + shift[0], y * scale + shift[1]

    for (x, y, width, height), group in zip(_bounds(workflow), workflow["groups"], strict=True):
        draw.rounded_rectangle((*at(x, y), *at(x + width, y + height)), 8 * scale, fill="#28323a", outline="#3f789e")
        draw.text(at(x + 12, y + 6), group["title"], fill="#9fb8c8", font=font)
    for node in nodes.values():
        (x, y), (width, height) = node["pos"], node["size"]
        box = (*at(x, y - TITLE), *at(x + width, y + height))
        draw.rounded_rectangle(box, 8 * scale, fill=node.get("bgcolor", "#353535"), outline="#0d0d0d", width=2)
        title = node.get("title") or TITLES.get(node["type"], node["type"])
        draw.text(at(x + 8, y - TITLE + 2), title, fill="#dddddd", font=font)
        if node["type"] == "MarkdownNote":
            body = ImageFont.load_default(size=11 * scale)
            lines = [line for text in node["widgets_values"][0].splitlines() for line in _wrap(text, 52)]
            draw.text(at(x + 8, y + 8), "\n".join(lines[: int(height / 14)]), fill="#bbbbbb", font=body)
    for _, source, source_slot, target, target_slot, kind in workflow["links"]:
        start = at(nodes[source]["pos"][0] + nodes[source]["size"][0], nodes[source]["pos"][1] + 14 + 20 * source_slot)
        end = at(nodes[target]["pos"][0], nodes[target]["pos"][1] + 14 + 20 * target_slot)
        draw.line(
            _curve(start, end), fill=LINK_COLORS.get(kind, "#aaaaaa"), width=max(2, round(3 * scale)), joint="curve"
        )
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _bounds(workflow: dict) -> list[list[float]]:
    return [group["bounding"] for group in workflow["groups"]]


def _curve(start: tuple[float, float], end: tuple[float, float]) -> list[tuple[float, float]]:
    """A cubic Bezier curve that leaves and arrives horizontally."""
    pull = max(20.0, abs(end[0] - start[0]) / 2)
    controls = (start, (start[0] + pull, start[1]), (end[0] - pull, end[1]), end)
    points = []
    for step in range(25):
        t = step / 24
        weights = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
        points.append(tuple(sum(w * c[axis] for w, c in zip(weights, controls, strict=True)) for axis in (0, 1)))
    return points


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def main(arguments: list[str]) -> None:
    pictures = dict(argument.split("=", 1) for argument in arguments)
    for path in sorted(WORKFLOWS.glob("*.json")):
        target = path.with_suffix(".jpg")
        picture = pictures.pop(path.stem, None)
        if picture is None and target.exists():
            continue
        image = from_picture(Path(picture)) if picture else from_graph(json.loads(path.read_text(encoding="utf-8")))
        image.save(target, quality=88)
        print(target)
    if pictures:
        sys.exit(f"No such workflow: {', '.join(pictures)}")


if __name__ == "__main__":
    main(sys.argv[1:])
