"""Switching: a small U-Net runs one part of a run's steps and a large one the rest, within one sampler run.

>>> import sun.switching
>>> sun.switching.attach(pipe, small_unet, share=0.4)
>>> pipe("a cat", num_inference_steps=25)

The third of A-SDM's methods (arXiv 2406.00210; a reconstruction, its text was not available). Hosts other than
diffusers use :class:`Switching` on the noise levels of their runs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy
from .pair import SAME_UNET, Traits, check_pair, control_for_small, layers_a_stage, residuals_for, what_to_say
from .plan import LARGE_FIRST, ORDERS, SMALL_FIRST, Border, Switching, SwitchingError

if TYPE_CHECKING:
    from .pipelines import attach, detach, last_run

_NEED_DIFFUSERS = ("attach", "detach", "last_run")

__all__ = [
    "LARGE_FIRST",
    "ORDERS",
    "SAME_UNET",
    "SMALL_FIRST",
    "Border",
    "Switching",
    "SwitchingError",
    "Traits",
    "attach",
    "check_pair",
    "control_for_small",
    "detach",
    "last_run",
    "layers_a_stage",
    "residuals_for",
    "what_to_say",
]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(_NEED_DIFFUSERS, "pipelines"))
