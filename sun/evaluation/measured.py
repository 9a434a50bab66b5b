"""One model under test and its samples, each drawn once (see ``cells.py``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.identity import fingerprint
from ..compact import LISTS
from .accelerators import plan_of, skipper_of
from .cells import CellStore, Tensors, digest, fingerprint_module
from .config import EvaluateConfig
from .features import Features
from .names import REFERENCE, MethodCall, parse_method, parse_methods
from .prompts import Drawn, PromptSet
from .sampler import Sampler

FORMAT = 2  # of the cells; raise it when what is computed changes
OTHER_NOISE = 1_000_000  # added to the seed for the floor


@dataclass(frozen=True)
class Timed:
    """Of samples whose seconds count: what these depend on (device, threads), and a number for this session."""

    conditions: dict[str, Any]
    session: int


@dataclass
class ModelEvaluation:
    """One model with what it is measured by. ``name`` labels its cells; distances are to :data:`~.names.REFERENCE`."""

    name: str
    sampler: Sampler
    prompts: PromptSet
    config: EvaluateConfig
    store: CellStore
    features: Features
    methods: list[MethodCall] = field(default_factory=list)
    judged: bool = False  # whether somebody can say of its pictures if they are right

    def __post_init__(self) -> None:
        sampler, config = self.sampler, self.config
        self.methods = self.methods or parse_methods(config.methods, config.steps)
        self.base_key: dict[str, Any] = {
            "format": FORMAT,
            "unet": fingerprint_module(sampler.unet),
            "text_encoder": fingerprint_module(sampler.text_encoder),
            "scheduler": dict(sampler.scheduler_config),
            "size": sampler.latent_size,
            "precision": config.precision,
        }
        self.vae_key = fingerprint_module(sampler.vae)
        # before anything is attached, which may change an adapter's number format
        self.assets = {call: asset_fingerprint(sampler, call) for call in self.every_method()}

    def every_method(self) -> list[MethodCall]:
        """The reference, the other solver for it, and the methods."""
        ceiling = self.config.negative_ceiling
        return list(dict.fromkeys((REFERENCE, *map(parse_method, filter(None, [ceiling])), *self.methods)))

    def methods_among(self, chosen: Sequence[str]) -> list[MethodCall]:
        """This model's methods that are ``chosen``, in their order; all of them if none is."""
        return [call for call in self.methods if not chosen or call.text in chosen]

    # --- samples -------------------------------------------------------------------------------------------------

    def sample_key(self, call: MethodCall, drawn: Drawn, timed: Timed | None = None) -> dict[str, Any]:
        """All that the latents of a method depend on and, where the seconds count, what these do."""
        if call not in self.assets:
            self.assets[call] = asset_fingerprint(self.sampler, call)
        adapter = self.sampler.assets.adapter_of(call)
        takes_guidance = call.method.guided or (adapter is not None and adapter.guided)
        return {
            **self.base_key,
            "method": call.text,
            "asset": self.assets[call],
            "w": self.sampler.w if takes_guidance else None,
            "positives": drawn.positives,
            "negatives": drawn.negatives if call.method.uses_negative else None,
            "seed": drawn.seed,
            **({} if timed is None else {"timed": timed.conditions}),
        }

    def sample(self, call: MethodCall, drawn: Drawn, timed: Timed | None = None) -> Tensors:
        """``latents`` [N, 4, h, w], and ``unet_calls``, ``seconds``, ``processor`` [N] of the run that made them.

        timed: for samples whose seconds count; ``session`` [N] says then which one made them.
        """

        def compute(rows: slice) -> Tensors:
            noise = self.sampler.noise(rows.stop - rows.start, drawn.seed + rows.start)
            with self.sampler.autocast(self.config.precision):
                made = self.sampler(call, drawn.positives[rows], drawn.negatives[rows], noise)
            session = {} if timed is None else {"session": torch.full((len(noise),), timed.session)}
            return {
                "latents": made.latents,
                "unet_calls": torch.full((len(noise),), made.unet_calls),
                "seconds": torch.full((len(noise),), made.seconds),
                "processor": torch.full((len(noise),), made.processor),
                **session,
            }

        label = f"{self.name} {call}{drawn.label}"
        return self.store.get(label, self.sample_key(call, drawn, timed), len(drawn), self.config.batch_size, compute)

    def all_prompts(self, other_noise: bool = False) -> Drawn:
        """Every prompt with its own negative; with ``other_noise`` as the floor is drawn."""
        seed = self.config.seed + (OTHER_NOISE if other_noise else 0)
        return Drawn(self.prompts.positives, self.prompts.negatives, seed, " other noise" if other_noise else "")

    def run(self, call: MethodCall) -> Tensors:
        """The sample of all prompts with their own negatives."""
        return self.sample(call, self.all_prompts())

    def pixels(self, latents: Tensor) -> Tensor:
        """Decoded [B, 3, H, W] in -1..1, in the evaluation's number format."""
        with self.sampler.autocast(self.config.precision):
            return self.sampler.pixels(latents)


def asset_fingerprint(sampler: Sampler, method: str | MethodCall) -> str:
    """Fingerprint of the files a method adds to the model: its adapter, LoRA or U-Net."""
    call, assets = parse_method(method), sampler.assets
    added = digest(sampler.calibration) if call.method.ltc and not call.forecasts else ""
    added += str(plan_of(call)) if call.method.inherits else ""
    added += repr(skipper_of(call)()) if call.method.skips or call.forecasts else ""
    if call.method.unet:
        source = assets.peer_folder(call)
        added += source if source in LISTS else fingerprint(source)
    if call.method.adapter:
        adapter = assets.adapter_of(call)
        return added if adapter is None else added + fingerprint_module(adapter)
    if added:
        return added
    folder = assets.peer_folder(call)
    if not folder:
        return ""
    # of a training run's folder the weights alone, not its checkpoints
    weights = (Path(folder) / "pytorch_lora_weights.safetensors", Path(folder) / "unet", Path(folder))
    return fingerprint(next((path for path in weights if path.exists()), Path(folder)))
