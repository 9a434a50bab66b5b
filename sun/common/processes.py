"""This process among those that ``accelerate launch`` or ``torchrun`` started; for training and evaluation alone."""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state(**options: Any) -> PartialState:
    """accelerate's view of this process and its device, made with ``options`` if it is not there yet."""
    if PartialState._shared_state:
        return PartialState()
    # accelerate itself looks at this flag in the Accelerator alone, which may not exist yet or never will
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), **options)
