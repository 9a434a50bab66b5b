"""What a checkpoint keeps of a run: progress, weights, optimiser, averages and loss scale.

Each part checks what it is given before it takes it over: a checkpoint may be somebody else's, or another run's.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

_SAME_SHAPE = (
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "state1",
    "state2",
)  # as the parameter: AdamW's, 8-bit AdamW's


class Trained(Protocol):
    """What a run trains: its modules as prepared for several processes, and what belongs to their parameters."""

    modules: dict[str, Any]
    parameters: list[nn.Parameter]
    optimizer: Any
    ema: Any
    accelerator: Any
    sharded: bool

    def unwrapped(self, name: str) -> Any: ...


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint. ``unet_calls`` are those of all processes together."""

    step: int = 0
    seconds: float = 0.0
    unet_calls: int = 0
    losses: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": self.seconds, "unet_calls": self.unet_calls, "losses": dict(self.losses)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        step, calls = (whole_number(state, name) for name in ("step", "unet_calls"))
        seconds, losses = number(state["seconds"], "seconds"), state["losses"]
        if seconds < 0:
            raise ValueError(f"seconds is {seconds}")
        if not isinstance(losses, dict):
            raise ValueError("losses is no table of numbers")
        self.step, self.unet_calls, self.seconds = step, calls, seconds
        self.losses = {str(name): number(value, name) for name, value in losses.items()}


def describe_machine() -> str:
    """Device, threads and versions, for a card."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device} ({platform.machine()}), torch {torch.__version__}"


class Weights:
    """The trained modules' weights, by module, under the names that they have without several processes."""

    def __init__(self, run: Trained):
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        if self.run.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return {name: get_model_state_dict(module, options=whole) for name, module in self.run.modules.items()}
        return {name: dict(self.run.unwrapped(name).state_dict()) for name in self.run.modules}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, module in self.run.modules.items():
            if self.run.sharded:
                from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

                set_model_state_dict(module, state[name], options=StateDictOptions(full_state_dict=True))
            else:
                self.run.unwrapped(name).load_state_dict(state[name])


class OptimizerState:
    """What the optimiser knows of each parameter. Its settings are the configuration's, which may have changed."""

    def __init__(self, run: Trained):
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        if self.run.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            return dict(get_optimizer_state_dict(self._all(), self.run.optimizer.optimizer, options=whole))
        return {"state": self.run.optimizer.state_dict()["state"]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.run.sharded:
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict

            whole = StateDictOptions(full_state_dict=True)
            set_optimizer_state_dict(self._all(), self.run.optimizer.optimizer, state, options=whole)
            return
        own = self.run.optimizer.state_dict()
        check_optimizer(state["state"], self.run.parameters)
        self.run.optimizer.load_state_dict({**own, "state": state["state"]})

    def _all(self) -> nn.Module:
        return nn.ModuleDict(self.run.modules) if len(self.run.modules) > 1 else next(iter(self.run.modules.values()))


class Averages:
    """The averaged weights (EMA), in the order of the parameters."""

    def __init__(self, run: Trained):
        self.run = run

    def state_dict(self) -> dict[str, Any]:
        assert self.run.ema is not None
        own = self.run.ema.state_dict()
        return {"shadow_params": list(own["shadow_params"]), "optimization_step": int(own["optimization_step"])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        ema, averages = self.run.ema, state["shadow_params"]
        assert ema is not None
        if shapes(averages) != shapes(self.run.parameters):
            raise ValueError("the averaged weights have other shapes than the trained ones")
        step = whole_number(state, "optimization_step")
        ema.load_state_dict({**ema.state_dict(), "shadow_params": averages, "optimization_step": step})
        ema.to(self.run.accelerator.device)


class Scaler:
    """The loss scale of fp16 training."""

    def __init__(self, scaler: Any):
        self.scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        return dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self.scaler.state_dict()
        if not number(state["scale"], "the loss scale") > 0:
            raise ValueError(f"the loss scale is {state['scale']}")
        self.scaler.load_state_dict({**own, "scale": state["scale"], "_growth_tracker": int(state["_growth_tracker"])})


def check_optimizer(state: Any, parameters: list[nn.Parameter]) -> None:
    """Raise ValueError unless ``state`` is what AdamW knows of these parameters after any number of steps."""
    if not isinstance(state, Mapping) or not set(state) <= set(range(len(parameters))):
        raise ValueError(f"the optimiser's state is not that of {len(parameters)} parameters")
    for index, known in state.items():
        for name, value in known.items():
            wrong = name in _SAME_SHAPE and tuple(value.shape) != tuple(parameters[index].shape)
            if wrong or (name == "step" and not 0 < float(value) < math.inf):
                raise ValueError(f"the optimiser's {name} of parameter {index} does not fit")


def shapes(tensors: Any) -> list[tuple[int, ...]]:
    """Those of a list of tensors. Raises ValueError for anything else."""
    if not isinstance(tensors, (list, tuple)) or not all(isinstance(t, Tensor) for t in tensors):
        raise ValueError("no list of tensors")
    return [tuple(t.shape) for t in tensors]


def whole_number(state: Mapping[str, Any], name: str, limit: int = 2**53) -> int:
    """``state[name]`` as a number 0, 1, 2, ... Raises ValueError."""
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < limit:
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a number from 0 up")
    return value


def number(value: Any, name: str) -> float:
    """``value`` as a finite number. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is {str(value)[:40]!r}, not a number")
    return float(value)
