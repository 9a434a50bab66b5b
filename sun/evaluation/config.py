"""Settings of ``sun evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from ..common.settings import ConfigError, apply
from ..common.worlds import EMOJI

PARTS = ("distances", "negatives", "time", "edits", "agreement", "equal_time", "guidance")


@dataclass
class ModelSpec:
    """A model under test. Empty settings are those of the same name of the whole evaluation.

    model: diffusers folder, single-file checkpoint, ``emoji`` for the shipped one, or ``random`` for Stable Diffusion
    1.5 with random weights (for time alone). unet: folder of a U-Net that replaces the model's. lora: LoRA as
    ``path`` or ``path:weight``, fused. adapter: SUN file, ``emoji``, or ``init`` for an untrained one. lcm_lora,
    guided_distill: folders of those peers. guidance_scale:
    w; 0 is the adapter's own. style: a word for tables. methods, measure: what this model is measured with and in.
    """

    model: str = EMOJI
    unet: str = ""
    lora: str = ""
    adapter: str = ""
    lcm_lora: str = ""
    guided_distill: str = ""
    guidance_scale: float = 0.0
    style: str = ""
    methods: tuple[str, ...] = ()
    measure: tuple[str, ...] = ()

    def within(self, config: EvaluateConfig) -> EvaluateConfig:
        """``config`` with this model's own methods and measures."""
        return replace(config, methods=self.methods or config.methods, measure=self.measure or config.measure)


@dataclass
class EvaluateConfig:
    """``model``/``adapter`` default to the shipped ones; ``prompts_file`` holds one ``positive | negative`` a line.

    A report on several models has a table ``models``: names with a folder, or a table of :class:`ModelSpec`.
    ``adapters`` names more adapter files, for methods such as ``sun[NAME]-4``. ``steps`` multiplies the methods that
    are written without: ``methods = ["sun", "ddim"]``, ``steps = [4, 8]``.
    """

    model: str = EMOJI
    adapter: str = ""
    lora: str = ""
    lcm_lora: str = ""
    guided_distill: str = ""
    models: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
    # Compact U-Nets for methods such as ``compact[NAME]-25``, ``switch[NAME]-25``: a folder, or what to remove (a list
    # or a plan's file).
    unets: dict[str, str] = field(default_factory=dict)
    methods: tuple[str, ...] = ("ddim-4", "dpmpp-4", "cond-25", "sun-4", "sun-8")
    steps: tuple[int, ...] = ()
    skip_missing: bool = False  # leave out methods whose files a model does not name, instead of stopping
    prompts: int = 512
    prompts_file: str = ""
    negatives: str = "auto"  # list of phrases for the experiment on negatives: auto or a file
    guidance_scale: float = 0.0  # 0: the adapter's own w
    batch_size: int = 64
    seed: int = 20_000
    resolution: int = 0
    measure: tuple[str, ...] = ("distances", "negatives", "time")
    negative_pairs: int = 128
    negative_groups: tuple[str, ...] = ("seen",)
    negative_methods: tuple[str, ...] = ()  # of methods, those in the experiment on negatives; empty: all
    negative_ceiling: str = ""  # another solver for the reference, such as unipc-25: how far two references agree
    features: str = "auto"  # auto | emoji | clip | none
    contrast: str = ""
    clip_model: str = ""
    inception: str = ""
    edits: tuple[str, ...] = ("img2img-0.75", "img2img-0.5", "inpaint-1")  # kind and strength
    edit_methods: tuple[str, ...] = ()  # of methods, those that edit; empty: all
    edit_prompts: int = 64
    agreement_prompts: int = 300  # questions, asked without and with negatives: twice as many pictures
    agreement_scales: tuple[float, ...] = ()  # guidance scales at which the reference's agreement is measured
    agreement_methods: tuple[str, ...] = ()  # of methods, those whose agreement is measured; empty: all
    calibration_prompts: int = 8  # pictures LTC-Accel is calibrated on
    set_draws: int = 0  # bootstrap draws for the interval of the set distance; 0: none
    timing_batch: int = 4
    timing_rounds: int = 5
    device: str = ""
    precision: str = "auto"  # bf16 where the device is fast in it, else fp32
    output: str = ""
    resume: bool = True
    grid: str = ""
    grid_prompts: int = 8
    grid_methods: tuple[str, ...] = ()  # of methods, those in the grid; empty: all


def model_specs(config: EvaluateConfig) -> dict[str, ModelSpec]:
    """The models to measure by name, with the evaluation's own settings where a model has none. Raises ConfigError."""
    shared = ("lora", "adapter", "lcm_lora", "guided_distill", "guidance_scale")
    own: dict[str, Any] = {name: getattr(config, name) for name in shared}
    if not config.models:
        name = PurePath(config.model).stem or config.model
        return {name: ModelSpec(model=config.model, **own)}
    if config.model != EvaluateConfig.model:
        raise ConfigError(
            f"the table models says what is measured, so model = {config.model} would not be: leave out one of them."
        )
    specs = {}
    for name, value in config.models.items():
        given = value if isinstance(value, Mapping) else {"model": value}
        specs[name] = apply(ModelSpec(**own), given, f"models.{name}")
    return specs
