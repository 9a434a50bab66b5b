"""What takes the place of CLIP's training for the text encoder of Emoji Diffusion."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from .scenes import Scene, caption_of


def pretrain_text(
    tokenizer: CLIPTokenizer,
    text_encoder: CLIPTextModel,
    scenes: list[Scene],
    latents: torch.Tensor,
    steps: int,
    batch_size: int,
    seed: int = 0,
) -> float:
    """Teach ``text_encoder`` what captions look like: regress each scene's latents from its caption's end token.

    Stable Diffusion's text encoder comes trained from CLIP; here this takes CLIP's place, at a fraction of the cost
    of learning words through the U-Net. ``latents`` [N, 4, h, w] belong to ``scenes``.
    Returns the last mean squared error.
    """
    width = text_encoder.config.hidden_size
    head = torch.nn.Sequential(
        torch.nn.Linear(width, 4 * width), torch.nn.GELU(), torch.nn.Linear(4 * width, latents[0].numel())
    ).to(text_encoder.device)
    parameters = [*text_encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    rng = random.Random(seed)
    errors: list[float] = []
    bar = tqdm(range(steps), desc="text encoder")
    for _ in bar:
        picked = [rng.randrange(len(scenes)) for _ in range(batch_size)]
        tokens = tokenizer(
            [caption_of(scenes[i], rng) for i in picked], padding="longest", truncation=True, return_tensors="pt"
        ).to(text_encoder.device)
        with torch.autocast(text_encoder.device.type, torch.bfloat16):
            states = text_encoder(tokens.input_ids).last_hidden_state
        ends = tokens.attention_mask.sum(1) - 1
        predicted = head(states[torch.arange(len(picked)), ends].float())
        error = F.mse_loss(predicted, latents[picked].flatten(1).to(predicted.device))
        error.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        errors = [*errors[-19:], error.item()]
        bar.set_postfix(mse=f"{sum(errors) / len(errors):.4f}")
    return sum(errors) / len(errors)
