"""``sun reproduce``: everything that ships, made again, a stage after the other.

A stage that has its result is skipped; one that was interrupted goes on from its last checkpoint. When a stage's
settings change, or one before it was made anew, it is made anew too. Nothing outside of the output folder is touched
before the last stage, and by that one only with ``ship``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.devices import process_state
from ..common.identity import digest_of
from ..common.settings import ConfigError
from .stages import Recipe, ReproduceConfig, quick, stages_of

Say = Callable[[str], None]


@dataclass
class Mark:
    """That a stage has its result: made with which settings, in how many minutes."""

    settings: str
    minutes: float


def reproduce(config: ReproduceConfig, *, tiny: bool = False, ship: bool = False, say: Say = print) -> Path:
    """Run every stage that has no result yet; returns the folder of the results.

    tiny: the whole chain with numbers that only show that it runs. ship: the last stage writes into the package.
    Raises ConfigError for settings that cannot work, and whatever a stage raises.
    """
    if not config.output:
        raise ConfigError("reproducing needs a folder: give the setting output.")
    if tiny and ship:
        raise ConfigError("what --quick makes only shows that the chain runs: it is not shipped. Leave out --ship.")
    recipe = Recipe(quick(config) if tiny else config, ship)
    stages = stages_of(recipe)
    marks = Marks(recipe.folder)
    anew, expected = False, [stage.minutes for stage in stages]
    for number, stage in enumerate(stages):
        settings = digest_of(recipe.settings_of(stage.name))
        mark = marks.read(stage.name)
        where = f"[{number + 1}/{len(stages)}] {stage.title}"
        if not anew and mark and mark.settings == settings and all(path.exists() for path in stage.results):
            say(f"{where}: there, made in {mark.minutes:.1f} min")
            expected[number] = mark.minutes
            continue
        say(f"{where}: {time_left(expected, number)}")
        again = mark is not None  # the result of other settings, or of other models before it
        anew = anew or again
        began = time.monotonic()
        stage.make(not anew)
        process_state().wait_for_everyone()
        missing = [str(path) for path in stage.results if not path.exists()]
        if missing:
            raise ConfigError(f"the stage {stage.name} ended without {', '.join(missing)}.")
        expected[number] = (time.monotonic() - began) / 60
        marks.write(stage.name, Mark(settings, expected[number]))
    return recipe.folder


def time_left(expected: Sequence[float], number: int) -> str:
    """How long the stages from ``number`` on take, as far as is known."""
    left = sum(expected[number:])
    return f"about {left / 60:.1f} h left" if left >= 90 else f"about {left:.0f} min left"


class Marks:
    """The marks of stages, in the folder ``stages`` of the output."""

    def __init__(self, folder: Path):
        self.folder = folder / "stages"

    def read(self, name: str) -> Mark | None:
        """The mark of a stage; None where there is none that can be read."""
        try:
            found: dict[str, Any] = json.loads((self.folder / f"{name}.json").read_text())
            return Mark(str(found["settings"]), float(found["minutes"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, mark: Mark) -> None:
        """Written by the main process alone."""
        if process_state().is_main_process:
            write_json(self.folder / f"{name}.json", {"settings": mark.settings, "minutes": mark.minutes})
