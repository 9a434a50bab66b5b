"""Switching in ComfyUI: a second MODEL samples a part of the steps, within the run of the first.

Nothing is patched while nothing is sampled. Three wrappers hang on a clone of the first model:

    OUTER_SAMPLE     once a run         keeps what the guider was asked for, and puts the next one innermost
    SAMPLER_SAMPLE   once a run         begins a second sampling, of the small model, with a guider and a copy of the
                                        conditionings of its own, in which the first one's sampler goes on
    PREDICT_NOISE    each model call    has the small model's guider answer in its steps

So ComfyUI itself prepares the small model and cleans up after it, and all that other nodes put on it acts in its steps.
One sampler runs through, so that solvers keep their history.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import comfy.sampler_helpers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ..sun.switching import (
    SAME_UNET,
    Border,
    Switching,
    SwitchingError,
    Traits,
    check_pair,
    control_for_small,
    layers_a_stage,
    what_to_say,
)
from . import checks, merging, notices
from .wrapping import UNetCall, Wrapper, around_unet, hang, innermost

log = logging.getLogger(__name__)

KEY = "sun_switching"
SUN, LTC = "sun", "sun_ltc"
GUIDANCE = ("sampler_pre_cfg_function", "sampler_post_cfg_function")
"""Lists of functions that change predictions, whichever model made them."""
COMBINING = ("sampler_cfg_function", "sampler_calc_cond_batch_function")
"""Functions in the place of ComfyUI's own that make and combine predictions (RescaleCFG)."""
AROUND = "model_function_wrapper"
OWN = "sun_switching_own"
"""In model_options: what of these the first model had before the node. There because copies of the options, which may
copy functions, copy both alike."""


@dataclass(frozen=True)
class Choice:
    """What Switch U-Nets by Step remembers on the model that comes out. doubt: the text of a notice about the pair.
    ``own_*``: what the first model had on it."""

    switching: Switching
    small: ModelPatcher
    node: str | None = None
    doubt: str = ""
    own_patches: frozenset[str] = frozenset()
    own_weights: Any = None

    def steps_of_model(self, steps: int) -> int:
        """How many of a run's steps the first model makes."""
        return steps - self.switching.small_steps(steps)


@dataclass(frozen=True)
class Part:
    """What the small model has on it. stages: layers of each stage of both U-Nets, for ControlNet; None: no U-Nets."""

    switching: Switching
    stages: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def steps_of_model(self, steps: int) -> int:
        """How many of a run's steps the small model makes."""
        return self.switching.small_steps(steps)


@dataclass(eq=False)
class Side:
    """One of the two models in a run."""

    guider: Any
    options: dict[str, Any]
    calls: int = 0

    @property
    def patcher(self) -> ModelPatcher:
        return self.guider.model_patcher

    def load(self, shape: Any) -> None:
        """Has ComfyUI bring the model to its device, with all that runs beside it. What is there stays there."""
        comfy.sampler_helpers.prepare_sampling(self.patcher, shape, self.guider.conds, self.guider.model_options)
        if hasattr(self.patcher.model, "current_patcher"):
            self.patcher.model.current_patcher = self.patcher  # both may be the same U-Net with other weights

    def is_loaded(self) -> bool:
        """Whether the whole model is on its device."""
        return self.patcher.loaded_size() >= 0.99 * self.patcher.model_size()


@dataclass(eq=False)
class ComfySwitching:
    """One sampling run. given: how the guider was asked to sample."""

    choice: Choice
    given: dict[str, Any]
    border: Border
    large: Side | None = None
    small: Side | None = None
    runs: Side | None = None
    swapped: bool = False

    def __deepcopy__(self, _memo: object) -> ComfySwitching:
        """Itself: nodes that copy model_options in the middle of a run stay in that run."""
        return self

    def turn(self, sigma: float) -> Side:
        """The side whose step it is, loaded."""
        assert self.large is not None
        assert self.small is not None
        side, other = (self.small, self.large) if self.border.small(sigma) else (self.large, self.small)
        if side is not self.runs:
            side.load(self.given["noise"].shape)
            self.swapped = self.swapped or (self.runs is not None and not other.is_loaded())
            self.runs = side
        side.calls += 1
        return side


# --------------------------------------------------------------------------------------------------------- applying


def apply(model: ModelPatcher, small: ModelPatcher, switching: Switching) -> ModelPatcher:
    """A clone of `model` in whose runs `small` makes a share of the steps. Raises SwitchingError."""
    check_pair(traits_of(model), traits_of(small))
    for patcher, name in ((model, "model"), (small, "small_model")):
        if isinstance(patcher.get_attachment(KEY), Choice):
            raise SwitchingError(f"The {name} switches between two U-Nets already. Connect the plain model.")
    if small.get_attachment(LTC) is not None:
        raise SwitchingError(
            "The small model has LTC-Accel on it, which counts the steps of a whole run. Put Apply LTC-Accel on the "
            "model that comes out of Switch U-Nets by Step."
        )
    if said := what_to_say(unet_of(model), unet_of(small)):
        log.warning("%s", said)
    patched, partner = model.clone(), small.clone()
    stages = tuple(layers_a_stage(unet_of(m)) for m in (model, small)) if is_unet(model) and is_unet(small) else None
    partner.set_attachments(KEY, Part(switching, stages))
    if stages is not None:  # transformers are called with other things than U-Nets
        hang(partner, KEY, {WrappersMP.DIFFUSION_MODEL: _small_diffusion_model})
    options = patched.model_options
    options[OWN] = {name: options[name] for name in (*GUIDANCE, *COMBINING, AROUND) if name in options}
    doubt = "" if not said else "switched_same" if said == SAME_UNET else "switched_reversed"
    choice = Choice(switching, partner, notices.running_node(), doubt, patches_of(model), weights_of(model))
    patched.set_attachments(KEY, choice)
    merging.speak_up(patched)
    around: dict[str, Wrapper] = {
        WrappersMP.OUTER_SAMPLE: _outer_sample,
        WrappersMP.SAMPLER_SAMPLE: _sampler_sample,
        WrappersMP.PREDICT_NOISE: _predict_noise,
    }
    hang(patched, KEY, around)
    return patched


def on_each(model: ModelPatcher, put_on: Callable[[ModelPatcher], ModelPatcher]) -> ModelPatcher:
    """`put_on(model)`; of a model that switches, on both of its U-Nets. Raises what `put_on` raises, and says which."""
    choice = model.get_attachment(KEY)
    patched = put_on(model)
    if not isinstance(choice, Choice):
        return patched
    try:
        small = put_on(choice.small)
    except ValueError as error:
        raise type(error)(
            f"On the small model of Switch U-Nets by Step: {error} Put this node on each of the two models before they "
            "go into Switch U-Nets by Step."
        ) from error
    patched.set_attachments(KEY, replace(choice, small=small))
    return patched


def choice_of(model: ModelPatcher) -> Choice | None:
    """The switching on a model, or None."""
    found = model.get_attachment(KEY)
    return found if isinstance(found, Choice) else None


def unet_of(model: ModelPatcher) -> Any:
    return model.model.diffusion_model


def is_unet(model: ModelPatcher) -> bool:
    return hasattr(unet_of(model), "input_blocks")


def traits_of(model: ModelPatcher) -> Traits:
    """What must agree of a ComfyUI model."""
    config, sampling = model.model.model_config.unet_config, model.get_model_object("model_sampling")
    ends: Any = (getattr(sampling, "sigma_min", None), getattr(sampling, "sigma_max", None))
    return Traits(
        latents=config.get("in_channels"),
        output=config.get("out_channels"),
        text=config.get("context_dim"),
        vector=config.get("adm_in_channels"),
        prediction=checks.predicts(sampling),
        sigmas=None if None in ends else (float(ends[0]), float(ends[1])),
        space=type(model.model.latent_format).__name__,
    )


def patches_of(model: ModelPatcher) -> frozenset[str]:
    """The kinds of patches of attention and blocks that are on a model."""
    options = model.model_options.get("transformer_options", {})
    replaced = {f"{kind}_replace" for kind, ones in options.get("patches_replace", {}).items() if ones}
    return frozenset({kind for kind, ones in options.get("patches", {}).items() if ones} | replaced)


def weights_of(model: ModelPatcher) -> Any:
    """Changes with the weight patches (LoRAs) of a model."""
    return getattr(model, "patches_uuid", None) if model.patches else None


# ------------------------------------------------------------------------------------------------------ the wrappers


def _outer_sample(
    executor: Any,
    noise: torch.Tensor,
    latent_image: torch.Tensor,
    sampler: Any,
    sigmas: torch.Tensor,
    denoise_mask: Any = None,
    callback: Any = None,
    disable_pbar: bool = False,
    seed: int | None = None,
    **more: Any,
) -> torch.Tensor:
    guider = executor.class_obj
    asked = (noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed)
    choice = choice_of(guider.model_patcher)
    steps = len(sigmas) - 1
    if choice is None or choice.switching.small_steps(steps) <= 0:
        return executor(*asked, **more)
    check_pair(traits_of(guider.model_patcher), traits_of(choice.small))  # nodes behind may have changed the sampling
    if len(more.get("latent_shapes") or ()) > 1:
        raise SwitchingError(
            "Switching works on latents of one part, and these have several (video with sound). Take the plain model."
        )
    if denoise_mask is not None and denoise_mask.shape == noise.shape:
        denoise_mask = denoise_mask[:, :1]  # newer ComfyUI has brought it to the latents' shape, and will do so again
    given = {"noise": noise, "latent_image": latent_image, "denoise_mask": denoise_mask, "seed": seed}
    # model_options is this run's own copy, dropped by ComfyUI when the run ends, whatever ends it.
    options = guider.model_options["transformer_options"]
    state = options[KEY] = ComfySwitching(choice, given, choice.switching.border(map(float, sigmas[:-1])))
    # Last among those that may answer in a model's place: what others skip is skipped of either model.
    options["wrappers"] = innermost(options["wrappers"], WrappersMP.PREDICT_NOISE, KEY)
    try:
        return executor(*asked, **more)
    finally:
        _report(state, left_out(choice, guider.model_patcher))
        state.large = state.small = state.runs = None


class _Within:
    """A SAMPLER for the small model's run, in which the first model's sampler goes on. Else it is that sampler."""

    def __init__(self, sampler: Any, go_on: Callable[[Any, dict[str, Any]], torch.Tensor]) -> None:
        self._sampler, self._go_on = sampler, go_on

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, guider: Any, _sigmas: Any, extra_args: dict[str, Any], *_args: Any, **_kwargs: Any) -> Any:
        return self._go_on(guider, extra_args["model_options"])


def _sampler_sample(
    executor: Any, guider: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], *args: Any, **kwargs: Any
) -> torch.Tensor:
    state = guider.model_options.get("transformer_options", {}).get(KEY)
    if not isinstance(state, ComfySwitching):
        return executor(guider, sigmas, extra_args, *args, **kwargs)
    partner = copy.copy(guider)
    partner.model_patcher, partner.model_options = state.choice.small, state.choice.small.model_options
    partner.original_conds = _with_shared_controls(guider.original_conds)
    state.large = Side(guider, extra_args["model_options"])
    result: list[torch.Tensor] = []

    def go_on(small_guider: Any, options: dict[str, Any]) -> torch.Tensor:
        state.small = state.runs = Side(small_guider, options)
        options.setdefault("transformer_options", {})[KEY] = small_guider.model_patcher.get_attachment(KEY)
        result.append(executor(guider, sigmas, extra_args, *args, **kwargs))
        return result[0]

    given = state.given
    partner.sample(
        given["noise"],
        given["latent_image"],
        _Within(executor.class_obj, go_on),
        sigmas,
        denoise_mask=given["denoise_mask"],
        callback=None,
        disable_pbar=True,
        seed=given["seed"],
    )
    return result[0]


def _with_shared_controls(conds: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """The conditionings for the small model. Their ControlNets stay made ready for the large one: a Control-LoRA takes
    its encoder from the model, and its residuals are those of the layers that both have."""
    shared: dict[int, Any] = {}

    def of(cond: dict[str, Any]) -> dict[str, Any]:
        control = cond.get("control")
        if control is None:
            return cond
        return {**cond, "control": shared.setdefault(id(control), _share(control))}

    return {name: [of(cond) for cond in group] for name, group in conds.items()}


def _share(control: Any) -> Any:
    """The same ControlNet, with all it has and will have, but for its preparation and its end."""
    kind = type(control)
    nothing = {name: (lambda *_args, **_kwargs: None) for name in ("pre_run", "cleanup")}
    same: Any = object.__new__(type(kind.__name__, (kind,), nothing))
    same.__dict__ = control.__dict__
    return same


def _predict_noise(
    executor: Any,
    x: torch.Tensor,
    timestep: torch.Tensor,
    model_options: dict[str, Any] | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    options = model_options if model_options is not None else {}
    state = options.get("transformer_options", {}).get(KEY)
    if not isinstance(state, ComfySwitching) or state.small is None:
        return executor(x, timestep, options, seed)
    side = state.turn(float(timestep.flatten()[0]))
    if side is state.large:
        return executor(x, timestep, options, seed)
    return side.guider.outer_predict_noise(x, timestep, _with_guidance(side.options, options), seed)


def _with_guidance(own: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """The small model's options, and what nodes behind this one and samplers (CFG++) do to predictions."""
    options, before = {**own}, given.get(OWN, {})
    for name in GUIDANCE:
        added = [f for f in given.get(name, ()) if not any(f is known for known in before.get(name, ()))]
        if added:
            options[name] = [*own.get(name, ()), *added]
    for name in COMBINING:
        if given.get(name) is not None and given[name] is not before.get(name):
            options[name] = given[name]
    if given.get("disable_cfg1_optimization"):
        options["disable_cfg1_optimization"] = True
    return options


@around_unet
def _small_diffusion_model(call: UNetCall) -> torch.Tensor:
    """ControlNet's residuals that the small U-Net has a place for."""
    part = call.options.get(KEY)
    if isinstance(part, Part) and part.stages is not None:
        call.control = control_for_small(call.control, *part.stages)
    return call.go_on()


def left_out(choice: Choice, patcher: ModelPatcher) -> str:
    """What was put on the model behind the node and acts on the large model alone; empty if there is nothing."""
    added = sorted(patches_of(patcher) - choice.own_patches)
    options = patcher.model_options
    if options.get(AROUND) is not options.get(OWN, {}).get(AROUND):
        added.append(AROUND)
    if weights_of(patcher) != choice.own_weights:
        added.insert(0, "LoRA")
    if patcher.get_attachment(SUN) is not None and choice.small.get_attachment(SUN) is None:
        added.insert(0, "SUN")
    return ", ".join(added)


def _report(state: ComfySwitching, alone: str) -> None:
    """What a run did, in the log and at the node."""
    if state.small is None or state.large is None:
        return
    small, large = state.small.calls, state.large.calls
    memory = "; memory was short, so they took turns in it" if state.swapped else ""
    if small and large and not memory:
        memory = "; both stayed loaded"
    log.info(
        "Switching (%s): %d calls of the small model and %d of the large one%s",
        state.choice.switching,
        small,
        large,
        memory,
    )
    text = "switched_swapped" if state.swapped else state.choice.doubt or "switched"
    if alone:
        text = "switched_alone"
        log.warning(
            "Switching: %s acts on the large model alone. For both, put it on each of the two models before they go "
            "into Switch U-Nets by Step.",
            alone,
        )
    notices.tell(state.choice.node, text, small=small, large=large, what=alone)
