"""``sun evaluate``: the figures of one model, or a folder with a report on several."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..common.atomic import write_json, write_text
from ..common.devices import resolve
from ..common.settings import ConfigError
from .cells import CellStore, file_name, processes
from .config import EvaluateConfig, ModelSpec, check, method_names, model_specs, portable
from .features import load_features
from .loading import check_models, device_of, load_sampler, methods_of
from .methods import REFERENCE
from .model import ModelEvaluation
from .prompts import PromptSet, build_prompts, calibration_pairs


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """All figures of one model as a dictionary.

    ``reference``; ``methods``: ``unet_calls``, ``seconds``, ``paired_mse``, ``set_distance`` and more of each;
    ``floor``: the reference against itself with other noise; ``negative_prompt``: direction of change; ``settings``.
    Raises ConfigError for settings that cannot work, a list of several models among them.
    """
    config = _checked(config)
    specs = model_specs(config)
    if len(specs) > 1:
        raise ConfigError("several models make a report: name a folder for it with the setting output.")
    check_models(config, specs)
    name, spec = next(iter(specs.items()))
    store = CellStore(Path(config.output) / "cells" if config.output else None, config.resume)
    evaluation = prepare(config, name, spec, build_prompts(config), store)
    result = {**evaluation.figures(), "settings": portable(config)}
    if config.grid and processes().is_main_process:
        from .pictures import save_comparison

        save_comparison(evaluation, Path(config.grid), max(config.grid_prompts, 1))
    return result


def _checked(config: EvaluateConfig) -> EvaluateConfig:
    """``config`` with the number format it means here. Raises ConfigError."""
    check(config)
    return replace(config, precision=resolve(config.precision, device_of(config)))


def prepare(
    config: EvaluateConfig, name: str, spec: ModelSpec, prompts: PromptSet, store: CellStore
) -> ModelEvaluation:
    """Load one model and all it is measured with."""
    config = spec.within(config)
    sampler = load_sampler(config, spec)
    sampler.calibration = calibration_pairs(config)
    features = load_features(
        config.features, sampler, emoji_model=spec.model == "emoji", contrast=config.contrast,
        clip_model=config.clip_model, inception=config.inception,
    )  # fmt: skip
    methods = methods_of(config, name, spec, method_names(config), sampler)
    return ModelEvaluation(name, sampler, prompts, config, store, features, methods)


def report(config: EvaluateConfig) -> dict[str, Any]:
    """Measure every model under every method and write the report into ``config.output``; returns its figures.

    ``figures.json`` and ``tables.md`` grow model by model; each model has a folder with its plots and its grid.
    What is in ``cells/`` is not computed again. Under ``accelerate launch`` the prompts are divided between the
    processes. Raises ConfigError.
    """
    if not config.output:
        raise ConfigError("a report needs a folder: give the setting output.")
    config = _checked(config)
    folder, main = Path(config.output), processes().is_main_process
    specs = model_specs(config)
    check_models(config, specs)
    prompts = build_prompts(config)
    figures: dict[str, Any] = {"reference": REFERENCE, "models": {}, "settings": portable(config)}
    for name, spec in specs.items():
        if main:
            tqdm.write(f"model {name}")
        store = CellStore(folder / "cells", config.resume)
        evaluation = prepare(config, name, spec, prompts, store)
        described = {k: v for k, v in portable(asdict(spec)).items() if v and k not in ("methods", "measure")}
        figures["models"][name] = {**evaluation.figures(), "model": described}
        if main:
            _write_model(folder, name, evaluation, figures)
    return figures


def _write_model(folder: Path, name: str, evaluation: ModelEvaluation, figures: dict[str, Any]) -> None:
    from .pictures import save_comparison, save_edits, save_plots
    from .tables import markdown

    own = folder / file_name(name)
    write_json(folder / "figures.json", figures)
    write_text(folder / "tables.md", markdown(figures))
    save_plots(name, figures["models"][name], own)
    if "distances" in evaluation.config.measure:
        save_comparison(evaluation, own / "grid.png", evaluation.config.grid_prompts)
    if "edits" in evaluation.config.measure:
        save_edits(evaluation, own, evaluation.config.grid_prompts)
