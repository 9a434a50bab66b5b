"""The command line: ``sun`` or ``python -m sun``. Commands are thin; heavy imports wait until one runs."""

from __future__ import annotations

# Importing a module registers its commands.
from .commands import adapters, benchmark, evaluation, pictures, training
from .commands.app import app

__all__ = ["adapters", "app", "benchmark", "evaluation", "main", "pictures", "training"]


def main() -> None:
    """Entry point of the console script."""
    app()
