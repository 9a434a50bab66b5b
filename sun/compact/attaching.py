"""Experts on a diffusers U-Net, and back to an ordinary one."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .experts import Experts, alike_of, fold, make_experts, mean_routings, recentre
from .measuring import State, noise_of
from .mixing import Mixing, put_on
from .planfile import Plan
from .structure import CompactError, shape_of

_ON = "_sun_experts"


def experts_for(unet: Any, small: Any, plan: Plan, count: int = 4, hidden: int = 64) -> Experts:
    """New experts for ``small``, assembled from ``unet`` by ``plan``: see :func:`sun.compact.experts.make_experts`."""
    plan.check(shape_of(unet.config))
    width = small.time_embedding.linear_2.out_features
    return make_experts(unet.state_dict(), small.state_dict(), plan, width, count, hidden)


def attach_experts(unet: Any, experts: Experts) -> Mixing:
    """Mix kernels in a compact U-Net (a diffusers ``UNet2DConditionModel``) from now on; in place of others there.

    Rows that are passes of one picture, as the two of guidance, share a routing. The experts come to the U-Net's
    device and number format. Raises CompactError for experts of another U-Net.
    """
    unet = getattr(unet, "_orig_mod", unet)
    if found := experts.shape.difference(shape_of(unet.config)):
        name, mine, theirs = found
        raise CompactError(
            f"These experts are for another compact U-Net: its {name} is {mine} there and {theirs} here. "
            "Take the U-Net they were trained with."
        )
    detach_experts(unet)
    like = unet.conv_in.weight
    mixing = mixing_of(unet, experts.to(like.device, like.dtype))

    def see(_unet: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        x: Tensor = args[0] if args else given["sample"]
        mixing.alike = alike_of(x)

    vars(unet)[_ON] = (mixing, unet.register_forward_pre_hook(see, with_kwargs=True))
    return mixing


def mixing_of(unet: Any, experts: Experts) -> Mixing:
    """Experts put on a diffusers U-Net, seeing every row of a call as a picture of its own. Raises CompactError."""
    return put_on(unet, experts, lambda name: (name, name.rpartition(".")[0]))


def detach_experts(unet: Any) -> bool:
    """Take experts off a U-Net, which is then the compact one it was. Returns whether there were any."""
    unet = getattr(unet, "_orig_mod", unet)
    found = vars(unet).pop(_ON, None)
    if found is None:
        return False
    mixing, hook = found
    hook.remove()
    mixing.remove()
    return True


def experts_of(unet: Any) -> Experts | None:
    """The experts on a U-Net, or None."""
    found = vars(getattr(unet, "_orig_mod", unet)).get(_ON)
    return None if found is None else found[0].experts


@contextmanager
def watching(experts: Experts) -> Iterator[None]:
    """Inside, the routings of all calls are kept in ``experts.seen``."""
    experts.seen = {}
    try:
        yield
    finally:
        experts.seen = None


@torch.no_grad()
def collapse(unet: Any, states: Sequence[State]) -> Any:
    """An ordinary compact U-Net, a copy of one with experts: each routing is replaced by its mean over ``states``.

    states: see :func:`sun.compact.record_states`. It loads in every host and costs nothing more; what is lost is for
    you to measure. The U-Net given is not changed. Raises CompactError where it has no experts or no states are given.
    """
    unet = getattr(unet, "_orig_mod", unet)
    experts = experts_of(unet)
    if experts is None:
        raise CompactError("This U-Net has no experts to collapse. Put them on first (attach_experts).")
    with watching(experts):
        for state in states:
            noise_of(unet, state)
        routings = mean_routings(experts)
    detach_experts(unet)  # hooks would be copied with it
    try:
        small = copy.deepcopy(unet)
    finally:
        attach_experts(unet, experts)
    weights = small.state_dict()
    fold(weights, experts, routings)
    small.load_state_dict(weights)
    return small


@torch.no_grad()
def settle(weights: dict[str, Tensor], experts: Experts) -> None:
    """Bring what :func:`watching` saw as mean routing into a compact U-Net's ``weights``, in place, and count experts
    from it: the U-Net with experts is the same, and without them it is the collapsed one.
    """
    routings = mean_routings(experts)
    fold(weights, experts, routings)
    recentre(experts, routings)
