"""What every training run here shares: progress, learning rate, EMA, checkpoints, resume, logs, several processes."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    gather_object,
    set_seed,
)
from diffusers.training_utils import EMAModel
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm.auto import tqdm

from ..common.atomic import write_atomically
from ..common.devices import process_state, resolve
from ..common.settings import ConfigError
from .calls import UNetCalls
from .checkpoint import (
    CheckpointError,
    Stateful,
    check_run_folder,
    discard,
    drop_unfinished,
    find_checkpoint,
    find_to_resume,
    load_tracked,
    publish,
    read_state,
    restore,
    save_tracked,
    settings_changed,
    start_checkpoint,
    verify,
    write_state,
)
from .config import DTYPES, RunConfig, check_run
from .optimizers import make_optimizer
from .state import Averages, OptimizerState, Progress, Scaler, Weights

T = TypeVar("T", bound=Stateful)

LOCK = "run.lock"
_MAX_SKIPPED_UPDATES = 50
# what a run may go on with other values of
_FREE = ("run", "workers", "cache", "gradient_checkpointing", "allow_commands", "sample_guidance")


class NonFiniteLoss(FloatingPointError):
    """The loss or the gradient became NaN or infinite; the last checkpoint is intact."""


class TrainingRun:
    """Owns the accelerator, the optimiser, the averaged weights and the checkpoints of one run.

    ``modules`` are trained; everything else the caller freezes. Train through ``run.modules``, which holds them as
    prepared for several processes. Iterate over :meth:`steps` and call :meth:`update` with the losses of each step.

    Every step begins with all random generators (``run.rng``, python's, numpy's, torch's) seeded from the run's seed,
    the step and the lane (process and micro-batch). So a run that was killed and resumed draws what an uninterrupted
    one draws, and N processes draw what one process with ``accumulate`` = N draws.
    """

    def __init__(
        self,
        config: RunConfig,
        modules: dict[str, torch.nn.Module],
        settings: dict[str, Any] | None = None,
        unused: bool = False,
    ):
        """``settings``: of the whole training, kept with the checkpoints; a run goes on with the same ones only.
        unused: some steps leave some parameters without a gradient, which several processes have to look for.

        Raises ConfigError for settings that cannot work, for a folder that another training writes into and for a
        checkpoint that is damaged or of another run.
        """
        self.config, self.settings = config, settings or {}
        self.precision = resolve(config.precision, process_state().device)
        check_run(config, self.precision)
        self.folder = Path(config.output)
        self.accelerator = Accelerator(
            mixed_precision="no" if self.precision == "fp32" else self.precision,
            # The plugin rather than the number: that one gives way to an environment variable.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.accumulate, sync_with_dataloader=False
            ),
            # Older torch gives no gradient to weights whose low-precision copy was made in a call without one.
            kwargs_handlers=[
                AutocastKwargs(cache_enabled=False),
                DistributedDataParallelKwargs(find_unused_parameters=unused),
            ],
        )
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and config.ema_decay:
            raise ConfigError("ema_decay needs the whole weights on each process, which FSDP does not keep: set it 0.")
        self._claim_folder()
        self.rng = random.Random(config.seed)
        set_seed(config.seed)
        self._prepare(modules)
        self.progress, self.calls = Progress(), UNetCalls()
        self._recent: dict[str, deque[float]] = {}
        self._tracked: dict[str, Stateful] = {}
        self._restored: dict[str, Any] = {}
        self._skipped_updates = 0
        self._aside = 0.0
        if config.resume:
            self._resume()
        elif self.accelerator.is_main_process:
            discard(self.folder)
        self._sampled = self.progress.seconds

    def _claim_folder(self) -> None:
        """Make the folder and hold it as long as this run lives: two trainings in one would mix their checkpoints."""
        try:
            check_run_folder(self.folder, (LOCK,))
            self.folder.mkdir(parents=True, exist_ok=True)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(f"the run cannot write into {self.folder}: {error.strerror or error}.") from error
        if not self.accelerator.is_main_process:
            return
        self._lock = FileLock(self.folder / LOCK, timeout=0, thread_local=False, is_singleton=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise ConfigError(
                f"another training is running in {self.folder}. Wait for its end or stop it, or give another output "
                "folder."
            ) from None
        except (OSError, NotImplementedError) as error:
            self.say(f"{self.folder} cannot be locked ({error}): take care that no other training writes there.")

    def _prepare(self, modules: dict[str, torch.nn.Module]) -> None:
        parameters = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
        optimizer = make_optimizer(self.config, parameters, self.accelerator.device)
        prepared = self.accelerator.prepare(*modules.values(), optimizer)
        self.modules = dict(zip(modules, prepared[:-1], strict=True))
        self.optimizer = prepared[-1]
        # Asked again, because FSDP puts its shards in their place.
        self.parameters = [p for m in self.modules.values() for p in m.parameters() if p.requires_grad]
        self.ema: EMAModel | None = None
        if self.config.ema_decay:
            self.ema = EMAModel(self.parameters, decay=self.config.ema_decay)
            self.ema.to(self.accelerator.device)

    # --- for the training loop ---------------------------------------------------------------------------------------

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
        """Share of the run that is done, 0 to 1: by steps, or by time or U-Net calls if one of these ends it sooner."""
        done = self.progress.step / max(1, self.config.steps)
        if self.config.minutes:
            done = max(done, self.progress.seconds / (60 * self.config.minutes))
        if self.config.unet_calls:
            done = max(done, self.progress.unet_calls / self.config.unet_calls)
        return min(1.0, done)

    def time_to_sample(self) -> bool:
        """Whether ``sample_minutes`` of training have passed since it began, went on or this was last true."""
        due = self.progress.seconds - self._sampled > 60 * self.config.sample_minutes
        if due:
            self._sampled = self.progress.seconds
        return due

    def learning_rate(self) -> float:
        warm = min(1.0, (self.progress.step + 1) / max(1, self.config.warmup_steps))
        decay = 0.5 * (1 + math.cos(math.pi * self.fraction)) if self.config.lr_schedule == "cosine" else 1.0
        return self.config.lr * warm * max(decay, 0.01)

    def steps(self) -> Iterator[int]:
        """Yield step numbers until the run's length is reached; saves at intervals and at the end.

        With ``accumulate`` > 1 each number comes that many times, once for each micro-batch. Raises ConfigError when
        the checkpoint does not fit what is tracked, OSError when a checkpoint cannot be written.
        """
        self._restore_tracked()
        bar = tqdm(
            total=self.config.steps,
            initial=self.progress.step,
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
            mininterval=2.0,
            desc=self.folder.name,
        )
        saved = self.progress.seconds
        while self.fraction < 1.0:
            began = time.monotonic()
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            for micro in range(self.config.accumulate):
                self._seed(micro)
                self.calls.begin()
                with self.accelerator.accumulate(*self.modules.values()):
                    yield self.progress.step
            self.progress.step += 1
            self.progress.seconds += self._mean(time.monotonic() - began - self._aside)
            self._aside = 0.0
            bar.update(1)
            if self.progress.step % 10 == 0:
                bar.set_postfix({k: f"{v:.4f}" for k, v in self.average_losses().items()} | self._calls_in_words())
            if self.progress.seconds - saved > 60 * self.config.checkpoint_minutes:
                self.save()
                saved = self.progress.seconds
        bar.close()
        self.save()
        if self.progress.unet_calls:
            self.say(f"{self.progress.unet_calls:,} U-Net calls of training in {self.progress.step:,} steps")

    @contextmanager
    def preparing(self) -> Iterator[None]:
        """What a step does in here, as encoding pictures, takes nothing of a budget of minutes."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._aside += time.monotonic() - began

    def update(self, loss: Tensor, **named: Tensor | float) -> None:
        """Backward and, after the last micro-batch of a step, clip, optimiser step, EMA.

        Raises NonFiniteLoss, on every process alike, before anything was changed.
        """
        value = self._mean(loss)
        if not math.isfinite(value):
            self._stop(f"the loss became {value}")
        self.accelerator.backward(loss)
        self.progress.unet_calls += self._sum(self.calls.take())
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

    # --- results -----------------------------------------------------------------------------------------------------

    def average_losses(self) -> dict[str, float]:
        """Means over the last 100 batches of this process; those in the log are over all processes."""
        return {k: sum(v) / len(v) for k, v in self._recent.items() if v}

    def facts(self) -> dict[str, Any]:
        """Progress, processes and precision, for logs and cards."""
        done = {"processes": self.accelerator.num_processes, "precision": self.precision}
        return {**self.progress.state_dict(), **done}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the trained modules hold the EMA weights (or the plain ones without EMA)."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def unwrapped(self, name: str) -> Any:
        return self.accelerator.unwrap_model(self.modules[name])

    def averaged_state(self, name: str) -> dict[str, Tensor]:
        """The whole averaged weights of a module. Every process must call it: FSDP gathers them from all."""
        with self.averaged():
            state = self.accelerator.get_state_dict(self.modules[name])
            return {key: value.detach().cpu().clone() for key, value in state.items()}

    @contextmanager
    def writing(self, what: str, needed: bool = True) -> Iterator[None]:
        """Inside, ``what`` is written from the weights of the moment: should that fail, nothing of the run is lost.

        Raises OSError with what to do, or says so and goes on when ``what`` is not ``needed``.
        """
        try:
            yield
        except OSError as error:
            text = f"{what} could not be written into {self.folder}: {_reason(error)}."
            if needed:
                raise OSError(f"{text} {self._what_is_kept()} Make room, then run the same command again.") from error
            self.say(f"{text} The training goes on.")

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint and a line of ``log.jsonl``. Every process must call it.

        Raises OSError, saying what is kept, when there is no room; NonFiniteLoss when the weights hold NaN.
        """
        self.progress.losses = self._losses_of_all() or self.progress.losses
        main, process = self.accelerator.is_main_process, self.accelerator.process_index
        self.accelerator.wait_for_everyone()
        shared = self._shared_state()
        try:
            with self.writing("the checkpoint"):
                folder = start_checkpoint(self.folder) if main else self.folder / "checkpoint.new"
                self.accelerator.wait_for_everyone()
                if main:
                    write_state(folder / "state.safetensors", shared)
                save_tracked(folder, process, self._tracked)
                skipped = self._skipped_samples()
                self.accelerator.wait_for_everyone()
                if main:
                    publish(self.folder)
                    row = {**self.facts(), "lr": self.learning_rate(), **({"skipped": skipped} if skipped else {})}
                    with open(self.folder / "log.jsonl", "a", encoding="utf-8") as log:
                        log.write(json.dumps(row) + "\n")
        except CheckpointError as error:
            self._stop(str(error))
        finally:
            if main:
                drop_unfinished(self.folder)
        self.accelerator.wait_for_everyone()

    def _parts(self) -> dict[str, Stateful]:
        """What all processes share, by its name in a checkpoint."""
        parts: dict[str, Stateful] = {
            "progress": self.progress,
            "weights": Weights(self),
            "optimizer": OptimizerState(self),
        }
        if self.ema is not None:
            parts["ema"] = Averages(self)
        if self.accelerator.scaler is not None:
            parts["scaler"] = Scaler(self.accelerator.scaler)
        return parts

    def _shared_state(self) -> dict[str, Any]:
        return {"settings": self.settings, **{name: part.state_dict() for name, part in self._parts().items()}}

    def _resume(self) -> None:
        try:
            checkpoint = find_to_resume(self.folder)
        except CheckpointError as error:
            raise ConfigError(str(error)) from error
        if checkpoint is None:
            if (self.folder / "log.jsonl").exists():
                self.say(f"{self.folder} holds no checkpoint: the training begins anew.")
            return
        again = "Give another output folder, or start anew with --no-resume."
        try:
            names = verify(checkpoint)
            state = read_state(checkpoint / "state.safetensors")
            other = list(settings_changed(state.get("settings"), self.settings, _FREE))
            other += [f"the checkpoint has no {name}" for name in self._parts() if name not in state]
            if other:
                raise ConfigError(f"{self.folder} holds a run with other settings: {'; '.join(other)}. {again}")
            restore(self._parts(), state, checkpoint)
            self._restored = load_tracked(checkpoint, self.accelerator.process_index, names)
        except CheckpointError as error:
            text = str(error)
            raise ConfigError(text if "--no-resume" in text else f"{text} {again}") from error
        except OSError as error:
            raise ConfigError(f"{checkpoint} cannot be read: {_reason(error)}. {again}") from error
        self.accelerator.step = 0  # checkpoints lie between updates, also when `accumulate` has changed since
        self.say(f"resumed {self.folder} at step {self.progress.step}")

    def _restore_tracked(self) -> None:
        if self.config.unet_calls and not self.calls.watched:
            raise ConfigError(
                "unet_calls counts the calls of a U-Net, and this training has none: use steps or minutes."
            )
        states, self._restored = self._restored, {}
        try:
            # popped, so that a large state is not kept beside the thing that has taken it
            for name in [name for name in states if name in self._tracked]:
                restore({name: self._tracked[name]}, {name: states.pop(name)}, self.folder / "checkpoint")
        except CheckpointError as error:
            raise ConfigError(str(error)) from error

    # --- several processes -------------------------------------------------------------------------------------------

    def _seed(self, micro: int) -> None:
        lane = self.accelerator.process_index * self.config.accumulate + micro
        self.rng.seed(f"{self.config.seed}/{self.progress.step}/{lane}")
        set_seed(self.rng.getrandbits(32))

    def _mean(self, value: Tensor | float) -> float:
        """Mean over the processes."""
        mine = torch.as_tensor(value).detach().to(self.accelerator.device, torch.float32)
        return float(self.accelerator.reduce(mine, reduction="mean"))

    def _sum(self, count: int) -> int:
        """Sum over the processes."""
        return int(self.accelerator.reduce(torch.tensor(count, device=self.accelerator.device), reduction="sum"))

    def _losses_of_all(self) -> dict[str, float]:
        """:meth:`average_losses` of all processes together, which need not have the same names."""
        merged: dict[str, list[float]] = {}
        for recent in gather_object([{name: list(values) for name, values in self._recent.items()}]):
            for name, values in recent.items():
                merged.setdefault(name, []).extend(values)
        return {name: sum(values) / len(values) for name, values in merged.items()}

    def _skipped_samples(self) -> dict[str, int]:
        """Samples left out so far by every process, by reason."""
        mine = sum((Counter(getattr(t, "skipped", None) or {}) for t in self._tracked.values()), Counter[str]())
        return dict(sum(gather_object([mine]), Counter[str]()))

    # --- words -------------------------------------------------------------------------------------------------------

    def _calls_in_words(self) -> dict[str, str]:
        return {"unet_calls": f"{self.progress.unet_calls:,}"} if self.progress.unet_calls else {}

    def _count_skipped_updates(self, skipped: bool) -> None:
        self._skipped_updates = self._skipped_updates + 1 if skipped else 0
        if self._skipped_updates > _MAX_SKIPPED_UPDATES:
            self._stop(f"fp16 gradients overflowed in {self._skipped_updates} updates in a row")

    def _what_is_kept(self) -> str:
        kept = find_checkpoint(self.folder)
        return f"The last checkpoint, {kept}, is intact." if kept else "There is no checkpoint yet."

    def _stop(self, what: str) -> None:
        raise NonFiniteLoss(
            f"{what} at step {self.progress.step}. {self._what_is_kept()} Lower the learning rate (lr), raise "
            "warmup_steps or use precision bf16 or fp32, then run the same command to resume."
        )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def start_run(
    config: Any, modules: dict[str, torch.nn.Module], unused: bool = False, named: Mapping[str, Any] | None = None
) -> TrainingRun:
    """The :class:`TrainingRun` of ``config.run``, with all settings kept beside it in ``config.json``.

    named: what files that the settings name hold, where a run can only go on with the same. Raises ConfigError if the
    folder holds a checkpoint of a run with other settings: going on there would end with the old run's weights under
    the new run's name. The group ``run`` may change, and what only touches speed.
    """
    settings = json.loads(json.dumps(asdict(config), default=str))
    settings.pop("allow_commands", None)  # said on the command line each time
    run = TrainingRun(config.run, modules, {**settings, **(named or {})}, unused)
    if run.accelerator.is_main_process:
        with run.writing("config.json"):
            text = json.dumps(settings, indent=2) + "\n"
            write_atomically(run.folder / "config.json", lambda handle: handle.write(text.encode()))
    return run
