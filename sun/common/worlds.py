"""The worlds that models are trained on, and where what is special about each is: names to ``module:attribute``.

Training and evaluation ask here for the data, prompts, features or negatives of a world by name, and know nothing of
where they come from. Modules are those of this package, imported when they are asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import ConfigError

EMOJI, PHOTO = "emoji", "photo"
_PACKAGE = __package__.rpartition(".")[0]

WORLDS: dict[str, dict[str, str]] = {
    EMOJI: {
        "prompts": ".lab.emoji.scenes:random_captions",
        "consistent_negative": ".lab.emoji.scenes:consistent_negative",
        "negatives": ".training.data.negative_phrases:NegativePrompts",
        "features": ".lab.emoji.contrast:EmojiContrast",
        "judge": ".lab.emoji.agreement:EmojiJudge",
        "source": ".lab.emoji.training_data:EmojiSource",
        "samples": ".lab.emoji.training_data:SAMPLES",
    },
    PHOTO: {
        "negatives": ".training.data.negative_phrases:NegativePrompts",
    },
}


def world_of(name: str) -> str:
    """The world of a model or of data: ``emoji`` for the shipped model and for ``emoji:STYLE``, else ``photo``."""
    return EMOJI if name == EMOJI or name.startswith(f"{EMOJI}:") else PHOTO


def find(world: str, what: str) -> Any:
    """What a world has under a name. Raises ConfigError where that part of the repository was left out, as in the
    archives of the nodes; KeyError if the world has no such thing."""
    module, _, attribute = WORLDS[world][what].partition(":")
    try:
        return getattr(import_module(module, _PACKAGE), attribute)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{what} of the {world} world: {error.name} is not installed. Take the whole repository and its extras: "
            'pip install -e ".[all]" in a clone.'
        ) from error
