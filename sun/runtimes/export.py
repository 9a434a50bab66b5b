"""``sun export``: a model, its adapter, LoRAs and a ControlNet into a folder that a runtime reads."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapter import SunAdapter
from ..common.notes import note
from ..pipelines import NEGATIVE
from ..pipelines.attach import attach, detach
from ..pipelines.latents import latent_scale
from ..pipelines.loading import load_controlnet, load_pipeline
from ..pipelines.lora import apply_lora
from ..pipelines.schedulers import make_scheduler
from ..pipelines.text import encode_prompts
from ..schedule import trailing_timesteps
from ..shipped import EMOJI_CONTROLNET, SHIPPED, adapter_file, guidance_of
from . import engines
from .contents import Contents, ExportError, is_exported, write_contents
from .graphs import (
    Graph,
    controlnet_graph,
    in_plain_float,
    text_encoder_graph,
    unet_graph,
    vae_decoder_graph,
    vae_encoder_graph,
)
from .pipeline import load_exported

OnPart = Callable[[str, int, int], None]
"""Told before each part: its name, parts done, parts in all."""
TOLERANCE = 1e-4
"""Of fp32 exports: the largest relative difference of latents from torch's."""


@dataclass(frozen=True)
class ExportSettings:
    """What to export, where to."""

    model: str
    adapter: str
    runtime: str
    out: Path
    weights: str = "fp32"
    size: tuple[int, int] | None = None
    loras: tuple[tuple[str, float], ...] = ()
    controlnet: str = ""
    config: str = ""


@dataclass
class _Parts:
    pipe: Any
    adapter: SunAdapter | None
    controlnet: Any

    def modules(self) -> list[Any]:
        found = [self.pipe.unet, self.pipe.vae, self.pipe.text_encoder, self.adapter, self.controlnet]
        return [part for part in found if part is not None]


def export(settings: ExportSettings, on_part: OnPart = lambda name, done, total: None) -> Contents:
    """Write ``settings.out`` and return what is in it; the folder appears complete or not at all.

    One that is there already is replaced if it is an exported model. Raises ExportError, ModelError, SunFileError,
    OSError.
    """
    engines.require(settings.runtime, writing=True, weights=settings.weights)
    _check_target(settings.out)
    parts = _load(settings)
    _check_size(settings, latent_scale(parts.pipe.vae))
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    # What a killed export leaves behind is hidden, and gone with the next.
    for left in settings.out.parent.glob(f".{settings.out.name}-*.part"):
        shutil.rmtree(left, ignore_errors=True)
    part = Path(tempfile.mkdtemp(prefix=f".{settings.out.name}-", suffix=".part", dir=settings.out.parent))
    try:
        part.chmod(0o777 & ~_umask())
        contents = _write(settings, parts, part, on_part)
        _put_in_place(part, settings.out)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    return contents


def _load(settings: ExportSettings) -> _Parts:
    pipe = load_pipeline(settings.model, torch.float32, settings.config)
    adapter = None
    if settings.adapter != "none":
        adapter = SunAdapter.load(adapter_file(settings.adapter))
    controlnet = None  # before the LoRAs: a Control-LoRA takes the U-Net's encoder as it is in the file
    if settings.controlnet:
        path = EMOJI_CONTROLNET if settings.controlnet == SHIPPED else settings.controlnet
        controlnet = load_controlnet(path, pipe.unet, torch.float32)
    for path, weight in settings.loras:
        apply_lora(pipe, path, weight)
    return _Parts(pipe, adapter, controlnet)


def _check_target(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file. Name a folder.")
    if out.is_dir() and any(out.iterdir()) and not is_exported(out):
        raise ExportError(f"{out} holds something else than an exported model. Name another folder.")


def _check_size(settings: ExportSettings, scale: int) -> None:
    if settings.size and any(side <= 0 or side % scale for side in settings.size):
        width, height = settings.size
        raise ExportError(f"the size {width}x{height} is impossible: both sides must be multiples of {scale}.")


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def _put_in_place(part: Path, out: Path) -> None:
    """``part`` becomes ``out``; an exported model that was there goes."""
    if out.is_dir():
        before = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".part", dir=out.parent))
        out.rename(before / "old")
        part.rename(out)
        shutil.rmtree(before, ignore_errors=True)
    else:
        part.rename(out)


def _write(settings: ExportSettings, parts: _Parts, folder: Path, on_part: OnPart) -> Contents:
    pipe, adapter = parts.pipe, parts.adapter
    guided = bool(adapter is not None and adapter.guided and adapter.info.guidance_scale)
    with in_plain_float(*parts.modules()):
        if adapter is not None:
            attach(pipe.unet, adapter)
        try:
            makers = _makers(settings, parts, guided)
            inputs = {}
            for done, (name, make) in enumerate(makers.items()):
                on_part(name, done, len(makers) + 1)
                inputs[name] = _write_part(settings, name, make(), folder)
            on_part("comparing with torch", len(makers), len(makers) + 1)
            _write_configs(parts, folder)
            contents = Contents(
                runtime=settings.runtime,
                weights=settings.weights,
                model=settings.model,
                adapter=settings.adapter,
                guidance=adapter.info.guidance_scale if adapter is not None else guidance_of(settings.model),
                guided=guided,
                guidance_range=adapter.guidance_range if adapter is not None else None,
                controlnet=settings.controlnet,
                loras=tuple(f"{path}:{weight:g}" for path, weight in settings.loras),
                size=settings.size,
                inputs=inputs,
                made_with={"sun": __version__, "torch": torch.__version__, **engines.versions(settings.runtime)},
            )
            contents = write_contents(folder, contents)
            contents = replace(contents, agreement=_agreement(folder, parts, contents))
        finally:
            if adapter is not None:
                detach(pipe.unet)
    write_contents(folder, contents)
    found = contents.agreement["latents"]
    if settings.weights == "fp32" and not found <= TOLERANCE:
        note(
            f"the exported model's latents differ from torch's by {found:.1e}, more than {TOLERANCE:g} as they should."
        )
    return contents


def _makers(settings: ExportSettings, parts: _Parts, guided: bool) -> dict[str, Callable[[], Graph]]:
    """Every graph of the folder, made when it is its turn."""
    pipe, scale = parts.pipe, latent_scale(parts.pipe.vae)
    pixels = (settings.size[1], settings.size[0]) if settings.size else None
    latent = (pixels[0] // scale, pixels[1] // scale) if pixels else None
    makers: dict[str, Callable[[], Graph]] = {
        "text_encoder": lambda: text_encoder_graph(pipe.text_encoder),
        "unet": lambda: unet_graph(pipe.unet, parts.adapter, guided, latent, _residuals(parts, latent)),
        "vae_decoder": lambda: vae_decoder_graph(pipe.vae, latent),
        "vae_encoder": lambda: vae_encoder_graph(pipe.vae, pixels, scale),
    }
    if parts.controlnet is not None:
        makers["controlnet"] = lambda: controlnet_graph(parts.controlnet, latent)
    return makers


def _residuals(parts: _Parts, latent: tuple[int, int] | None) -> Sequence[torch.Tensor]:
    """An example of what the ControlNet gives the U-Net; none without one."""
    if parts.controlnet is None:
        return ()
    graph = controlnet_graph(parts.controlnet, latent)
    with torch.no_grad():
        return tuple(graph.module(*graph.inputs.values()))


def _write_part(settings: ExportSettings, name: str, graph: Graph, folder: Path) -> list[str]:
    # An autoencoder in int8 would be seen in every picture, and is a tenth of the model.
    weights = "fp16" if settings.weights == "int8" and name.startswith("vae") else settings.weights
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        source = Path(scratch) / "source.onnx"
        graph.write(source)
        engines.write(settings.runtime, source, folder / name, weights)
    return list(graph.inputs)


def _write_configs(parts: _Parts, folder: Path) -> None:
    pipe = parts.pipe
    configs = {"unet": pipe.unet.config, "vae_decoder": pipe.vae.config}
    if parts.controlnet is not None:
        configs["controlnet"] = parts.controlnet.config
    for name, config in configs.items():
        kept = {key: value for key, value in config.items() if key != "_name_or_path"}
        kept.setdefault("_class_name", type(pipe.vae).__name__ if name == "vae_decoder" else name)
        if name == "vae_decoder":
            kept["_class_name"] = type(pipe.vae).__name__
        (folder / name / "config.json").write_text(json.dumps(kept, indent=2, default=str), encoding="utf-8")
    pipe.text_encoder.config.to_json_file(folder / "text_encoder" / "config.json")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    pipe.scheduler.save_pretrained(folder / "scheduler")


# --- comparing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _agreement(folder: Path, parts: _Parts, contents: Contents) -> dict[str, float]:
    """A 4-step picture by torch and by the folder, small unless the graphs have a size, of the same noise and texts.

    ``latents``: relative difference at the end; ``psnr``: of the decoded pictures, in dB (of a perfect match 200).
    """
    exported, pipe = load_exported(folder, threads=torch.get_num_threads(), verify=False), parts.pipe
    scale = latent_scale(pipe.vae)
    width, height = (side // scale for side in contents.size) if contents.size else (16, 16)
    channels = pipe.unet.config.in_channels
    noise = torch.randn(1, channels, height, width, generator=torch.Generator().manual_seed(0))
    texts = ["a red apple on a table"], ["blurry, dark"]

    def draw(unet: Any, vae: Any, encoder: Any) -> tuple[torch.Tensor, torch.Tensor]:
        positive, negative = encode_prompts(pipe.tokenizer, encoder, *texts)
        options = {NEGATIVE: negative} if contents.with_sun else None
        scheduler = make_scheduler("ddim", pipe.scheduler.config)
        scheduler.set_timesteps(4)
        latents, fixed = noise[:, : pipe.vae.config.latent_channels], noise[:, pipe.vae.config.latent_channels :]
        for t in trailing_timesteps(4):
            sample = torch.cat([latents, fixed], dim=1)
            predicted = unet(sample, torch.tensor([t]), positive, cross_attention_kwargs=options, return_dict=False)[0]
            latents = scheduler.step(predicted, t, latents).prev_sample
        factor = pipe.vae.config.scaling_factor or 1.0
        return latents, vae.decode(latents / factor, return_dict=False)[0].clamp(-1, 1)

    theirs, their_picture = draw(exported.pipe.unet, exported.pipe.vae, exported.pipe.text_encoder)
    ours, our_picture = draw(pipe.unet, pipe.vae, pipe.text_encoder)
    error = float((their_picture - our_picture).square().mean())
    return {
        "latents": float((theirs - ours).norm() / ours.norm()),
        "psnr": min(200.0, 10 * math.log10(4.0 / error)) if error > 0 else 200.0,
    }
