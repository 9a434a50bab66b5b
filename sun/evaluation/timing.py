"""Seconds, measured fairly: all methods in turn in one process, after a warm-up, medians of several rounds.

A machine that slows down slows every method alike, so ratios hold where single times would not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

from .methods import MethodCall, parse_method
from .sampler import Sampler


@dataclass(frozen=True)
class Timing:
    """Seconds per picture: of the U-Net loop, and of text encoding, loop and decoding together; one value a round."""

    loop: tuple[float, ...]
    pipeline: tuple[float, ...]
    unet_calls: float

    def figures(self, reference: Timing) -> dict[str, Any]:
        """Medians, the smallest and largest round, and how many times faster than the reference in the same round."""
        speedups = [theirs / mine for mine, theirs in zip(self.loop, reference.loop, strict=True)]
        return {
            "unet_calls": self.unet_calls,
            "seconds": statistics.median(self.loop),
            "seconds_interval": (min(self.loop), max(self.loop)),
            "pipeline_seconds": statistics.median(self.pipeline),
            "speedup": statistics.median(speedups),
            "pipeline_speedup": statistics.median(
                theirs / mine for mine, theirs in zip(self.pipeline, reference.pipeline, strict=True)
            ),
        }


def time_methods(
    sampler: Sampler, methods: Sequence[str], prompts: list[str], negatives: list[str], rounds: int, precision: str
) -> dict[str, Timing]:
    """Time every method once a round on the same batch; the order turns by one from round to round.

    Before the first round each method runs once with few steps, which pays for allocation and kernel choice.
    """
    noise = sampler.noise(len(prompts), seed=0)
    loops: dict[str, list[float]] = {m: [] for m in methods}
    pipelines: dict[str, list[float]] = {m: [] for m in methods}
    calls = dict.fromkeys(methods, 0.0)
    with sampler.autocast(precision):
        for method in tqdm(methods, desc="seconds: warm-up", leave=False):
            sampler.pixels(sampler(f"{parse_method(method).family}-2", prompts, negatives, noise).latents)
        order = [methods[(turn + k) % len(methods)] for turn in range(rounds) for k in range(len(methods))]
        for method in tqdm(order, desc="seconds", leave=False):
            with sampler.prepared(method) as run:
                sampler.synchronize()
                began = time.perf_counter()
                sample = run(prompts, negatives, noise)
                sampler.pixels(sample.latents)
                sampler.synchronize()
                pipelines[method].append((time.perf_counter() - began) / len(noise))
                loops[method].append(sample.seconds)
                calls[method] = sample.unet_calls
    return {m: Timing(tuple(loops[m]), tuple(pipelines[m]), calls[m]) for m in methods}


@torch.no_grad()
def time_unet_calls(
    sampler: Sampler, methods: Sequence[str], prompts: list[str], negatives: list[str], rounds: int, precision: str
) -> dict[str, dict[str, float]]:
    """One step of each kind of method against one plain U-Net call, in turn: what SUN, a peer or guidance costs.

    ``{NAME: {"seconds", "ratio"}}`` by the names without steps, ``cond`` being the plain call; ratios are medians over
    rounds of neighbours in time. Guidance has twice the rows, so its ratio is about 2.
    """
    families = dict.fromkeys(["cond", *(parse_method(m).family for m in methods)])
    noise = sampler.noise(len(prompts), seed=0)
    t = torch.tensor(499, device=sampler.device)
    seconds: dict[str, list[float]] = {family: [] for family in families}
    with sampler.autocast(precision):
        positive, negative = sampler.encode(prompts), sampler.encode(negatives)
        for turn in tqdm(range(rounds + 1), desc="seconds of one step", leave=False):
            for family in families:
                call = parse_method(f"{family}-1")
                took = _one_call(sampler, call, lambda predict, x: predict(x, t, positive, negative), noise)
                if turn:  # the first turn warms up
                    seconds[family].append(took)
    plain = seconds["cond"]
    return {
        family: {
            "seconds": statistics.median(values) / len(noise),
            "ratio": statistics.median(mine / theirs for mine, theirs in zip(values, plain, strict=True)),
        }
        for family, values in seconds.items()
    }


def _one_call(
    sampler: Sampler, call: MethodCall, ask: Callable[[Any, torch.Tensor], torch.Tensor], noise: torch.Tensor
) -> float:
    with call.method.prepare(sampler.assets, call) as ready:
        x = noise.to(ready.unet.dtype)
        sampler.synchronize()
        began = time.perf_counter()
        ask(ready.predict, x)
        sampler.synchronize()
        return time.perf_counter() - began


def timing_conditions(sampler: Sampler, batch: int, precision: str) -> dict[str, Any]:
    """What a measured time depends on, for the report."""
    cuda = sampler.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(sampler.device) if cuda else sampler.device.type,
        "threads": torch.get_num_threads(),
        "batch": batch,
        "precision": precision,
        "weights": str(sampler.unet.dtype).removeprefix("torch."),
        "attention": "torch scaled_dot_product_attention",
        "pixels": sampler.latent_size * 8,
        "torch": torch.__version__,
    }
