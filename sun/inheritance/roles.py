"""What a part does in an inherit step: give its last output, its last residual, or a stand-in nobody looks at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .places import Block, Part, Places
from .plan import InheritanceError, Plan, check_names

BLANK, OUTPUT, RESIDUAL = "blank", "output", "residual"


@dataclass(frozen=True)
class Role:
    """A part and what it does in an inherit step."""

    part: Part
    kind: str


def roles_of(plan: Plan, places: Places) -> tuple[Role, ...]:
    """Roles of all parts that ``plan`` leaves out. Raises InheritanceError for parts the U-Net does not have."""
    check_names(plan.layers, places.layers, "layer")
    units = places.units()
    check_names(plan.units, units, "unit")
    chosen: dict[int, Role] = {}

    def add(role: Role) -> None:
        chosen.setdefault(id(role.part.module), role)  # the first, coarser one counts

    kept = _outer_blocks(plan, places)
    if kept:
        for block in (*places.inputs[kept:], places.middle, *places.outputs[: len(places.outputs) - kept - 1]):
            for part in block.parts:
                add(Role(part, BLANK))
        _inherit(places.outputs[len(places.outputs) - kept - 1], add)
    for name in plan.layers:
        _inherit(places.layers[name], add)
    for name in plan.units:
        add(Role(units[name], RESIDUAL))
    return tuple(chosen.values())


def skipped_outputs(plan: Plan, places: Places) -> tuple[int, int]:
    """How many input blocks run, and how many output blocks do not, in an inherit step."""
    kept = _outer_blocks(plan, places)
    return (kept, len(places.outputs) - kept) if kept else (len(places.inputs), 0)


def _outer_blocks(plan: Plan, places: Places) -> int:
    if plan.stages >= len(places.stage_ends):
        raise InheritanceError(
            f"This U-Net has {len(places.stage_ends)} stages; stages = {plan.stages} leaves none of them out. "
            f"Use 1 to {len(places.stage_ends) - 1}."
        )
    if plan.outer >= len(places.outputs):
        raise InheritanceError(
            f"This U-Net has {len(places.outputs)} blocks; outer = {plan.outer} leaves none of them out. "
            f"Use 1 to {len(places.outputs) - 1}."
        )
    return places.stage_ends[plan.stages - 1] if plan.stages else plan.outer


def _inherit(block: Block, add: Callable[[Role], None]) -> None:
    """The last part gives the block's output of before; what runs ahead of it is not looked at."""
    for part in block.parts[:-1]:
        add(Role(part, BLANK))
    add(Role(block.parts[-1], OUTPUT))


@dataclass
class Feature:
    """What is kept of one part: the last two values with the numbers of their steps, or a shape alone."""

    shape: tuple[int, ...] = ()
    in_tuple: bool = False
    kept: list[tuple[int, Tensor]] = field(default_factory=list)

    def keep(self, step: int, value: Tensor, forecast: bool) -> None:
        """Keep a key step's ``value`` [B, ...]; for a forecast the one before it too."""
        # A copy: hosts add control residuals to what a part gave, in place.
        self.kept = [(step, value.detach().clone()), *(self.kept[:1] if forecast else [])]

    def value(self, step: int, forecast: float) -> Tensor:
        """[B, ...] for an inherit step: the last value, carried on along its last change by ``forecast`` of it."""
        (last, value), *earlier = self.kept
        if not earlier or not forecast:
            return value.clone()
        before, previous = earlier[0]
        return value + forecast * (step - last) / (last - before) * (value - previous)

    @property
    def bytes(self) -> int:
        """Of what is kept."""
        return sum(tensor.numel() * tensor.element_size() for _, tensor in self.kept)


Memory = dict[int, Feature]
"""Features by the position of their role."""


@contextmanager
def substituted(roles: tuple[Role, ...], memory: Memory, step: int, key: bool, forecast: float) -> Iterator[None]:
    """For one call of the U-Net: in a key step every part is watched, in others it plays its role.

    Other threads that call the U-Net meanwhile do not notice.
    """
    replaced: list[tuple[nn.Module, Any]] = []
    try:
        for position, role in enumerate(roles):
            module = role.part.module
            before = module.__dict__.get("forward")  # offloading hooks sit here
            forward = _watched if key else _inherited
            call = forward(role, memory, position, step, forecast, module.forward)
            replaced.append((module, before))
            module.__dict__["forward"] = _in_this_thread(call, module.forward)
        yield
    finally:
        for module, before in reversed(replaced):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def _in_this_thread(forward: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    owner = threading.get_ident()
    return lambda *args, **kwargs: (forward if threading.get_ident() == owner else original)(*args, **kwargs)


def _watched(
    role: Role, memory: Memory, position: int, step: int, forecast: float, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        base = role.part.base(x) if role.kind == RESIDUAL and role.part.base is not None else None
        result = original(x, *args, **kwargs)
        output = _tensor(result)
        feature = memory.setdefault(position, Feature())
        feature.shape, feature.in_tuple = tuple(output.shape), isinstance(result, tuple)
        if role.kind != BLANK:
            feature.keep(step, output if base is None else output - base, bool(forecast))
        return result

    return forward


def _inherited(
    role: Role, memory: Memory, position: int, step: int, forecast: float, original: Callable[..., Any]
) -> Callable[..., Any]:
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        feature = memory.get(position)
        if feature is None:  # this part did not run in the key step
            return original(x, *args, **kwargs)
        if role.kind == BLANK:
            # One channel of zeros of the right size: hosts join and add to it, and nothing reads the result.
            output = x.new_zeros((feature.shape[0], 1, *feature.shape[2:]))
        else:
            output = feature.value(step, forecast).to(x.dtype)
            if role.kind == RESIDUAL and role.part.base is not None:
                output = role.part.base(x) + output
        return (output,) if feature.in_tuple else output

    return forward


def _tensor(result: Any) -> Tensor:
    if isinstance(result, tuple):
        return _tensor(result[0])
    tensor: Tensor = result if isinstance(result, Tensor) else result.sample
    return tensor


def memory_of(slots: Mapping[Any, Memory]) -> int:
    """Bytes of all kept features."""
    return sum(feature.bytes for memory in slots.values() for feature in memory.values())
