"""The diffusers side: states of real trajectories."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .measuring import State
from .structure import CompactError


def record_states(
    pipe: Any,
    prompts: Sequence[str],
    negatives: Sequence[str] | None = None,
    *,
    every: int = 1,
    seed: int = 0,
    **call: Any,
) -> list[State]:
    """What the U-Net of any diffusers pipeline is given while it draws ``prompts``, every ``every``-th call of it.

    call: further arguments of the pipeline, as ``num_inference_steps`` and ``guidance_scale``. Nothing is decoded.
    Raises CompactError where the U-Net was never called.
    """
    states: list[State] = []
    calls = 0

    def keep(_module: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        nonlocal calls
        values = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | given
        if calls % every == 0:
            added = {key: value.clone() for key, value in (values.get("added_cond_kwargs") or {}).items()}
            t = torch.as_tensor(values["timestep"]).clone()
            states.append(State(values["sample"].clone(), t, values["encoder_hidden_states"].clone(), added))
        calls += 1

    hook = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    negative = {} if negatives is None else {"negative_prompt": list(negatives)}
    try:
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            pipe(list(prompts), **negative, generator=generator, output_type="latent", **call)
    finally:
        hook.remove()
    if not states:
        raise CompactError("The pipeline never called its U-Net, so there are no states to measure on.")
    return states
