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
    from .attaching import attach_experts, collapse, detach_experts, experts_for, experts_of
    from .carrying import carry_over, control_residuals
    from .expertfile import read_experts, write_experts
    from .experts import Experts
    from .measuring import State
    from .pipelines import record_states, save_folder, save_single_file
    from .planfile import Plan, read_plan, write_plan
    from .planning import plan

_HOME_OF = {
    "assemble": "assembly",
    "attach_experts": "attaching",
    "collapse": "attaching",
    "detach_experts": "attaching",
    "experts_for": "attaching",
    "experts_of": "attaching",
    "read_experts": "expertfile",
    "write_experts": "expertfile",
    "Experts": "experts",
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
    "Experts",
    "Plan",
    "Shape",
    "State",
    "assemble",
    "attach_experts",
    "candidates",
    "carry_over",
    "collapse",
    "control_residuals",
    "detach_experts",
    "experts_for",
    "experts_of",
    "plan",
    "read_experts",
    "read_plan",
    "record_states",
    "save_folder",
    "save_single_file",
    "shape_of",
    "write_experts",
    "write_plan",
]

__getattr__ = lazy.attributes(__name__, _HOME_OF)
