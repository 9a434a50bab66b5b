"""Makes the thumbnails ComfyUI's template browser shows for example_workflows/.

python tests/comfy/make_thumbnails.py "SUN text to image=picture.png" ...   takes the picture as thumbnail

SUN_PICTURES=FOLDER pytest -c tests/pytest.ini tests/comfy/test_comfy_workflows.py leaves each workflow's picture there.
That of Stable Diffusion 1.5, whose weights no test has, is a part of ComfyUI's page with the workflow open.
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageOps

WORKFLOWS = Path(__file__).resolve().parents[2] / "example_workflows"
SIDE = 512


def thumbnail(picture: Path) -> Image.Image:
    """A square of SIDE pixels; small pictures are enlarged, wide ones get margins."""
    image = Image.open(picture).convert("RGB")
    return ImageOps.pad(image, (SIDE, SIDE), Image.Resampling.LANCZOS, color="#1e1e1e")


def main(arguments: list[str]) -> None:
    pictures = dict(argument.split("=", 1) for argument in arguments)
    workflows = {path.stem: path for path in sorted(WORKFLOWS.glob("*.json"))}
    if unknown := pictures.keys() - workflows.keys():
        sys.exit(f"No such workflow: {', '.join(sorted(unknown))}")
    for name, picture in pictures.items():
        thumbnail(Path(picture)).save(workflows[name].with_suffix(".jpg"), quality=88)
        print(workflows[name].with_suffix(".jpg"))
    if missing := [name for name, path in workflows.items() if not path.with_suffix(".jpg").is_file()]:
        sys.exit(f"Without a thumbnail: {', '.join(missing)}")


if __name__ == "__main__":
    main(sys.argv[1:])
