"""LTC-Accel on diffusers pipelines: ``attach``, ``detach``, and ``calibrate``.

Nothing is patched while nothing is sampled. During a run the scheduler's ``step`` and the ``forward`` of the denoiser
(and of a ControlNet) are replaced on these very objects, and given back when the run ends, whatever ends it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..common.finite import NonFiniteError, require_finite
from ..pipelines.layered import default_of, original_call, put_on, take_off
from .calibration import run_calibration
from .errors import LtcError
from .fingerprint import fingerprint
from .interval import LtcSettings
from .keep import keep_measured, none_calm
from .run import LtcRun, Measurements
from .schedulers import Stepper, sampler_of
from .table import LtcKey, LtcTable, TableStore

DENOISERS = ("unet", "transformer")
SKIPPED = (*DENOISERS, "transformer_2", "controlnet")


@dataclass(eq=False)
class _Attachment:
    """What is on a pipeline. ``opener`` replaces the usual choice of a run, for calibration."""

    settings: LtcSettings
    store: TableStore
    opener: Callable[[LtcKey], LtcRun] | None = None
    last_key: LtcKey | None = None


def attach(
    pipe: Any,
    *,
    settings: LtcSettings | None = None,
    table: LtcTable | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> None:
    """Let a diffusers pipeline skip steps, whatever its model: Stable Diffusion, SDXL, SD 3, text-to-video.

    The first run with new steps, sampler or guidance scale measures itself at full cost and gives the usual picture;
    later ones are fast. ``folder`` keeps what was measured; ``table`` brings one, from ``calibrate`` for instance.
    A skipped step calls neither pass of classifier-free guidance, nor a ControlNet.

    May be called before or after ``sun.attach`` and ``sun.inheritance.attach``; calling it again replaces the settings.
    Raises LtcError if the scheduler adds noise or is not supported, TypeError if this is no diffusers pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"LTC-Accel attaches to a diffusers pipeline, not to a {type(pipe).__name__}.")
    _denoiser(pipe)
    sampler_of(pipe.scheduler)
    detach(pipe)
    store = TableStore(folder)
    if table is not None:
        settings = settings or table.settings
        store.put(table)
    pipe._ltc = _Attachment(settings or LtcSettings(), store)
    put_on(pipe, WithLtc)


def detach(pipe: Any) -> None:
    """Take LTC-Accel off a pipeline; without it, do nothing."""
    take_off(pipe, WithLtc)
    pipe.__dict__.pop("_ltc", None)


def last_table(pipe: Any) -> LtcTable | None:
    """The table of the pipeline's last run: the one it measured, or the one it used."""
    state: _Attachment | None = pipe.__dict__.get("_ltc")
    if state is None or state.last_key is None:
        return None
    return state.store.find(state.last_key, state.settings)


@torch.no_grad()
def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    negatives: Sequence[str] = (),
    *,
    batch: int = 4,
    seed: int = 0,
    find_bias: bool = False,
    progress: Callable[[str], None] = lambda _: None,
    **options: Any,
) -> LtcTable:
    """Measure a table on some prompts for a pipeline that LTC-Accel is attached to, and keep it there.

    Two passes: the first measures the angles and chooses the steps to skip, the second fits the coefficients on
    trajectories that have the skips before. options: those of the pipeline, as num_inference_steps and guidance_scale.
    find_bias: also look for one factor on all coefficients that brings the results nearest to the unaccelerated ones.
    Raises LtcError if LTC-Accel is not attached or no step can be skipped.
    """
    state: _Attachment | None = pipe.__dict__.get("_ltc")
    if state is None:
        raise LtcError("Call sun.ltc.attach(pipe) before calibrate(pipe, ...).")
    parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]

    def run(opener: Callable[[LtcKey], LtcRun]) -> list[Tensor]:
        return [_sample(pipe, state, opener, prompts[p], negatives[p], seed + p.start, options) for p in parts]

    table = run_calibration(run, state.settings, find_bias=find_bias, progress=progress)
    if not table.coefficients:
        raise LtcError(none_calm(table.turns, state.settings))
    state.store.put(table)
    return table


def _sample(
    pipe: Any, state: _Attachment, opener: Callable[[LtcKey], LtcRun], prompts: Sequence[str],
    negatives: Sequence[str], seed: int, options: dict[str, Any],
) -> Tensor:  # fmt: skip
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    texts: dict[str, Any] = {"prompt": list(prompts)}
    if negatives:
        texts["negative_prompt"] = list(negatives)
    state.opener = opener
    try:
        result = pipe(**texts, generator=generators, output_type="latent", **options)
    finally:
        state.opener = None
    latents: Tensor = result[0] if isinstance(result, tuple) else next(iter(result.values()))
    try:
        require_finite(latents, "the latents", "Look at a picture of this model first: a table would be made of NaN.")
    except NonFiniteError as error:
        raise LtcError(str(error)) from error
    return latents.float().cpu()


def _denoiser(pipe: Any) -> Any:
    for name in DENOISERS:
        if getattr(pipe, name, None) is not None:
            return getattr(pipe, name)
    raise LtcError(f"LTC-Accel finds no unet or transformer in {type(pipe).__name__}. Use a text-to-image pipeline.")


def _open_run(state: _Attachment, key: LtcKey) -> LtcRun:
    state.last_key = key
    if state.opener is not None:
        return state.opener(key)
    table = state.store.find(key, state.settings)
    if table is not None:
        return LtcRun(key.steps, table=table)
    return LtcRun(key.steps, measure=Measurements(key.steps, state.settings))


class WithLtc:
    """The layer that ``attach`` puts on a pipeline's class: it samples with LTC-Accel."""

    @staticmethod
    def around(pipe: Any, given: Mapping[str, Any]) -> AbstractContextManager[None]:
        w = given.get("guidance_scale", default_of(original_call(pipe), "guidance_scale", 1.0))
        return _running(pipe, pipe._ltc, float(w or 0.0))


@contextmanager
def _running(pipe: Any, state: _Attachment, w: float) -> Iterator[None]:
    scheduler, model = pipe.scheduler, _denoiser(pipe)

    def open_run(sampler: str, sigmas: tuple[float, ...]) -> LtcRun:
        return _open_run(state, LtcKey(fingerprint(model), sampler, sigmas, w))

    def finished(run: LtcRun) -> None:
        if run.measure is not None and state.opener is None and state.last_key is not None:
            keep_measured(run.measure, state.last_key, state.store)

    stepper = Stepper(scheduler, open_run, finished)
    step = functools.wraps(scheduler.step)(lambda *args, **kwargs: stepper.step(*args, **kwargs))
    with ExitStack() as stack:
        stack.enter_context(_replaced(scheduler, "step", step))
        for module in {id(m): m for m in (getattr(pipe, name, None) for name in SKIPPED) if m is not None}.values():
            stack.enter_context(_replaced(module, "forward", _skipping(module.forward, stepper)))
        yield


def _skipping(forward: Callable[..., Any], stepper: Stepper) -> Callable[..., Any]:
    """``forward`` that in a skipped step gives the last output again; the scheduler does not look at it."""
    kept: list[Any] = []

    @functools.wraps(forward)
    def skipping(*args: Any, **kwargs: Any) -> Any:
        if stepper.skips_next and kept:
            return kept[0]
        kept[:] = [forward(*args, **kwargs)]
        return kept[0]

    return skipping


@contextmanager
def _replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this one object replaced for a while."""
    before = target.__dict__.get(name)
    target.__dict__[name] = value
    try:
        yield
    finally:
        if before is None:
            target.__dict__.pop(name, None)
        else:
            target.__dict__[name] = before
