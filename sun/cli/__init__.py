"""The command line: ``sun`` or ``python -m sun``. Commands are thin; heavy imports wait until one runs."""

from __future__ import annotations

# Importing a module registers its commands; --help lists them in this order.
from . import pictures, exporting, inspection, calibration, evaluation, training, assembly, benchmark  # isort: skip
from . import runtime_benchmark, reproduction  # isort: skip
from .app import app

__all__ = [
    "app",
    "assembly",
    "benchmark",
    "calibration",
    "evaluation",
    "exporting",
    "inspection",
    "main",
    "pictures",
    "training",
]


def main() -> None:
    """Entry point of the console script."""
    app()
