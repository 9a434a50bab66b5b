"""Feature inheritance in diffusers: ``attach`` to a pipeline or a U-Net, ``detach``.

The U-Net's parts are replaced only while it is called, by hooks that torch runs around the call, failing or not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..pipelines.layered import put_on, take_off
from .places import places_of
from .plan import InheritanceError, Plan, parse_plan
from .roles import roles_of
from .run import InheritanceRun

log = logging.getLogger(__name__)

_ARGUMENTS = ("sample", "timestep", "encoder_hidden_states")


@dataclass(eq=False)
class _Attachment:
    """``waiting``: (time, shape, full) of a call whose first convolution has not run; LTC-Accel may answer it."""

    run: InheritanceRun
    scheduler: Any = None  # of the pipeline that runs
    hooks: list[Any] = field(default_factory=list)
    stack: ExitStack = field(default_factory=ExitStack)
    waiting: tuple[float, tuple[int, ...], bool] | None = None

    def begin(self) -> None:
        """The U-Net really runs: put the roles in."""
        if self.waiting is not None:
            (time, shape, full), self.waiting = self.waiting, None
            if self.scheduler is not None and not self.run.begun:
                # What the pipeline has set by now: image to image leaves out the first of its steps.
                self.run.steps = len({t for t in map(float, self.scheduler.timesteps) if t <= time})
            self.stack.enter_context(self.run.call(time, shape, full=full))


def attach(target: Any, plan: Plan | str = "balanced", *, steps: int = 0) -> None:
    """Let a diffusers pipeline or ``UNet2DConditionModel`` inherit features from earlier steps.

    plan: a preset (fine, balanced, fast), a text such as ``"stages=1 every=3"``, or a Plan. steps: for a bare U-Net,
    and plans that are not uniform, how many steps a run has; pipelines tell it themselves.

    Works on Stable Diffusion 1.x, 2.x and SDXL, with or without SUN, LTC-Accel, LoRA and ControlNet, attached in any
    order; attaching again replaces the plan. Calls with T2I-Adapter residuals run in full. A run begins when the
    timestep rises, so a bare U-Net needs no telling.

    Raises InheritanceError for a plan that does not fit the U-Net, TypeError for another target.
    """
    pipe = target if isinstance(target, DiffusionPipeline) else None
    unet = _unet_of(target)
    plan = parse_plan(plan) if isinstance(plan, str) else plan
    roles = roles_of(plan, places_of(unet))
    detach(target)
    attachment = _Attachment(InheritanceRun(plan, roles, steps))
    attachment.hooks = [
        unet.register_forward_pre_hook(_before, with_kwargs=True),
        unet.conv_in.register_forward_pre_hook(lambda *_: attachment.begin()),
        unet.register_forward_hook(_after, always_call=True),
    ]
    unet._inheritance = attachment
    if pipe is not None:
        put_on(pipe, WithInheritance)


def detach(target: Any) -> None:
    """Take feature inheritance off; without it, do nothing."""
    if isinstance(target, DiffusionPipeline):
        take_off(target, WithInheritance)
    attachment = _attachment_of(target)
    if attachment is not None:
        attachment.stack.close()
        for hook in attachment.hooks:
            hook.remove()
        del _unet_of(target)._inheritance


def run_of(target: Any) -> InheritanceRun | None:
    """The counters of the run that is under way or was last."""
    attachment = _attachment_of(target)
    return attachment.run if attachment else None


def _attachment_of(target: Any) -> _Attachment | None:
    return _unet_of(target).__dict__.get("_inheritance")


def _before(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    attachment: _Attachment = unet._inheritance
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    time = given["timestep"]
    time = float(time.flatten()[0]) if isinstance(time, torch.Tensor) else float(time)
    # T2I-Adapters add to the inside of stages, in place.
    full = given.get("down_intrablock_additional_residuals") is not None
    attachment.stack.close()
    attachment.waiting = (time, tuple(given["sample"].shape), full)


def _after(unet: Any, _args: Any, _output: Any) -> None:
    attachment = unet.__dict__.get("_inheritance")
    if attachment is not None:
        attachment.waiting = None
        attachment.stack.close()


def _unet_of(target: Any) -> Any:
    unet = getattr(target, "unet", None) if isinstance(target, DiffusionPipeline) else target
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise InheritanceError(
            f"Feature inheritance works on a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, SDXL), not on "
            f"{type(unet if unet is not None else target).__name__}. LTC-Accel (sun.ltc.attach) works on any model."
        )
    return unet


class WithInheritance:
    """The layer that ``attach`` puts on a pipeline's class: it begins and ends runs."""

    @staticmethod
    @contextmanager
    def around(pipe: Any, _given: Mapping[str, Any]) -> Iterator[None]:
        attachment = _attachment_of(pipe)
        if attachment is None:
            yield
            return
        attachment.run.reset()
        attachment.scheduler = pipe.scheduler
        try:
            yield
        finally:
            attachment.scheduler = None
            log.info("%s", attachment.run.finish())
