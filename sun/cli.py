"""The command line: ``sun`` or ``python -m sun``. Commands are thin; heavy imports wait until one runs."""

from __future__ import annotations

from .commands import (  # importing a module registers its commands
    adapters,
    emoji_styles,
    evaluation,
    pictures,
    training,
)
from .commands.app import app

__all__ = ["adapters", "app", "emoji_styles", "evaluation", "main", "pictures", "training"]


def main() -> None:
    """Entry point of the console script."""
    app()
