"""Several adapters from one configuration, one after the other: ablations, each change measured alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..common.atomic import file_name
from ..common.reading import printable
from ..common.settings import ConfigError, apply, assign
from .config import SunTrainConfig, check_settings
from .sun import train_sun


def variant_configs(
    settings: Mapping[str, Any],
    only: Sequence[str] = (),
    where: str = "the configuration",
    assignments: Sequence[str] = (),
) -> dict[str, SunTrainConfig]:
    """The configuration of every variant of ``settings``: those of ``sun train`` and tables ``variants.NAME`` with what
    differs. A variant's run is the folder NAME in ``run.output``. ``only`` names those wanted;
    ``assignments`` are texts like ``run.lr=1e-3`` that change what the variants have in common.

    Raises ConfigError.
    """
    common = {key: value for key, value in settings.items() if key != "variants"}
    variants = settings.get("variants")
    if not isinstance(variants, Mapping) or not variants:
        raise ConfigError(f"{where} has no variants. Add tables [variants.NAME] with the settings that differ.")
    if unknown := [name for name in only if name not in variants]:
        raise ConfigError(f"{where} has no variant {', '.join(unknown)}; there are: {', '.join(variants)}.")
    base = assign(apply(SunTrainConfig(), common, where), assignments)
    found = {}
    for name, changes in variants.items():
        if only and name not in only:
            continue
        config = apply(copy.deepcopy(base), changes, f"{where}, variants.{name}")
        if name != file_name(name):
            raise ConfigError(
                f"{where}: variants.{printable(name)} is no folder's name. Use letters, digits, '-', '_' and '.'."
            )
        config.run = replace(config.run, output=str(Path(config.run.output) / name))
        found[name] = config
    return found


def train_variants(configs: Mapping[str, SunTrainConfig]) -> Iterator[tuple[str, Path]]:
    """Train each, and yield its name and adapter as it is done. A run that has ended is not trained again, one that
    was interrupted goes on. Raises ConfigError before the first."""
    for config in configs.values():
        check_settings(config)
    for name, config in configs.items():
        yield name, train_sun(config)
