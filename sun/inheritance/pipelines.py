"""Feature inheritance in diffusers: ``attach`` to a pipeline or a U-Net, ``detach``.

The U-Net's parts are replaced only while it is called, by hooks that torch runs around the call, failing or not. What
belongs to a call of a pipeline is kept for that call alone; pipelines that share a U-Net have each its own plan.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..pipelines.layered import one_at_a_time, put_on, take_off
from ..pipelines.unet import UNET_ARGUMENTS
from .places import places_of
from .plan import InheritanceError, Plan, parse_plan
from .roles import roles_of
from .run import InheritanceRun

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _User:
    """What one user of a U-Net attached: a pipeline, or whoever calls the bare U-Net. ``steps``: of a run, if told."""

    plan: Plan
    steps: int = 0


@dataclass(eq=False)
class _Attachment:
    """What is installed on a U-Net. ``bare``: what acts in calls that belong to no pipeline."""

    unet: Any
    users: list[_User] = field(default_factory=list)
    bare: _User | None = None
    hooks: list[Any] = field(default_factory=list)

    @classmethod
    def of(cls, unet: Any) -> _Attachment:
        attachment: _Attachment | None = unet.__dict__.get("_inheritance")
        if attachment is None:
            attachment = unet._inheritance = cls(unet)
            attachment.hooks = [
                unet.register_forward_pre_hook(_before, with_kwargs=True),
                unet.conv_in.register_forward_pre_hook(_begins),
                unet.register_forward_hook(_after, always_call=True),
            ]
        return attachment

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        self.users, self.bare = [], None
        self.unet.__dict__.pop("_inheritance", None)

    def remove_if_idle(self) -> None:
        if not self.users and self.bare is None:
            self.remove()


@dataclass(eq=False)
class _Calls:
    """The calls of a U-Net that make a run. ``waiting``: (time, shape, full) of one whose first convolution has not
    run; LTC-Accel may answer it. ``scheduler``: of the pipeline that runs."""

    unet: Any
    run: InheritanceRun
    scheduler: Any = None
    waiting: tuple[float, tuple[int, ...], bool] | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def begin(self) -> None:
        """The U-Net really runs: put the roles in. Another thread that calls it waits until they are out again."""
        if self.waiting is None:
            return
        (time, shape, full), self.waiting = self.waiting, None
        if self.scheduler is not None and not self.run.begun:
            # What the pipeline has set by now: image to image leaves out the first of its steps.
            self.run.steps = len({t for t in map(float, self.scheduler.timesteps) if t <= time})
        self.stack.enter_context(one_at_a_time(self.unet))
        self.stack.enter_context(self.run.call(time, shape, full=full))

    def end(self) -> None:
        self.waiting = None
        self.stack.close()


_current: ContextVar[_Calls | None] = ContextVar("sun_inheritance", default=None)
"""Of the pipeline that is being called in this thread or task."""
_bare = threading.local()
"""Runs of bare U-Nets, for each thread its own: ``calls`` by U-Net."""
_last: weakref.WeakKeyDictionary[Any, InheritanceRun] = weakref.WeakKeyDictionary()
"""The last run of each pipeline and bare U-Net."""


def attach(target: Any, plan: Plan | str = "balanced", *, steps: int = 0) -> None:
    """Let a diffusers pipeline or ``UNet2DConditionModel`` inherit features from earlier steps.

    plan: a preset (fine, balanced, fast), a text such as ``"stages=1 every=3"``, or a Plan. steps: for a bare U-Net,
    and plans that are not uniform, how many steps a run has; pipelines tell it themselves.

    Works on Stable Diffusion 1.x, 2.x and SDXL, with or without SUN, LTC-Accel, LoRA and ControlNet, attached in any
    order; attaching again replaces the plan. Pipelines that share a U-Net are attached each by itself and keep their
    plans. Calls with T2I-Adapter residuals run in full. A run begins when the timestep rises, so a bare U-Net needs no
    telling.

    Raises InheritanceError for a plan that is none or does not fit the U-Net, and for another target.
    """
    unet = _unet_of(target)
    user = _User(parse_plan(plan) if isinstance(plan, str) else plan, steps)
    roles_of(user.plan, places_of(unet))  # says now if the plan does not fit
    if not isinstance(target, DiffusionPipeline):
        _Attachment.of(unet).bare = user
        _forget(unet)
        return
    detach(target)
    _Attachment.of(unet).users.append(user)
    target._inheritance = user
    put_on(target, WithInheritance)


def detach(target: Any) -> None:
    """Take feature inheritance off; without it, do nothing.

    Detaching a U-Net that pipelines share detaches it for all of them. Raises InheritanceError for another target.
    """
    attachment: _Attachment | None = _unet_of(target).__dict__.get("_inheritance")
    if isinstance(target, DiffusionPipeline):
        take_off(target, WithInheritance)
        user = target.__dict__.pop("_inheritance", None)
        if attachment is not None:
            attachment.users = [other for other in attachment.users if other is not user]
            attachment.remove_if_idle()
    elif attachment is not None:
        attachment.remove()
        _forget(attachment.unet)


def run_of(target: Any) -> InheritanceRun | None:
    """The counters of the run of a pipeline or bare U-Net that is under way or was last."""
    calls = _current.get()
    if calls is not None and calls.unet is _unet_of(target):
        return calls.run
    return _last.get(target if isinstance(target, DiffusionPipeline) else _unet_of(target))


class WithInheritance:
    """The layer that ``attach`` puts on a pipeline's class: it begins and ends runs."""

    @staticmethod
    @contextmanager
    def around(pipe: Any, _given: Mapping[str, Any]) -> Iterator[None]:
        unet, user = _unet_of(pipe), pipe._inheritance
        attachment: _Attachment | None = unet.__dict__.get("_inheritance")
        if attachment is None or user not in attachment.users:
            raise InheritanceError(
                "The U-Net of this pipeline was replaced or detached since sun.inheritance.attach(pipe). Call that "
                "again, or sun.inheritance.detach(pipe)."
            )
        run = _last[pipe] = InheritanceRun(user.plan, roles_of(user.plan, places_of(unet)), user.steps)
        calls = _Calls(unet, run, pipe.scheduler)
        before = _current.set(calls)
        try:
            yield
        finally:
            _current.reset(before)
            calls.end()
            log.info("%s", run.finish())


def _calls_of(unet: Any) -> _Calls | None:
    """The run that a call of ``unet`` in this thread belongs to, if it inherits."""
    attachment: _Attachment | None = unet.__dict__.get("_inheritance")
    calls = _current.get()
    if attachment is None or (calls is not None and calls.unet is unet):
        return calls if attachment is not None else None
    user = attachment.bare
    if user is None:
        return None
    known = _bare_calls().get(unet)
    if known is None or known.run.plan is not user.plan:
        run = _last[unet] = InheritanceRun(user.plan, roles_of(user.plan, places_of(unet)), user.steps)
        known = _bare_calls()[unet] = _Calls(unet, run)
    return known


def _bare_calls() -> weakref.WeakKeyDictionary[Any, _Calls]:
    if not hasattr(_bare, "calls"):
        _bare.calls = weakref.WeakKeyDictionary()
    calls: weakref.WeakKeyDictionary[Any, _Calls] = _bare.calls
    return calls


def _forget(unet: Any) -> None:
    """End this thread's run of a bare U-Net, also one whose last call was interrupted and left its parts replaced."""
    calls = _bare_calls().pop(unet, None)
    if calls is not None:
        calls.end()
        if getattr(_called, "calls", None) is calls:
            _called.calls = None


def _before(unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    calls = _calls_of(unet)
    if calls is None:
        return
    given = dict(zip(UNET_ARGUMENTS, args, strict=False)) | kwargs
    time = given["timestep"]
    time = float(time.flatten()[0]) if isinstance(time, torch.Tensor) else float(time)
    # T2I-Adapters add to the inside of stages, in place.
    full = given.get("down_intrablock_additional_residuals") is not None
    calls.end()  # of a call that never came back
    calls.waiting = (time, tuple(given["sample"].shape), full)
    _called.calls = calls


_called = threading.local()
"""The call that the first convolution belongs to, in this thread."""


def _begins(_conv_in: Any, _args: Any) -> None:
    calls: _Calls | None = getattr(_called, "calls", None)
    if calls is not None:
        calls.begin()


def _after(_unet: Any, _args: Any, _output: Any) -> None:
    calls: _Calls | None = getattr(_called, "calls", None)
    if calls is not None:
        _called.calls = None
        calls.end()


def _unet_of(target: Any) -> Any:
    unet = getattr(target, "unet", None) if isinstance(target, DiffusionPipeline) else target
    unet = getattr(unet, "_orig_mod", unet)
    if not isinstance(unet, UNet2DConditionModel):
        raise InheritanceError(
            f"Feature inheritance works on a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, SDXL), not on "
            f"{type(unet if unet is not None else target).__name__}. LTC-Accel (sun.ltc.attach) works on any model."
        )
    return unet
