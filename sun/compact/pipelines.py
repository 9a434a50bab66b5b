"""The diffusers side: states of real trajectories, and files of a compact U-Net for every host."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save

from ..common.atomic import write_atomically, write_json, write_text
from ..common.reading import read_json
from ..common.weights import header_of
from ..pipelines.loading import load_part, load_text_encoder, noise_schedule, stated_prediction
from . import ldm
from .measuring import State
from .structure import CompactError


def record_states(
    pipe: Any,
    prompts: Sequence[str],
    negatives: Sequence[str] | None = None,
    *,
    every: int = 1,
    seed: int = 0,
    **call: Any,
) -> list[State]:
    """What the U-Net of any diffusers pipeline is given while it draws ``prompts``, every ``every``-th call of it.

    call: further arguments of the pipeline, as ``num_inference_steps`` and ``guidance_scale``. Nothing is decoded.
    Raises CompactError where the U-Net was never called.
    """
    states: list[State] = []
    calls = 0

    def keep(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal calls
        values = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | given
        if calls % every == 0:
            added = {key: value.clone() for key, value in (values.get("added_cond_kwargs") or {}).items()}
            t = torch.as_tensor(values["timestep"]).clone()
            states.append(State(values["sample"].clone(), t, values["encoder_hidden_states"].clone(), added))
        calls += 1

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    negative = {} if negatives is None else {"negative_prompt": list(negatives)}
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            pipe(list(prompts), **negative, generator=generator, output_type="latent", **call)
    finally:
        hook.remove()
    if not states:
        raise CompactError("The pipeline never called its U-Net, so there are no states to measure on.")
    return states


def save_single_file(
    unet: Any,
    path: str | os.PathLike[str],
    source: str | os.PathLike[str] | None = None,
    dtype: torch.dtype | None = None,
) -> list[str]:
    """Write a compact U-Net as ``path`` in LDM layout, with the config file A1111 needs beside it; returns what is to
    be said to the user, in sentences.

    source: the original's checkpoint, whose other parts are taken over as they are, or its diffusers folder (SD 1.x).
    Without, or where its parts have no LDM form, the file holds the U-Net alone (ComfyUI: Load Diffusion Model).
    Raises CompactError, OSError.
    """
    path = Path(path)
    said: list[str] = []
    tensors = ldm.unet_tensors(unet.state_dict(), unet.config)
    others = _other_parts(Path(source), said) if source is not None else {}
    tensors = {name: t.to(dtype or t.dtype).contiguous() for name, t in {**others, **tensors}.items()}
    write_atomically(path, lambda handle: handle.write(save(tensors, {"format": "pt"})))
    if reason := ldm.why_not_comfyui(unet.config):
        said.append(reason)
    if not others:
        said.append(f"{path.name} holds the U-Net alone. In ComfyUI put it into models/diffusion_models.")
        return said
    if reason := ldm.why_no_config(unet.config):
        said.append(reason)
    else:
        write_text(path.with_suffix(".yaml"), ldm.a1111_config(unet.config, _prediction(Path(source or ""))))
    return said


def _other_parts(source: Path, said: list[str]) -> dict[str, torch.Tensor]:
    """What a checkpoint has besides the U-Net, by LDM's names; empty, and said why, where there is no LDM form."""
    if source.is_file():
        with safe_open(str(source), "pt") as content:
            names = [n for n in content.keys() if not n.startswith((ldm.UNET, "model_ema."))]  # noqa: SIM118
            return {name: content.get_tensor(name) for name in names}
    index = read_json(source / "model_index.json")
    vae = (index.get("vae") or ["", ""])[-1]
    if vae != "AutoencoderKL" or "text_encoder_2" in index:
        said.append(f"The {vae or 'parts'} of {source.name} has no place in a checkpoint of SD 1.x.")
        return {}
    encoder = load_text_encoder(source / "text_encoder")
    if encoder.config.hidden_act != "quick_gelu":  # a checkpoint does not say so: hosts take SD 1.x's activation
        said.append(f"The text encoder of {source.name} is not SD 1.x's, the only one that is written here.")
        return {}
    part = load_part(AutoencoderKL, source / "vae")
    text = {n: t for n, t in encoder.state_dict().items() if not n.endswith("position_ids")}
    return {**ldm.vae_tensors(part.state_dict(), len(part.config.block_out_channels)), **ldm.text_tensors(text)}


def _prediction(source: Path) -> str:
    """What the original predicts: by its scheduler's config, or what a checkpoint states."""
    if source.is_dir():
        return str(noise_schedule(source).get("prediction_type", "epsilon"))
    header = header_of(source)
    return stated_prediction(source, header.tensors, header.metadata)[0] or "epsilon"


def save_folder(unet: Any, folder: str | os.PathLike[str]) -> None:
    """Write a U-Net as diffusers does, without this machine's paths in its config. Raises OSError."""
    unet.save_pretrained(folder)
    file = Path(folder) / "config.json"
    settings = {key: value for key, value in read_json(file).items() if key != "_name_or_path"}
    write_json(file, settings)


def save_unet(unet: Any, tensors: Mapping[str, torch.Tensor], folder: str | os.PathLike[str]) -> None:
    """Write a U-Net of the configuration of ``unet`` with these weights as :func:`save_folder` does. Raises OSError."""
    with torch.device("meta"):
        made = type(unet).from_config(dict(unet.config))
    made.load_state_dict(tensors, assign=True)
    save_folder(made, folder)
