"""Settings that do not go with SUN, said once a run: an error where the picture would be wrong, else a warning."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import comfy.model_sampling
import torch

from ..sun.ltc.kdiffusion import NOISY
from ..sun.prediction import PredictionError, check_prediction

log = logging.getLogger(__name__)

FEW_STEPS = 12
SKIPS_STEPS = "sun_ltc"  # Apply LTC-Accel, who is asked to leave out steps
SHARES_STEPS = "sun_switching"  # Switch U-Nets by Step, whose two models make some each
RIGHT = "4 steps, cfg 1.0, euler, ddim or dpmpp_2m, scheduler simple (or the sigmas of SUN Scheduler)"

# Samplers of ComfyUI that ask the U-Net between the steps as well.
TWICE = (
    "heun",
    "heunpp2",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpm_fast",
    "dpm_adaptive",
    "seeds_2",
    "seeds_3",
    "sa_solver_pece",
)


def check_effect(effect: tuple[float, float]) -> None:
    """Raises ValueError unless SUN acts somewhere between start_percent and end_percent."""
    start, end = effect
    if not 0.0 <= start < end <= 1.0:
        raise ValueError(
            f"SUN would act nowhere between start_percent {start:g} and end_percent {end:g}. "
            f"Set start_percent below end_percent; 0 and 1 are the whole run."
        )


def check_run(guider: Any, sampler: Any, sigmas: torch.Tensor, latent: torch.Tensor) -> None:
    """Warns of settings that make a run slower or its picture worse. Raises ValueError where it would be wrong."""
    sampling = guider.model_patcher.get_model_object("model_sampling")
    cfg = getattr(guider, "cfg", 1.0)
    if abs(cfg - 1.0) > 1e-6:
        log.warning(
            "SUN: cfg is %g, so each step costs two U-Net calls and the guidance counts twice. "
            "SUN has the guidance in its weights: set cfg to 1.0.",
            cfg,
        )
    table = getattr(sampling, "sigmas", None)
    if said := _check_prediction(sampling, table):
        log.warning("SUN: %s", said)
    if table is not None and len(sigmas) > 1:
        _check_timesteps(_timesteps(table, sigmas), len(table), empty=not torch.count_nonzero(latent))
    _check_sampler(sampler)
    if abs(cfg - 1.0) <= 1e-6:
        _check_single_pass(guider, sampler)


def check_report(guider: Any, steps: int, calls: int, answered: int) -> None:
    """Warns, after a run of few steps, when another node has answered in the place of the U-Net."""
    shares = guider.model_patcher.get_attachment(SHARES_STEPS)
    steps = steps if shares is None else shares.steps_of_model(steps)
    left_out = answered or steps - calls
    wanted = guider.model_patcher.get_attachment(SKIPS_STEPS) is not None
    if steps > FEW_STEPS or left_out <= 0 or wanted:
        return
    cache = guider.model_options.get("transformer_options", {}).get("easycache")
    log.warning(
        "SUN: %s has answered %d of %d calls in the place of the U-Net. In so few steps each counts, and the picture "
        "is another one: take it out.",
        getattr(cache, "name", "another node"),
        left_out,
        calls + left_out,
    )


def check_something_runs(sigmas: torch.Tensor, latent: torch.Tensor) -> None:
    """Raises ValueError when no step would run on an empty latent: what came out would be no picture."""
    if len(sigmas) < 2 and not torch.count_nonzero(latent):
        raise ValueError(
            "This denoise leaves no step to run, and the latent is empty, so there would be no picture. For a picture "
            "from nothing set denoise to 1.0; for image to image connect VAE Encode to the latent input."
        )


def predicts(sampling: Any) -> str:
    """What a model with this model sampling predicts, in diffusers' words; ComfyUI's own name for other kinds."""
    host = comfy.model_sampling
    takes, gives = (
        next((kind for kind in type(sampling).__mro__ if name in vars(kind)), object)
        for name in ("calculate_input", "calculate_denoised")
    )
    known = {host.EPS: "epsilon", host.V_PREDICTION: "v_prediction", host.X0: "sample"}
    return known.get(gives, gives.__name__.lower()) if takes is host.EPS else takes.__name__.lower()


def _check_prediction(sampling: Any, sigmas: torch.Tensor | None) -> str:
    """A sentence on what the model predicts, or an empty one. Raises ValueError where SUN cannot sample it."""
    final = 0.0 if sigmas is None else 1.0 / (1.0 + float(sigmas[-1]) ** 2)
    try:
        return check_prediction(predicts(sampling), final)
    except PredictionError as error:
        raise ValueError(f"{error} In ComfyUI the node ModelSamplingDiscrete sets both.") from error


def _timesteps(table: torch.Tensor, sigmas: torch.Tensor) -> list[int]:
    """The timestep nearest to each sigma; -1 for sigma 0, one before the first."""
    logs = table.detach().float().cpu().log()
    found = (sigmas.detach().float().cpu().clamp(min=1e-10).log()[:, None] - logs[None, :]).abs().argmin(dim=1)
    return [-1 if sigma == 0.0 else t for sigma, t in zip(sigmas.tolist(), found.tolist(), strict=True)]


def _check_timesteps(timesteps: list[int], total: int, empty: bool) -> None:
    """timesteps: of each sigma, the last one's included; total: how many the model has."""
    if empty and timesteps[0] < 0.95 * (total - 1):
        raise ValueError(
            f"Sampling starts at timestep {timesteps[0]} of {total - 1}, and the latent is empty: the picture would "
            f"come out grey and flat. For a picture from nothing choose {RIGHT} and denoise 1.0; for image to image "
            f"connect VAE Encode to the latent input."
        )
    lengths = [a - b for a, b in itertools.pairwise(timesteps)]
    mean = (timesteps[0] - timesteps[-1]) / len(lengths)
    if any(abs(length - mean) > max(2.0, 0.2 * mean) for length in lengths):
        log.warning(
            "SUN: these sigmas visit the timesteps %s, and adapters are trained for steps of equal length that begin "
            "with the noisiest (4 steps: 999, 749, 499, 249). The picture will be worse. Choose %s.",
            ", ".join(str(t) for t in timesteps[:-1]),
            RIGHT,
        )


def name_of(sampler: Any) -> str:
    """A SAMPLER's name as ComfyUI lists it; empty for one that is no function of k-diffusion's kind."""
    function = getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return function.removeprefix("sample_").removesuffix("_gpu").removesuffix("_function")


def _check_sampler(sampler: Any) -> None:
    name = name_of(sampler)
    options = getattr(sampler, "extra_options", {})
    quiet = options.get("eta", 1.0) == 0.0 or options.get("s_noise", 1.0) == 0.0
    if (any(kind in name for kind in NOISY) or options.get("s_churn", 0.0) > 0.0) and not quiet:
        log.warning(
            "SUN: the sampler %s adds new noise at every step, and adapters are trained for deterministic steps. "
            "Choose euler, ddim or dpmpp_2m.",
            name,
        )
    if name in TWICE:
        log.warning(
            "SUN: the sampler %s asks the U-Net more than once a step, between the trained timesteps too. "
            "Choose euler, ddim or dpmpp_2m.",
            name,
        )


def _check_single_pass(guider: Any, sampler: Any) -> None:
    """Warns of what asks for the unguided picture all the same at cfg 1, where ComfyUI leaves it out."""
    name, options = name_of(sampler), guider.model_options
    if "cfg_pp" in name:
        log.warning(
            "SUN: the sampler %s (CFG++) asks for the picture without guidance too, so each step costs two U-Net calls "
            "and the guidance counts twice. Choose euler, ddim or dpmpp_2m.",
            name,
        )
    patches = options.get("transformer_options", {}).get("patches", {})
    added = {_node_of(patch) for kind in patches.values() for patch in kind}
    if "NAGuidance" in added:
        log.warning(
            "SUN: NAGuidance needs both prompts in one U-Net call, and SUN has the negative one in its own attention: "
            "NAGuidance does nothing here, and each step costs two U-Net calls. Take it out."
        )
    elif options.get("disable_cfg1_optimization"):
        asking = [*options.get("sampler_pre_cfg_function", []), *options.get("sampler_post_cfg_function", [])]
        names = sorted({_node_of(function) for function in asking}) or ["another node"]
        log.warning(
            "SUN: %s asks for the picture without guidance at every step, so each step costs two U-Net calls. "
            "SUN has the guidance in its weights: take it out.",
            " and ".join(names),
        )


def _node_of(function: Any) -> str:
    """The class in whose method a function was defined: of patches, their node."""
    return getattr(function, "__qualname__", type(function).__name__).split(".")[0]
