"""The settings of ``sun train-compact`` and what they may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from ...common.settings import ConfigError
from ...common.worlds import EMOJI
from ...compact.structure import LISTS
from ...shipped import SHIPPED
from ..config import RunConfig, check_numbers

INPUTS = ("noised", "trajectories")
MOST_EXPERTS = 16


@dataclass
class CompactTrainConfig:
    """Every symbol of the training as a setting.

    From sources: the removal lists, AdamW with lr 5e-5 and three losses of weight 1 (BK-SDM, arXiv 2305.15798), the
    features' normalisation (LAPTOP-Diff, arXiv 2404.11098), incubation of one stage at a time inside the frozen
    original (Deep Incubation, arXiv 2212.04129, which A-SDM's "model assembly" very likely is). Ours, since A-SDM's
    body was not available: how the run is shared out, the semantic term, and training on the teacher's trajectories.
    """

    run: RunConfig = field(
        default_factory=lambda: RunConfig(output="runs/compact", steps=25000, batch_size=32, lr=5e-5)
    )
    model: str = SHIPPED  # the original: teacher, and where the weights come from
    plan: str = "shallow"  # a list (shallow, bk-base, bk-small, bk-tiny) or a file of `sun assemble --plan-only`
    # Pictures with captions, as for `sun train`. Not used with `captions`.
    data: str = f"{EMOJI}:twemoji"
    allow_commands: bool = field(default=False, metadata={"typed": True})
    cache: str = ""
    workers: int = 0
    resolution: int = 0  # 0: the model's own
    # Where no pictures are at hand: a text file of captions, one a line, or "emoji". The teacher draws then.
    captions: str = ""
    negatives: str = "auto"  # of what the teacher draws: auto | a text file, one phrase a line
    max_negative_phrases: int = 6
    guidance_scale: float = 7.5  # of what the teacher draws
    teacher_steps: int = 25
    teacher_solver: str = "dpmpp_2m"
    bank_size: int = 1024  # pictures of the teacher that are kept
    target_reuse: int = 8  # steps for each batch of pictures the teacher draws
    # noised: x_t = a x_0 + s e. trajectories: the states the teacher went through, with either text; needs `captions`.
    inputs: str = "noised"
    empty_captions: float = 0.1
    # Incubation: this share of the run, divided among the slimmed stages; 0 leaves it out.
    incubation: float = 0.3
    stage_weight: float = 1.0  # of the stage's outputs against the original's, normalised
    final_weight: float = 1.0  # of the predicted noise of the hybrid against the original's
    # Distillation: noise_weight MSE(S, e) + output_weight MSE(S, T) + feature_weight sum ||f_S - f_T||^2 / ||f_T||^2
    noise_weight: float = 1.0
    output_weight: float = 1.0
    feature_weight: float = 1.0
    # Semantic term: 1 - cosine of an image encoder's features of the decoded clean pictures S and T predict.
    semantic_weight: float = 0.0
    semantic_model: str = ""  # folder of a CLIP, as transformers saves it
    semantic_until: float = 0.3  # only at timesteps below this share: earlier predictions show nothing yet
    semantic_rows: int = 4  # rows of a batch that are decoded for it
    # ME-CondConv: kernels that a router mixes in each convolution beside a removed layer; 0 leaves them out. Routings
    # are the softmax of logits / temperature, which falls to 1: the plain softmax at once lets one expert take it all.
    experts: int = 0
    router_width: int = 64
    temperature: float = 10.0
    temperature_share: float = 0.2  # of the run, in which it falls
    gradient_checkpointing: bool = False


def check_compact(config: CompactTrainConfig) -> None:
    """Raise ConfigError for an unknown word, a number outside its range or settings that do nothing."""
    check_numbers(config.run)
    if config.inputs not in INPUTS:
        raise ConfigError(f"inputs is {' or '.join(INPUTS)}, not {config.inputs!r}.")
    if config.teacher_solver not in ("dpmpp_2m", "ddim"):
        raise ConfigError(f"teacher_solver is dpmpp_2m or ddim, not {config.teacher_solver!r}.")
    if config.inputs == "trajectories" and not config.captions:
        raise ConfigError("inputs = trajectories are the teacher's own: give captions, a text file or emoji.")
    if config.inputs == "trajectories" and config.noise_weight:
        raise ConfigError("noise_weight needs the noise that was added, which trajectories have not: set it to 0.")
    if config.resolution < 0 or config.resolution % 8:
        raise ConfigError(f"resolution is a multiple of 8 pixels, or 0 for the model's own, not {config.resolution}.")
    for name in ("empty_captions", "semantic_until", "incubation", "temperature_share"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"{name} is a share, from 0 to 1, not {getattr(config, name):g}.")
    weights = ("noise_weight", "output_weight", "feature_weight", "stage_weight", "final_weight", "semantic_weight")
    for name in weights:
        if getattr(config, name) < 0:
            raise ConfigError(f"{name} is 0 or above, not {getattr(config, name):g}.")
    if not any(getattr(config, name) for name in weights[:3]):
        raise ConfigError("noise_weight, output_weight and feature_weight are all 0: nothing would be learned.")
    if config.incubation and not config.stage_weight + config.final_weight:
        raise ConfigError("stage_weight and final_weight are both 0: incubation would learn nothing.")
    if config.semantic_weight and not config.semantic_model:
        raise ConfigError("semantic_weight needs semantic_model: the folder of a CLIP.")
    for name in ("teacher_steps", "bank_size", "target_reuse", "semantic_rows"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is a number of at least 1, not {getattr(config, name)}.")
    if config.experts and not 2 <= config.experts <= MOST_EXPERTS:
        raise ConfigError(f"experts is 0, or from 2 to {MOST_EXPERTS} kernels, not {config.experts}.")
    if config.router_width < 1 or not 1 <= config.temperature <= 1e6:
        raise ConfigError("router_width is at least 1, temperature from 1 on, to which it falls.")
    if config.guidance_scale <= 0 or config.max_negative_phrases < 0:
        raise ConfigError("guidance_scale is above 0, max_negative_phrases 0 or more.")


def is_list(plan: str) -> bool:
    """Whether a plan is one of the named lists, not a file."""
    return plan in LISTS
