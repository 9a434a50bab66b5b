"""Methods that leave out work against their own full run, and against plain fewer steps, at equal time.

Methods with the same sampler and number of steps make a group. Its reference is that sampler's full run; the full runs
with fewer steps are the rivals that everybody has. All methods run in turn on one block of prompts after the other, so
that every speed-up is a ratio of neighbours in time, and every full run serves all groups it belongs to.

Samples are kept, as everywhere, and serve again on the same device with as many threads. Of a method that is added to
a report later, or of a block whose run was interrupted, the times are those of another session than its rivals'. Then
``timed_together`` is false.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..common.notes import note
from .agreement import Judge, all_right
from .cells import Tensors, processes
from .measured import ModelEvaluation, Timed
from .metrics import map_distance, mean_and_interval, psnr
from .names import PLAIN, MethodCall, parse_method
from .prompts import Drawn
from .timing import timing_conditions

MEASURES = ("mse", "psnr", "feature_distance")
FEW_STEP = ("sun", "lcm-lora")
"""Methods of few steps whose own full run is what a combination with them is compared with."""

TIMED_APART = (
    "Not all methods of equal time were timed in one session (some were added later, or the run was interrupted), so a "
    "speed-up may compare a busy machine with an idle one. Set resume=false, or another output, to time all anew."
)


class EqualTime:
    """The groups of one :class:`~.measured.ModelEvaluation`. With a judge its questions are drawn, half of them with
    negatives, and answered; without one the evaluation's prompts are."""

    def __init__(self, evaluation: ModelEvaluation, judge: Judge | None):
        self.of, self.judge = evaluation, judge
        self.size = evaluation.config.batch_size
        conditions = timing_conditions(evaluation.sampler, self.size, evaluation.config.precision)
        self.timed = Timed(conditions, time.time_ns())
        self._pixels: dict[tuple[MethodCall, int], Tensor] = {}
        self._maps: dict[tuple[MethodCall, int], list[Tensor]] = {}

    @cached_property
    def questions(self) -> list[Any]:
        assert self.judge is not None
        count, seed = self.of.config.prompts, self.of.config.seed
        plain = self.judge.questions(-(-count // 2), seed, "plain")
        negative = self.judge.questions(-(-count // 2), seed, "with_negatives")
        return [question for pair in zip(plain, negative, strict=True) for question in pair][:count]

    @cached_property
    def blocks(self) -> list[Drawn]:
        """The prompts in blocks of the batch size; a picture's noise depends on its number alone."""
        if self.judge is None:
            texts = list(zip(self.of.prompts.positives, self.of.prompts.negatives, strict=True))
        else:
            texts = [(q.prompt, q.negative) for q in self.questions]
        parts = [texts[i : i + self.size] for i in range(0, len(texts), self.size)]
        seed = self.of.config.seed
        return [
            Drawn([p for p, _ in part], [n for _, n in part], seed + i * self.size, f" block {i}")
            for i, part in enumerate(parts)
        ]

    def figures(self) -> dict[str, Any]:
        """``groups``: for each full run its own row and those of its rivals, with :func:`beside_fewer_steps` at the
        same time and, as ``calls_...`` of methods that leave out whole calls, at as many calls; ``pictures``;
        ``processor``: whether seconds are processor time; ``timed_together``: whether all methods of each block were
        timed in one session."""
        groups = groups_of(self.of.methods)
        calls = list(dict.fromkeys(call for reference, rows in groups.items() for call in (reference, *rows)))
        self._run(calls)
        found = {reference.text: self._group(reference, rows) for reference, rows in groups.items()}
        together = all(self._together(calls, block) for block in self.blocks)
        if not together and processes().is_main_process:
            note(TIMED_APART)
        return {
            "groups": found,
            "pictures": sum(map(len, self.blocks)),
            "processor": self._by_processor,
            "timed_together": together,
        }

    def _sample(self, call: MethodCall, drawn: Drawn) -> Tensors:
        return self.of.sample(call, drawn, self.timed)

    def _together(self, calls: Sequence[MethodCall], drawn: Drawn) -> bool:
        return len({int(number) for call in calls for number in self._sample(call, drawn)["session"]}) == 1

    @property
    def _by_processor(self) -> bool:
        return self.of.sampler.device.type == "cpu"

    def _run(self, calls: Sequence[MethodCall]) -> None:
        """All methods in turn on each block; the order turns by one from block to block."""
        sampler, first = self.of.sampler, self.blocks[0]
        with sampler.autocast(self.of.config.precision):  # pays for allocation and choice of kernels
            sampler(calls[0].in_steps(2), first.positives, first.negatives, sampler.noise(len(first), 0))
        for number, block in enumerate(tqdm(self.blocks, desc="blocks", leave=False)):
            for k in range(len(calls)):
                self._sample(calls[(number + k) % len(calls)], block)

    def _group(self, reference: MethodCall, calls: Sequence[MethodCall]) -> dict[str, Any]:
        rows = {call.text: self._row(call, reference) for call in (reference, *calls)}
        fewer = {name: row for name, row in rows.items() if is_plain(parse_method(name))}
        for name, row in rows.items():
            if name not in fewer:
                row |= beside_fewer_steps(row, list(fewer.values()))
                if not parse_method(name).method.inside:
                    at_calls = beside_fewer_steps(row, list(fewer.values()), "unet_calls")
                    row |= {f"calls_{key}": value for key, value in at_calls.items()}
        return {"reference": reference.text, "rows": rows}

    def _row(self, call: MethodCall, reference: MethodCall) -> dict[str, Any]:
        blocks = range(len(self.blocks))
        took = [self._seconds(call, b) for b in blocks]
        ratios = [self._seconds(reference, b) / mine for b, mine in zip(blocks, took, strict=True)]
        sampled = [self._sample(call, block)["unet_calls"] for block in self.blocks]
        row: dict[str, Any] = {
            "unet_calls": float(torch.cat(sampled).mean()),
            "seconds": statistics.median(took),
            "speedup": statistics.median(ratios),
            "speedup_range": (min(ratios), max(ratios)),
        }
        if self.judge is not None:
            row |= mean_and_interval("agreement", torch.cat([self._right(call, b) for b in blocks]))
        if call != reference:
            parts = [self._measure(call, reference, b) for b in blocks]
            for name in MEASURES:
                row |= mean_and_interval(name, torch.cat([part[name] for part in parts]))
            row["median_mse"] = float(torch.cat([part["mse"] for part in parts]).double().median())
        return row

    def _seconds(self, call: MethodCall, block: int) -> float:
        column = "processor" if self._by_processor else "seconds"
        return float(self._sample(call, self.blocks[block])[column][0])

    def _measure(self, call: MethodCall, reference: MethodCall, block: int) -> Tensors:
        """``mse`` of latents, ``psnr``, and ``feature_distance`` in the model's own features, each [B]."""
        mine, theirs = (self._sample(c, self.blocks[block])["latents"] for c in (call, reference))
        own, other = (self._decoded(c, block).float() / 127.5 - 1 for c in (call, reference))
        return {
            "mse": (mine - theirs).square().mean((1, 2, 3)),
            "psnr": psnr(own, other),
            "feature_distance": map_distance(self._features(call, block), self._features(reference, block)),
        }

    def _decoded(self, call: MethodCall, block: int) -> Tensor:
        """Pictures [B, 3, H, W] as bytes, decoded once."""
        if (call, block) not in self._pixels:
            drawn = self.blocks[block]
            key = {"sample": self.of.sample_key(call, drawn, self.timed), "vae": self.of.vae_key}

            def compute(rows: slice) -> Tensors:
                pixels = self.of.pixels(self._sample(call, drawn)["latents"][rows])
                return {"pixels": ((pixels + 1) * 127.5).round().byte()}

            label = f"{self.of.name} {call}{drawn.label} pixels"
            self._pixels[call, block] = self.of.store.get(label, key, len(drawn), self.size, compute)["pixels"]
        return self._pixels[call, block]

    def _features(self, call: MethodCall, block: int) -> list[Tensor]:
        if (call, block) not in self._maps:
            drawn = self.blocks[block]
            key = {"sample": self.of.sample_key(call, drawn, self.timed), "what": "feature maps"}

            def compute(rows: slice) -> Tensors:
                maps = self.of.sampler.feature_maps(self._sample(call, drawn)["latents"][rows])
                return {f"{i}": stage for i, stage in enumerate(maps)}

            label = f"{self.of.name} {call}{drawn.label} features"
            found = self.of.store.get(label, key, len(drawn), self.size, compute)
            self._maps[call, block] = [found[name] for name in sorted(found)]
        return self._maps[call, block]

    def _right(self, call: MethodCall, block: int) -> Tensor:
        """[B]: 1 where the picture shows what was asked for."""
        assert self.judge is not None
        asked = self.questions[block * self.size : (block + 1) * self.size]
        return all_right(self.judge.judge(self._decoded(call, block).float() / 127.5 - 1, asked))


def is_plain(call: MethodCall) -> bool:
    """Whether a method leaves nothing out: a sampler with all its steps, SUN, or LCM-LoRA."""
    return (call.method.name in PLAIN.values() and not call.options) or call.family in FEW_STEP


def full_run(call: MethodCall) -> MethodCall:
    """The method that a method leaves something out of."""
    parts = call.method.name.split("+")
    whole = next((name for name in FEW_STEP if name in parts), "") or PLAIN[call.scheduler]
    return parse_method(f"{whole}-{call.steps}")


def groups_of(calls: Sequence[MethodCall]) -> dict[MethodCall, list[MethodCall]]:
    """Full runs and their rivals: what leaves out some of it, then the same in fewer steps, many steps first."""
    plain = [call for call in calls if is_plain(call)]
    groups: dict[MethodCall, list[MethodCall]] = {}
    for call in calls:
        if not is_plain(call):
            groups.setdefault(full_run(call), []).append(call)
    for reference, rows in groups.items():
        fewer = [call for call in plain if call.family == reference.family and call.steps < reference.steps]
        rows += sorted(fewer, key=lambda call: -call.steps)
    return groups


def beside_fewer_steps(
    row: Mapping[str, Any], fewer: Sequence[Mapping[str, Any]], cost: str = "speedup"
) -> dict[str, float]:
    """What a method gains on fewer steps of the same ``cost``, between which the figures are interpolated.

    ``psnr_gain`` in dB; ``mse_ratio``, ``median_ratio`` and ``feature_ratio``: below 1 it is nearer. Empty where fewer
    steps were not measured on both sides.
    """
    points = sorted((p for p in fewer if "psnr" in p), key=lambda p: p[cost])
    for low, high in pairwise(points):
        if low[cost] <= row[cost] <= high[cost]:
            break
    else:
        return {}
    share = (row[cost] - low[cost]) / max(high[cost] - low[cost], 1e-9)
    names = {"mse_ratio": "mse", "median_ratio": "median_mse", "feature_ratio": "feature_distance"}
    found = {"psnr_gain": row["psnr"] - (low["psnr"] + share * (high["psnr"] - low["psnr"]))}
    for name, key in names.items():
        there = math.exp((1 - share) * math.log(low[key]) + share * math.log(high[key]))
        found[name] = row[key] / there
    return found
