"""Which timesteps SUN visits and how it steps between them (arXiv 2312.08887, Eq. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

DenoiseMode = Literal["trained", "respaced"]
Coefficient = float | torch.Tensor


def trailing_timesteps(steps: int, num_train_timesteps: int = 1000) -> list[int]:
    """Return the ``steps`` timesteps of the "trailing" schedule, from the noisiest down; 4 steps: 999, 749, 499, 249.

    t_k = round(arange(T, 0, -T / steps)) - 1. The arithmetic is numpy's (floats, half to even), so that every count
    gives the timesteps of diffusers' schedulers with ``timestep_spacing="trailing"``.

    Raises ValueError when ``steps`` is not between 1 and ``num_train_timesteps``.
    """
    if not 1 <= steps <= num_train_timesteps:
        raise ValueError(f"steps must be between 1 and {num_train_timesteps}, not {steps}.")
    start = float(num_train_timesteps)
    delta = (start - num_train_timesteps / steps) - start  # numpy.arange steps by the rounded difference
    return [round(start + k * delta) - 1 for k in range(steps)]


def denoise_timesteps(
    steps: int, denoise: float, mode: DenoiseMode = "trained", num_train_timesteps: int = 1000
) -> list[int]:
    """Return the timesteps of an image-to-image run that keeps part of the picture.

    ``denoise`` (0 to 1) is the share of the noise axis that is run: diffusers' ``strength``, ComfyUI's ``denoise``.
    ``mode="trained"`` keeps the timesteps the adapter was trained on and drops the first ones, as diffusers and the
    authors do: 4 steps at 0.5 give 499, 249. ``mode="respaced"`` always runs ``steps`` steps, ComfyUI's convention:
    499, 374, 249, 124. The list is empty when nothing is left to do; the caller then returns its input.

    Raises ValueError for a denoise outside 0 to 1, an unknown mode or an impossible number of steps.
    """
    if not 0.0 <= denoise <= 1.0:
        raise ValueError(f"denoise must be between 0 and 1, not {denoise}.")
    trained = trailing_timesteps(steps, num_train_timesteps)
    if mode == "trained":
        return trained[steps - int(steps * denoise) :]
    if mode == "respaced":
        if denoise == 0.0:
            return []
        return trailing_timesteps(respaced_steps(steps, denoise, num_train_timesteps), num_train_timesteps)[-steps:]
    raise ValueError(f"mode must be 'trained' or 'respaced', not {mode!r}.")


def respaced_steps(steps: int, denoise: float, num_train_timesteps: int = 1000) -> int:
    """How many steps the schedule has whose last ``steps`` are the "respaced" run; ``denoise`` is above 0."""
    return int(min(steps / denoise, num_train_timesteps))


def alpha_sigma(
    alphas_cumprod: torch.Tensor | Sequence[float], t: int | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (a, s) = (sqrt(alphas_cumprod[t]), sqrt(1 - alphas_cumprod[t])) with the shape of ``t``.

    A negative ``t`` stands for the clean end of the trajectory: (1, 0).
    """
    table = torch.as_tensor(alphas_cumprod)
    index = torch.as_tensor(t, device=table.device)
    cumprod = torch.where(index < 0, torch.ones_like(table[0]), table[index.clamp(min=0)])
    return cumprod.sqrt(), (1.0 - cumprod).sqrt()


def ddim_step(
    x: torch.Tensor, eps: torch.Tensor, a_t: Coefficient, s_t: Coefficient, a_s: Coefficient, s_s: Coefficient
) -> torch.Tensor:
    """Step from time t to the cleaner time s along the DDIM trajectory, eta 0 (Eq. 9).

    x, eps: latents and predicted noise [B, C, h, w]. a_t, s_t, a_s, s_s: what :func:`alpha_sigma` gives for t and s,
    numbers or broadcasting against ``x``. Returns latents of the shape of ``x``.
    """
    return a_s * (x - s_t * eps) / a_t + s_s * eps
