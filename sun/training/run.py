"""What every training run here shares: progress, learning rate, EMA, checkpoints, resume, logs."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm


@dataclass
class RunConfig:
    """Length, optimiser and bookkeeping of a run. Times are minutes of training, counted across resumes."""

    output: str = "runs/run"
    steps: int = 1000
    minutes: float = 0.0
    batch_size: int = 32
    lr: float = 1e-4
    lr_schedule: str = "constant"  # constant | cosine
    warmup_steps: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    precision: str = "bf16"
    seed: int = 0
    checkpoint_minutes: float = 5.0
    sample_minutes: float = 10.0
    resume: bool = True


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    step: int = 0
    seconds: float = 0.0
    losses: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "losses": self.losses}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.seconds, self.losses = state["step"], state["seconds"], state["losses"]


class TrainingRun:
    """Owns the accelerator, the optimiser, the averaged weights and the checkpoints of one run.

    ``modules`` are trained; everything else the caller freezes. Iterate over :meth:`steps` and call
    :meth:`update` with the losses of each step. A checkpoint holds everything needed to go on after an interruption.
    """

    def __init__(self, config: RunConfig, modules: dict[str, torch.nn.Module]):
        self.config = config
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(mixed_precision="no" if config.precision == "fp32" else config.precision)
        torch.manual_seed(config.seed + self.accelerator.process_index)
        self.parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            self.parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        prepared = self.accelerator.prepare(*modules.values(), optimizer)
        self.modules = dict(zip(modules, prepared[:-1], strict=True))
        self.optimizer = prepared[-1]
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.ema: EMAModel | None = None
        if config.ema_decay:
            self.ema = EMAModel(self.parameters, decay=config.ema_decay)
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self._recent: dict[str, deque[float]] = {}
        if config.resume and (self.folder / "checkpoint" / "done").exists():
            self.accelerator.load_state(str(self.folder / "checkpoint"))
            self.say(f"resumed {self.folder} at step {self.progress.step}")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)

    @property
    def fraction(self) -> float:
        """Share of the run that is done, 0 to 1: by steps, or by time if that ends it sooner."""
        done = self.progress.step / max(1, self.config.steps)
        if self.config.minutes:
            done = max(done, self.progress.seconds / (60 * self.config.minutes))
        return min(1.0, done)

    def learning_rate(self) -> float:
        warm = min(1.0, (self.progress.step + 1) / max(1, self.config.warmup_steps))
        decay = 0.5 * (1 + math.cos(math.pi * self.fraction)) if self.config.lr_schedule == "cosine" else 1.0
        return self.config.lr * warm * max(decay, 0.01)

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the run's length is reached; saves at intervals and at the end."""
        bar = tqdm(total=self.config.steps, initial=self.progress.step, disable=not self.accelerator.is_main_process,
                   dynamic_ncols=True, mininterval=2.0, desc=self.folder.name)  # fmt: skip
        saved = time.monotonic()
        while self.fraction < 1.0:
            began = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            yield self.progress.step
            self.progress.step += 1
            self.progress.seconds += time.monotonic() - began
            bar.update(1)
            if self.progress.step % 10 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.average_losses().items()})
            if time.monotonic() - saved > 60 * self.config.checkpoint_minutes:
                self.save()
                saved = time.monotonic()
        bar.close()
        self.save()

    def update(self, loss: torch.Tensor, **named: torch.Tensor | float) -> None:
        """Backward, clip, optimiser step, EMA. Raises ``FloatingPointError`` when the loss is not finite."""
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss.item()} at step {self.progress.step}; the last checkpoint in {self.folder} "
                "is intact. Lower the learning rate or raise warmup_steps, then resume."
            )
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.step(self.parameters)
        for name, value in {"loss": loss, **named}.items():
            self._recent.setdefault(name, deque(maxlen=100)).append(float(torch.as_tensor(value).detach()))

    def average_losses(self) -> dict[str, float]:
        return {k: sum(v) / len(v) for k, v in self._recent.items() if v}

    def save(self) -> None:
        """Write the checkpoint atomically enough: the marker file is removed first and written last."""
        self.progress.losses = self.average_losses() or self.progress.losses
        folder = self.folder / "checkpoint"
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            (folder / "done").unlink(missing_ok=True)
        self.accelerator.save_state(str(folder))
        if self.accelerator.is_main_process:
            (folder / "done").touch()
            with open(self.folder / "log.jsonl", "a") as log:
                row = {**self.progress.state_dict(), "lr": self.learning_rate()}
                log.write(json.dumps(row) + "\n")

    def averaged(self) -> _Averaged:
        """Context in which the trained modules hold the EMA weights (or the plain ones without EMA)."""
        return _Averaged(self)

    def unwrapped(self, name: str) -> Any:
        return self.accelerator.unwrap_model(self.modules[name])


class _Averaged:
    def __init__(self, run: TrainingRun):
        self.run = run

    def __enter__(self) -> None:
        if self.run.ema is not None:
            self.run.ema.store(self.run.parameters)
            self.run.ema.copy_to(self.run.parameters)

    def __exit__(self, *_: object) -> None:
        if self.run.ema is not None:
            self.run.ema.restore(self.run.parameters)
