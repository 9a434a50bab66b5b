"""What every training run here shares: progress, learning rate, EMA, checkpoints, resume, logs, several processes."""

from __future__ import annotations

import json
import math
import platform
import random
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, DistributedType, GradientAccumulationPlugin, gather_object, set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from tqdm.auto import tqdm

from ..common.devices import AUTOCAST, resolve
from ..common.processes import process_state
from ..common.settings import ConfigError
from .checkpoint import Stateful, discard, find_checkpoint, load_tracked, publish, save_tracked, start_checkpoint
from .optimizers import OptimizerName, make_optimizer

T = TypeVar("T", bound=Stateful)

DTYPES = {"fp32": torch.float32, **AUTOCAST}
_MAX_SKIPPED_UPDATES = 50
_FREE = ("run", "workers", "cache", "gradient_checkpointing")  # what a run may go on with other values of


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient became NaN or infinite; the last checkpoint is intact."""


@dataclass
class RunConfig:
    """Length, optimiser and bookkeeping of a run. Times are minutes of training, counted across resumes.

    A step is one update of the weights; it sees ``batch_size`` x ``accumulate`` x processes pictures.
    """

    output: str = "runs/run"
    steps: int = 1000
    minutes: float = 0.0
    batch_size: int = 32  # pictures at a time, on each process
    accumulate: int = 1  # batches whose gradients are averaged before an update
    lr: float = 1e-4
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: OptimizerName = "adamw"
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    ema_decay: float = 0.0
    # Of the arithmetic (autocast). auto: bf16 where the device has it, else fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    frozen: Literal["fp32", "bf16", "fp16"] = "fp32"  # in which models that do not train are kept
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


def describe_machine() -> str:
    """Device, threads and versions, for a card."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device} ({platform.machine()}), torch {torch.__version__}"


class TrainingRun:
    """Owns the accelerator, the optimiser, the averaged weights and the checkpoints of one run.

    ``modules`` are trained; everything else the caller freezes. Train through ``run.modules``, which holds them as
    prepared for several processes. Iterate over :meth:`steps` and call :meth:`update` with the losses of each step.

    Every step begins with all random generators (``run.rng``, python's, numpy's, torch's) seeded from the run's seed,
    the step and the lane (process and micro-batch). So a run that was killed and resumed draws what an uninterrupted
    one draws, and N processes draw what one process with ``accumulate`` = N draws.
    """

    def __init__(self, config: RunConfig, modules: dict[str, torch.nn.Module]):
        self.config = config
        self.precision = resolve(config.precision, process_state().device)
        _check(config, self.precision)
        self.folder = Path(config.output)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            # The plugin rather than the number: that one gives way to an environment variable.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.accumulate, sync_with_dataloader=False
            ),
            # Older torch gives no gradient to weights whose low-precision copy was made in a call without one.
            kwargs_handlers=[AutocastKwargs(cache_enabled=False)],
        )
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and config.ema_decay:
            raise ConfigError("ema_decay needs the whole weights on each process, which FSDP does not keep: set it 0.")
        self.rng = random.Random(config.seed)
        set_seed(config.seed)
        parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        optimizer = make_optimizer(config, parameters, self.accelerator.device)
        prepared = self.accelerator.prepare(*modules.values(), optimizer)
        self.modules = dict(zip(modules, prepared[:-1], strict=True))
        self.optimizer = prepared[-1]
        # Asked again, because FSDP puts its shards in their place.
        self.parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        self.progress = Progress()
        self.accelerator.register_for_checkpointing(self.progress)
        self.ema: EMAModel | None = None
        if config.ema_decay:
            self.ema = EMAModel(self.parameters, decay=config.ema_decay)
            self.ema.to(self.accelerator.device)
            self.accelerator.register_for_checkpointing(self.ema)
        self._recent: dict[str, deque[float]] = {}
        self._tracked: dict[str, Stateful] = {}
        self._restored: dict[str, dict[str, Any]] = {}
        self._skipped_updates = 0
        if config.resume:
            self._resume()
        elif self.accelerator.is_main_process:
            discard(self.folder)

    def place(self, *frozen: torch.nn.Module) -> None:
        """Move models that do not train to the run's device, in ``config.frozen``."""
        for module in frozen:
            # torch's own method: diffusers' warns of layers to keep in float32, also where there are none.
            torch.nn.Module.to(module, self.accelerator.device, DTYPES[self.config.frozen])

    def track(self, name: str, thing: T) -> T:
        """Keep ``thing``'s state in the checkpoints, one state a process; restored when :meth:`steps` begins."""
        self._tracked[name] = thing
        return thing

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
        """Yield step numbers until the run's length is reached; saves at intervals and at the end.

        With ``accumulate`` > 1 each number comes that many times, once for each micro-batch.
        """
        bar = tqdm(total=self.config.steps, initial=self.progress.step, disable=not self.accelerator.is_main_process,
                   dynamic_ncols=True, mininterval=2.0, desc=self.folder.name)  # fmt: skip
        for name, state in self._restored.items():
            if name in self._tracked:
                self._tracked[name].load_state_dict(state)
        self._restored = {}
        saved = self.progress.seconds
        while self.fraction < 1.0:
            began = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            for micro in range(self.config.accumulate):
                self._seed(micro)
                with self.accelerator.accumulate(*self.modules.values()):
                    yield self.progress.step
            self.progress.step += 1
            self.progress.seconds += self._mean(time.monotonic() - began)
            bar.update(1)
            if self.progress.step % 10 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.average_losses().items()})
            if self.progress.seconds - saved > 60 * self.config.checkpoint_minutes:
                self.save()
                saved = self.progress.seconds
        bar.close()
        self.save()

    def update(self, loss: Tensor, **named: Tensor | float) -> None:
        """Backward and, after the last micro-batch of a step, clip, optimiser step, EMA.

        Raises NonFiniteLoss, on every process alike, before anything was changed.
        """
        value = self._mean(loss)
        if not math.isfinite(value):
            self._stop(f"the loss became {value}")
        self.accelerator.backward(loss)
        overflow = False
        if self.accelerator.sync_gradients:
            norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
            # With a loss scaler (fp16) infinite gradients are normal now and then: it skips the update.
            overflow = norm is not None and not math.isfinite(float(norm))
            if self.accelerator.scaler is None and overflow:
                self._stop(f"the gradient became {float(norm)}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.accelerator.sync_gradients:
            # A fused optimiser skips by itself, of which accelerate does not hear.
            self._count_skipped_updates(overflow or self.accelerator.optimizer_step_was_skipped)
            if self.ema is not None:
                self.ema.step(self.parameters)
        for name, part in {"loss": loss, **named}.items():
            self._recent.setdefault(name, deque(maxlen=100)).append(float(torch.as_tensor(part).detach()))

    def average_losses(self) -> dict[str, float]:
        """Means over the last 100 batches of this process; those in the log are over all processes."""
        return {k: sum(v) / len(v) for k, v in self._recent.items() if v}

    def facts(self) -> dict[str, Any]:
        """Progress, processes and precision, for logs and cards."""
        done = {"processes": self.accelerator.num_processes, "precision": self.precision}
        return {**self.progress.state_dict(), **done}

    def save(self) -> None:
        """Write a checkpoint and a line of ``log.jsonl``. Every process must call it."""
        self.progress.losses = self._losses_of_all() or self.progress.losses
        main, process = self.accelerator.is_main_process, self.accelerator.process_index
        self.accelerator.wait_for_everyone()
        if main:
            start_checkpoint(self.folder)
        self.accelerator.wait_for_everyone()
        folder = self.folder / "checkpoint.new"
        self.accelerator.save_state(str(folder))
        save_tracked(folder, process, self._tracked)
        skipped = self._skipped_samples()
        self.accelerator.wait_for_everyone()
        if main:
            publish(self.folder)
            with open(self.folder / "log.jsonl", "a") as log:
                row = {**self.facts(), "lr": self.learning_rate()}
                log.write(json.dumps(row | ({"skipped": skipped} if skipped else {})) + "\n")
        self.accelerator.wait_for_everyone()

    def averaged(self) -> _Averaged:
        """Context in which the trained modules hold the EMA weights (or the plain ones without EMA)."""
        return _Averaged(self)

    def unwrapped(self, name: str) -> Any:
        return self.accelerator.unwrap_model(self.modules[name])

    def averaged_state(self, name: str) -> dict[str, Tensor]:
        """The whole averaged weights of a module. Every process must call it: FSDP gathers them from all."""
        with self.averaged():
            state = self.accelerator.get_state_dict(self.modules[name])
            return {key: value.detach().cpu().clone() for key, value in state.items()}

    def _resume(self) -> None:
        checkpoint = find_checkpoint(self.folder)
        if checkpoint is None:
            return
        try:
            self.accelerator.load_state(str(checkpoint))
        except (RuntimeError, ValueError, KeyError) as error:
            raise ConfigError(
                f"the checkpoint in {checkpoint} is of a run with other settings ({error}). Give another output "
                "folder, or start anew with --no-resume."
            ) from error
        if self.ema is not None:  # what accelerate loads for it lies on the CPU
            self.ema.to(self.accelerator.device)
        self.accelerator.step = 0  # checkpoints lie between updates, also when `accumulate` has changed since
        self._restored = load_tracked(checkpoint, self.accelerator.process_index)
        self.say(f"resumed {self.folder} at step {self.progress.step}")

    def _seed(self, micro: int) -> None:
        lane = self.accelerator.process_index * self.config.accumulate + micro
        self.rng.seed(f"{self.config.seed}/{self.progress.step}/{lane}")
        set_seed(self.rng.getrandbits(32))

    def _mean(self, value: Tensor | float) -> float:
        """Mean over the processes."""
        mine = torch.as_tensor(value).detach().to(self.accelerator.device, torch.float32)
        return float(self.accelerator.reduce(mine, reduction="mean"))

    def _losses_of_all(self) -> dict[str, float]:
        """:meth:`average_losses` of all processes together, which need not have the same names."""
        merged: dict[str, list[float]] = {}
        for recent in gather_object([{name: list(values) for name, values in self._recent.items()}]):
            for name, values in recent.items():
                merged.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in merged.items()}

    def _count_skipped_updates(self, skipped: bool) -> None:
        self._skipped_updates = self._skipped_updates + 1 if skipped else 0
        if self._skipped_updates > _MAX_SKIPPED_UPDATES:
            self._stop(f"fp16 gradients overflowed in {self._skipped_updates} updates in a row")

    def _stop(self, what: str) -> None:
        kept = find_checkpoint(self.folder)
        where = f"The last checkpoint, {kept}, is intact" if kept else "There is no checkpoint yet"
        raise NonFiniteLoss(
            f"{what} at step {self.progress.step}. {where}. Lower the learning rate (lr), raise warmup_steps or use "
            "precision bf16 or fp32, then run the same command to resume."
        )

    def _skipped_samples(self) -> dict[str, int]:
        """Samples left out so far by every process, by reason."""
        mine = sum((Counter(getattr(t, "skipped", None) or {}) for t in self._tracked.values()), Counter[str]())
        return dict(sum(gather_object([mine]), Counter[str]()))


def start_run(config: Any, modules: dict[str, torch.nn.Module]) -> TrainingRun:
    """The :class:`TrainingRun` of ``config.run``, with all settings kept beside it in ``config.json``.

    Raises ConfigError if the folder holds a checkpoint of a run with other settings: going on there would end with the
    old run's weights under the new run's name. The group ``run`` may change, and what only touches speed.
    """
    folder = Path(config.run.output)
    settings = json.loads(json.dumps(asdict(config), default=str))
    kept = folder / "config.json"
    if config.run.resume and find_checkpoint(folder) and kept.is_file():
        before = json.loads(kept.read_text())
        other = [f"{k} {before[k]!r}, now {v!r}" for k, v in settings.items()
                 if k in before and k not in _FREE and before[k] != v]  # fmt: skip
        if other:
            raise ConfigError(
                f"{folder} holds a run with other settings: {'; '.join(other)}. Give another output folder, or start "
                "anew with --no-resume."
            )
    run = TrainingRun(config.run, modules)
    if run.accelerator.is_main_process:
        kept.write_text(json.dumps(settings, indent=2) + "\n")
    return run


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


def _check(config: RunConfig, precision: str) -> None:
    if config.accumulate < 1 or config.batch_size < 1:
        raise ConfigError("batch_size and accumulate are numbers of pictures and batches: at least 1.")
    if config.lr < 0:
        raise ConfigError(f"lr is 0 or above, not {config.lr:g}.")
    if config.max_grad_norm <= 0:
        raise ConfigError(f"max_grad_norm is above 0, not {config.max_grad_norm:g}: every gradient would become 0.")
    if not 0 <= config.ema_decay < 1 or not all(0 <= beta < 1 for beta in config.betas):
        raise ConfigError(f"ema_decay ({config.ema_decay:g}) and betas {config.betas} are from 0 to below 1.")
    if config.lr_schedule not in ("constant", "cosine"):
        raise ConfigError(f"lr_schedule is constant or cosine, not {config.lr_schedule!r}.")
    if config.frozen not in ("fp32", precision):
        raise ConfigError(
            f"frozen = {config.frozen} needs precision = {config.frozen}: half-precision weights are only used by "
            "arithmetic of the same format."
        )
