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

from .measured import ModelEvaluation
from .methods import prepare
from .names import REFERENCE, MethodCall, parse_method
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


def measure_times(evaluation: ModelEvaluation) -> dict[str, Any]:
    """Times of every method of a model and of one U-Net call, measured by the main process alone.

    ``methods`` by name, ``unet_call`` by kind of method, and ``machine``: what they depend on.
    """
    config, sampler, prompts = evaluation.config, evaluation.sampler, evaluation.prompts
    batch = min(config.timing_batch, len(prompts.positives))
    methods = list(dict.fromkeys((REFERENCE, *evaluation.methods)))
    texts = prompts.positives[:batch], prompts.negatives[:batch]
    machine = timing_conditions(sampler, batch, config.precision)

    def make() -> dict[str, Any]:
        found = time_methods(sampler, methods, *texts, config.timing_rounds, config.precision)
        calls = time_unet_calls(sampler, methods, *texts, 4 * config.timing_rounds, config.precision)
        rows = {name: timing.figures(found[REFERENCE.text]) for name, timing in found.items()}
        return {"methods": rows, "unet_call": calls, "machine": machine}

    key = {
        **evaluation.base_key,
        "methods": [call.text for call in methods],
        "machine": machine,
        "rounds": config.timing_rounds,
        "assets": [evaluation.assets[call] for call in methods],
    }
    times: dict[str, Any] = evaluation.store.note(f"{evaluation.name} times", key, make)
    return times


def time_methods(
    sampler: Sampler,
    methods: Sequence[str | MethodCall],
    prompts: list[str],
    negatives: list[str],
    rounds: int,
    precision: str,
) -> dict[str, Timing]:
    """Time every method once a round on the same batch; the order turns by one from round to round.

    Before the first round each method runs once with few steps, which pays for allocation and kernel choice.
    """
    calls = [parse_method(method) for method in methods]
    noise = sampler.noise(len(prompts), seed=0)
    loops: dict[str, list[float]] = {call.text: [] for call in calls}
    pipelines: dict[str, list[float]] = {call.text: [] for call in calls}
    counted = {call.text: 0.0 for call in calls}
    with sampler.autocast(precision):
        for call in tqdm(calls, desc="seconds: warm-up", leave=False):
            sampler.pixels(sampler(call.in_steps(2), prompts, negatives, noise).latents)
        order = [calls[(turn + k) % len(calls)] for turn in range(rounds) for k in range(len(calls))]
        for call in tqdm(order, desc="seconds", leave=False):
            with sampler.prepared(call) as run:
                sampler.synchronize()
                began = time.perf_counter()
                sample = run(prompts, negatives, noise)
                sampler.pixels(sample.latents)
                sampler.synchronize()
                pipelines[call.text].append((time.perf_counter() - began) / len(noise))
                loops[call.text].append(sample.seconds)
                counted[call.text] = sample.unet_calls
    return {name: Timing(tuple(loops[name]), tuple(pipelines[name]), counted[name]) for name in counted}


@torch.no_grad()
def time_unet_calls(
    sampler: Sampler,
    methods: Sequence[str | MethodCall],
    prompts: list[str],
    negatives: list[str],
    rounds: int,
    precision: str,
) -> dict[str, dict[str, float]]:
    """One step of each kind of method against one plain U-Net call, in turn: what SUN, a peer or guidance costs.

    ``{NAME: {"seconds", "ratio"}}`` by the names without steps, ``cond`` being the plain call; ratios are medians over
    rounds of neighbours in time. Guidance has twice the rows, so its ratio is about 2.
    """
    calls = dict.fromkeys(parse_method(method).in_steps(1) for method in ("cond-1", *methods))
    noise = sampler.noise(len(prompts), seed=0)
    t = torch.tensor(499, device=sampler.device)
    seconds: dict[str, list[float]] = {call.family: [] for call in calls}
    with sampler.autocast(precision):
        positive, negative = sampler.encode_both(prompts, negatives)
        for turn in tqdm(range(rounds + 1), desc="seconds of one step", leave=False):
            for call in calls:
                took = _one_call(sampler, call, lambda predict, x: predict(x, t, positive, negative), noise)
                if turn:  # the first turn warms up
                    seconds[call.family].append(took)
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
    with prepare(sampler.assets, call) as ready:
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
