"""What takes the place of CLIP's training for the text encoder of Emoji Diffusion."""

from __future__ import annotations

import random
from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ...common.devices import autocast
from .scenes import BACKGROUNDS, PLACES, SIZES, Scene, caption_of


class SceneReader(nn.Module):
    """Reads off a caption's state what its scene shows: the emoji, the attributes and, roughly, the latents."""

    def __init__(self, width: int, emojis: list[str], latents: int):
        super().__init__()
        none = ["none"]
        self.choices: dict[str, list[Any]] = {
            "first": emojis,
            "second": none + emojis,
            "background": list(BACKGROUNDS),
            "size": list(SIZES),
            "place": list(PLACES),
            "mirrored": [False, True],
        }
        self.heads = nn.ModuleDict({name: nn.Linear(width, len(options)) for name, options in self.choices.items()})
        self.picture = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, latents))

    def labels(self, scenes: list[Scene]) -> dict[str, Tensor]:
        """The right choice [N] of every head."""
        shown = [
            {
                "first": s.emojis[0].code,
                "second": s.emojis[1].code if len(s.emojis) == 2 else "none",
                "background": s.background,
                "size": s.size,
                "place": s.place,
                "mirrored": s.mirrored,
            }
            for s in scenes
        ]
        return {
            name: torch.tensor([options.index(row[name]) for row in shown]) for name, options in self.choices.items()
        }


def pretrain_text(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    scenes: list[Scene],
    latents: Tensor,
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> dict[str, float]:
    """Teach ``text_encoder`` what captions say: their states must name the emoji and attributes, and look like them.

    Stable Diffusion's text encoder comes trained from CLIP, which tells things apart. Learned through the U-Net
    alone, or from latents alone, the states of different objects stay nearly parallel and the U-Net draws their
    average. Read are the end token and a random one of the padding after it, for the U-Net attends to all 77.
    ``latents`` [N, 4, h, w] belong to ``scenes``.

    Returns the last mean squared error of the latents (``picture``) and the share of right first emoji (``first``).
    """
    reader = SceneReader(
        text_encoder.config.hidden_size, sorted({e.code for s in scenes for e in s.emojis}), latents[0].numel()
    ).to(text_encoder.device)
    parameters = [*text_encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    labels = {name: row.to(text_encoder.device) for name, row in reader.labels(scenes).items()}
    seen: deque[tuple[float, float]] = deque(maxlen=20)
    bar = tqdm(range(steps), desc="text encoder")
    for _ in bar:
        picked = [rng.randrange(len(scenes)) for _ in range(batch_size)]
        tokens = tokenizer(
            [caption_of(scenes[i], rng) for i in picked], padding="max_length", truncation=True, return_tensors="pt"
        ).to(text_encoder.device)
        with autocast(text_encoder.device):
            states = text_encoder(tokens.input_ids).last_hidden_state.float()
        ends = (tokens.attention_mask.sum(1) - 1).tolist()
        later = [rng.randint(end, states.shape[1] - 1) for end in ends]
        rows = torch.arange(2 * len(picked)) % len(picked)
        read = states[rows, torch.tensor(ends + later)]
        errors, right = [], torch.zeros(())
        for name, head in reader.heads.items():
            scores, wanted = head(read), labels[name][picked][rows]
            errors.append(F.cross_entropy(scores, wanted))
            if name == "first":
                right = (scores.argmax(1) == wanted).float().mean()
        picture = F.mse_loss(reader.picture(read), latents[picked].flatten(1).to(read.device)[rows])
        (picture + torch.stack(errors).mean()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        seen.append((picture.item(), right.item()))
        last = [sum(values) / len(seen) for values in zip(*seen, strict=True)]
        bar.set_postfix(picture=f"{last[0]:.4f}", first=f"{last[1]:.3f}")
    return {"picture": last[0], "first": last[1]}
