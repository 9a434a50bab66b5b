"""Several methods on one diffusers pipeline: each adds a layer to its class, and any of them may leave first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAKER = "_sun_layer"


def put_on(pipe: Any, maker: Callable[[Any], Any]) -> None:
    """Give ``pipe`` the class ``maker(its class)``. ``maker`` must return the same class for the same base."""
    made = maker(type(pipe))
    setattr(made, MAKER, staticmethod(maker))
    pipe.__class__ = made


def take_off(pipe: Any, maker: Callable[[Any], Any]) -> None:
    """Take the layer of ``maker`` away and keep the others in their order; without one, do nothing."""
    layers: list[Callable[[Any], Any]] = []
    base: Any = type(pipe)
    while MAKER in base.__dict__:
        layers.append(base.__dict__[MAKER].__func__)
        base = base.__base__
    if maker not in layers:
        return
    for layer in reversed(layers):
        if layer is not maker:
            base = layer(base)
            setattr(base, MAKER, staticmethod(layer))
    pipe.__class__ = base
