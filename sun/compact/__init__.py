"""Compact U-Nets assembled from the original one: leave layers out, keep the rest's weights, then distil.

>>> import sun.compact
>>> plan = sun.compact.plan(pipe.unet, named="shallow")
>>> small = sun.compact.assemble(pipe.unet, plan)      # an ordinary UNet2DConditionModel

After A-SDM's "model assembly" (arXiv 2406.00210, whose body was not available: a reconstruction, with the removal lists
and losses of BK-SDM, arXiv 2305.15798, and LAPTOP-Diff, arXiv 2404.11098).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy
from .structure import LISTS, CompactError, Shape, candidates, shape_of

if TYPE_CHECKING:
    from .assembly import assemble
    from .carrying import carry_over, control_residuals
    from .measuring import State
    from .pipelines import record_states, save_folder, save_single_file
    from .planfile import Plan, read_plan, write_plan
    from .planning import plan

_HOME_OF = {
    "assemble": "assembly",
    "carry_over": "carrying",
    "control_residuals": "carrying",
    "State": "measuring",
    "Plan": "planfile",
    "read_plan": "planfile",
    "write_plan": "planfile",
    "plan": "planning",
    "record_states": "pipelines",
    "save_folder": "pipelines",
    "save_single_file": "pipelines",
}

__all__ = [
    "LISTS",
    "CompactError",
    "Plan",
    "Shape",
    "State",
    "assemble",
    "candidates",
    "carry_over",
    "control_residuals",
    "plan",
    "read_plan",
    "record_states",
    "save_folder",
    "save_single_file",
    "shape_of",
    "write_plan",
]

__getattr__ = lazy.attributes(__name__, _HOME_OF)
