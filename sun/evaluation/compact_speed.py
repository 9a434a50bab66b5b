"""Seconds of compact U-Nets beside the original's, in turn in one process (``sun bench-compact``)."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..common.devices import device_name, synchronize
from ..compact import (
    LISTS,
    CompactError,
    Plan,
    assemble,
    attach_experts,
    experts_for,
    read_plan,
    shape_of,
)
from ..compact import plan as make_plan
from ..compact.measuring import State, noise_of, random_state

EXPERTS = "+experts"


@dataclass(frozen=True)
class Candidate:
    """A compact U-Net to measure. ``unet`` shares the original's weights."""

    name: str
    unet: Any


def candidates(unet: Any, names: Sequence[str]) -> list[Candidate]:
    """Compact U-Nets of ``unet`` by name: a list (shallow), a plan's file, or parts (pair.0.1 pair.1.1).

    ``+experts`` behind a name puts untrained experts on it. Raises CompactError, FileNotFoundError.
    """
    found = []
    for name in names:
        bare = name.removesuffix(EXPERTS).strip()
        if bare in LISTS:
            plan = make_plan(unet, named=bare)
        elif bare.endswith(".json"):
            plan = read_plan(bare)
        else:
            plan = Plan(tuple(bare.split()), shape_of(unet.config))
        small = assemble(unet, plan, share=True)
        if name.endswith(EXPERTS):
            attach_experts(small, experts_for(unet, small, plan).requires_grad_(False))
        found.append(Candidate(name, small))
    if not found:
        raise CompactError("Name at least one compact U-Net to measure.")
    return found


@torch.inference_mode()
def measure(
    unet: Any, compact: Sequence[Candidate], latent: int, pictures: int, rounds: int, on_call: Callable[[], None]
) -> dict[str, Any]:
    """Figures of each by name, ``original`` first: seconds of a call with guidance's two rows a picture, median over
    rounds; how many times faster than the original in the same round; its arithmetic (multiplications and additions).

    latent: height and width. On a CPU seconds are processor time, which other programs disturb least.
    """
    device = next(unet.parameters()).device
    one = random_state(unet, latent, latent, pictures)
    state = State(one.x.repeat(2, 1, 1, 1), one.t, torch.randn_like(one.text.repeat(2, 1, 1)), _twice(one.added))
    unets = {"original": unet} | {candidate.name: candidate.unet for candidate in compact}
    work: dict[str, int] = {}
    for name, each in unets.items():  # which is the call that warms up, too
        with FlopCounterMode(display=False) as flops:
            noise_of(each, state)
        work[name] = flops.get_total_flops()
        on_call()
    seconds: dict[str, list[float]] = {name: [] for name in unets}
    order = list(unets)
    for turn in range(rounds):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            seconds[name].append(_seconds(lambda name=name: noise_of(unets[name], state), device))  # type: ignore[misc]
            on_call()
    return {
        "machine": {
            "device": device_name(device) if device.type != "cpu" else f"cpu, {platform.machine()}",
            "seconds": "processor time" if device.type == "cpu" else "clock",
            "threads": torch.get_num_threads(),
            "dtype": str(next(unet.parameters()).dtype).removeprefix("torch."),
            "latent": [2 * pictures, one.x.shape[1], latent, latent],
            "rounds": rounds,
            "torch": torch.__version__,
        },
        "unets": {name: _figures(seconds, work, name) for name in unets},
    }


def _figures(seconds: Mapping[str, list[float]], work: Mapping[str, int], name: str) -> dict[str, Any]:
    ratios = [whole / own for whole, own in zip(seconds["original"], seconds[name], strict=True)]
    return {
        "seconds": statistics.median(seconds[name]),
        "speedup": statistics.median(ratios),
        "speedup_interval": [min(ratios), max(ratios)],
        "tflop": work[name] / 1e12,
        "speedup_in_arithmetic": work["original"] / work[name],
    }


def _twice(added: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([value, value]) for name, value in added.items()}


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    synchronize(device)
    began = clock()
    call()
    synchronize(device)
    return clock() - began
