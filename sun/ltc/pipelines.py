"""LTC-Accel on diffusers pipelines: ``attach``, ``detach``, ``last_run``, and ``calibrate``.

Nothing is patched while nothing is sampled. During a run the scheduler's ``step`` and the ``forward`` of the denoiser
(and of a ControlNet), or what ``module.compile()`` made of it, are replaced on these very objects, and given back when
the run ends, whatever ends it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..common.finite import NonFiniteError, require_finite
from ..common.notes import note
from ..pipelines.layered import DENOISERS, default_of, original_call, put_on, take_off
from ..pipelines.unet import CURRENT as SUN_RUN
from ..switching.pipelines import last_run as switching_run
from ..switching.pipelines import partner_of
from . import presets
from .calibration import run_calibration
from .counts import Counts, say
from .errors import LtcError
from .fingerprint import adapter_digest, fingerprint, lora_of
from .interval import LtcSettings
from .keep import none_calm, running
from .outputs import OutputStepper
from .presets import BALANCED, PAPER, SkipSettings
from .run import LtcRun
from .schedulers import Stepper, sampler_of
from .skipping import SkipRun
from .table import LtcKey, LtcTable, TableStore

SKIPPED = (*DENOISERS, "transformer_2", "controlnet")


Opener = Callable[[LtcKey], LtcRun]


@dataclass(eq=False)
class _Attachment:
    """What is on a pipeline. ``given``: the table that was brought; ``last_key``: of the run that ended last."""

    settings: LtcSettings | SkipSettings
    store: TableStore
    given: LtcTable | None = None
    last_key: LtcKey | None = None
    last_run: Counts | None = None
    measures: bool = True


_opener: ContextVar[Opener | None] = ContextVar("sun_ltc_opener", default=None)
"""Instead of the usual choice of a run, for calibration."""
_stepper: ContextVar[Stepper | OutputStepper | None] = ContextVar("sun_ltc_stepper", default=None)
"""Of the pipeline that is being called in this thread or task."""


def attach(
    pipe: Any,
    preset: str | None = None,
    *,
    settings: SkipSettings | LtcSettings | None = None,
    table: LtcTable | None = None,
    folder: str | os.PathLike[str] | None = None,
    measure: bool = True,
    **overrides: Any,
) -> None:
    """Let a diffusers pipeline skip steps from its first picture on, whatever its model and its scheduler.

    preset: "fine", "balanced" (if nothing is named), "fast" or "fastest"; overrides: single settings of it, as in
    ``attach(pipe, "fast", last=3)``, see :class:`.SkipSettings`; settings: all of them at once. A skipped step calls
    neither pass of classifier-free guidance, nor a ControlNet. :func:`last_run` tells what it saved.

    preset "paper", or settings of :class:`.LtcSettings`: the published method for Euler, DDIM, DPM-Solver++ 2M, Heun,
    DPM2 and flow-matching Euler. Its first run with new steps, sampler or guidance scale measures itself at full cost;
    ``folder`` keeps what was measured; ``table`` brings one, from ``calibrate`` for instance. measure=False: a run that
    has no table of its own does not measure itself, but raises LtcError.

    May be called before or after ``sun.attach`` and ``sun.inheritance.attach``; calling it again replaces the settings.
    Raises LtcError for presets and settings there are not, for arguments that would have no effect beside others, for a
    pipeline without U-Net or transformer, and for the paper's settings with a scheduler that adds noise or is not
    supported; TypeError if this is no diffusers pipeline.
    """
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"LTC-Accel attaches to a diffusers pipeline, not to a {type(pipe).__name__}.")
    _denoiser(pipe)
    chosen = _chosen(preset, settings, table, folder, overrides, measure)
    if isinstance(chosen, LtcSettings):
        sampler_of(pipe.scheduler)
    detach(pipe)
    store = TableStore(folder)
    if table is not None:
        store.put(table)
    pipe._ltc = _Attachment(chosen, store, table, measures=measure)
    put_on(pipe, WithLtc)


def _chosen(
    name: str | None,
    settings: SkipSettings | LtcSettings | None,
    table: LtcTable | None,
    folder: Any,
    overrides: dict[str, Any],
    measure: bool = True,
) -> SkipSettings | LtcSettings:
    """The settings that ``attach`` is to use. Raises LtcError for words that say nothing, or two things."""
    brought = "settings" if table is None else "a table"
    if (settings is not None or table is not None) and overrides:
        raise LtcError(f"Give LTC-Accel either {brought} or {', '.join(overrides)}, not both.")
    if table is not None:
        if not isinstance(settings, LtcSettings | None):
            raise LtcError("A table of LTC-Accel belongs to the preset paper; leave the table or the settings out.")
        if settings not in (None, table.settings):
            raise LtcError(
                f"LTC-Accel's table was measured with {table.settings}, so no run with {settings} would use it. Leave "
                "the settings out, or calibrate with them."
            )
    chosen = table.settings if table is not None else settings or _of_preset(name or BALANCED, overrides)
    published = isinstance(chosen, LtcSettings)
    if name is not None and (settings is not None or table is not None) and not (published and name == PAPER):
        raise LtcError(f"Give LTC-Accel either the preset {name} or {brought}, not both.")
    if not published and (folder is not None or not measure):
        kind = f"LTC-Accel's preset {name or BALANCED}" if settings is None else "LTC-Accel by SkipSettings"
        what = "measure=False" if folder is None else "the folder"
        raise LtcError(f"{kind} measures nothing: leave {what} out, or take the preset paper.")
    return chosen


def _of_preset(name: str, overrides: dict[str, Any]) -> SkipSettings | LtcSettings:
    """A preset with some of its settings changed. Raises LtcError for names and settings there are not."""
    if name != PAPER:
        return presets.preset(name, **overrides)
    known = [field.name for field in fields(LtcSettings)]
    if unknown := [key for key in overrides if key not in known]:
        raise LtcError(f"LTC-Accel's preset paper has no setting {unknown[0]!r}; it has {', '.join(known)}.")
    return LtcSettings(**overrides)


def detach(pipe: Any) -> None:
    """Take LTC-Accel off a pipeline; without it, do nothing."""
    take_off(pipe, WithLtc)
    pipe.__dict__.pop("_ltc", None)


def last_table(pipe: Any) -> LtcTable | None:
    """The table of the pipeline's last run: the one it measured, or the one it used."""
    state: _Attachment | None = pipe.__dict__.get("_ltc")
    if state is None or state.last_key is None or not isinstance(state.settings, LtcSettings):
        return None
    return state.store.find(state.last_key, state.settings)


def last_run(pipe: Any) -> Counts | None:
    """What LTC-Accel did in the pipeline's last complete run: calls, steps, and percent saved. None before one."""
    state: _Attachment | None = pipe.__dict__.get("_ltc")
    return None if state is None else state.last_run


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
    batch: pictures at a time; seed: of the first picture, the next have the next ones. find_bias: also look for one
    factor on all coefficients that brings the results nearest to the unaccelerated ones. progress: is told what is
    going on.
    Raises LtcError if LTC-Accel is not attached or no step can be skipped, and for lists that do not fit each other.
    """
    state: _Attachment | None = pipe.__dict__.get("_ltc")
    if state is None or not isinstance(state.settings, LtcSettings):
        raise LtcError('Call sun.ltc.attach(pipe, "paper") before calibrate(pipe, ...).')
    settings = state.settings
    if isinstance(prompts, str) or isinstance(negatives, str):
        raise LtcError("LTC-Accel calibrates on lists of prompts and negative prompts, not on a text.")
    if not prompts:
        raise LtcError("LTC-Accel calibrates on some prompts; this list has none. Give at least one.")
    if negatives and len(negatives) != len(prompts):
        raise LtcError(
            f"LTC-Accel calibrates on a negative prompt for each prompt, or on none: {len(prompts)} prompts and "
            f"{len(negatives)} negative prompts do not fit each other."
        )
    if batch < 1:
        raise LtcError(f"LTC-Accel calibrates on batches of 1 picture or more, not of {batch}.")
    parts = [slice(i, i + batch) for i in range(0, len(prompts), batch)]

    def run(opener: Opener) -> list[Tensor]:
        return [_sample(pipe, opener, prompts[p], negatives[p], seed + p.start, options) for p in parts]

    table = run_calibration(run, settings, find_bias=find_bias, progress=progress)
    if not table.coefficients:
        raise LtcError(none_calm(table.turns, settings))
    state.store.put(table)
    return table


def _sample(
    pipe: Any, opener: Opener, prompts: Sequence[str], negatives: Sequence[str], seed: int, options: dict[str, Any]
) -> Tensor:
    generators = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
    texts: dict[str, Any] = {"prompt": list(prompts)}
    if negatives:
        texts["negative_prompt"] = list(negatives)
    before = _opener.set(opener)
    try:
        result = pipe(**texts, generator=generators, output_type="latent", **options)
    finally:
        _opener.reset(before)
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


class WithLtc:
    """The layer that ``attach`` puts on a pipeline's class: it samples with LTC-Accel."""

    @staticmethod
    @contextmanager
    def around(pipe: Any, given: Mapping[str, Any]) -> Iterator[None]:
        state: _Attachment = pipe._ltc
        with ExitStack() as stack:
            stepper: Stepper | OutputStepper
            if isinstance(state.settings, LtcSettings):
                stepper = Stepper(pipe.scheduler, lambda *found: stack.enter_context(_run(pipe, state, given, *found)))
            else:
                stepper = OutputStepper(pipe.scheduler, partial(_skip_run, pipe, state.settings))
            stack.callback(_stepper.reset, _stepper.set(stepper))
            stack.enter_context(_replaced(pipe.scheduler, "step", _Stepping(pipe.scheduler.step, stepper)))
            for module in _skippable(pipe):
                called = _called(module)
                stack.enter_context(_replaced(module, called, _skipping(getattr(module, called), stepper)))
            yield
            made = stepper.run and stepper.run.counts
            state.last_run = made or Counts(0, 0, why=stepper.stopped or "its scheduler made no step")
            say(state.last_run)


def _skip_run(pipe: Any, settings: SkipSettings, sigmas: tuple[float, ...], noisy: bool, refused: str) -> SkipRun:
    return SkipRun(sigmas, settings, noisy=noisy, refused=refused, anew=_switching_steps(pipe, len(sigmas) - 1))


@contextmanager
def _run(
    pipe: Any, state: _Attachment, given: Mapping[str, Any], sampler: str, sigmas: tuple[float, ...]
) -> Iterator[LtcRun]:
    """The run of a call by the paper's settings, once its sampler and noise levels are known."""
    assert isinstance(state.settings, LtcSettings)
    steering = _steering(pipe, given)
    w = given.get("guidance_scale", default_of(original_call(pipe), "guidance_scale", 1.0))
    w = 1.0 if steering.startswith("sun") else float(w or 0.0)  # SUN runs no classifier-free guidance
    key = state.last_key = LtcKey(fingerprint(_denoiser(pipe)), sampler, sigmas, w, steering)
    real = _switching_steps(pipe, len(sigmas) - 1)
    if (opener := _opener.get()) is not None:
        run = opener(key)
        run.real |= real
        yield run
        return
    if state.given is not None and state.given.key.parts() != key.parts() and state.measures:
        note(f"{_of_another_run(state.given.key, key)}, or leave the table out: then a run measures itself.")
    if not state.measures and state.store.find(key, state.settings) is None:
        none = "LTC-Accel has no table for this run. Calibrate for these settings"
        raise LtcError(f"{none if state.given is None else _of_another_run(state.given.key, key)}.")
    with running(key, state.settings, state.store) as run:
        run.real |= real
        yield run


def _switching_steps(pipe: Any, steps: int) -> set[int]:
    """The step in which another U-Net takes over: what the one before it said is none of its words to say again."""
    run = None if partner_of(pipe) is None else switching_run(pipe)
    first = None if run is None else run.switches_in(steps)
    return set() if first is None else {first}


def _steering(pipe: Any, given: Mapping[str, Any]) -> str:
    """SUN, the LoRAs and the second U-Net in a call of the pipeline, for ``LtcKey``."""
    parts: list[str] = []
    run, attached = SUN_RUN.get(), pipe.__dict__.get("_sun")
    if run is not None and attached is not None:
        adapter = attached.steering.adapter
        w = adapter.info.guidance_scale if run.guidance is None else float(run.guidance)
        parts.append(f"sun {adapter_digest(adapter)} {run.strength:.4g} {w or 0:.4g}")
    if lora := lora_of(_denoiser(pipe)):
        scale = (given.get("cross_attention_kwargs") or {}).get("scale", 1.0)
        parts.append(f"lora {lora} {scale:.4g}")
    if (partner := partner_of(pipe)) is not None:
        parts.append(f"switching {fingerprint(partner.small)} {lora_of(partner.small)} {partner.switching}")
    return " ".join(parts)


def _of_another_run(given: LtcKey, found: LtcKey) -> str:
    """Why the table that was brought does not serve a run."""
    names = (
        ("model", "model"),
        ("sampler", "sampler"),
        ("steps", "number of steps"),
        ("schedule", "noise levels"),
        ("w", "guidance scale"),
        ("steering", "SUN adapter or LoRA"),
    )
    different = [words for name, words in names if getattr(given, name) != getattr(found, name)]
    return (
        f"LTC-Accel's table was measured with another {' and another '.join(different)}, so it does not serve this "
        "run. Calibrate for these settings"
    )


def _skippable(pipe: Any) -> list[Any]:
    """The modules that a skipped step does not call."""
    partner = partner_of(pipe)
    found = [*(getattr(pipe, name, None) for name in SKIPPED), None if partner is None else partner.small]
    return list({id(module): module for module in found if module is not None}.values())


def _called(module: Any) -> str:
    """The attribute that a call of a module ends up in: after ``module.compile()`` not ``forward``, which is compiled
    and could not be traced with what skips around it."""
    return "forward" if getattr(module, "_compiled_call_impl", None) is None else "_compiled_call_impl"


SECOND = "it steps a second scheduler"
"""Why nothing is skipped where a pipeline copies its scheduler, as for the sound of a video: no forecast is made of
what the copy steps, and the model's last output would be an old one for it."""


class _Stepping:
    """``scheduler.step``: ours within this call, the scheduler's own for whoever else uses it meanwhile.

    As a bound method does, it goes to the copy with a scheduler that is copied, which then steps itself; within this
    call that ends skipping.
    """

    def __init__(self, step: Callable[..., Any], stepper: Stepper | OutputStepper, bound: Any = None) -> None:
        functools.update_wrapper(self, step)  # pipelines look whether it takes eta or a generator
        self._step, self._stepper = step, stepper
        self._bound = stepper.scheduler if bound is None else bound

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        ours = _stepper.get() is self._stepper
        if self._bound is self._stepper.scheduler:
            return (self._stepper.step if ours else self._step)(*args, **kwargs)
        if ours:
            self._stepper.stop(SECOND)
        return type(self._bound).step(self._bound, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Stepping:
        """The step of the scheduler's copy; of the same scheduler, where only what it holds is copied."""
        return _Stepping(self._step, self._stepper, memo.get(id(self._bound), self._bound))


def _form(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells calls of a denoiser apart without looking at their values."""
    shapes = [tuple(value.shape) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    return (len(args), sorted(kwargs), shapes, kwargs.get("return_dict"))


_CHANGING = ("sample", "hidden_states", "timestep", "timesteps", "sigma", "controlnet_cond")
"""Arguments of a denoiser that are others in every step by the noise level alone, or as large as pictures and set once
a run. Latents of a second kind (``audio_hidden_states``) are none of them: no forecast is made of what becomes of
those."""
_RESIDUALS = ("down_block_additional_residuals", "mid_block_additional_residual")
"""What a ControlNet said in this step; whether it is asked the same is looked at where it is called."""


def _asked(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What else than latents and their timestep a denoiser is asked: texts, sizes, scales, pictures of adapters."""
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, (torch.Tensor, float, int)):
            found[name] = value
        elif isinstance(value, Mapping):
            for key, part in value.items():
                walk(f"{name}.{key}", part)
        elif isinstance(value, (list, tuple)):
            for i, part in enumerate(value):
                walk(f"{name}.{i}", part)

    for i, value in enumerate(args[2:], 3):
        walk(f"argument {i}", value)
    for name, value in kwargs.items():
        if name not in (*_CHANGING, *_RESIDUALS) and "controlnet_" not in name:
            walk(name, value)
    return found


def _differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[str]:
    """Names of what a denoiser is asked otherwise than before."""
    yield from now.keys() ^ before.keys()
    for name in now.keys() & before.keys():
        value, other = now[name], before[name]
        if value is other:
            continue
        both = isinstance(value, torch.Tensor), isinstance(other, torch.Tensor)
        if any(both):
            if not (all(both) and value.shape == other.shape and bool(torch.equal(value, other))):
                yield name
        elif value != other:
            yield name


def _nearest(now: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What tells a call of a denoiser from the one before that is most like it, in a word or two for the user."""
    names = min((sorted(_differing(now, other)) for other in others), key=len, default=[])
    return ", ".join(names[:3]) or "arguments of another form"


def _skipping(forward: Callable[..., Any], stepper: Stepper | OutputStepper) -> Callable[..., Any]:
    """``forward`` that in a skipped step gives the last outputs again; the scheduler does not look at them.

    Pipelines may call it several times a step, as for the passes of guidance. A call that asks for something else than
    those of the last real step did (another text, fewer rows because guidance ends, a ControlNet that begins to act)
    makes the step a real one, and nothing that was seen before it is carried on. So does a model's first call.
    """
    before: list[tuple[Any, Mapping[str, Any], Any]] = []  # the calls of the last real step
    made: list[tuple[Any, Mapping[str, Any], Any]] = []  # those of the step under way
    step = answered = -1  # the one under way, and the last one in which a call was answered with a kept output

    @functools.wraps(forward)
    def skipping(*args: Any, **kwargs: Any) -> Any:
        nonlocal step, answered
        if _stepper.get() is not stepper:
            return forward(*args, **kwargs)
        form, asked = _form(args, kwargs), _asked(args, kwargs)
        if step != stepper.done:
            step, before[:] = stepper.done, made or before
            made.clear()
        alike = [(other, output) for shape, other, output in before if shape == form]
        if isinstance(stepper, Stepper):
            if stepper.skips_next and before:
                return alike[0][1] if alike else forward(*args, **kwargs)
            if stepper.skips_next:
                stepper.must_run()  # a model that comes in, as Wan 2.2's second one
        elif before:
            same = [output for other, output in alike if next(_differing(asked, other), None) is None]
            if stepper.skips_next and same:
                answered, stepper.answered = step, True
                return same[0]
            if answered == step:  # half of the step is answered already: it stays a skipped one
                return forward(*args, **kwargs)
            if not same:
                stepper.must_run(_nearest(asked, [other for other, _ in alike]))
        elif not stepper.answered:
            stepper.must_run()
        if isinstance(stepper, OutputStepper):
            stepper.ran = True
        output = forward(*args, **kwargs)
        before[:] = [(shape, other, None) for shape, other, _ in before]  # not asked for again in a step that runs
        made.append((form, asked, output))
        return output

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
