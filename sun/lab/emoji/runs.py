"""What the trainings of this folder have in common."""

from __future__ import annotations

from ...training.config import RunConfig


def emoji_run(
    output: str,
    steps: int,
    lr: float,
    *,
    batch_size: int = 32,
    warmup_steps: int = 50,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.99),
    ema_decay: float = 0.99,
) -> RunConfig:
    """The default settings of a run: a learning rate that falls along a cosine, and averaged weights."""
    return RunConfig(
        output=output,
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        lr_schedule="cosine",
        warmup_steps=warmup_steps,
        weight_decay=weight_decay,
        betas=betas,
        ema_decay=ema_decay,
    )
