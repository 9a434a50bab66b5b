"""Functions around ComfyUI's sampling: how they are hung on a model, which is last, what those around a U-Net see."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

Wrapper = Callable[..., torch.Tensor]


def hang(patcher: ModelPatcher, key: str, wrappers: Mapping[str, Wrapper]) -> None:
    """Put wrappers (by their kind in WrappersMP) on a patcher, in the place of those it has under `key`."""
    for kind, wrapper in wrappers.items():
        patcher.remove_wrappers_with_key(kind, key)
        patcher.add_wrapper_with_key(kind, key, wrapper)


def innermost(wrappers: dict[str, Any], kind: str, key: str) -> dict[str, Any]:
    """The wrappers of a call with those of `key` last of their kind: others may answer in their place."""
    around = wrappers.get(kind, {})
    if key not in around:
        return wrappers
    return {**wrappers, kind: {name: ones for name, ones in around.items() if name != key} | {key: around[key]}}


@dataclass
class UNetCall:
    """One call of a U-Net, with what is given to it: x [B, C, h, w], timesteps [B], context [B, L, width]."""

    executor: Any
    x: torch.Tensor
    timesteps: torch.Tensor
    context: torch.Tensor | None
    y: Any
    control: Any
    options: dict[str, Any]
    others: dict[str, Any]

    @property
    def unet(self) -> Any:
        return self.executor.class_obj

    def go_on(self) -> torch.Tensor:
        """Let the wrappers further in, and then the U-Net, answer."""
        return self.executor(self.x, self.timesteps, self.context, self.y, self.control, self.options, **self.others)


def around_unet(answer: Callable[[UNetCall], torch.Tensor]) -> Wrapper:
    """`answer` as a wrapper of the kind DIFFUSION_MODEL, for U-Nets: transformers are called with other things."""

    @functools.wraps(answer)
    def wrapper(
        executor: Any,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None = None,
        y: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **others: Any,
    ) -> torch.Tensor:
        options = transformer_options if transformer_options is not None else {}
        return answer(UNetCall(executor, x, timesteps, context, y, control, options, others))

    return wrapper
