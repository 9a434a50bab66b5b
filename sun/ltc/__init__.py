"""LTC-Accel: skip whole steps of any sampler, without training (after arXiv 2503.09675).

>>> import sun.ltc
>>> sun.ltc.attach(pipe)  # or "fine", "fast", "fastest", or "paper", the published method
>>> pipe("a cat", num_inference_steps=30)  # skips about a third of the U-Net calls
>>> print(sun.ltc.last_run(pipe))

Hosts other than diffusers tell a :class:`SkipRun` of their calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy
from .counts import Counts
from .errors import LtcError
from .fingerprint import adapter_digest, fingerprint, lora_of
from .forecast import Forecast
from .interval import LtcSettings, interval, skipped_steps
from .presets import PRESETS, SkipSettings
from .run import LtcRun, Measurements
from .skipping import SkipRun
from .table import LtcKey, LtcTable, TableStore, load_table

if TYPE_CHECKING:
    from .pipelines import attach, calibrate, detach, last_run, last_table

_NEED_DIFFUSERS = ("attach", "calibrate", "detach", "last_run", "last_table")

__all__ = [
    "PRESETS",
    "Counts",
    "Forecast",
    "LtcError",
    "LtcKey",
    "LtcRun",
    "LtcSettings",
    "LtcTable",
    "Measurements",
    "SkipRun",
    "SkipSettings",
    "TableStore",
    "adapter_digest",
    "attach",
    "calibrate",
    "detach",
    "fingerprint",
    "interval",
    "last_run",
    "last_table",
    "load_table",
    "lora_of",
    "skipped_steps",
]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(_NEED_DIFFUSERS, "pipelines"))
