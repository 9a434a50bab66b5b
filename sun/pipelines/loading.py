"""Models from files: one way to read a Stable Diffusion 1.x for everything that needs one.

A diffusers folder is read part by part, through diffusers' and transformers' own classes: nothing in a folder can name
code to run, and each part says which of its weights its file lacks, which the pipeline's own loader does not. A
single-file checkpoint goes through diffusers' converters the same way. Nothing is asked of a model hub.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors import SafetensorError, safe_open
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..common.errors import ConfigError
from ..common.notes import note
from ..common.reading import ReadError, check_regular, read_bytes, read_json
from ..prediction import PredictionError, check_prediction, marked_prediction
from ..shipped import EMOJI_DIFFUSION, SHIPPED, SINGLE_FILE_CONFIG
from .schedulers import prediction_of

_VAES = {kind.__name__: kind for kind in (AutoencoderKL, AutoencoderTiny, AsymmetricAutoencoderKL)}
_LDM_UNET, _LDM_VAE, _LDM_TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."
_LDM_FIRST = f"{_LDM_UNET}input_blocks.0.0.weight"
_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError, SafetensorError)
# What files hold besides a part's weights: positions, which are counted anew today, and the other half of CLIP.
_POSITIONS = "position_ids"
_UNUSED = re.compile(rf"{_POSITIONS}$|^(vision_model|visual_projection|text_projection|logit_scale)")
# model.safetensors, model.fp16.safetensors, and the same in several files with an index
_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_|pytorch_)?model(?:\.([\w-]+?))?(?:-\d{5}-of-\d{5})?"
    r"\.(?:safetensors|bin)(?:\.index(?:\.([\w-]+))?\.json)?"
)
_VARIANTS = ("fp16", "bf16", "ema", "non_ema")


class ModelError(ConfigError):
    """A model that cannot be used; the message says which file or folder, why, and what to do."""


class ModelMissing(ModelError, FileNotFoundError):
    """A model that is not where it should be."""


def load_pipeline(model: str | Path, dtype: torch.dtype = torch.float32, config: str = "") -> Any:
    """A ``StableDiffusionPipeline`` on the CPU: the shipped model for ``emoji``, a diffusers folder, or a checkpoint.

    config: diffusers folder that describes a single file which is not laid out like SD 1.5; weights in it are not
    read. What a user should know of the model is told as a ``SunWarning``. Raises ModelError, also for a model of which
    a part lacks weights, and for one that predicts what cannot be sampled.
    """
    path = model_path(model)
    pipe = _from_folder(path, dtype) if path.is_dir() else _from_file(path, dtype, config)
    _check_fit(pipe, path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load_unet(model: str | Path, dtype: torch.dtype | None = None) -> Any:
    """Only the U-Net of a model as :func:`load_pipeline` takes it, or of a folder that diffusers saved a U-Net in.

    Raises ModelError.
    """
    path = model_path(model)
    if path.is_file():
        return _unet_of(path, *_content(path), SINGLE_FILE_CONFIG, dtype)
    inside = path / "unet" if (path / "unet").is_dir() else path
    if not (inside / "config.json").is_file():
        raise ModelMissing(f"{path} holds no U-Net (no config.json). Give a folder that diffusers saved.")
    return load_part(UNet2DConditionModel, inside, dtype)


def noise_schedule(folder: str | Path) -> dict[str, Any]:
    """The scheduler config of a diffusers folder; empty where there is none. Raises ModelError."""
    file = Path(folder) / "scheduler" / "scheduler_config.json"
    return _json(file, infinite=True) if file.exists() else {}


def model_path(model: str | Path) -> Path:
    """Where the model is. Raises ModelMissing."""
    path = EMOJI_DIFFUSION if str(model) == SHIPPED else Path(model)
    if str(model) == SHIPPED and not path.is_dir():
        raise ModelMissing("this installation has no shipped model. Give --model, or install SUN again.")
    if not path.exists():
        raise ModelMissing(
            f"{model} does not exist. Give a diffusers folder or a .safetensors checkpoint; SUN downloads nothing."
        )
    return path


# --- folders -----------------------------------------------------------------------------------------------------


def load_part(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """One model (``kind``: its class) from the folder its weights and ``config.json`` lie in, every weight from there.

    A folder may hold another variant alone (``fp16``). Raises ModelError.
    """
    what = f"the {_NAMES.get(kind, kind.__name__)} in {folder}"
    if not (folder / "config.json").is_file():
        raise ModelMissing(f"{what} has no config.json. Get the folder again, or give the one that has it.")
    options = {"torch_dtype": dtype, "local_files_only": True, "variant": _variant(folder)}
    try:
        part, found = kind.from_pretrained(folder, output_loading_info=True, **options)
    except _ERRORS as error:
        raise ModelError(f"{what} could not be loaded: {_reason(error, folder)}") from error
    missing = {*found["missing_keys"], *(name for name, value in part.state_dict().items() if value.is_meta)}
    wrong = [str(entry[0] if isinstance(entry, (tuple, list)) else entry) for entry in found["mismatched_keys"]]
    _complete(what, [name for name in missing if not name.endswith(_POSITIONS)], wrong)
    unused = [name for name in found["unexpected_keys"] if not _UNUSED.search(name)]
    if unused:
        note(f"{what}: {_count(unused)} of the file belong to no layer of it and are not used.")
    return part.eval()


_NAMES = {
    UNet2DConditionModel: "U-Net",
    ControlNetModel: "ControlNet",
    CLIPTextModel: "text encoder",
    CLIPModel: "CLIP",
    **dict.fromkeys(_VAES.values(), "autoencoder (VAE)"),
}


def _from_folder(folder: Path, dtype: torch.dtype) -> Any:
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelMissing(f"{folder} is not a diffusers folder (no model_index.json). Give the folder that has one.")
    names = _json(index)
    pipeline = str(names.get("_class_name", ""))
    if "text_encoder_2" in names or not pipeline.startswith("StableDiffusion") or "XL" in pipeline or "3" in pipeline:
        raise ModelError(f"{folder} holds a {pipeline or 'pipeline without a name'}, not a Stable Diffusion 1.x.")
    lacking = [part for part in ("unet", "vae", "text_encoder", "tokenizer") if not (folder / part).is_dir()]
    if lacking:
        raise ModelError(f"{folder} lacks {', '.join(lacking)}. Get the folder again; a Stable Diffusion has them all.")
    vae = _class_of(names, "vae")
    if vae not in _VAES:
        raise ModelError(f"{folder} has a {vae} to decode pictures with; SUN reads {', '.join(_VAES)}.")
    return _assembled(
        unet=load_part(UNet2DConditionModel, folder / "unet", dtype),
        vae=load_part(_VAES[vae], folder / "vae", dtype),
        text_encoder=load_text_encoder(folder / "text_encoder", dtype),
        folder=folder,
        scheduler=_scheduler(folder, _class_of(names, "scheduler")),
    )


def _assembled(folder: Path, **parts: Any) -> Any:
    _files_of(folder / "tokenizer")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    except _ERRORS as error:
        raise ModelError(f"the tokenizer in {folder} could not be read: {_reason(error)}") from error
    # The folder may state none, or a stranger's number; what the encoder has positions for is what it takes.
    tokenizer.model_max_length = parts["text_encoder"].config.max_position_embeddings
    return StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )


def _scheduler(folder: Path, name: str = "", **changes: Any) -> Any:
    """The noise schedule a folder describes, as the class it names where that is one of diffusers'."""
    kind = getattr(diffusers, name, None) if name.isidentifier() else None
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    file = folder / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise ModelMissing(f"{folder} has no scheduler/scheduler_config.json, which says how its noise is spaced.")
    try:
        chosen: Any = kind if known else DDIMScheduler
        return chosen.from_config({**_json(file, infinite=True), **changes})
    except _ERRORS as error:
        raise ModelError(f"the noise schedule in {file} could not be read: {_reason(error)}") from error


def _files_of(folder: Path) -> list[Path]:
    """What lies in a folder. Raises ModelError for a pipe or a device, at which a library would wait for ever."""
    found = list(folder.iterdir())
    for file in found:
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ModelError(f"{file} is not a regular file. Get the folder again.")
    return found


def _variant(folder: Path) -> str | None:
    """The variant of the weights to ask for: None for the usual one, else one that is there alone."""
    usual, others = False, set()
    for file in _files_of(folder):
        match = _WEIGHTS.fullmatch(file.name)
        if match and (match[1] or match[2]):
            others.add(match[1] or match[2])
        elif match:
            usual = True
    if usual or not others:
        return None
    return next((name for name in _VARIANTS if name in others), min(others))


# --- text encoders -----------------------------------------------------------------------------------------------


def load_text_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The text encoder a diffusers folder has in ``text_encoder``, by names of any age. Raises ModelError."""
    variant = _variant(folder)
    file = folder / f"model{f'.{variant}' if variant else ''}.safetensors"
    if not file.is_file():  # in several files, or a pickle
        return load_part(CLIPTextModel, folder, dtype)
    try:
        check_regular(file)
        return _text_encoder(_tensors(file, ""), folder, f"the text encoder in {folder}", dtype)
    except _ERRORS as error:
        raise (
            error
            if isinstance(error, ModelError)
            else ModelError(f"the text encoder in {folder} could not be loaded: {_reason(error, folder)}")
        ) from error


def _text_encoder(tensors: dict[str, torch.Tensor], folder: Path, what: str, dtype: torch.dtype) -> Any:
    """The text encoder that ``folder`` describes, with ``tensors`` by the names of any age.

    CLIP's outer layer, ``text_model``, has come and gone in the names of checkpoints as of transformers.
    """
    config = CLIPTextConfig.from_pretrained(folder, local_files_only=True)
    with init_empty_weights():
        own = set(CLIPTextModel(config).state_dict())
    outer = "text_model." if any(name.startswith("text_model.") for name in own) else ""
    given = {outer + name.removeprefix("text_model."): t for name, t in tensors.items() if not _UNUSED.search(name)}
    _complete(what, [name for name in own if name not in given and not name.endswith(_POSITIONS)])
    if unused := [name for name in given if name not in own]:
        note(f"{what}: {_count(unused)} belong to no layer of it and are not used.")
    given = {name: tensor for name, tensor in given.items() if name in own}
    return CLIPTextModel.from_pretrained(None, config=config, state_dict=given, torch_dtype=dtype).eval()


# --- single files ------------------------------------------------------------------------------------------------


def _from_file(path: Path, dtype: torch.dtype, config: str) -> Any:
    names, header = _content(path)
    if any(name.startswith(("conditioner.embedders.", "cond_stage_model.model.")) for name in names):
        raise ModelError(f"{path} is a Stable Diffusion 2.x or SDXL checkpoint. SUN works with Stable Diffusion 1.x.")
    for part, prefix in {"text encoder": "cond_stage_model.", "VAE": _LDM_VAE}.items():
        if not any(name.startswith(prefix) for name in names):
            raise ModelError(f"{path} holds no {part}. Give a full checkpoint, or a diffusers folder with all parts.")
    folder = Path(config) if config else SINGLE_FILE_CONFIG
    if not (folder / "model_index.json").is_file():
        raise ModelMissing(f"{folder} describes no pipeline (no model_index.json). Give --config a diffusers folder.")
    return _assembled(
        unet=_unet_of(path, names, header, folder, dtype),
        vae=_converted(AutoencoderKL, path, _tensors(path, _LDM_VAE), folder, "vae", dtype),
        text_encoder=_text_encoder_of(path, folder, dtype),
        folder=folder,
        scheduler=_scheduler_of(path, names, header, folder),
    )


def _content(path: Path) -> tuple[set[str], dict[str, str]]:
    """Names and header entries of a checkpoint, from its header alone. Raises ModelError unless it has a U-Net."""
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path} is not a .safetensors file. Pickled checkpoints can run code; convert it first.")
    try:
        check_regular(path)
        with safe_open(str(path), "pt") as content:
            names, header = set(content.keys()), dict(content.metadata() or {})
    except ReadError as error:
        raise ModelError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{path} is not a complete safetensors file ({_reason(error, path)}). Get it again."
        ) from error
    if not any(name.startswith(f"{_LDM_UNET}input_blocks.") for name in names):
        raise ModelError(f"{path} holds no Stable Diffusion U-Net. `sun inspect` tells what it is; give a checkpoint.")
    return names, header


def _tensors(path: Path, *prefixes: str) -> dict[str, torch.Tensor]:
    with safe_open(str(path), "pt") as content:
        return {name: content.get_tensor(name) for name in content.keys() if name.startswith(prefixes)}  # noqa: SIM118


def _unet_of(path: Path, names: set[str], header: dict[str, str], folder: Path, dtype: torch.dtype | None) -> Any:
    with safe_open(str(path), "pt") as content:
        shape = content.get_slice(_LDM_FIRST).get_shape() if _LDM_FIRST in names else []
    _refuse_compact(path, names, folder)
    # An inpainting model is laid out as its base, but for the channels its first layer takes.
    own = {"in_channels": shape[1]} if len(shape) == 4 else {}
    return _converted(UNet2DConditionModel, path, _tensors(path, _LDM_UNET), folder, "unet", dtype, **own)


def _refuse_compact(path: Path, names: set[str], folder: Path) -> None:
    """Raise ModelError for a U-Net with fewer layers than ``folder`` describes: it is not damaged, but assembled."""
    if f"{_LDM_UNET}label_emb.0.0.weight" in names:
        return  # of SDXL, which has fewer stages
    layers, n = [0], 1
    while any(f"{_LDM_UNET}input_blocks.{n}.0.{part}.weight" in names for part in ("in_layers.2", "op")):
        if f"{_LDM_UNET}input_blocks.{n}.0.op.weight" in names:
            layers.append(0)
        else:
            layers[-1] += 1
        n += 1
    try:
        settings = UNet2DConditionModel.load_config(folder, subfolder="unet", local_files_only=True)
    except _ERRORS:
        return  # which is said where the model is made of it
    each, stages = settings.get("layers_per_block", 2), len(settings.get("down_block_types", ()))
    wanted = [each] * stages if isinstance(each, int) else list(each)
    there = zip(layers, wanted, strict=False)
    fewer = len(wanted) - 1 <= len(layers) <= len(wanted) and all(0 < own <= most for own, most in there)
    middle = any(name.startswith(f"{_LDM_UNET}middle_block.") for name in names)
    if fewer and (layers != wanted or not middle):
        raise ModelError(
            f"{path} holds a compact U-Net: {', '.join(map(str, layers))} layers in its stages"
            f"{'' if middle else ' and no middle'}, where {folder.name} has {', '.join(map(str, wanted))}. Give its "
            "diffusers folder (`sun assemble --out`); single files of compact U-Nets are for ComfyUI and the web UIs."
        )


def _converted(
    kind: Any, path: Path, tensors: dict[str, torch.Tensor], folder: Path, part: str, dtype: Any, **changes: Any
) -> Any:
    """A part of a single file, its names translated by diffusers' converter, every weight of it from there."""
    what = f"the {_NAMES[kind]} of {path}"
    try:
        config = {**kind.load_config(folder, subfolder=part, local_files_only=True), **changes}
        with init_empty_weights():
            model = kind.from_config(config)
        found = _CONVERTERS[kind](tensors, config=config)
    except KeyError as error:
        raise ModelError(f"{what} lacks weights, {error} among them: {_INCOMPLETE}") from error
    except Exception as error:  # the converter raises anything on layouts it does not know
        raise _other_layout(path, folder, _reason(error)) from error
    own = model.state_dict()
    for name in [name for name in found if name in own]:
        if found[name].shape != own[name].shape:
            theirs, ours = list(found[name].shape), list(own[name].shape)
            raise _other_layout(path, folder, f"{name} is {theirs} in the file and {ours} in that model.")
    _complete(what, [name for name in own if name not in found])
    model.load_state_dict({name: found[name].to(dtype) for name in own}, assign=True)
    return model.eval()


_CONVERTERS = {UNet2DConditionModel: convert_ldm_unet_checkpoint, AutoencoderKL: convert_ldm_vae_checkpoint}


def _text_encoder_of(path: Path, folder: Path, dtype: torch.dtype) -> Any:
    what = f"the text encoder of {path}"
    tensors = {name.removeprefix(_LDM_TEXT): value for name, value in _tensors(path, _LDM_TEXT).items()}
    try:
        return _text_encoder(tensors, folder / "text_encoder", what, dtype)
    except _ERRORS as error:
        raise error if isinstance(error, ModelError) else _other_layout(path, folder, _reason(error)) from error


def _other_layout(path: Path, folder: Path, reason: str) -> ModelError:
    return ModelError(
        f"{path} could not be read as the model {folder.name} describes: {reason} "
        "Give --config a diffusers folder of the same architecture."
    )


def stated_prediction(path: Path, names: Collection[str], header: Mapping[str, str]) -> tuple[str, bool]:
    """(kind, zero terminal SNR) that a checkpoint, or the config file A1111 reads beside it, states; ("", False) where
    neither says anything. names: of its tensors. header: its metadata."""
    kind, zero_snr = marked_prediction(names, header)
    beside = path.with_suffix(".yaml")
    if not kind and beside.is_file():
        try:
            text = read_bytes(beside, 2**20).decode("utf-8", "replace")
        except (OSError, ReadError):
            text = ""
        kind = "v_prediction" if re.search(r"^\s*parameterization:\s*[\"']?v[\"']?\s*$", text, re.M) else ""
    return kind, zero_snr


def _scheduler_of(path: Path, names: set[str], header: dict[str, str], folder: Path) -> Any:
    """The noise schedule of ``folder``, predicting what the checkpoint says of itself."""
    kind, zero_snr = stated_prediction(path, names, header)
    if not kind and not zero_snr:
        return _scheduler(folder, str(_json(folder / "model_index.json").get("scheduler", [None, ""])[-1]))
    changes = {"prediction_type": kind} if kind else {}
    return _scheduler(folder, "DDIMScheduler", **changes, **({"rescale_betas_zero_snr": True} if zero_snr else {}))


# --- ControlNets -------------------------------------------------------------------------------------------------


def load_controlnet(path: str | Path, unet: Any, dtype: torch.dtype) -> Any:
    """A ControlNet: a diffusers folder, or a Control-LoRA file, which takes the encoder of ``unet`` as it is now.

    Raises ModelError.
    """
    from ..shipped.control_lora import controlnet_from_unet

    if Path(path).is_file():
        try:
            check_regular(path)
            return controlnet_from_unet(unet, path)
        except _ERRORS as error:
            raise ModelError(f"{path} could not be loaded as a Control-LoRA: {_reason(error)}") from error
    if not (Path(path) / "config.json").is_file():
        raise ModelMissing(
            f"{path} is not a ControlNet folder (no config.json). Give a diffusers one, or a Control-LoRA file."
        )
    return load_part(ControlNetModel, Path(path), dtype)


# --- checks ------------------------------------------------------------------------------------------------------

_INCOMPLETE = "what is not there would be random. Get the file again, complete."


def _complete(what: str, missing: list[str], wrong: list[str] | None = None) -> None:
    """Raise ModelError, naming part, count and an example, if a model lacks weights or has some of another size."""
    if missing:
        raise ModelError(f"{what} lacks {_count(missing)}: {_INCOMPLETE}")
    if wrong:
        raise ModelError(f"{what} has {_count(wrong)} of another size than its config says. Get the folder again.")


def _count(names: list[str]) -> str:
    """ "46 tensors (mid_block.attentions.0.norm.bias, ...)"."""
    names = sorted(names)
    more = ", ..." if len(names) > 1 else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''} ({names[0]}{more})"


def _check_fit(pipe: Any, path: Path) -> None:
    """Raise ModelError unless the parts belong together and the model can be sampled; tell what is unusual."""
    unet, text = pipe.unet.config, pipe.text_encoder.config.hidden_size
    if unet.cross_attention_dim != text:
        raise ModelError(
            f"{path}: the U-Net takes texts {unet.cross_attention_dim} wide and the text encoder makes them {text} "
            "wide. The parts are of different models."
        )
    latents = pipe.vae.config.latent_channels
    if unet.in_channels not in (latents, 2 * latents + 1):
        kinds = {8: "an InstructPix2Pix model", 5: "a depth-to-image model", 7: "an upscaler"}
        kind = kinds.get(unet.in_channels, "another kind of model")
        raise ModelError(
            f"{path}: its U-Net takes {unet.in_channels} channels, so it is {kind}. SUN works with text-to-image "
            f"({latents} channels) and inpainting models ({2 * latents + 1})."
        )
    try:
        check_prediction(*prediction_of(pipe.scheduler.config), adapter=False)
    except PredictionError as error:
        raise ModelError(f"{path}: {error}") from error


def is_inpainting(pipe: Any) -> bool:
    """Whether the U-Net also takes a mask and the masked picture (9 channels)."""
    return bool(pipe.unet.config.in_channels != pipe.vae.config.latent_channels)


def require_text_to_image(pipe: Any, model: str | Path) -> None:
    """Raise ModelError for an inpainting model, which draws nothing without a picture and a mask."""
    if is_inpainting(pipe):
        raise ModelError(f"{model} is an inpainting model, which draws into pictures. Take the model it was made from.")


def why_not_finite(parts: Mapping[str, Any]) -> str:
    """What to do where models (by name; None are left out) made NaN or infinity of finite noise: a sentence."""
    half = False
    for what, part in parts.items():
        for name, weight in part.named_parameters() if part is not None else ():
            half = half or weight.dtype == torch.float16
            if not bool(weight.isfinite().all()):
                return f"{name} of the {what} holds NaN or infinity itself: the file, or a LoRA on it, is damaged."
    if half:
        return "Numbers above 65504 are infinite in float16: use --dtype float32 or bfloat16."
    return "The model is damaged, or a guidance scale, strength or LoRA weight far too large."


def _class_of(names: dict[str, Any], part: str) -> str:
    entry = names.get(part)
    return str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else ""


def _json(file: Path, infinite: bool = False) -> dict[str, Any]:
    try:
        content = read_json(file, infinite=infinite)
    except (OSError, ReadError) as error:
        raise ModelError(str(error)) from error
    if not isinstance(content, dict):
        raise ModelError(f"{file} should hold names and values. Get the folder again.")
    return content


def _reason(error: BaseException, place: Path | None = None) -> str:
    """The first line of an error; of a Git LFS pointer, that it is one."""
    files = [place] if place is not None and place.is_file() else sorted(place.glob("*.safetensors")) if place else []
    for file in files:
        with file.open("rb") as handle:
            if handle.read(40).startswith(b"version https://git-lfs"):
                return f"{file.name} is a Git LFS pointer, not the file itself. Run `git lfs pull`."
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
