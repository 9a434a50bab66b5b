"""Make pictures from a :class:`~sun.pictures.recipe.Recipe`: load a model, attach SUN, run the fitting pipeline."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from PIL import Image
from safetensors import SafetensorError, safe_open

from .. import __version__
from ..adapter import SunAdapter
from ..common.counting import CallCounter
from ..common.reading import printable
from ..pipelines.attach import attach, detach
from ..pipelines.schedulers import make_scheduler
from ..schedule import denoise_timesteps, trailing_timesteps
from ..shipped import EMOJI_CONTROLNET, EMOJI_DIFFUSION, EMOJI_SUN, SINGLE_FILE_CONFIG
from ..shipped.control_lora import controlnet_from_unet
from ..user_pictures import PictureError, read_mask, read_picture
from .recipe import MAX_SIDE, Recipe, RecipeError, fingerprints, png_text, split_lora

OnStep = Callable[[int, int], None]
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class Loaded:
    """A model ready to draw; ``pipe`` carries no adapter between runs."""

    pipe: Any  # a StableDiffusionPipeline; diffusers' classes have no usable types
    adapter: SunAdapter | None = None
    controlnet: Any = None

    @property
    def size(self) -> int:
        """Pixels of the model's own square pictures."""
        return int(self.pipe.unet.config.sample_size) * int(self.pipe.vae_scale_factor)


@dataclass
class Drawn:
    """What one run made; ``unet_calls`` is U-Net rows a picture (a CFG step counts two), ``seconds`` the whole run."""

    images: list[Image.Image]
    latents: torch.Tensor
    unet_calls: float
    seconds: float


def load(recipe: Recipe) -> Loaded:
    """Load model, adapter, LoRAs and ControlNet of ``recipe``. Raises RecipeError or SunFileError."""
    device, dtype = _device(recipe.device), _dtype(recipe)
    pipe = load_base(recipe.model, dtype, recipe.config)
    # Before the LoRAs: a Control-LoRA takes the U-Net's encoder as it is in the file.
    controlnet = _load_controlnet(recipe.controlnet, pipe.unet, dtype).to(device).eval() if recipe.controlnet else None
    for i, lora in enumerate(recipe.loras):
        _load_lora(pipe, lora, f"lora{i}")
    if recipe.loras:
        weights = [split_lora(lora)[1] for lora in recipe.loras]
        pipe.set_adapters([f"lora{i}" for i in range(len(weights))], weights)
    pipe.to(device)
    adapter = None if recipe.adapter == "none" else load_adapter(recipe.adapter)
    return Loaded(pipe, adapter, controlnet)


def load_adapter(name: str) -> SunAdapter:
    """The adapter file ``name``, or the shipped one for ``emoji``. Raises SunFileError or RecipeError."""
    if name == "emoji" and not EMOJI_SUN.is_file():
        raise RecipeError("this installation has no shipped adapter. Give --adapter FILE, or install SUN again.")
    return SunAdapter.load(EMOJI_SUN if name == "emoji" else name)


def load_base(model: str, dtype: torch.dtype = torch.float32, config: str = "") -> Any:
    """The shipped model for ``emoji``, a diffusers folder, or a single-file SD 1.x checkpoint. Raises RecipeError.

    ``config``: diffusers folder that describes a single file which is not laid out like SD 1.5; weights in it are not
    read. Nothing is asked of a model hub.
    """
    path = EMOJI_DIFFUSION if model == "emoji" else Path(model)
    if model == "emoji" and not path.is_dir():
        raise RecipeError("this installation has no shipped model. Give --model, or install SUN again.")
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise RecipeError(f"{path} is not a diffusers folder (no model_index.json). Give the folder that has one.")
        pipe = _pretrained(path, dtype)
    elif path.is_file():
        pipe = _single_file(path, dtype, config)
    else:
        raise RecipeError(
            f"{model} does not exist. Give a diffusers folder or a .safetensors checkpoint; SUN downloads nothing."
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _pretrained(path: Path, dtype: torch.dtype) -> Any:
    try:
        return StableDiffusionPipeline.from_pretrained(
            path, torch_dtype=dtype, safety_checker=None, feature_extractor=None, local_files_only=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise RecipeError(
            f"{path} could not be loaded as a Stable Diffusion 1.x folder: {_first_line(error)}"
        ) from error


def _single_file(path: Path, dtype: torch.dtype, config: str) -> Any:
    if path.suffix.lower() != ".safetensors":
        raise RecipeError(f"{path} is not a .safetensors file. Pickled checkpoints can run code; convert it first.")
    try:
        with safe_open(str(path), "pt") as content:
            keys = set(content.keys())
    except (OSError, SafetensorError) as error:
        raise RecipeError(f"{path} is not a complete safetensors file ({error}). Get it again.") from error
    if not any(key.startswith("model.diffusion_model.input_blocks.") for key in keys):
        raise RecipeError(f"{path} holds no Stable Diffusion U-Net. `sun inspect` tells what it is; give a checkpoint.")
    if any(key.startswith("conditioner.embedders.") or key.startswith("cond_stage_model.model.") for key in keys):
        raise RecipeError(f"{path} is a Stable Diffusion 2.x or SDXL checkpoint. SUN works with Stable Diffusion 1.x.")
    for part, prefix in {"text encoder": "cond_stage_model.", "VAE": "first_stage_model."}.items():
        if not any(key.startswith(prefix) for key in keys):
            raise RecipeError(f"{path} holds no {part}. Give a full checkpoint, or a diffusers folder with all parts.")
    folder = Path(config) if config else SINGLE_FILE_CONFIG
    if not (folder / "model_index.json").is_file():
        raise RecipeError(f"{folder} describes no pipeline (no model_index.json). Give --config a diffusers folder.")
    try:
        return StableDiffusionPipeline.from_single_file(
            str(path), config=str(folder), torch_dtype=dtype, safety_checker=None, local_files_only=True
        )
    except Exception as error:  # the converter raises anything on layouts it does not know
        raise RecipeError(
            f"{path} could not be read as the model {folder.name} describes: {_first_line(error)} "
            "Give --config a diffusers folder of the same architecture."
        ) from error


def _load_lora(pipe: Any, lora: str, name: str) -> None:
    path, _ = split_lora(lora)
    if not Path(path).exists():
        raise RecipeError(f"the LoRA {path} does not exist. Check the path.")
    try:
        pipe.load_lora_weights(path, adapter_name=name, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise RecipeError(f"{path} could not be loaded as a LoRA for this model: {_first_line(error)}") from error
    # diffusers only warns when no key is of this model, and fails later.
    if not any(name in names for names in pipe.get_list_adapters().values()):
        raise RecipeError(
            f"{path} holds no LoRA for a Stable Diffusion 1.x U-Net or text encoder. `sun inspect` tells what it is."
        )


def _load_controlnet(folder: str, unet: Any, dtype: torch.dtype) -> Any:
    if folder == "emoji":
        return _shipped_controlnet(unet)
    if Path(folder).is_file():
        try:
            return controlnet_from_unet(unet, folder)
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise RecipeError(f"{folder} could not be loaded as a Control-LoRA: {_first_line(error)}") from error
    if not (Path(folder) / "config.json").is_file():
        raise RecipeError(
            f"{folder} is not a ControlNet folder (no config.json). Give a diffusers one, or a Control-LoRA file."
        )
    try:
        controlnet, loaded = ControlNetModel.from_pretrained(
            folder, torch_dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise RecipeError(f"{folder} could not be loaded as a ControlNet: {_first_line(error)}") from error
    if loaded["missing_keys"]:  # diffusers only warns and draws these at random, for any U-Net's folder too
        raise RecipeError(f"{folder} is not a ControlNet: it lacks {len(loaded['missing_keys'])} of its weights.")
    return controlnet


def _shipped_controlnet(unet: Any) -> Any:
    if not EMOJI_CONTROLNET.is_file():
        raise RecipeError("this installation has no shipped ControlNet. Give --controlnet a folder, or update SUN.")
    try:
        return controlnet_from_unet(unet, EMOJI_CONTROLNET)
    except ValueError as error:
        raise RecipeError(f"the shipped ControlNet is for Emoji Diffusion (--model emoji): {error}") from error


def complete(recipe: Recipe, loaded: Loaded | None = None) -> Recipe:
    """``recipe`` with every default that depends on files or the model filled in, and checked. Raises RecipeError."""
    if recipe.mask and not recipe.init:
        raise RecipeError("a mask needs the picture it masks. Add --init IMAGE.")
    if bool(recipe.control) != bool(recipe.controlnet):
        raise RecipeError("--controlnet FOLDER (or emoji) and --control IMAGE belong together. Give both.")
    if recipe.init:
        recipe = replace(recipe, strength=(1.0 if recipe.mask else 0.5) if recipe.strength is None else recipe.strength)
        _kept_steps(recipe)
    if loaded and not (recipe.width and recipe.height):
        width, height = loaded.size, loaded.size
        if recipe.init:
            width, height = (max(8, side // 8 * 8) for side in open_image(recipe.init).size)
            if max(width, height) > MAX_SIDE:
                raise RecipeError(
                    f"{printable(recipe.init)} is {width} x {height} pixels, and at most {MAX_SIDE} a side are drawn. "
                    "Give the size to draw with --size."
                )
        recipe = replace(recipe, width=width, height=height)
    if loaded:
        recipe = replace(recipe, guidance=_guidance(recipe, loaded))
    return replace(recipe, dtype=str(_dtype(recipe)).removeprefix("torch."), device=_device(recipe.device))


def _guidance(recipe: Recipe, loaded: Loaded) -> float | None:
    """The scale this run uses; None with an adapter that has its own fixed in the weights. Raises RecipeError."""
    adapter = loaded.adapter
    if adapter is None:
        return 7.5 if recipe.guidance is None else recipe.guidance
    if adapter.guided:
        return adapter.info.guidance_scale if recipe.guidance is None else recipe.guidance
    if recipe.guidance is not None:
        own = adapter.info.guidance_scale
        raise RecipeError(
            f"this adapter's guidance scale is fixed{f' at {own:g}' if own else ''}. Leave --guidance out, use "
            "--sun-strength, or take an adapter that takes the scale."
        )
    return None


def noise(recipe: Recipe, loaded: Loaded) -> torch.Tensor:
    """Start noise [batch, 4, h, w], float32 on the CPU, picture ``i`` from ``seed + i``: the same on every device."""
    factor = int(loaded.pipe.vae_scale_factor)
    shape = (loaded.pipe.vae.config.latent_channels, recipe.height // factor, recipe.width // factor)
    return torch.stack([torch.randn(shape, generator=g) for g in _generators(recipe)])


def generate(loaded: Loaded, recipe: Recipe, on_step: OnStep | None = None) -> Drawn:
    """Draw the pictures of a complete ``recipe``: the whole batch, or the one at ``recipe.index``.

    The whole batch runs in either case, because a picture's last bits depend on its batch. ``on_step(done, total)``
    is called after each step. Raises RecipeError, SunFileError.
    """
    pipe_class, inputs, total = _mode(loaded, recipe)
    pipe = _pipeline(pipe_class, loaded)
    latents: dict[str, torch.Tensor] = {}

    def after_step(_pipe: Any, step: int, _t: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents["last"] = state["latents"]
        if on_step:
            on_step(step + 1, total)
        return {}

    if loaded.adapter:
        attach(pipe, loaded.adapter, strength=recipe.sun_strength)
    try:
        pipe.scheduler = make_scheduler(recipe.scheduler, pipe.scheduler.config)
        with CallCounter(pipe.unet) as counter, torch.no_grad():
            began = time.perf_counter()
            images = pipe(
                prompt=[recipe.prompt] * recipe.batch,
                negative_prompt=[recipe.negative] * recipe.batch,
                guidance_scale=1.0 if recipe.guidance is None else recipe.guidance,
                generator=_generators(recipe),
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["latents"],
                **inputs,
            ).images
            seconds = time.perf_counter() - began
    finally:
        if loaded.adapter:
            detach(pipe)
    if recipe.mask:
        images = [_keep_unmasked(image, recipe) for image in images]
    picked = slice(None) if recipe.index is None else slice(recipe.index, recipe.index + 1)
    return Drawn(images[picked], latents["last"].float().cpu()[picked], counter.rows / recipe.batch, seconds)


def png_texts(recipe: Recipe) -> list[dict[str, str]]:
    """The text chunks of each picture ``generate`` returns for ``recipe``."""
    prints = fingerprints({**_shipped(recipe), **recipe.files()})
    indices = range(recipe.batch) if recipe.index is None else [recipe.index]
    return [png_text(recipe, i, environment(recipe.device), prints) for i in indices]


def changes_since(recipe: Recipe, content: dict[str, Any]) -> list[str]:
    """What is no longer as when the picture was made, each a sentence. Raises RecipeError for a missing file."""
    named, before = {**_shipped(recipe), **recipe.files()}, content.get("files", {})
    found = [
        f"{printable(named[field])} ({field}) has changed since the picture was made"
        for field, mark in fingerprints(named).items()
        if before.get(field, mark) != mark
    ]
    now, then = environment(_device(recipe.device)), content.get("made_with", {})
    found += [f"{k} was {then[k]} and is {v}" for k, v in now.items() if then.get(k, v) != v]
    return found


def environment(device: str) -> dict[str, str]:
    """Versions and device that can change the last bits of a picture."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"sun": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__, "device": name}


def open_image(path: str) -> Image.Image:
    """An RGB picture, read as training reads it (:func:`sun.user_pictures.read_picture`). Raises RecipeError."""
    try:
        return read_picture(path)
    except PictureError as error:
        raise RecipeError(str(error)) from error


def open_mask(path: str) -> Image.Image:
    """A mask, mode L, white where a picture is repainted. Raises RecipeError."""
    try:
        return read_mask(path)
    except PictureError as error:
        raise RecipeError(str(error)) from error


# --- the pieces of a run -----------------------------------------------------------------------------------------


def _mode(loaded: Loaded, recipe: Recipe) -> tuple[type, dict[str, Any], int]:
    """Pipeline class, its inputs and the number of steps it will run."""
    size = (recipe.width, recipe.height)
    inputs: dict[str, Any] = {}
    if not recipe.init:
        start = noise(recipe, loaded).to(loaded.pipe.device, loaded.pipe.unet.dtype)
        inputs = {"latents": start, "width": size[0], "height": size[1], "num_inference_steps": recipe.steps}
    else:
        kept, scheduled = _kept_steps(recipe)
        # Half a step more than the wanted share, so that the pipelines' int(steps * strength) cannot round it away.
        share = 1.0 if kept == scheduled else (kept + 0.5) / scheduled
        inputs = {"image": [_resized(open_image(recipe.init), size)] * recipe.batch, "strength": share}
        inputs["num_inference_steps"] = scheduled
    if recipe.mask:
        inputs |= {"mask_image": [_resized(open_mask(recipe.mask), size)] * recipe.batch}
        inputs |= {"width": size[0], "height": size[1]}
    if loaded.controlnet:
        control = [_resized(open_image(recipe.control), size)] * recipe.batch
        inputs |= {"control_image" if recipe.init else "image": control}
        inputs |= {"controlnet_conditioning_scale": recipe.control_scale}
    steps = _kept_steps(recipe)[0] if recipe.init else recipe.steps
    return _CLASSES[bool(loaded.controlnet), bool(recipe.init), bool(recipe.mask)], inputs, steps


_CLASSES: dict[tuple[bool, bool, bool], Any] = {
    (False, False, False): StableDiffusionPipeline,
    (False, True, False): StableDiffusionImg2ImgPipeline,
    (False, True, True): StableDiffusionInpaintPipeline,
    (True, False, False): StableDiffusionControlNetPipeline,
    (True, True, False): StableDiffusionControlNetImg2ImgPipeline,
    (True, True, True): StableDiffusionControlNetInpaintPipeline,
}


def _kept_steps(recipe: Recipe) -> tuple[int, int]:
    """(steps run, steps of the schedule they are the last ones of) for a run on ``init``. Raises RecipeError."""
    strength = 1.0 if recipe.strength is None else recipe.strength
    try:
        mode: Any = recipe.denoise_mode
        kept = denoise_timesteps(recipe.steps, strength, mode)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not kept:
        raise RecipeError(
            f"strength {strength:g} of {recipe.steps} steps leaves no step to run. Use at least "
            f"{1 / recipe.steps:g}, more steps, or --denoise-mode respaced."
        )
    scheduled = recipe.steps if recipe.denoise_mode == "trained" else min(int(recipe.steps / strength), 1000)
    assert trailing_timesteps(scheduled)[-len(kept) :] == kept
    return len(kept), scheduled


def _pipeline(pipe_class: Any, loaded: Loaded) -> Any:
    accepted = inspect.signature(pipe_class.__init__).parameters
    parts = {**loaded.pipe.components, "controlnet": loaded.controlnet}
    pipe = pipe_class(**{k: v for k, v in parts.items() if k in accepted}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _generators(recipe: Recipe) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(recipe.seed + i) for i in range(recipe.batch)]


def _keep_unmasked(image: Image.Image, recipe: Recipe) -> Image.Image:
    """``image`` with the unmasked pixels as they were: the autoencoder alone would change them a little."""
    before, mask = open_image(recipe.init), open_mask(recipe.mask)
    return Image.composite(image, _resized(before, image.size), _resized(mask, image.size))


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _device(name: str) -> str:
    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(f"the device {name!r} is not available here ({_first_line(error)})") from error
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _dtype(recipe: Recipe) -> torch.dtype:
    if recipe.dtype == "auto":
        return torch.float32 if _device(recipe.device) == "cpu" else torch.float16
    if recipe.dtype not in _DTYPES:
        raise RecipeError(f"the dtype {recipe.dtype!r} is unknown. Choose one of auto, {', '.join(_DTYPES)}.")
    return _DTYPES[recipe.dtype]


def _shipped(recipe: Recipe) -> dict[str, str]:
    found = {"model": str(EMOJI_DIFFUSION)} if recipe.model == "emoji" else {}
    found |= {"controlnet": str(EMOJI_CONTROLNET)} if recipe.controlnet == "emoji" else {}
    return found | ({"adapter": str(EMOJI_SUN)} if recipe.adapter == "emoji" else {})


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
