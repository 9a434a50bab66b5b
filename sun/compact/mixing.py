"""Experts on the convolutions of a U-Net, whoever built it: torch hooks, which come off again without a trace.

Hosts' convolutions make their weights ready (number format, LoRA, device) and hand them to ``_conv_forward``; there the
mixed change is added, so that one convolution with one kernel does the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .experts import Alike, ExpertConv, Experts


def put_on(unet: Any, experts: Experts, place_of: Callable[[str], tuple[str, str]]) -> Mixing:
    """Experts on the convolutions of ``unet``, which see every row of a call as a picture of its own.

    place_of: by diffusers' name of a convolution, the names in this U-Net of it and of the residual layer it is in.
    Raises CompactError for a U-Net that the experts are not for.
    """
    convolutions, layers = {}, {}
    for name, _ in experts.by_name():
        conv, layer = place_of(name)
        try:
            found, layers[name] = unet.get_submodule(conv), unet.get_submodule(layer)
        except AttributeError:
            continue  # the experts say that it is not there
        convolutions[name] = getattr(found, "base_layer", found)  # a LoRA of peft around it
    return Mixing(experts, convolutions, layers)


class Mixing:
    """Experts in use on one U-Net. ``alike`` is to be set before a call whose rows are several passes.

    convolutions: by diffusers' names. layers: the residual layer of each, whose second input is the time embedding.
    Raises CompactError for a U-Net that the experts are not for.
    """

    def __init__(self, experts: Experts, convolutions: Mapping[str, Any], layers: Mapping[str, Any]) -> None:
        experts.fits(convolutions)
        self.experts, self.alike = experts, Alike()
        self._mixed = [_Mixed(self, name, layer, convolutions[name], layers[name]) for name, layer in experts.by_name()]

    def remove(self) -> None:
        """Take them off."""
        for mixed in self._mixed:
            mixed.remove()
        self._mixed = []


class _Mixed:
    """One convolution with experts."""

    def __init__(self, mixing: Mixing, name: str, experts: ExpertConv, conv: Any, layer: Any) -> None:
        self.mixing, self.name, self.experts, self.conv = mixing, name, experts, conv
        self.time: Tensor | None = None
        self.change: tuple[Tensor, Tensor] | None = None
        self._own: Callable[..., Tensor] = conv._conv_forward
        self._had = vars(conv).get("_conv_forward")
        vars(conv)["_conv_forward"] = self._conv_forward
        self._hooks = [
            layer.register_forward_pre_hook(self._take_time, with_kwargs=True),
            conv.register_forward_pre_hook(self._before),
            conv.register_forward_hook(self._after),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if vars(self.conv).get("_conv_forward") == self._conv_forward:
            del vars(self.conv)["_conv_forward"]
            if self._had is not None:
                vars(self.conv)["_conv_forward"] = self._had

    def _take_time(self, _layer: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        self.time = args[1] if len(args) > 1 else given.get("temb", given.get("emb"))

    def _before(self, _conv: Any, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if self.experts.kernels.device != x.device:
            self.experts.to(x.device)
        assert self.time is not None
        routing = self.mixing.experts.routing(self.name, self.experts, x, self.time, self.mixing.alike)
        self.change = self.experts.change(routing)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, *more: Any) -> Tensor:
        if self.change is None:
            return self._own(x, weight, bias, *more)
        kernels, biases = (part.to(weight.dtype) for part in self.change)
        self.change = None
        own = torch.zeros_like(biases[0]) if bias is None else bias
        return self._convolve(x, weight + kernels, own + biases, *more)

    def _convolve(self, x: Tensor, kernels: Tensor, biases: Tensor, *more: Any) -> Tensor:
        """x [(n G), C, h, w] with a kernel [G, O, C, k, k] of each picture."""
        pictures, conv = len(kernels), self.conv
        if pictures == 1:
            return self._own(x, kernels[0], biases[0], *more)
        if getattr(conv, "padding_mode", "zeros") != "zeros":  # tiling
            rows = x.unflatten(0, (-1, pictures)).unbind(1)
            done = [self._own(r, k, b, *more) for r, k, b in zip(rows, kernels, biases, strict=True)]
            return torch.stack(done, 1).flatten(0, 1)
        y = nn.functional.conv2d(
            rearrange(x, "(n g) c h w -> n (g c) h w", g=pictures),
            rearrange(kernels, "g o c i j -> (g o) c i j"),
            rearrange(biases, "g o -> (g o)"),
            conv.stride,
            conv.padding,
            conv.dilation,
            pictures,
        )
        return rearrange(y, "n (g o) h w -> (n g) o h w", g=pictures)

    def _after(self, conv: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A host whose convolution went its own way gets the change as a second one: slower, the same result."""
        if self.change is None:
            return None
        kernels, biases = (part.to(output.dtype) for part in self.change)
        self.change = None
        return output + self._convolve(args[0].to(output.dtype), kernels, biases)
