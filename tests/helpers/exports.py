"""What the tests of exported models share, and what is asked of each runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sun
from sun.pipelines.loading import load_pipeline

Exported = Callable[..., tuple[Path, Any]]
TEXTS = {"prompt": ["a cat", "a dog on a hill"], "negative_prompt": ["blurry", "x"]}


def attached(files: Path, adapter: str = "adapter.safetensors", **options: Any) -> Any:
    pipe = load_pipeline(files / "model")
    sun.attach(pipe, files / adapter, **options)
    return pipe


def latents_of(pipe: Any, seed: int = 5, size: tuple[int, int] = (64, 64), **options: Any) -> torch.Tensor:
    """(width, height) = size; two prompts unless ``options`` say otherwise."""
    noise = torch.randn(2, 4, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))
    options = {**TEXTS, "latents": noise, "width": size[0], "height": size[1], **options}
    return pipe(num_inference_steps=4, output_type="latent", **options).images


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check_four_steps(exported: Exported, files: Path, runtime: str) -> None:
    """They are torch's at any size, batch, guidance and strength."""
    folder, contents = exported(runtime, "guided.safetensors", controlnet=str(files / "controlnet"))
    assert contents.agreement["latents"] <= 1e-4
    ours, theirs = sun.load_exported(folder, threads=1), attached(files, "guided.safetensors")
    assert difference(latents_of(ours), latents_of(theirs)) <= 1e-4
    odd = (72, 104)  # 9 x 13 latents, which no downsampling divides evenly
    assert difference(latents_of(ours, size=odd), latents_of(theirs, size=odd)) <= 1e-4
    assert difference(latents_of(ours, size=odd), latents_of(ours, size=odd, negative_prompt=["", ""])) > 1e-3
    assert difference(latents_of(ours, guidance_scale=7.0), latents_of(theirs, guidance_scale=7.0)) <= 1e-4
    assert difference(latents_of(ours, guidance_scale=7.0), latents_of(ours)) > 1e-3
    half = attached(files, "guided.safetensors", strength=0.5)
    assert difference(latents_of(ours, sun_strength=0.5), latents_of(half)) <= 1e-4
    plain = load_pipeline(files / "model")
    plain.scheduler = theirs.scheduler
    assert difference(latents_of(ours, sun_strength=0.0), latents_of(plain, guidance_scale=1.0)) <= 1e-4


def check_smaller_weights(exported: Exported, files: Path, runtime: str, weights: str) -> None:
    """They are smaller, and the export says how far its pictures are from torch's."""
    whole = exported(runtime, "guided.safetensors", controlnet=str(files / "controlnet"))[0]
    _, contents = exported(runtime, weights=weights)
    assert 0 < contents.agreement["latents"] < (0.02 if weights == "fp16" else 0.1)
    assert 30 < contents.agreement["psnr"] < 200
    data = "unet/model.bin" if runtime == "openvino" else "unet/model.onnx.data"
    assert contents.files[data]["bytes"] < 0.8 * (whole / data).stat().st_size
