"""Measure methods against the 25-step DPM-Solver++ reference with CFG, at equal noise (``sun evaluate``).

Methods are named ``SAMPLER-STEPS``: ``ddim-4``, ``dpmpp-8``, ``unipc-4`` run with CFG (two U-Net rows a picture and
step), ``cond-25`` is DPM-Solver++ without guidance, ``sun-4`` is SUN, ``nasa-4``, ``nag-4``, ``lcm-lora-4`` and
``guided-distill-4`` its peers. U-Net calls are counted by a hook on the U-Net as rows per picture, so a CFG step
counts two however it is batched.

Who only samples (``sun compare``, training) imports :class:`Sampler` and pays for no measuring library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy
from ..common.counting import CallCounter
from .config import EvaluateConfig, ModelSpec
from .names import METHODS, REFERENCE, MethodCall, parse_method
from .sampler import Sample, Sampler

if TYPE_CHECKING:
    from .metrics import bootstrap_interval, frechet_distance
    from .prompts import PromptSet, build_prompts
    from .run import evaluate, report

# What only measuring needs, by the module that defines it.
_HOME_OF = {
    "PromptSet": "prompts",
    "bootstrap_interval": "metrics",
    "build_prompts": "prompts",
    "evaluate": "run",
    "frechet_distance": "metrics",
    "report": "run",
}

__all__ = [
    "METHODS",
    "REFERENCE",
    "CallCounter",
    "EvaluateConfig",
    "MethodCall",
    "ModelSpec",
    "PromptSet",
    "Sample",
    "Sampler",
    "bootstrap_interval",
    "build_prompts",
    "evaluate",
    "frechet_distance",
    "parse_method",
    "report",
]

__getattr__ = lazy.attributes(__name__, _HOME_OF)
