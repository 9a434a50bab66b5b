"""What is looked at before anything is measured: settings that cannot work, packages and files that are missing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tqdm.auto import tqdm

from ..common.settings import ConfigError
from ..common.worlds import EMOJI
from ..compact import LISTS
from ..pictures.recipe import split_lora
from .accelerators import import_deepcache
from .config import PARTS, EvaluateConfig, ModelSpec, model_specs
from .edits import parse_edit
from .metrics import import_torchmetrics
from .names import MethodCall, parse_methods
from .plots import import_matplotlib
from .sampler import PRECISIONS

_LEAST = {
    "prompts": 1,
    "batch_size": 1,
    "calibration_prompts": 2,
    "timing_batch": 1,
    "timing_rounds": 1,
    "edit_prompts": 1,
    "agreement_prompts": 1,
}
PEERS = ("lcm_lora", "guided_distill")


def check(config: EvaluateConfig) -> None:
    """Raise ConfigError for settings that would fail only after hours, for want of a package too."""
    if config.precision not in PRECISIONS:
        raise ConfigError(f"precision takes {', '.join(PRECISIONS)}, not {config.precision!r}.")
    each = [config, *(spec.within(config) for spec in model_specs(config).values())]
    measured = dict.fromkeys(part for one in each for part in one.measure)
    calls = {call.text: call for one in each for call in parse_methods(one.methods, one.steps)}
    if unknown := [part for part in measured if part not in PARTS]:
        raise ConfigError(f"measure takes {', '.join(PARTS)}, not {', '.join(unknown)}.")
    for name, least in _LEAST.items():
        if getattr(config, name) < least:
            raise ConfigError(f"{name} is at least {least}, not {getattr(config, name)}.")
    if "distances" in measured and config.prompts < 2:
        raise ConfigError("distances of sets need two prompts at least, better 500.")
    if "negatives" in measured and not config.negative_pairs:
        raise ConfigError("the experiment on negatives needs negative_pairs; or leave negatives out of measure.")
    if wrong := [scale for scale in config.agreement_scales if scale < 1]:
        raise ConfigError(f"agreement_scales are guidance scales of 1 or more, not {wrong[0]:g}.")
    for name in (*config.negative_methods, *config.edit_methods, *config.grid_methods, *config.agreement_methods):
        if name not in calls:
            raise ConfigError(f"{name} is not among methods, so no grid and no experiment of it is made.")
    for name in config.edits:
        parse_edit(name)
    _check_packages(config, measured, calls)


def _check_packages(config: EvaluateConfig, measured: Mapping[str, None], calls: Mapping[str, MethodCall]) -> None:
    if {"distances", "edits", "equal_time"} & set(measured):
        import_torchmetrics("image.fid")
    if config.output:
        import_matplotlib()
    if any(call.method.name == "deepcache" for call in calls.values()):
        import_deepcache()


def missing_asset(
    spec: ModelSpec, call: MethodCall, adapters: Mapping[str, str], unets: Mapping[str, str], shipped_fits: bool
) -> str:
    """The setting a method lacks on a model, or nothing."""
    if call.method.unet and call.variant not in unets:
        return f"unets.{call.variant}"
    if call.method.named and call.variant:
        return "" if call.variant in adapters else f"adapters.{call.variant}"
    if call.method.adapter:
        return "" if spec.adapter or shipped_fits else "adapter"
    return "" if not call.method.peer or getattr(spec, call.method.peer) else call.method.peer


def check_models(config: EvaluateConfig, specs: Mapping[str, ModelSpec]) -> None:
    """Look for every file of every model before the first is measured; with ``skip_missing`` a peer may lack its own.

    Raises ConfigError.
    """
    for name, source in config.unets.items():
        if source not in LISTS and not Path(source).exists():
            raise ConfigError(f"unets.{name} = {source} does not exist. Give a folder, a plan or {', '.join(LISTS)}.")
    for name, spec in specs.items():
        files = {
            "model": "" if spec.model in (EMOJI, "random") else spec.model,
            "lora": "" if split_lora(spec.lora)[0] == EMOJI else split_lora(spec.lora)[0],
            "adapter": "" if spec.adapter in (EMOJI, "init") else spec.adapter,
            "unet": spec.unet,
            **{kind: getattr(spec, kind) for kind in PEERS},
        }
        for setting, path in files.items():
            if path and not Path(path).exists():
                if config.skip_missing and setting in PEERS:
                    setattr(spec, setting, "")
                    tqdm.write(f"{name}: no {setting}, {path} is not there")
                    continue
                raise ConfigError(f"models.{name}: {setting} = {path} does not exist. Check the path.")
        own = spec.within(config)
        methods_of(config, name, spec, parse_methods(own.methods, own.steps), True)


def methods_of(
    config: EvaluateConfig, name: str, spec: ModelSpec, methods: list[MethodCall], shipped_fits: bool
) -> list[MethodCall]:
    """The methods that can run on a model. Those that lack a file are an error, or left out with ``skip_missing``."""
    kept = []
    for call in methods:
        lacking = missing_asset(spec, call, config.adapters, config.unets, shipped_fits)
        if not lacking:
            kept.append(call)
        elif not config.skip_missing:
            raise ConfigError(
                f"{call} on the model {name!r} needs the setting {lacking}. Give it, leave the method out, or set "
                "skip_missing = true to leave out what a model has no files for."
            )
    return kept
