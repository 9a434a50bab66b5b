"""Devices and number formats by name: the one way to choose them, and which formats a device is fast in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .errors import ConfigError

AUTO = "auto"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def has_bf16(device: torch.device | str) -> bool:
    """Whether ``device`` has bfloat16 arithmetic of its own.

    GPUs before Ampere and CPUs without AVX-512 or Arm's BF16 instructions emulate it: on a Zen 3 CPU Emoji Diffusion's
    U-Net then takes 12 times as long as in float32, and its picture encoder 100 times. Of other devices than GPUs of
    Nvidia, AMD and Intel nothing is known: they count as without.
    """
    device = torch.device(device)
    if device.type == "cuda":
        return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type == "xpu"


def resolve(precision: str, device: torch.device | str) -> str:
    """``auto`` as what it means on ``device``: bf16 where it is fast, else fp32. Any other name as it is."""
    if precision != AUTO:
        return precision
    return "bf16" if has_bf16(device) else "fp32"


def autocast(device: torch.device | str, precision: str = AUTO) -> AbstractContextManager[Any]:
    """The context to compute in: bf16 and fp16 in that format with the weights as they are, others without casts."""
    device = torch.device(device)
    dtype = AUTOCAST.get(resolve(precision, device))
    # not torch.autocast(enabled=False): it refuses devices it has nothing for
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def process_state(**options: Any) -> Any:
    """accelerate's view of this process among those that ``accelerate launch`` or ``torchrun`` started, and its device.

    Made with ``options`` if it is not there yet; for training and evaluation, which have accelerate.
    """
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    if PartialState._shared_state:
        return PartialState()
    # accelerate itself looks at this flag in the Accelerator alone, which may not exist yet or never will
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done all that it was given, so that the clock tells the truth."""
    if device.type in ("cuda", "mps", "xpu"):
        getattr(torch, device.type).synchronize()


def device_name(device: torch.device) -> str:
    """The accelerator's name, or a CPU's threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def pick_device(name: str = AUTO) -> str:
    """The device of a name, after trying it; ``auto``: a GPU where there is one. Raises ConfigError."""
    if name == AUTO:
        return accelerators()[0] if accelerators() else "cpu"
    try:
        torch.empty(1, device=name).tolist()  # "meta" has no numbers
    except Exception as error:  # each backend that is not there raises something else
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"the device {name!r} is not available here ({reason})") from error
    return name


def accelerators() -> list[str]:
    """The kinds of accelerators this machine has, as far as torch can use them."""
    found = ["cuda"] if torch.cuda.is_available() else []
    return found + (["mps"] if torch.backends.mps.is_available() else [])


def pick_dtype(name: str, device: str) -> torch.dtype:
    """A number format for weights; ``auto`` is float32 on a CPU and float16 elsewhere. Raises ConfigError."""
    if name == AUTO:
        return torch.float32 if torch.device(device).type == "cpu" else torch.float16
    if name not in DTYPES:
        raise ConfigError(f"the dtype {name!r} is unknown. Choose one of auto, {', '.join(DTYPES)}.")
    return DTYPES[name]
