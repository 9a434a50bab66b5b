"""Adapter files: reading, checking and writing both layouts.

``sun`` layout: "{layer name}.{part}" with readable layer names and metadata in the safetensors header.
``official`` layout: the keys of the authors' release, "{index}.{part}", index 1, 3, 5 and so on.
Both hold the same tensors, so converting loses nothing; our metadata travels in the header of either.

:func:`header_of` and :func:`peek` read a file's header alone, never its weights.
"""

from __future__ import annotations

import json
import math
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from safetensors.torch import save

from .common.atomic import write_atomically
from .common.errors import NotAnAdapterError
from .common.errors import SunFileError as SunFileError
from .common.reading import ReadError, open_regular, parse_json, printable
from .common.weights import DTYPES, clip, header_of, kind_of, name_of, short, values_of
from .layers import guess_layers

Layout = Literal["sun", "official"]
FORMAT = "sun-adapter-1"

# Our name of each part of a layer -> the authors' name.
NEGATIVE_PARTS = {
    "to_k_neg.weight": "to_k_neg.weight",
    "to_v_neg.weight": "to_v_neg.weight",
    "alpha_neg": "to_k_neg_alpha",
    "beta_neg": "to_k_neg_beta",
}
POSITIVE_PARTS = {
    "to_k_pos.weight": "to_k_extra_pos.weight",
    "to_v_pos.weight": "to_v_extra_pos.weight",
    "alpha_pos": "to_k_extra_pos_alpha",
    "beta_pos": "to_k_extra_pos_beta",
}
# How alpha and beta change with the guidance scale: [2, C], coefficients of log(w / w0) and its square. Not in the
# authors' layout.
GUIDANCE_PARTS = {
    "alpha_neg_w": "alpha_neg_w",
    "beta_neg_w": "beta_neg_w",
    "alpha_pos_w": "alpha_pos_w",
    "beta_pos_w": "beta_pos_w",
}
MAX_PICKLE = 2**30
"""Bytes of a pickled adapter. It cannot be looked at without loading it, and the largest adapters have 160 MB."""
SAFE_PICKLES = (2, 10)
"""The first torch whose ``weights_only`` holds: before it a pickle could write anywhere (CVE-2026-24747)."""
_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.", "sun_adapter.", "adapter.")
FOREIGN_TEXT_WIDTHS = {1024: "Stable Diffusion 2.x", 1280: "SDXL's second text encoder", 2048: "SDXL"}


@dataclass
class SunInfo:
    """What is known about an adapter besides its weights; kept in the file's header."""

    base_model: str = ""
    """Name of the model it was trained on."""
    guidance_scale: float | None = None
    """w, the classifier-free guidance scale fixed in the weights; where an adapter takes any, the one by default."""
    stage_length: float | None = None
    """Delta, the share of the time axis one step covers (0.25: four steps)."""
    normalized: bool = True
    """With Attention Normalization (Eq. 5), as every adapter but one trained to see what it is good for."""
    branches: str = ""
    """"negative" (the paper) or "negative+positive" (the authors' release)."""
    training: dict[str, Any] = field(default_factory=dict)
    """Settings and outcome of the training run."""
    notes: dict[str, str] = field(default_factory=dict)
    """Other header entries, kept as they are."""
    path: Path | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class AdapterTensors:
    """The checked content of a file: for each layer, in order of index, its name and its parts by our names."""

    names: tuple[str, ...]
    layers: tuple[dict[str, torch.Tensor], ...]
    info: SunInfo

    @property
    def positive(self) -> bool:
        """With the positive branch."""
        return "to_k_pos.weight" in self.layers[0]

    @property
    def guided(self) -> bool:
        """Takes the guidance scale as an input."""
        return "alpha_neg_w" in self.layers[0]

    @property
    def channels(self) -> tuple[int, ...]:
        """Width C of each layer."""
        return tuple(layer["to_k_neg.weight"].shape[0] for layer in self.layers)

    @property
    def text_width(self) -> int:
        """Width of the text states."""
        return self.layers[0]["to_k_neg.weight"].shape[1]


def read(path: str | os.PathLike[str]) -> AdapterTensors:
    """Read and check an adapter file of either layout; safetensors, or a pickle holding nothing but tensors.

    Whether a safetensors file is an adapter at all is decided by its header, so nothing of a foreign checkpoint is
    loaded. Raises SunFileError for anything that is not a complete, finite SUN adapter.
    """
    path = Path(path)
    if kind_of(path) == "pickle":
        return _parsed(_read_pickle(path), {}, path)
    header = header_of(path)
    _parsed(header.tensors, header.metadata, path, header_only=True)
    return _parsed(values_of(path, header), header.metadata, path)


def peek(path: str | os.PathLike[str]) -> AdapterTensors:
    """As :func:`read`, from the header alone: tensors without values (on torch's meta device), which may be damaged.

    A pickle has no header and is read. Raises SunFileError.
    """
    path = Path(path)
    if kind_of(path) == "pickle":
        return _parsed(_read_pickle(path), {}, path)
    header = header_of(path)
    return _parsed(header.tensors, header.metadata, path, header_only=True)


def parse(
    state_dict: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    where: str = "The state dict",
    *,
    header_only: bool = False,
) -> AdapterTensors:
    """Check a state dict of either layout and put it in order.

    where: how errors name it. header_only: the tensors are those of a :class:`Header`, so their values cannot be
    checked. Raises SunFileError for anything that is not a complete, finite SUN adapter.
    """
    info = _info_from_metadata(metadata or {}, where)
    state_dict = _unwrapped(state_dict)
    official = any(re.match(r"\d+\.", key) for key in state_dict if isinstance(key, str))
    parts = NEGATIVE_PARTS | POSITIVE_PARTS | ({} if official else GUIDANCE_PARTS)
    label = parts if official else {ours: ours for ours in parts}
    grouped = _by_layer(state_dict, {stored: ours for ours, stored in label.items()}, official, where, header_only)

    names = sorted(grouped, key=int if official else _layer_order)
    found = {part for group in grouped.values() for part in group}
    wanted = layer_parts(bool(found & set(POSITIVE_PARTS)), bool(found & set(GUIDANCE_PARTS)))
    expected = _expected_names(names, official)
    missing = [f"{n}.{label[part]}" for n in expected[:1000] for part in wanted if part not in grouped.get(n, {})]
    if missing:
        raise SunFileError(f"{where} is incomplete: {_keys(missing)} missing: {_some(missing)}. Get it again.")
    if names != expected:
        like = "1, 3, 5, ..." if official else "layers.0, layers.1, ..."
        raise SunFileError(
            f"{where} numbers its layers {_some(names)}; a SUN adapter has {like} Choose a SUN adapter file."
        )

    layers = tuple({part: grouped[name][part] for part in wanted} for name in names)
    _check_tensors(names, layers, label, where, header_only)
    _check_declared(metadata or {}, layers, where)
    if "alpha_neg_w" in layers[0] and info.guidance_scale == 0:
        raise SunFileError(f"{where}: header entry w = '0', from which no other guidance scale can be counted.")
    if official:
        guessed = guess_layers([layer["to_k_neg.weight"].shape[0] for layer in layers])
        names = [la.name for la in guessed] if guessed else [f"layers.{i}" for i in range(len(layers))]
    branches = "negative+positive" if "to_k_pos.weight" in layers[0] else "negative"
    return AdapterTensors(
        tuple(names), layers, replace(info, branches=branches, layout="official" if official else "sun")
    )


def layer_parts(positive: bool, guided: bool) -> list[str]:
    """Names of the tensors of one layer."""
    parts = [*NEGATIVE_PARTS, *(POSITIVE_PARTS if positive else ())]
    return parts + [p for p in GUIDANCE_PARTS if guided and p.removesuffix("_w") in parts]


def write(content: AdapterTensors, path: str | os.PathLike[str], layout: Layout = "sun") -> None:
    """Write an adapter file in one piece: it appears under ``path`` complete or not at all.

    Raises SunFileError if the adapter holds NaN or infinity or the layout is unknown, OSError if writing fails.
    """
    path = Path(path)
    if layout not in ("sun", "official"):
        raise SunFileError(f"{path}: unknown layout {layout!r}. Use 'sun' or 'official'.")
    if layout == "official" and content.guided:
        raise SunFileError(
            f"{path} was not written: the authors' layout has one guidance scale, and this adapter takes any. "
            "Fix one with `bake` (sun convert --guidance 7) first."
        )
    if layout == "official" and not content.info.normalized:
        raise SunFileError(f"{path} was not written: the authors' layout always means Attention Normalization.")
    label = NEGATIVE_PARTS | POSITIVE_PARTS
    tensors: dict[str, torch.Tensor] = {}
    for i, (name, layer) in enumerate(zip(content.names, content.layers, strict=True)):
        for part, value in layer.items():
            key = f"{name}.{part}" if layout == "sun" else f"{2 * i + 1}.{label[part]}"
            if not torch.isfinite(value).all():
                raise SunFileError(f"{path} was not written: {key} holds NaN or infinity. Did the training diverge?")
            tensors[key] = value.detach().cpu().contiguous().clone()  # safetensors refuses shared memory
    metadata = _metadata(content)
    write_atomically(path, lambda handle: handle.write(save(tensors, metadata)))


def text_width_name(width: int) -> str:
    """Return "1024 (Stable Diffusion 2.x)" for widths known from other families, else the number."""
    family = FOREIGN_TEXT_WIDTHS.get(width, "Stable Diffusion 1.x" if width == 768 else "")
    return f"{width} ({family})" if family else str(width)


# --- reading -----------------------------------------------------------------------------------------------------


def _parsed(
    tensors: Mapping[str, Any], metadata: Mapping[str, str], path: Path, header_only: bool = False
) -> AdapterTensors:
    content = parse(tensors, metadata, name_of(path), header_only=header_only)
    return replace(content, info=replace(content.info, path=path))


def _read_pickle(path: Path) -> Mapping[str, Any]:
    name = name_of(path)
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < SAFE_PICKLES:
        raise SunFileError(
            f"{name} is a pickle, and before torch 2.10 (this is {torch.__version__}) no pickle is safe to load. "
            "Ask for a .safetensors file, or update torch."
        )
    try:
        with open_regular(path, MAX_PICKLE) as file:  # given a path, torch.load judges by the name
            if _is_compressed(file):
                raise ValueError("torch does not compress; this would unpack to any size")
            content = torch.load(file, map_location="cpu", weights_only=True)
    except ReadError as error:
        raise SunFileError(f"{error} It is no SUN adapter, then.") from error
    except Exception as error:  # the unpickler raises anything on hostile or damaged input
        raise SunFileError(
            f"{name} is a pickle that holds more than tensors or is damaged, and was not loaded, because pickles can "
            "run code. Ask for a .safetensors file, or convert it where you trust it."
        ) from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise SunFileError(f"{name} holds a {type(content).__name__}, not named tensors. Choose a SUN adapter file.")
    return content


def _unwrapped(state_dict: Mapping[Any, Any]) -> Mapping[Any, Any]:
    """``state_dict`` without what torch's wrappers (DataParallel, compile) put before every name."""
    while state_dict and (
        wrapper := next((w for w in _WRAPPERS if all(isinstance(k, str) and k.startswith(w) for k in state_dict)), None)
    ):
        state_dict = {key.removeprefix(wrapper): value for key, value in state_dict.items()}
    return state_dict


def _by_layer(
    state_dict: Mapping[Any, Any], ours_of: Mapping[str, str], official: bool, where: str, header_only: bool
) -> dict[str, dict[str, torch.Tensor]]:
    """Layer name -> {our name of a part: tensor}. ``ours_of``: our name of each part by the file's."""
    suffixes = sorted(ours_of, key=len, reverse=True)
    grouped: dict[str, dict[str, torch.Tensor]] = {}
    extra: list[str] = []
    for key, value in state_dict.items():
        suffix = next((s for s in suffixes if isinstance(key, str) and key.endswith(f".{s}")), None)
        layer = key.removesuffix(f".{suffix}") if suffix else ""
        if suffix is None or not _is_layer(layer, official):
            extra.append(str(key))
        elif not isinstance(value, torch.Tensor):
            raise SunFileError(f"{where}: {key} is a {type(value).__name__}, not a tensor. Get the file again.")
        elif not header_only and not _is_plain(value):
            raise SunFileError(
                f"{where}: {key} is a sparse, quantized or otherwise unusual tensor. Save it as a plain one."
            )
        else:
            grouped.setdefault(layer, {})[ours_of[suffix]] = value
    if not grouped:
        raise NotAnAdapterError(
            f"{where} is not a SUN adapter: it has none of the keys of one, such as '1.to_k_neg.weight' "
            f"(found: {_some(extra) or 'nothing'}). Choose a SUN adapter file."
        )
    if extra:
        raise SunFileError(
            f"{where} has {_keys(extra)} that cannot belong to a SUN adapter: {_some(extra)}. "
            "Choose a SUN adapter file, or remove them."
        )
    return grouped


def _expected_names(names: Sequence[str], official: bool) -> list[str]:
    """The names that the layers of a complete file have, given those that were found, in order."""
    if official:
        return [str(2 * i + 1) for i in range(max(len(names), (int(names[-1]) + 1) // 2))]
    if all(re.fullmatch(r"layers\.\d{1,6}", name) for name in names):
        last = max(int(name.removeprefix("layers.")) for name in names)
        return [f"layers.{i}" for i in range(max(len(names), min(last + 1, 1000)))]
    return list(names)


def _is_compressed(file: BinaryIO) -> bool:
    """Whether a zip file holds compressed parts. Leaves the file at its beginning."""
    compressed = False
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            compressed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    file.seek(0)
    return compressed


def _is_plain(value: torch.Tensor) -> bool:
    """Ordinary numbers in memory of their own: not sparse, quantized, without data, or one number for many places."""
    if value.layout is not torch.strided or value.is_nested or value.is_quantized or value.is_meta:
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def _is_layer(name: str, official: bool) -> bool:
    pattern = r"0|[1-9]\d{0,5}" if official else r"layers\.\d{1,6}|(down_blocks|up_blocks|mid_block)(\.\w+)+"
    return len(name) <= 200 and re.fullmatch(pattern, name, flags=re.ASCII) is not None


def _layer_order(name: str) -> tuple[Any, ...]:
    """Sort key of a layer name in the order of ``index``: down, up, middle, each by its numbers.

    A name that begins otherwise is no layer's (:func:`_is_layer`): it would land in another layer's place.
    """
    kind = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}.get(name.split(".")[0], 3)
    return kind, [int(n[:9]) for n in re.findall(r"\d+", name)], name


def _check_tensors(
    names: Sequence[str],
    layers: Sequence[Mapping[str, torch.Tensor]],
    label: Mapping[str, str],
    where: str,
    header_only: bool,
) -> None:
    first = layers[0]["to_k_neg.weight"]
    for name, layer in zip(names, layers, strict=True):
        width = layer["to_k_neg.weight"].shape[0] if layer["to_k_neg.weight"].ndim else 0
        text = first.shape[1] if first.ndim == 2 else 0
        for part, value in layer.items():
            key = f"{name}.{label[part]}"
            shape = (width, text) if part.endswith(".weight") else (2, width) if part in GUIDANCE_PARTS else (width,)
            if tuple(value.shape) != shape or value.numel() == 0:
                raise SunFileError(
                    f"{where}: {key} has shape {clip(str(list(value.shape)))} where {list(shape)} belongs. "
                    "The file mixes models or is damaged; choose another."
                )
            if value.dtype not in DTYPES:
                raise SunFileError(
                    f"{where}: {key} is stored as {str(value.dtype).removeprefix('torch.')}; a SUN adapter is float32, "
                    "float16 or bfloat16. Convert it to one of them."
                )
            if not header_only and not torch.isfinite(value).all():
                raise SunFileError(f"{where}: {key} holds NaN or infinity. The file is damaged; get it again.")


def _check_declared(metadata: Mapping[str, str], layers: Sequence[Mapping[str, torch.Tensor]], where: str) -> None:
    """Compare what the header says with what is there; without a header only SD 1.x can be meant."""
    text_width = layers[0]["to_k_neg.weight"].shape[1]
    branches = "negative+positive" if "to_k_pos.weight" in layers[0] else "negative"
    for key, found in {"text_width": str(text_width), "layers": str(len(layers)), "branches": branches}.items():
        if metadata.get(key, found) != found:
            raise SunFileError(
                f"{where} should have {key} = {short(metadata[key])} by its own header, but has {found}. "
                "The file is incomplete or was edited; get it again."
            )
    if text_width in FOREIGN_TEXT_WIDTHS and "text_width" not in metadata:
        raise SunFileError(
            f"{where} was made for text width {text_width_name(text_width)}. SUN adapters belong to Stable Diffusion "
            "1.x (768); choose one made for it."
        )


# --- metadata ----------------------------------------------------------------------------------------------------

_OWN_KEYS = ("format", "base_model", "w", "stage_length", "branches", "layers", "text_width", "training", "normalized")


def _info_from_metadata(metadata: Mapping[str, str], where: str) -> SunInfo:
    stated = metadata.get("format", FORMAT)
    if stated.startswith("sun-adapter-") and stated != FORMAT:
        raise SunFileError(f"{where} has format {short(stated)}; this version reads {FORMAT}. Update SUN.")
    notes = {key: value for key, value in metadata.items() if key not in _OWN_KEYS}
    if stated != FORMAT:
        notes["format"] = stated  # other tools' mark, "pt"

    def number(key: str, least: float, most: float) -> float | None:
        if key not in metadata:
            return None
        try:
            value = float(metadata[key])
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise SunFileError(
                f"{where}: header entry {key} = {short(metadata[key])} is not a number from {least:g} to {most:g}."
            )
        return value

    try:
        training = parse_json(metadata.get("training", "{}"), "training")
    except ReadError:
        training = None
    if not isinstance(training, dict):
        raise SunFileError(f"{where}: header entry 'training' is not a JSON object. Get the file again.")
    guidance_range(training, where)
    if metadata.get("normalized", "true") not in ("true", "false"):
        raise SunFileError(f"{where}: header entry normalized = {short(metadata['normalized'])} is not true or false.")
    return SunInfo(
        base_model=clip(printable(metadata.get("base_model", "")), 200),
        guidance_scale=number("w", 0, 1000),
        stage_length=number("stage_length", 0.001, 1),  # a step is at least one of the 1000 timesteps
        normalized=metadata.get("normalized") != "false",
        training=training,
        notes=notes,
    )


def guidance_range(training: Mapping[str, Any], where: str = "The adapter") -> tuple[float, float] | None:
    """From where to where an adapter was trained to take the guidance scale. Raises SunFileError naming ``where``."""
    stated = training.get("guidance_range")
    if stated is None or stated == [] or stated in ([0, 0], (0, 0)):  # trained for one scale
        return None
    if isinstance(stated, (list, tuple)) and len(stated) == 2:
        low, high = stated
        plain = all(isinstance(n, (int, float)) and not isinstance(n, bool) for n in stated)
        if plain and 0 < low <= high <= 1000:
            return float(low), float(high)
    raise SunFileError(
        f"{where}: guidance_range = {clip(printable(repr(stated)))} in header entry 'training' is not two numbers "
        "above 0. Get the file again."
    )


def _metadata(content: AdapterTensors) -> dict[str, str]:
    info = content.info
    metadata = {key: value for key, value in info.notes.items() if key != "format"} | {
        "format": FORMAT,
        "branches": "negative+positive" if content.positive else "negative",
        "layers": str(len(content.layers)),
        "text_width": str(content.text_width),
    }
    if info.base_model:
        metadata["base_model"] = info.base_model
    if info.guidance_scale is not None:
        metadata["w"] = repr(float(info.guidance_scale))
    if info.stage_length is not None:
        metadata["stage_length"] = repr(float(info.stage_length))
    if not info.normalized:
        metadata["normalized"] = "false"
    if info.training:
        metadata["training"] = json.dumps(_finite(info.training), sort_keys=True, default=str)
    return metadata


def _finite(value: Any) -> Any:
    """``value`` with NaN and infinity as texts, because JSON has no numbers for them."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _some(keys: Sequence[str], limit: int = 3) -> str:
    return ", ".join(short(key) for key in keys[:limit]) + (", ..." if len(keys) > limit else "")


def _keys(keys: Sequence[str]) -> str:
    return f"{len(keys)} key" + ("s" if len(keys) > 1 else "")
