"""Settings of ``sun evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

from ..common.settings import ConfigError, apply

PARTS = ("distances", "negatives", "time", "edits")
_LEAST = {
    "prompts": 1,
    "batch_size": 1,
    "calibration_prompts": 2,
    "timing_batch": 1,
    "timing_rounds": 1,
    "edit_prompts": 1,
}


@dataclass
class ModelSpec:
    """A model under test. Empty settings are those of the same name of the whole evaluation.

    model: diffusers folder, single-file checkpoint, ``emoji`` for the shipped one, or ``random`` for Stable Diffusion
    1.5 with random weights (for time alone). unet: folder of a U-Net that replaces the model's. lora: LoRA as
    ``path`` or ``path:weight``, fused. adapter: SUN file, ``emoji``, or ``init`` for an untrained one. lcm_lora,
    guided_distill: folders of those peers. guidance_scale: w; 0 is the adapter's own. style: a word for tables.
    methods, measure: what this model is measured with and in.
    """

    model: str = "emoji"
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

    model: str = "emoji"
    adapter: str = ""
    lora: str = ""
    lcm_lora: str = ""
    guided_distill: str = ""
    models: dict[str, Any] = field(default_factory=dict)
    adapters: dict[str, str] = field(default_factory=dict)
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
    measure: tuple[str, ...] = PARTS[:3]
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
    own = {"lora": config.lora, "adapter": config.adapter, "lcm_lora": config.lcm_lora,
           "guided_distill": config.guided_distill, "guidance_scale": config.guidance_scale}  # fmt: skip
    if not config.models:
        name = PurePath(config.model).stem or config.model
        return {name: ModelSpec(model=config.model, **own)}  # type: ignore[arg-type]
    if config.model != EvaluateConfig.model:
        raise ConfigError(
            f"the table models says what is measured, so model = {config.model} would not be: leave out one of them."
        )
    specs = {}
    for name, value in config.models.items():
        given = value if isinstance(value, Mapping) else {"model": value}
        specs[name] = apply(ModelSpec(**own), given, f"models.{name}")  # type: ignore[arg-type]
    return specs


def method_names(config: EvaluateConfig) -> list[str]:
    """Every method with its steps, in order and once. Raises ConfigError."""
    from .methods import parse_method

    names: list[str] = []
    for method in config.methods:
        head, _, tail = method.rpartition("-")
        if head and tail.isdigit():
            names.append(method)
        elif config.steps:
            names += [f"{method}-{steps}" for steps in config.steps]
        else:
            names.append(method)  # parse_method says what is wrong with it
    for name in names:
        parse_method(name)
    return list(dict.fromkeys(names))


def check(config: EvaluateConfig) -> None:
    """Raise ConfigError for settings that would fail only after hours, for want of a package too."""
    from .accelerators import import_deepcache
    from .edits import parse_edit
    from .methods import load_peer, parse_method
    from .metrics import import_torchmetrics
    from .pictures import import_matplotlib
    from .sampler import PRECISIONS

    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision takes {', '.join(PRECISIONS)}, not {config.precision!r}.")
    each = [config, *(spec.within(config) for spec in model_specs(config).values())]
    measured = dict.fromkeys(part for one in each for part in one.measure)
    methods = dict.fromkeys(name for one in each for name in method_names(one))
    if unknown := [part for part in measured if part not in PARTS]:
        raise ConfigError(f"measure takes {', '.join(PARTS)}, not {', '.join(unknown)}.")
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is at least {least}, not {getattr(config, name)}.")
    if "distances" in measured and config.prompts < 2:
        raise ConfigError("distances of sets need two prompts at least, better 500.")
    if "negatives" in measured and not config.negative_pairs:
        raise ConfigError("the experiment on negatives needs negative_pairs; or leave negatives out of measure.")
    for name in (*config.negative_methods, *config.edit_methods, *config.grid_methods):
        if name not in methods:
            raise ConfigError(f"{name} is not among methods, so it is in no grid or experiment on negatives or edits.")
    if {"distances", "edits"} & set(measured):
        import_torchmetrics("image.fid")
    if config.output:
        import_matplotlib()
    for name in config.edits:
        parse_edit(name)
    for name in methods:
        call = parse_method(name)
        if call.method.name in ("nasa", "nag"):
            load_peer(call.method.name, call)
        if call.method.name == "deepcache":
            import_deepcache()


def portable(settings: Any) -> Any:
    """Settings as they may travel with a report: of absolute paths only the last name is kept."""
    if isinstance(settings, EvaluateConfig):
        kept = asdict(settings)
        kept.pop("output")
        return portable(kept)
    if isinstance(settings, dict):
        return {key: portable(value) for key, value in settings.items()}
    if isinstance(settings, (list, tuple)):
        return [portable(value) for value in settings]
    if isinstance(settings, str) and Path(settings).is_absolute():
        return Path(settings).name
    return settings
