"""The stages of ``sun reproduce``: what each makes of what the ones before it made."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..common.atomic import write_json, write_text
from ..common.devices import process_state
from ..common.settings import ConfigError, apply
from ..evaluation import EvaluateConfig, report
from ..shipped import EMOJI_DIFFUSION, SHIPPED
from ..training.config import SunTrainConfig
from ..training.sun import train_sun
from .emoji import colours
from .emoji.base import BaseConfig, train_base
from .emoji.checks import colour_figures
from .emoji.contrast_training import ContrastConfig, train_contrast
from .emoji.controlnet import ControlNetConfig, train_controlnet
from .emoji.inpainting import InpaintingConfig, train_inpainting
from .emoji.recoding import RecodeConfig, recode
from .emoji.style import LoraStyleConfig, StyleConfig, train_lora, train_style
from .emoji.vae import VaeConfig, train_vae
from .peers.guided_distillation import GuidedDistillConfig, train_guided_distillation
from .peers.lcm_lora import LcmLoraConfig, train_lcm_lora
from .release import Release, release

T = TypeVar("T")
SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


@dataclass
class ReproduceConfig:
    """``stages``: a table of settings for each stage, on top of its trainer's own defaults.

    unet_calls: of training, of SUN (both runs together) and of each peer alike; forward 1, backward 2. minutes:
    0 keeps the minutes that ``stages`` give; else they are scaled so that all together are this many. base: ``emoji``
    or the folder of a model that all of it is made for, in the place of a new autoencoder and a new model.
    """

    output: str = "runs/reproduce"
    base: str = ""
    minutes: float = 0.0
    unet_calls: int = 200_000
    guidance_scales: tuple[float, ...] = SCALES  # where agreement is measured; the best of them is what ships
    styles: tuple[str, ...] = ("openmoji", "fluent", "google")  # unseen models: the base fine-tuned on them
    lora_style: str = "google"
    stages: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """``make(resume)`` leaves ``results`` behind; ``minutes`` is what it is expected to take."""

    name: str
    title: str
    minutes: float
    results: tuple[Path, ...]
    make: Callable[[bool], object]


TRAINERS: dict[str, tuple[type[Any], Callable[[Any], Path]]] = {
    "autoencoder": (VaeConfig, train_vae),
    "recode": (RecodeConfig, recode),
    "decoder": (VaeConfig, train_vae),
    "base": (BaseConfig, train_base),
    "contrast": (ContrastConfig, train_contrast),
    "sun": (SunTrainConfig, train_sun),
    "sun-guided": (SunTrainConfig, train_sun),
    "lcm-lora": (LcmLoraConfig, train_lcm_lora),
    "guided-distill": (GuidedDistillConfig, train_guided_distillation),
    "style": (StyleConfig, train_style),
    "lora": (LoraStyleConfig, train_lora),
    "controlnet": (ControlNetConfig, train_controlnet),
    "inpainting": (InpaintingConfig, train_inpainting),
}
# Of one budget of U-Net calls: SUN's two runs share it, each peer has the whole.
BUDGET = {"sun": 0.6, "sun-guided": 0.4, "lcm-lora": 1.0, "guided-distill": 1.0}
EVALUATIONS = ("agreement", "evaluation")
OF_THE_BASE = ("autoencoder", "recode", "decoder", "base")  # left out where a base is given
_ALL = {"run": {"steps": 1_000_000}}  # a budget of minutes or calls ends a run
_NO_MINUTES = 15.0  # expected of a stage without a budget of minutes


class Recipe:
    """Where everything lies, and the settings of each stage."""

    def __init__(self, config: ReproduceConfig, ship: bool = False):
        unknown = set(config.stages) - {*TRAINERS, *EVALUATIONS, "release"}
        if unknown:
            raise ConfigError(f"stages takes {', '.join((*TRAINERS, *EVALUATIONS))}, not {', '.join(sorted(unknown))}.")
        self.config, self.ship = config, ship
        self.folder = Path(config.output)
        self.vae = self.path("decoder") / "vae"
        given = EMOJI_DIFFUSION if config.base == SHIPPED else Path(config.base)
        self.base = given if config.base else self.path("base") / "model"
        if config.base and not (given / "model_index.json").is_file():
            raise ConfigError(f"base: {given} is no model. Give emoji, or the folder of a model of sun train-emoji.")
        self.contrast = self.path("contrast") / "contrast"
        self.adapter = self.path("sun-guided") / "adapter.safetensors"
        self.agreement, self.evaluation = self.path("agreement"), self.path("evaluation")

    def path(self, name: str) -> Path:
        return self.folder / name

    @property
    def guidance(self) -> float:
        """The scale with the best agreement among those that guide. Raises ConfigError before it was measured."""
        file = self.agreement / "figures.json"
        if not file.is_file():
            raise ConfigError(f"{file} is not there: the stage agreement chooses the guidance scale.")
        model = next(iter(json.loads(file.read_text())["models"].values()))
        rows = model["agreement_by_guidance"]["rows"]
        guiding = {float(scale): row["agreement"] for scale, row in rows.items() if float(scale) > 1}
        return max(guiding, key=lambda scale: (guiding[scale], -scale))

    def settings_of(self, name: str) -> dict[str, Any]:
        """All that a stage's result depends on beside the stages before it."""
        config, kind = self.config, name.partition(":")[0]
        found: dict[str, Any] = {"own": config.stages.get(kind, {})}
        if config.base:
            found["base"] = config.base
        if kind in BUDGET:
            found["unet_calls"] = config.unet_calls
        if kind in ("agreement", "sun-guided"):
            found["guidance_scales"] = config.guidance_scales
        if kind == "evaluation":
            found["models"] = [config.styles, config.lora_style]
        return found | ({"ship": self.ship} if kind == "release" else {})

    def minutes_of(self, name: str) -> float:
        """The budget of a trainer in minutes; 0 for none."""
        given = float(self.config.stages.get(name, {}).get("run", {}).get("minutes", 0.0))
        if not self.config.minutes:
            return given
        return given * self.config.minutes / self._all_minutes()

    def _all_minutes(self) -> float:
        times = {"style": len(self.config.styles)}
        left_out = OF_THE_BASE if self.config.base else ()
        tables = {name: table for name, table in self.config.stages.items() if name not in left_out}
        of = {name: table.get("run", {}).get("minutes", 0.0) * times.get(name, 1) for name, table in tables.items()}
        return sum(of.values()) or 1.0

    def trainer(self, name: str, resume: bool, output: str = "", **settings: Any) -> Any:
        """The configuration of a trainer: defaults, this file's table, what the stages before give, its budget."""
        config = TRAINERS[name][0]()
        where = f"stages.{name}"
        if not self.config.stages.get(name, {}).get("run", {}).get("steps"):
            apply(config, _ALL, where)
        apply(config, self.config.stages.get(name, {}), where)
        run = {"output": str(self.path(output or name)), "resume": resume, "minutes": self.minutes_of(name)}
        if name in BUDGET and self.config.unet_calls:
            run |= {"unet_calls": round(BUDGET[name] * self.config.unet_calls), "minutes": 0.0}
        return apply(config, {**settings, "run": run}, where)

    def train(self, name: str, resume: bool, output: str = "", **settings: Any) -> Path:
        return TRAINERS[name][1](self.trainer(name, resume, output, **settings))


def stages_of(recipe: Recipe) -> list[Stage]:
    """Every stage, in order."""
    evaluation = recipe.evaluation / "figures.json"
    released = recipe.folder / "released.json"
    return [
        *_base(recipe),
        *_distilled(recipe),
        *_variants(recipe),
        Stage("evaluation", "every method on every model", 60.0, (evaluation,), partial(_evaluation, recipe)),
        Stage("release", "cards, weights, pictures and reports", 5.0, (released,), partial(_release, recipe)),
    ]


def _trained(recipe: Recipe, name: str, title: str, result: Path, output: str = "", **settings: Any) -> Stage:
    """A stage that trains. Settings that are functions are known only when the stages before have run."""

    def make(resume: bool) -> None:
        known = {key: value() if callable(value) else value for key, value in settings.items()}
        recipe.train(name, resume, output, **known)

    stage = f"{name}:{settings['style']}" if output else name
    return Stage(stage, title, recipe.minutes_of(name) or _NO_MINUTES, (result,), make)


def _base(recipe: Recipe) -> list[Stage]:
    """The model, what judges its pictures, and the scale it is guided with best."""
    report_on_colours, figures = recipe.path("decoder") / "colours.md", recipe.agreement / "figures.json"
    tokenizer = str(recipe.base / "tokenizer")
    first, recoded = recipe.path("autoencoder") / "vae", recipe.path("recode") / "vae"
    anew = [
        _trained(recipe, "autoencoder", "autoencoder", first),
        _trained(recipe, "recode", "latents whose colours survive guidance", recoded, vae=str(first)),
        _trained(recipe, "decoder", "decoder", recipe.vae, init_vae=str(recoded), freeze_encoder=True),
        Stage("colours", "do colours survive extrapolation?", 1.0, (report_on_colours,), partial(_colours, recipe)),
        _trained(recipe, "base", "text encoder and U-Net", recipe.base / "model_index.json", vae=str(recipe.vae)),
    ]
    return [
        *([] if recipe.config.base else anew),
        _trained(recipe, "contrast", "image-text model", recipe.contrast / "README.md", tokenizer=tokenizer),
        Stage("agreement", "agreement at every guidance scale", 30.0, (figures,), partial(_agreement, recipe)),
    ]


def _distilled(recipe: Recipe) -> list[Stage]:
    """SUN and its peers, at the scale that was chosen."""
    first, lcm = (
        recipe.path("sun") / "adapter.safetensors",
        recipe.path("lcm-lora") / "pytorch_lora_weights.safetensors",
    )

    def scale() -> float:
        return recipe.guidance

    def middle() -> float:
        """Of the scales' logarithms: the chosen scale, but for small ones."""
        return max(2.0, recipe.guidance)

    def scales() -> tuple[float, float]:
        return (1.0, middle() ** 2)

    on_base: dict[str, Any] = {"model": str(recipe.base), "guidance_scale": scale}
    widened = {**on_base, "init_adapter": str(first), "guidance_range": scales}
    return [
        _trained(recipe, "sun", "SUN", first, **{**on_base, "guidance_scale": middle}),
        _trained(recipe, "sun-guided", "SUN, with the guidance scale as input", recipe.adapter, **widened),
        _trained(recipe, "lcm-lora", "LCM-LoRA", lcm, **on_base),
        _trained(recipe, "guided-distill", "guided distillation", recipe.path("guided-distill") / "unet", **on_base),
    ]


def _variants(recipe: Recipe) -> list[Stage]:
    """What else is made of the base: unseen models, and what is drawn with."""
    model, lora = str(recipe.base), recipe.config.lora_style

    def result(folder: str, inside: str) -> Path:
        return recipe.path(folder) / inside / "README.md"

    styles = [
        _trained(
            recipe,
            "style",
            f"fine-tune on {style}",
            result(f"style-{style}", "model"),
            f"style-{style}",
            style=style,
            model=model,
        )
        for style in recipe.config.styles
    ]
    tuned = result(f"lora-{lora}", "lora")
    return [
        *styles,
        _trained(recipe, "lora", f"LoRA of {lora}", tuned, f"lora-{lora}", style=lora, model=model),
        _trained(recipe, "controlnet", "edge ControlNet", result("controlnet", "controlnet"), model=model),
        _trained(recipe, "inpainting", "inpainting U-Net", result("inpainting", "inpainting"), model=model),
    ]


def _colours(recipe: Recipe, resume: bool) -> None:
    if process_state().is_main_process:
        settings = recipe.config.stages.get("autoencoder", {})
        found = colour_figures(recipe.vae, settings.get("style", "twemoji"))
        write_json(recipe.path("decoder") / "colours.json", found.as_json())
        write_text(recipe.path("decoder") / "colours.md", colours.table(found))


def _agreement(recipe: Recipe, resume: bool) -> None:
    config = EvaluateConfig(
        models={"base": str(recipe.base)},
        adapter="init",
        methods=("cond-25",),
        measure=("agreement",),
        agreement_scales=recipe.config.guidance_scales,
        agreement_methods=("cond-25",),
        guidance_scale=max(recipe.config.guidance_scales),  # so that the reference is drawn at no other scale
        features="emoji",
        contrast=str(recipe.contrast),
        output=str(recipe.agreement),
        resume=resume,
    )
    report(apply(config, recipe.config.stages.get("agreement", {}), "stages.agreement"))


def _evaluation(recipe: Recipe, resume: bool) -> None:
    base, folder = str(recipe.base), recipe.path
    models: dict[str, Any] = {"base": {"model": base, "guided_distill": str(folder("guided-distill"))}}
    for style in recipe.config.styles:
        models[style] = {"model": str(folder(f"style-{style}") / "model"), "style": style}
    lora = recipe.config.lora_style
    models[f"lora-{lora}"] = {"model": base, "lora": str(folder(f"lora-{lora}") / "lora"), "style": lora}
    config = EvaluateConfig(
        models=models,
        adapter=str(recipe.adapter),
        lcm_lora=str(folder("lcm-lora")),
        skip_missing=True,
        guidance_scale=recipe.guidance,
        measure=("distances", "negatives", "agreement"),
        features="emoji",
        contrast=str(recipe.contrast),
        output=str(recipe.evaluation),
        resume=resume,
    )
    report(apply(config, recipe.config.stages.get("evaluation", {}), "stages.evaluation"))


def _release(recipe: Recipe, resume: bool) -> None:
    if not process_state().is_main_process:
        return
    made = Release(
        model=recipe.base,
        base=None if recipe.config.base else recipe.path("base"),
        autoencoder=(recipe.path("autoencoder"), recipe.path("recode"), recipe.path("decoder")),
        contrast=recipe.contrast,
        adapter=recipe.path("sun-guided"),
        lora=recipe.path(f"lora-{recipe.config.lora_style}") / "lora",
        controlnet=recipe.path("controlnet") / "controlnet",
        inpainting=recipe.path("inpainting") / "inpainting",
        agreement=recipe.agreement,
        evaluation=recipe.evaluation,
        guidance=recipe.guidance,
    )
    written = release(made, None if recipe.ship else recipe.folder / "release")
    write_json(recipe.folder / "released.json", {"files": [str(path) for path in written]})


def quick(config: ReproduceConfig) -> ReproduceConfig:
    """``config`` with every number so small that the chain ends in minutes, and means nothing."""
    run = {"steps": 2, "minutes": 0.0, "batch_size": 2, "warmup_steps": 0, "ema_decay": 0.5, "precision": "fp32"}
    scenes = {"scenes": 4, "run": run}
    few = {"prompts": 4, "batch_size": 4, "precision": "fp32", "agreement_prompts": 2, "grid_prompts": 2}
    data = {"data": "emoji:twemoji:4", "run": run}
    sun = {"substeps": 1, "max_negative_phrases": 2, **data}
    methods = ["sun-2", "ddim-2", "lcm-lora-2", "guided-distill-2"]
    tiny = {
        "autoencoder": {"size": 64, "crop": 32, "run": run},
        "recode": {"scenes": 2, "size": 64, "crop": 48, "flat_colours": 4, "flat_batch": 4, "run": run},
        "decoder": {"size": 64, "crop": 32, "flat_batch": 4, "run": run},
        "base": {
            **scenes,
            "stages": [[32, 0.5], [64, 0.5]],
            "channels": [32, 32, 64, 64],
            "heads": 2,
            "text_width": 32,
            "text_layers": 1,
            "vocabulary": 600,
            "text_steps": 2,
            "text_batch": 4,
        },
        "contrast": {
            "check_scenes": 4,
            "candidates": 2,
            "styles": ["twemoji", "google"],
            "run": run,
            "shape": {"size": 32, "widths": [16, 32], "text_width": 32, "text_layers": 1, "text_heads": 2, "dim": 32},
        },
        "agreement": few,
        "sun": sun,
        "sun-guided": sun,
        "lcm-lora": data,
        "guided-distill": {"substeps": 1, **data},
        "style": scenes,
        "lora": {**scenes, "rank": 2},
        "controlnet": {**scenes, "rank": 2, "check_scenes": 2},
        "inpainting": {**scenes, "rank": 2, "check_scenes": 2},
        "evaluation": {**few, "methods": methods, "negative_pairs": 2},
    }
    return replace(
        config, minutes=0.0, unet_calls=60, guidance_scales=(1.0, 2.0), styles=config.styles[:1], stages=tiny
    )
