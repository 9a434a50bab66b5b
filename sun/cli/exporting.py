"""``sun export``: a model with SUN in it for OpenVINO or ONNX Runtime."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..shipped import SHIPPED
from .app import app
from .options import Adapter, ConfigDir, ControlNet, Json, Lora, check_folder, parse_size
from .show import out, progress_bar, write_json


class Runtime(StrEnum):
    """Same names as sun.runtimes.contents.RUNTIMES."""

    openvino = "openvino"
    onnx = "onnx"


class Weights(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    int8 = "int8"


@app.command(
    epilog="""Examples:

sun export emoji --to openvino --out emoji-openvino

sun export dreamshaper.safetensors --adapter sun_adapter.safetensors --to openvino --weights int8 --out dreamshaper-int8

sun generate "a castle" --negative blurry --model dreamshaper-int8"""
)
def export(
    model: Annotated[str, typer.Argument(help="Diffusers folder or checkpoint; emoji is the shipped one.")],
    runtime: Annotated[Runtime, typer.Option("--to", help="What is to run it.", show_default=False)],
    folder: Annotated[Path, typer.Option("--out", help="Folder to make.", show_default=False)],
    adapter: Adapter = SHIPPED,
    weights: Annotated[
        Weights, typer.Option(help="fp16 halves the files and computes as the runtime likes; int8 quarters them.")
    ] = Weights.fp32,
    size: Annotated[
        str, typer.Option(help="Fix the pictures' pixels, as 512 or 512x768. (default: any multiples of 8)")
    ] = "",
    lora: Lora = None,
    controlnet: ControlNet = "",
    config: ConfigDir = "",
    figures: Json = None,
) -> None:
    """Write a model with its SUN adapter as a folder that OpenVINO or ONNX Runtime runs: `sun generate --model FOLDER`.

    LoRAs become part of the weights, the negative prompt, strength and guidance scale stay free. A small 4-step
    picture is compared with torch's at the end. The folder appears complete or not at all.
    """
    check_folder(folder)
    from ..pictures.recipe import split_lora
    from ..runtimes.export import ExportSettings
    from ..runtimes.export import export as run

    settings = ExportSettings(
        model=model,
        adapter=adapter,
        runtime=runtime.value,
        out=folder,
        weights=weights.value,
        size=parse_size(size) if size else None,
        loras=tuple(split_lora(text) for text in lora or ()),
        controlnet=controlnet,
        config=config,
    )
    with progress_bar("exporting") as progress:
        contents = run(settings, lambda name, done, total: progress(done, total))
    found, size_in_bytes = contents.agreement, sum(int(mark["bytes"]) for mark in contents.files.values())
    sizes = "any multiples of 8" if contents.size is None else f"{contents.size[0]}x{contents.size[1]} alone"
    out.print(f"{folder}: {size_in_bytes / 1e6:,.1f} MB, {contents.weights} weights, pictures of {sizes}, any batch")
    out.print(
        f"against torch, 4 steps: latents differ by {found['latents']:.2g} of their size, PSNR {found['psnr']:.1f} dB",
        soft_wrap=True,
    )
    write_json(figures, {"folder": str(folder), "bytes": size_in_bytes, "weights": contents.weights, **found})
