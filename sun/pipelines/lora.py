"""LoRA files on a diffusers pipeline: names of any program to the model's layers, every change added to the weights.

diffusers reads fewer kinds of files than people have, drops some of what it reads (DoRA's scales, layers it does not
find) with a line in a log, and finds no text encoder's layers with transformers 5. Here the layers are those of the
model at hand, by all names that programs give them; what is not of it is told, and what is of an unknown kind named.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..common.notes import note
from ..common.reading import ReadError, check_regular, parse_json, read_json
from ..layers import layers_of_unet
from ..shipped import EMOJI_LORA, SHIPPED
from .loading import ModelError, ModelMissing
from .lora_changes import LOHA, LOKR, WHOLE, changed, kind_of

FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PEFT_CONFIG = "adapter_config.json"
# The ends of tensor names: LoRA's as kohya, diffusers (three ages of them) and peft write them, then its relatives'.
_LORA_END = re.compile(r"(?:\.lora_|[._]lora\.|\.lora_linear_layer\.)(down|up|mid)(?:\.weight)?$")
_PEFT_END = re.compile(r"\.lora_(?:embedding_)?([AB])(?:\.(?!bias$)[\w-]+)?(?:\.weight)?$")
_DORA_END = re.compile(r"\.(?:dora_scale|lora_magnitude_vector(?:\.[\w-]+)?(?:\.weight)?)$")
_OTHER_END = re.compile(rf"\.(alpha|scalar|{'|'.join((*LOHA, *LOKR, *WHOLE))})(?:\.weight)?$")
_UNKNOWN_KINDS = (
    (re.compile(r"\.(oft_blocks|oft_diag|oft_R|boft_|oft_)"), "OFT"),
    (re.compile(r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$"), "GLoRA"),
    (re.compile(r"\.(on_input|ia3_l)"), "IA3"),
    (re.compile(r"vera_lambda|\.vera_"), "VeRA"),
    (re.compile(r"^bundle_emb\.|emb_params"), "textual inversion"),
    (re.compile(r"\.(set_weight|reshape_weight)$"), "replaced weights"),
    (re.compile(r"\.lora_[AB](\.[\w-]+)?\.bias$"), "LoRA biases"),
)
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|base_model\.model|base_model)\.")
_OF_SD1 = ("unet.", "text_encoder.", "lora_unet_", "lora_te_", "lora_te1_", "diffusion_model.", "text_model.")
_PROCESSOR = re.compile(r"\.processor\.(to_[qkv]|to_out)$")
_TEXT_PROJECTIONS = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass
class LoraFile:
    """What a file holds: ``layers`` by the file's own names of them, and the names of tensors of no known kind."""

    path: Path
    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    def unknown_kinds(self) -> str:
        """ "12 tensors of OFT, 2 of no known kind"; empty if there are none."""
        kinds = Counter(
            next((kind for mark, kind in _UNKNOWN_KINDS if mark.search(name)), "no known kind") for name in self.unknown
        )
        return ", ".join(f"{n} {'tensor' if n == 1 else 'tensors'} of {kind}" for kind, n in kinds.items())


def apply_lora(pipe: Any, path: str | Path, weight: float = 1.0) -> None:
    """Add ``weight`` times the changes of a LoRA file to the weights of ``pipe``, which has to be reloaded without it.

    path: a .safetensors file, or a folder as diffusers or peft write it. LoRA, DoRA, LoHa, LoKr, norms and whole
    differences are added, of U-Net and text encoder; what of the file is not is told as a ``SunWarning``. Raises
    ModelError if nothing of it is for this model, if a layer is of another size, or if it holds NaN.
    """
    if not math.isfinite(weight):
        raise ModelError(f"{path} has the weight {weight}; write a number, as in {path}:0.8.")
    file = read_lora(path)
    names: dict[str, Any] = layer_names(pipe)  # type checkers take a module's weight for a module
    found = {name: names[key] for name in file.layers if (key := _plain(name)) in names}
    lacking = [name for name in file.layers if name not in found]
    _check_any(file, found, lacking)
    with torch.no_grad():
        for name, layer in found.items():
            try:
                new, bias = changed(layer.weight, getattr(layer, "bias", None), file.layers[name], weight)
            except (ValueError, KeyError, IndexError, RuntimeError) as error:
                what = f"lacks its {error}" if isinstance(error, KeyError) else str(error)
                raise ModelError(
                    f"{file.path} could not be loaded as a LoRA for this model: {name}: {what}. It is for another base "
                    "model, or damaged."
                ) from error
            layer.weight.copy_(new)
            if bias is not None:
                layer.bias.copy_(bias)
    kinds = Counter(kind_of(file.layers[name]) for name in found)
    usual = set(kinds) == {"LoRA"} and all(name == _plain(name) for name in found)
    if not usual and not lacking and not file.unknown:
        holds = ", ".join(f"{count} layers of {kind}" for kind, count in kinds.items())
        note(f"{file.path}: {holds} applied, no keys of it left out.")
    if lacking:
        note(
            f"{file.path}: {len(lacking)} of {len(file.layers)} layers are not of this model and not applied "
            f"({_some(lacking)})."
        )
    if file.unknown:
        note(f"{file.path}: {file.unknown_kinds()} are not applied ({_some(file.unknown)}).")


def read_lora(path: str | Path) -> LoraFile:
    """The layers of a LoRA file, checked to be finite. Raises ModelError."""
    file = LoraFile(_lora_file(Path(path)))
    try:
        check_regular(file.path)
        with safe_open(str(file.path), "pt") as content:
            header = dict(content.metadata() or {})
            for name in content.keys():  # noqa: SIM118  (no dictionary)
                tensor = content.get_tensor(name)
                if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                    raise ModelError(f"{file.path}: {name} holds NaN or infinity. The training diverged; get another.")
                layer, part = _split(name)
                if part and part not in ("alpha", "scalar") and not tensor.is_floating_point():
                    raise ModelError(
                        f"{file.path}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not weights: the file "
                        "is quantised. Take it in fp16 or bf16."
                    )
                if part:
                    file.layers.setdefault(layer, {})[part] = tensor
                else:
                    file.unknown.append(name)
    except ReadError as error:
        raise ModelError(str(error)) from error
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{file.path} could not be loaded as a LoRA: it is damaged ({error}). Get it again."
        ) from error
    for layer in [name for name, parts in file.layers.items() if not set(parts) - {"alpha", "scalar"}]:
        file.unknown += [f"{layer}.{part}" for part in file.layers.pop(layer)]
    _add_stated_alphas(file, header)
    return file


def layer_names(pipe: Any) -> dict[str, nn.Module]:
    """Every layer with a weight of U-Net and text encoder, by all names that programs give it in LoRA files."""
    names: dict[str, nn.Module] = {}
    for name, layer in _weighted(pipe.text_encoder):
        inner = name.removeprefix("text_model.")
        flat = inner.replace(".", "_")
        for given in (f"text_encoder.{inner}", f"text_encoder.text_model.{inner}", f"text_model.{inner}"):
            names[given] = layer
        for start in ("lora_te_", "lora_te1_"):
            names[f"{start}{flat}"] = names[f"{start}text_model_{flat}"] = layer
    # LDM's names of the attention layers; what diffusers calls down_blocks.0.attentions.0 is input_blocks.1.1 there
    ldm = {
        layer.diffusers.partition(".transformer_blocks")[0]: layer.ldm.partition(".transformer_blocks")[0]
        for layer in layers_of_unet(pipe.unet)
    }
    for name, layer in _weighted(pipe.unet):
        names[name] = names[f"unet.{name}"] = names[f"lora_unet_{name.replace('.', '_')}"] = layer
        place = ".".join(name.split(".")[: 2 if name.startswith("mid_block") else 4])
        place = next((known for known in ldm if name.startswith(f"{known}.")), place)
        if place in ldm:
            theirs = ldm[place] + name.removeprefix(place)
            names[f"diffusion_model.{theirs}"] = names[f"lora_unet_{theirs.replace('.', '_')}"] = layer
    return names


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if isinstance(module.__dict__.get("_parameters", {}).get("weight"), nn.Parameter):
            yield name, module


def _lora_file(path: Path) -> Path:
    if str(path) == SHIPPED:
        if not EMOJI_LORA.is_file():
            raise ModelMissing("this installation has no shipped LoRA. Give --lora a file, or update SUN.")
        return EMOJI_LORA
    if not path.exists():
        raise ModelMissing(f"the LoRA {path} does not exist. Check the path.")
    if path.is_dir():
        inside = [path / name for name in FILES if (path / name).is_file()] or sorted(path.glob("*.safetensors"))
        if len(inside) != 1:
            raise ModelError(f"{path} holds {len(inside) or 'no'} .safetensors files. Give the LoRA file itself.")
        return inside[0]
    if path.suffix.lower() != ".safetensors":
        raise ModelError(f"{path} could not be loaded as a LoRA: it is no .safetensors file. Convert it first.")
    return path


def _split(name: str) -> tuple[str, str]:
    """A tensor's name as (layer, part of it); the part is empty where the name is of no known kind."""
    if match := _LORA_END.search(name):
        return name[: match.start()], match[1]
    if match := _PEFT_END.search(name):
        return name[: match.start()], {"A": "down", "B": "up"}[match[1]]
    if match := _DORA_END.search(name):
        return name[: match.start()], "dora"
    if match := _OTHER_END.search(name):
        return name[: match.start()], match[1]
    return name, ""


def _plain(layer: str) -> str:
    """The name of a layer without what wrappers (torch.compile, DataParallel, peft) and old diffusers put into it."""
    layer = _WRAPPERS.sub("", layer)
    if match := _PROCESSOR.search(layer):
        layer = f"{layer[: match.start()]}.{match[1].replace('to_out', 'to_out.0')}"
    head, _, last = layer.rpartition(".")
    if head.startswith("text_encoder.") and last in _TEXT_PROJECTIONS:
        return f"{head}.{_TEXT_PROJECTIONS[last]}"
    return layer


def _add_stated_alphas(file: LoraFile, header: Mapping[str, str]) -> None:
    """Alpha where it is not with the layers: in peft's config beside the file, or in diffusers' header entry."""
    stated: list[tuple[str, dict[str, Any]]] = []
    beside = file.path.with_name(_PEFT_CONFIG)
    try:
        if beside.is_file() and file.path.name == FILES[1]:
            stated = [("", read_json(beside))]
        elif "lora_adapter_metadata" in header:
            entries = parse_json(header["lora_adapter_metadata"], f"{file.path}: lora_adapter_metadata")
            for start in ("unet", "text_encoder"):
                own = {key.removeprefix(f"{start}."): v for key, v in entries.items() if key.startswith(f"{start}.")}
                stated.append((f"{start}.", own))
    except (ReadError, OSError, AttributeError) as error:
        raise ModelError(f"{file.path}: what it says of its settings could not be read ({error}).") from error
    for start, settings in stated:
        for name, parts in file.layers.items():
            layer = _plain(name)
            if "alpha" in parts or not layer.startswith(start) or kind_of(parts) == "whole differences":
                continue
            rank = len(parts["down"]) if "down" in parts else _stated(settings, "r", "rank_pattern", layer, file.path)
            alpha = _stated(settings, "lora_alpha" if "down" in parts else "alpha", "alpha_pattern", layer, file.path)
            if alpha and rank:  # as a factor: peft's scale of LoKr does not depend on whether a half has a rank
                parts["scalar"] = torch.tensor(alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank))


def _stated(settings: Mapping[str, Any], name: str, pattern: str, layer: str, where: Path) -> float:
    """A number of peft's settings for ``layer``, 0 where they do not state it. Raises ModelError."""
    own = settings.get(pattern) if isinstance(settings.get(pattern), dict) else {}
    value = next((v for key, v in (own or {}).items() if layer == key or layer.endswith(f".{key}")), None)
    value = settings.get(name, 0) if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"{where}: its settings state {name} = {value!r}, which is no number.")
    return float(value)


def _check_any(file: LoraFile, found: Mapping[str, nn.Module], lacking: list[str]) -> None:
    """Raise ModelError, saying what the file is instead, unless some of it is for this model."""
    if any("lora_te2_" in name or "text_encoder_2." in name for name in lacking):
        raise ModelError(
            f"{file.path} could not be loaded as a LoRA for this model: It is for SDXL, with its second text encoder "
            f"({_some([name for name in lacking if 'te2_' in name or 'text_encoder_2.' in name])}). Take one made for "
            "Stable Diffusion 1.x."
        )
    if found:
        return
    kinds = file.unknown_kinds()
    if lacking and any(_WRAPPERS.sub("", name).startswith(_OF_SD1) for name in lacking):
        kind = ", ".join(sorted({kind_of(file.layers[name]) for name in lacking}))
        raise ModelError(
            f"{file.path} could not be loaded as a LoRA for this model: none of its {len(lacking)} layers ({kind}) is "
            f"of it, {_some(lacking)} for one. Take one made for Stable Diffusion 1.x."
        )
    if not lacking:
        holds = f"it holds {kinds}, which SUN cannot apply" if kinds else "it is empty"
        raise ModelError(
            f"{file.path} could not be loaded as a LoRA: {holds} ({_some(file.unknown or ['no tensors'])})."
        )
    raise ModelError(
        f"{file.path} holds no LoRA for a Stable Diffusion 1.x U-Net or text encoder. Its first layer is {lacking[0]}."
    )


def _some(names: list[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
