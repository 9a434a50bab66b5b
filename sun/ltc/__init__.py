"""LTC-Accel: skip whole steps of any deterministic sampler, without training (arXiv 2503.09675).

>>> import sun.ltc
>>> pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)  # or Euler, DDIM, Heun
>>> sun.ltc.attach(pipe)
>>> pipe("a cat", num_inference_steps=30)  # measures itself at full cost
>>> pipe("a dog", num_inference_steps=30)  # skips about a third of the U-Net calls

Hosts other than diffusers use :class:`LtcRun` on their own latents.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy
from .errors import LtcError
from .fingerprint import adapter_digest, fingerprint, lora_of
from .interval import LtcSettings, interval, skipped_steps
from .run import LtcRun, Measurements
from .table import LtcKey, LtcTable, TableStore, load_table

if TYPE_CHECKING:
    from .pipelines import attach, calibrate, detach, last_table

_NEED_DIFFUSERS = ("attach", "calibrate", "detach", "last_table")

__all__ = [
    "LtcError",
    "LtcKey",
    "LtcRun",
    "LtcSettings",
    "LtcTable",
    "Measurements",
    "TableStore",
    "adapter_digest",
    "attach",
    "calibrate",
    "detach",
    "fingerprint",
    "interval",
    "last_table",
    "load_table",
    "lora_of",
    "skipped_steps",
]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(_NEED_DIFFUSERS, "pipelines"))
