"""Feature inheritance in ComfyUI: how it gets into the sampling.

Two wrappers hang on a clone of the model: OUTER_SAMPLE begins and ends a run, DIFFUSION_MODEL puts the inherited
parts into one call of the U-Net and takes them out again. The U-Net's own code runs, with all patches of other nodes.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..sun.inheritance import (
    InheritanceRun,
    Places,
    Plan,
    control_of_what_runs,
    places_of,
    roles_of,
)
from . import merging, notices
from .checks import SHARES_STEPS
from .wrapping import UNetCall, around_unet, hang

log = logging.getLogger(__name__)

KEY = "sun_inheritance"
NODE = "sun_inheritance_node"  # where the page shows what a run did


@dataclass
class ComfyInheritance:
    """One sampling run. With several GPUs each has a U-Net of its own, and so its own counting and features."""

    plan: Plan
    steps: int
    runs: dict[int, tuple[InheritanceRun, Places]] = field(default_factory=dict)

    def __deepcopy__(self, _memo: object) -> ComfyInheritance:
        """Itself: nodes that copy model_options in the middle of a run stay in that run."""
        return self

    def on(self, unet: Any) -> tuple[InheritanceRun, Places]:
        if id(unet) not in self.runs:
            places = places_of(unet)
            self.runs[id(unet)] = InheritanceRun(self.plan, roles_of(self.plan, places), self.steps), places
        return self.runs[id(unet)]


def apply(model: ModelPatcher, plan: Plan) -> ModelPatcher:
    """A clone of `model` that inherits features. A plan already on the model is replaced. Raises InheritanceError."""
    roles_of(plan, places_of(model.model.diffusion_model))  # says now if the plan does not fit
    patched = model.clone()
    if patched.get_attachment(KEY) is not None:
        log.warning("Feature inheritance: the model had a plan already; %s takes its place.", plan)
    patched.set_attachments(KEY, plan)
    patched.set_attachments(NODE, notices.running_node())
    merging.speak_up(patched)
    hang(patched, KEY, {WrappersMP.OUTER_SAMPLE: _outer_sample, WrappersMP.DIFFUSION_MODEL: _diffusion_model})
    return patched


def _outer_sample(
    executor: Any,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    guider = executor.class_obj
    plan: Plan | None = guider.model_patcher.get_attachment(KEY)
    if plan is None:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    steps, shares = len(sigmas) - 1, guider.model_patcher.get_attachment(SHARES_STEPS)
    state = ComfyInheritance(plan, steps if shares is None else shares.steps_of_model(steps))
    # model_options is this run's own copy, dropped by ComfyUI when the run ends, whatever ends it.
    guider.model_options.setdefault("transformer_options", {})[KEY] = state
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        runs = [run for run, _ in state.runs.values()]
        full, inherited = sum(run.full for run in runs), sum(run.inherited for run in runs)
        node = guider.model_patcher.get_attachment(NODE)
        notices.tell(node, "inherited", full=full, inherited=inherited, calls=full + inherited)
        for run in runs:
            log.info("%s", run.finish())


@around_unet
def _diffusion_model(call: UNetCall) -> torch.Tensor:
    state = call.options.get(KEY)
    if not isinstance(state, ComfyInheritance):
        return call.go_on()
    run, places = state.on(call.unet)
    sigmas = call.options.get("sigmas")
    # A timestep rises and falls with its sigma, so either tells the steps apart.
    time = float((call.timesteps if sigmas is None else sigmas).flatten()[0])
    who = (*call.options.get("uuids", ()), *call.options.get("cond_or_uncond", ()))
    with run.call(time, tuple(call.x.shape), who or None) as full:
        if not full:
            call.control = control_of_what_runs(call.control, state.plan, places)
        return call.go_on()
