"""Feature inheritance in ComfyUI: the node Apply Feature Inheritance, and how it gets into the sampling.

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
from comfy_api.latest import io

from ..sun.inheritance import (
    PRESETS,
    InheritanceError,
    InheritanceRun,
    Places,
    Plan,
    control_of_what_runs,
    parse_plan,
    places_of,
    roles_of,
)

log = logging.getLogger(__name__)

KEY = "sun_inheritance"


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
    for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, _outer_sample), (WrappersMP.DIFFUSION_MODEL, _diffusion_model)):
        patched.remove_wrappers_with_key(kind, KEY)
        patched.add_wrapper_with_key(kind, KEY, wrapper)
    return patched


def _outer_sample(
    executor: Any, noise: torch.Tensor, latent_image: torch.Tensor, sampler: Any, sigmas: torch.Tensor, *args: Any,
    **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    guider = executor.class_obj
    plan: Plan | None = guider.model_patcher.get_attachment(KEY)
    if plan is None:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    state = ComfyInheritance(plan, len(sigmas) - 1)
    # model_options is this run's own copy, dropped by ComfyUI when the run ends, whatever ends it.
    guider.model_options.setdefault("transformer_options", {})[KEY] = state
    try:
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    finally:
        for run, _ in state.runs.values():
            log.info("%s", run.finish())


def _diffusion_model(
    executor: Any, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor | None = None, y: Any = None,
    control: Any = None, transformer_options: dict[str, Any] | None = None, **kwargs: Any,
) -> torch.Tensor:  # fmt: skip
    options = transformer_options if transformer_options is not None else {}
    state = options.get(KEY)
    if not isinstance(state, ComfyInheritance):
        return executor(x, timesteps, context, y, control, options, **kwargs)
    run, places = state.on(executor.class_obj)
    sigmas = options.get("sigmas")
    # A timestep rises and falls with its sigma, so either tells the steps apart.
    time = float((timesteps if sigmas is None else sigmas).flatten()[0])
    who = (*options.get("uuids", ()), *options.get("cond_or_uncond", ()))
    with run.call(time, tuple(x.shape), who or None) as full:
        if not full:
            control = control_of_what_runs(control, state.plan, places)
        return executor(x, timesteps, context, y, control, options, **kwargs)


class ApplyFeatureInheritance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_ApplyFeatureInheritance",
            display_name="Apply Feature Inheritance",
            category="SUN",
            description=(
                "Leaves out the inner parts of the U-Net in some steps and takes their output of an earlier step; "
                "nothing is trained. For Stable Diffusion 1.x, 2.x and SDXL, with any sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or SDXL, with or without SUN."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="balanced",
                    tooltip="fine stays nearest to the original, fast saves most.",
                ),
                io.String.Input(
                    "plan",
                    default="",
                    optional=True,
                    tooltip=(
                        "For experts, instead of the preset: stages=1 every=3, or outer=2 mode=dense-early, or "
                        "layers=up.3.0,up.3.1 keys=0,2,5. The help page lists the words."
                    ),
                ),
            ],
            outputs=[io.Model.Output("inheriting_model", display_name="model", tooltip="The model, for any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, preset: str, plan: str = "") -> bool | str:
        try:
            parse_plan(plan.strip() or preset)
        except InheritanceError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, preset: str, plan: str = "") -> io.NodeOutput:
        return io.NodeOutput(apply(model, parse_plan(plan.strip() or preset)))
