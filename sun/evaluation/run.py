"""``sun evaluate``: the figures of one model, or a folder with a report on several."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..common import worlds
from ..common.atomic import write_json, write_text
from ..common.devices import resolve
from ..common.settings import ConfigError, without_folders
from ..common.worlds import EMOJI
from .agreement import Agreement
from .cells import CellStore, file_name, processes
from .checks import check, check_models, methods_of
from .config import EvaluateConfig, ModelSpec, model_specs
from .distances import Distances
from .edits import Edits
from .equal_time import EqualTime
from .features import load_features
from .guidance import Guidance
from .loading import device_of, load_sampler
from .measured import ModelEvaluation
from .names import REFERENCE, parse_methods
from .negative import Negatives
from .prompts import PromptSet, build_prompts, calibration_pairs
from .timing import measure_times


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
    result = {**figures_of(evaluation, spec.style), "settings": without_folders(config)}
    if config.grid and processes().is_main_process:
        from .grids import save_comparison

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
        config.features,
        sampler,
        emoji_model=spec.model == EMOJI,
        contrast=config.contrast,
        clip_model=config.clip_model,
        inception=config.inception,
    )
    methods = methods_of(
        config, name, spec, parse_methods(config.methods, config.steps), shipped_fits=sampler.adapter is not None
    )
    judged = spec.model == EMOJI and not config.prompts_file
    return ModelEvaluation(name, sampler, prompts, config, store, features, methods, judged)


def figures_of(evaluation: ModelEvaluation, style: str = "") -> dict[str, Any]:
    """``reference``, ``methods``, ``floor``, ``negative_prompt``, ``unet_call`` and more of one model, as far as they
    are measured, and what they are of. ``style``: of the model's emoji, for their colours."""
    measured, features = evaluation.config.measure, evaluation.features
    every = list(dict.fromkeys((REFERENCE, *evaluation.methods)))
    rows: dict[str, dict[str, Any]] = {call.text: {} for call in every}
    more: dict[str, Any] = {}
    if "distances" in measured:
        distances = Distances(evaluation)
        rows = {call.text: distances.row(call) for call in every}
        more["floor"] = {**distances.floor(), "what": "the reference again with other noise"}
    if "time" in measured:
        times = measure_times(evaluation)
        rows = {name: row | times["methods"][name] for name, row in rows.items()}
        more |= {"unet_call": times["unet_call"], "machine": times["machine"]}
    network = features.network if features.name == EMOJI else None  # tells objects apart; without it they are not asked
    if "agreement" in measured:
        judge = worlds.find(EMOJI, "judge")(network, style)
        agreement = Agreement(evaluation, judge)
        for call in dict.fromkeys((REFERENCE, *evaluation.methods_among(evaluation.config.agreement_methods))):
            rows[call.text] |= agreement.row(call)
        more |= agreement.figures()
    if "equal_time" in measured:
        judge = worlds.find(EMOJI, "judge")(network, style) if evaluation.judged else None
        more["equal_time"] = EqualTime(evaluation, judge).figures()
    if "negatives" in measured:
        more["negative_prompt"] = Negatives(evaluation).figures()
    if "guidance" in measured:
        more["guidance"] = Guidance(evaluation).figures()
    if "edits" in measured:
        more["edits"] = Edits(evaluation).figures()
    return {
        "reference": {"method": REFERENCE.text, **rows[REFERENCE.text]},
        "methods": {call.text: rows[call.text] for call in evaluation.methods},
        **more,
        "guidance_scale": evaluation.sampler.w,
        "pictures": len(evaluation.prompts.positives),
        "features": features.name,
        "set_features": features.sets,
    }


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
    figures: dict[str, Any] = {"reference": REFERENCE.text, "models": {}, "settings": without_folders(config)}
    for name, spec in specs.items():
        if main:
            tqdm.write(f"model {name}")
        store = CellStore(folder / "cells", config.resume)
        evaluation = prepare(config, name, spec, prompts, store)
        described = {k: v for k, v in without_folders(spec).items() if v and k not in ("methods", "measure")}
        figures["models"][name] = {**figures_of(evaluation, spec.style), "model": described}
        if main:
            _write_model(folder, name, evaluation, figures)
    return figures


def _write_model(folder: Path, name: str, evaluation: ModelEvaluation, figures: dict[str, Any]) -> None:
    from .grids import save_comparison, save_edits
    from .plots import save_plots
    from .tables import markdown

    own = folder / file_name(name)
    write_json(folder / "figures.json", figures)
    write_text(folder / "tables.md", markdown(figures))
    save_plots(name, figures["models"][name], own)
    if "distances" in evaluation.config.measure:
        save_comparison(evaluation, own / "grid.png", evaluation.config.grid_prompts)
    if "edits" in evaluation.config.measure:
        save_edits(evaluation, own, evaluation.config.grid_prompts)
