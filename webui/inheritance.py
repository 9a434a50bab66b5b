"""Feature inheritance in A1111 and Forge: torch hooks on the U-Net while one sampling runs.

They put the inherited parts into one call of the U-Net and take them out again. The U-Net's own code runs, with
ControlNet, LoRA and SUN where they are.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from modules import shared

from ..sun.inheritance import (
    InheritanceError,
    InheritanceRun,
    Plan,
    control_of_what_runs,
    places_of,
    roles_of,
)

log = logging.getLogger(__name__)


@contextmanager
def sampling(unet: Any, plan: Plan, steps: int) -> Iterator[None]:
    """Lets a U-Net inherit features. Raises InheritanceError for a plan that does not fit it."""
    places = places_of(unet)
    run, call = InheritanceRun(plan, roles_of(plan, places), steps), ExitStack()

    def before(_unet: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call.close()  # of a call that never came back
        x, time = args[0], args[1] if len(args) > 1 else kwargs["timesteps"]
        full = call.enter_context(run.call(float(time.flatten()[0]), tuple(x.shape), rows_of(kwargs)))
        if not full and kwargs.get("control"):
            kwargs = {**kwargs, "control": control_of_what_runs(kwargs["control"], plan, places)}
        return args, kwargs

    def after(*_: Any) -> None:
        call.close()

    with ExitStack() as stack:
        stack.callback(lambda: log.info("%s", run.finish()))
        stack.callback(call.close)
        stack.callback(unet.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(unet.register_forward_hook(after, always_call=True).remove)
        yield
        stopped = shared.state.interrupted or shared.state.skipped
        if not stopped and not run.most_bytes:
            raise InheritanceError(
                "Feature inheritance: the model ran without ever reaching the parts of its U-Net. Something replaces "
                "it (TensorRT, say); switch that off, or feature inheritance."
            )


def rows_of(kwargs: dict[str, Any]) -> Hashable:
    """Which parts of the conditioning a call is for, where the host says it (Forge); None where it does not."""
    options = kwargs.get("transformer_options") or {}
    return tuple(options.get("cond_or_uncond", ())) or None
