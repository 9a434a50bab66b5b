"""Prompts to schedules of text states: "[a:b:2]" changes at step 2, " AND " splits, "text :0.5" weighs a part."""

from __future__ import annotations

import re
from collections import namedtuple
from typing import Any

import torch

ScheduledPromptConditioning = namedtuple("ScheduledPromptConditioning", ["end_at_step", "cond"])


class SdConditioning(list):
    def __init__(self, prompts: Any, is_negative_prompt: bool = False, width: Any = None, height: Any = None) -> None:
        super().__init__(prompts)
        self.is_negative_prompt, self.width, self.height = is_negative_prompt, width, height


class Composable:
    def __init__(self, schedules: Any, weight: float) -> None:
        self.schedules, self.weight = schedules, weight


class Multicond:
    def __init__(self, batch: list[list[Composable]]) -> None:
        self.batch = batch


def _schedule(model: Any, prompt: str, steps: int) -> list[ScheduledPromptConditioning]:
    edit = re.search(r"\[([^:\]]*):([^:\]]*):(\d+)\]", prompt)
    if not edit:
        return [ScheduledPromptConditioning(steps, model.get_learned_conditioning([prompt])[0])]
    texts = [prompt[: edit.start()] + edit[side] + prompt[edit.end() :] for side in (1, 2)]
    ends = [int(edit[3]), steps]
    return [
        ScheduledPromptConditioning(end, model.get_learned_conditioning([text])[0])
        for end, text in zip(ends, texts, strict=True)
    ]


def get_learned_conditioning(model: Any, prompts: Any, steps: int, hires_steps: Any = None, old: bool = False) -> Any:
    return [_schedule(model, prompt, hires_steps or steps) for prompt in prompts]


def get_multicond_learned_conditioning(
    model: Any, prompts: Any, steps: int, hires: Any = None, old: bool = False
) -> Any:
    batch = []
    for prompt in prompts:
        parts = []
        for part in prompt.split(" AND "):
            weighed = re.fullmatch(r"(.*?)\s*:\s*([\d.]+)", part)
            text, weight = (weighed[1], float(weighed[2])) if weighed else (part, 1.0)
            parts.append(Composable(_schedule(model, text, steps), weight))
        batch.append(parts)
    return Multicond(batch)


def _now(schedules: Any, step: int) -> torch.Tensor:
    # The host compares with <= and 0-based steps.
    return next((s.cond for s in schedules if step <= s.end_at_step), schedules[0].cond)


def reconstruct_cond_batch(c: Any, step: int) -> torch.Tensor:
    return torch.stack([_now(schedules, step) for schedules in c])


def reconstruct_multicond_batch(c: Multicond, step: int) -> Any:
    tensors: list[torch.Tensor] = []
    lists = []
    for parts in c.batch:
        lists.append([(len(tensors) + i, part.weight) for i, part in enumerate(parts)])
        tensors += [_now(part.schedules, step) for part in parts]
    return lists, torch.stack(tensors)
