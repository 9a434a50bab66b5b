"""LTC-Accel in ComfyUI: how it gets into the sampling.

Nothing is patched while nothing is sampled. Two wrappers hang on a clone of the model:

    SAMPLER_SAMPLE   once a run         knows the sampler and its sigmas, and says what the run did
    PREDICT_NOISE    each model call    in a skipped step answers itself, instead of both passes of guidance
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_sampling
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..sun.common.identity import digest_of
from ..sun.kept import SunRun
from ..sun.ltc import (
    LtcKey,
    LtcRun,
    LtcSettings,
    LtcTable,
    SkipRun,
    SkipSettings,
    TableStore,
    adapter_digest,
    fingerprint,
    kdiffusion,
)
from ..sun.ltc.counts import say
from ..sun.ltc.fingerprint import signs_digest
from ..sun.ltc.kdiffusion import SamplerRun
from ..sun.ltc.keep import AUTOMATIC, UNUSED, running
from . import merging, notices, sun_patch, switching_patch
from .wrapping import hang

log = logging.getLogger(__name__)

KEY = "sun_ltc"
STATE = "sun_ltc_state"


@dataclass(frozen=True)
class LtcChoice:
    """What Apply LTC-Accel remembers."""

    settings: SkipSettings | LtcSettings
    calibration: str = AUTOMATIC  # of the paper's settings
    node: str | None = None  # where the page shows what a run did
    unused: str = ""  # settings of the paper's that were set beside another preset


def tables_folder() -> Path:
    """Where tables are kept: ComfyUI's user folder, out of reach of its web server where it knows such a place."""
    system = getattr(folder_paths, "get_system_user_directory", None)
    base = Path(system("sun")) if system else Path(folder_paths.get_user_directory()) / "default" / "sun"
    return base / "ltc"


def apply(
    model: ModelPatcher, settings: SkipSettings | LtcSettings, calibration: str = AUTOMATIC, unused: str = ""
) -> ModelPatcher:
    """A clone of `model` that skips steps. An LTC-Accel already on the model is replaced.

    unused: names of settings that have no effect beside these, to be said at the node.
    """
    patched = model.clone()
    if unused:
        log.warning(UNUSED.format(unused))
    if patched.get_attachment(KEY) is not None:
        log.warning("LTC-Accel: the model had it already; the later node takes its place.")
    patched.set_attachments(KEY, LtcChoice(settings, calibration, notices.running_node(), unused))
    merging.speak_up(patched)
    hang(patched, KEY, {WrappersMP.SAMPLER_SAMPLE: _sampler_sample, WrappersMP.PREDICT_NOISE: _predict_noise})
    return patched


# ------------------------------------------------------------------------------------------------------ the wrappers


def _sampler_sample(
    executor: Any, guider: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any
) -> torch.Tensor:
    choice: LtcChoice | None = guider.model_patcher.get_attachment(KEY)
    if choice is None or len(sigmas) < 2:
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    levels = tuple(float(sigma) for sigma in sigmas)
    name, given = _function_of(executor.class_obj)
    options = extra_args["model_options"].setdefault("transformer_options", {})
    sun: SunRun | None = options.get(sun_patch.KEY)
    with ExitStack() as stack:
        run: SamplerRun | SkipRun
        if isinstance(choice.settings, LtcSettings):
            solver = kdiffusion.solver_of(name, given)
            published = stack.enter_context(_by_the_paper(guider, solver, levels, choice, choice.settings, sun))
            published.real |= _switching_steps(guider.model_patcher, len(levels) - 1)
            run = SamplerRun(solver, levels, published)
        else:
            noisy, why = kdiffusion.kind_of(name, given)
            anew = _switching_steps(guider.model_patcher, len(levels) - 1)
            run = SkipRun(levels, choice.settings, noisy=noisy, refused=why, anew=anew)
        options[KEY], options[STATE] = run, Changes.of(guider, sun)
        stack.callback(options.pop, KEY, None)
        stack.callback(options.pop, STATE, None)
        samples = executor(guider, sigmas, extra_args, *args, **kwargs)
        if isinstance(run, SamplerRun) and levels[-1] == 0:  # else another sampler goes on, and the last step is unseen
            run.run.finish(samples)
    _tell(choice, run)
    return samples


def _function_of(sampler: Any) -> tuple[str, dict[str, Any]]:
    """Name of a ComfyUI SAMPLER's function, and the options it is called with."""
    function = getattr(sampler, "sampler_function", None)
    return getattr(function, "__name__", type(sampler).__name__), getattr(sampler, "extra_options", {})


def _by_the_paper(
    guider: Any,
    solver: str,
    levels: tuple[float, ...],
    choice: LtcChoice,
    settings: LtcSettings,
    sun: SunRun | None,
) -> AbstractContextManager[LtcRun]:
    """The run of the published method, by the table there is, or one that measures itself."""
    patcher = guider.model_patcher
    flow = isinstance(patcher.get_model_object("model_sampling"), comfy.model_sampling.CONST)
    model = fingerprint(patcher.model.diffusion_model, attention=not patcher.patches)  # they may be in place or not
    sampler, w = f"flow_{solver}" if flow else solver, float(getattr(guider, "cfg", 1.0))
    key = LtcKey(model, sampler, levels, w, " ".join(filter(None, (steering(patcher), times(patcher, sun)))))

    def measured(table: LtcTable) -> None:
        text = "ltc_measured" if table.coefficients else "ltc_nothing"
        notices.tell(choice.node, text, calls=table.calls, steps=key.steps)

    return running(key, settings, TableStore(tables_folder()), choice.calibration, measured)


def _tell(choice: LtcChoice, run: SamplerRun | SkipRun) -> None:
    """What a run did, in the log and at its node."""
    counts = run.counts
    if isinstance(run, SamplerRun) and run.run.measure is not None and not run.run.spoilt:
        return  # it has said what it measured
    say(counts)
    text = "ltc_real" if counts.calls == counts.steps else "ltc_saved"
    values: dict[str, Any] = {"calls": counts.calls, "steps": counts.steps, "saved": counts.saved}
    if choice.unused:
        text, values = "ltc_unused", {**values, "unused": choice.unused}
    notices.tell(choice.node, text, **values)


class Changes:
    """Where, in the course of a run, a model's answer changes for another reason than the noise level.

    bounds: sigmas at which prompts, ControlNets, hooks and SUN begin or end to act.
    """

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(sorted(set(bounds)))

    def __deepcopy__(self, _memo: object) -> Changes:
        return self

    def at(self, sigma: float) -> tuple[bool, ...]:
        """What is the same for two noise levels between which nothing begins or ends."""
        return tuple(side for bound in self.bounds for side in (bound >= sigma, bound > sigma))

    @classmethod
    def of(cls, guider: Any, sun: SunRun | None = None) -> Changes:
        """The changes of a run that is about to begin; prompts, ControlNets and SUN know theirs in sigmas by then."""
        bounds: list[float] = []
        for conds in getattr(guider, "conds", {}).values():
            for cond in conds or ():
                bounds += [cond[name] for name in ("timestep_start", "timestep_end") if cond.get(name) is not None]
                control = cond.get("control")
                while control is not None:
                    bounds += getattr(control, "timestep_range", None) or ()
                    control = getattr(control, "previous_controlnet", None)
                for hook in getattr(cond.get("hooks"), "hooks", ()):
                    frames = getattr(getattr(hook, "hook_keyframe", None), "keyframes", ())
                    bounds += [getattr(frame, "start_t", 0.0) for frame in frames]
        return cls(float(bound) for bound in (*bounds, *(() if sun is None else sun.bounds)))


def _switching_steps(patcher: ModelPatcher, steps: int) -> set[int]:
    """The step in which another U-Net takes over, which is never skipped."""
    switches = switching_patch.choice_of(patcher)
    first = None if switches is None else switches.switching.switches_at(steps)
    return set() if first is None else {first}


def steering(patcher: ModelPatcher) -> str:
    """SUN, the LoRAs and the second U-Net of a model, for `LtcKey`."""
    parts: list[str] = []
    sun, adapters = sun_patch.settings_of(patcher), patcher.get_additional_models_with_key(sun_patch.KEY)
    if sun is not None and adapters:
        scale = "" if sun.guidance is None else f"{sun.guidance:.4g}"
        parts.append(f"sun {adapter_digest(adapters[0].model)} {sun.strength:.4g} {scale} {sun.effect}")
    if patcher.patches:
        parts.append(f"lora {patches_digest(patcher.patches)}")
    if (switches := switching_patch.choice_of(patcher)) is not None:
        small = switches.small
        parts.append(f"switching {fingerprint(small.model.diffusion_model, attention=not small.patches)}")
        parts.append(f"{switches.switching} {steering(small)}".rstrip())
    return " ".join(parts)


def times(patcher: ModelPatcher, run: SunRun | None) -> str:
    """When SUN and its negatives act, for `LtcKey`; empty where that is all that Apply SUN's percents say."""
    settings = sun_patch.settings_of(patcher)
    if run is None or settings is None:
        return ""
    known = sun_patch.interval(patcher.get_model_object("model_sampling"), *settings.effect)
    if set(run.bounds) <= set(known):
        return ""
    intervals = (run.effect, *(negative.when for negative in run.negatives))
    return " ".join(f"{interval.start:.4g}-{interval.end:.4g}" for interval in intervals)


def patches_digest(patches: dict[Any, list[tuple[Any, ...]]]) -> str:
    """16 hexadecimal digits of the weight patches of a model: LoRAs, and what merging nodes make."""
    known = []
    for key in sorted(patches, key=str):
        for strength, content, of_model, *_ in patches[key]:
            known.append(f"{key} {strength:.4g} {of_model:.4g} {signs_digest(tensors_in(content))}")
    return digest_of(known)


def tensors_in(content: Any) -> list[torch.Tensor]:
    """All tensors of a patch: a tensor, a tuple of a kind and tensors, or an object of comfy.weight_adapter."""
    if isinstance(content, torch.Tensor):
        return [content]
    if isinstance(content, (tuple, list)):
        return [tensor for part in content for tensor in tensors_in(part)]
    return tensors_in(getattr(content, "weights", ()))


def _predict_noise(
    executor: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    options = model_options if model_options is not None else {}
    kept = options.get("transformer_options", {})
    run = kept.get(KEY)
    if not isinstance(run, (SkipRun, SamplerRun)):
        return executor(x, timestep, options, seed)
    sigma = float(timestep.flatten()[0])
    return run.denoised(sigma, x, lambda: executor(x, timestep, options, seed), kept[STATE].at(sigma))
