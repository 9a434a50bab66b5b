"""Feature inheritance: leave out parts of the U-Net in some steps and take their output of an earlier one.

>>> import sun.inheritance
>>> sun.inheritance.attach(pipe, "balanced")
>>> pipe("a cat", num_inference_steps=25)

Training-free (the idea of A-SDM, arXiv 2406.00210; our reconstruction). Hosts other than diffusers use
:class:`InheritanceRun` on the U-Net of their own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy
from .controlnet import control_of_what_runs
from .places import Places, places_of
from .plan import MODES, PRESETS, InheritanceError, Plan, parse_plan
from .roles import roles_of, skipped_outputs
from .run import InheritanceRun

if TYPE_CHECKING:
    from .pipelines import attach, detach, run_of

_NEED_DIFFUSERS = ("attach", "detach", "run_of")

__all__ = [
    "MODES",
    "PRESETS",
    "InheritanceError",
    "InheritanceRun",
    "Places",
    "Plan",
    "attach",
    "control_of_what_runs",
    "detach",
    "parse_plan",
    "places_of",
    "roles_of",
    "run_of",
    "skipped_outputs",
]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(_NEED_DIFFUSERS, "pipelines"))
