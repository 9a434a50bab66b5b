"""Says so where no more than a model's weights is taken: by merging nodes, and by those that save checkpoints.

What this pack puts on a model lives beside its weights. A merge keeps it of the first model, as it keeps that one's
other patches, and drops it of the second; a checkpoint never holds it.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from comfy.model_patcher import ModelPatcher

from . import notices

log = logging.getLogger(__name__)

NAMES = {  # by attachment
    "sun": "SUN",
    "sun_ltc": "LTC-Accel",
    "sun_inheritance": "Feature inheritance",
    "sun_switching": "Switching",
    "sun_experts": "Experts",
}


def speak_up(patcher: ModelPatcher) -> None:
    """From now on this patcher, and clones of it, say what is left behind when their weights alone are taken."""
    kind: Any = type(patcher)
    patcher.__class__ = _speaking(kind)


@functools.cache
def _speaking(kind: Any) -> Any:
    """`kind` with a word before its weights are handed out. A subclass: clones of a patcher are of its class."""
    if getattr(kind, "sun_speaks", False):
        return kind

    class Speaking(kind):
        sun_speaks = True

        def get_key_patches(self, filter_prefix: str | None = None, *args: Any, **kwargs: Any) -> Any:
            if filter_prefix is not None:  # without one the host asks for its own needs
                _say_merged(self)
            return super().get_key_patches(filter_prefix, *args, **kwargs)

        def partially_load(
            self, device_to: Any, extra_memory: Any = 0, force_patch_weights: bool = False, **kwargs: Any
        ) -> Any:
            if force_patch_weights:  # ComfyUI 0.3.75 saves what this leaves in the model
                _say_saved(self)
            return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights, **kwargs)

    if hasattr(kind, "state_dict_for_saving"):  # newer ones ask the patcher

        def state_dict_for_saving(self: Any, *args: Any, **kwargs: Any) -> Any:
            _say_saved(self)
            return kind.state_dict_for_saving(self, *args, **kwargs)

        Speaking.state_dict_for_saving = state_dict_for_saving
    Speaking.__name__, Speaking.__qualname__ = kind.__name__, kind.__qualname__  # others look at these
    return Speaking


def _what(patcher: ModelPatcher) -> str:
    return " and ".join(name for key, name in NAMES.items() if patcher.get_attachment(key) is not None)


def _say_merged(patcher: ModelPatcher) -> None:
    if what := _what(patcher):
        log.warning(
            "%s: no part of a model's weights, so a merge keeps it of its first model alone. If this was another one, "
            "apply it to the merged model.",
            what,
        )
        notices.tell(notices.running_node(), "merged", what=what)


def _say_saved(patcher: ModelPatcher) -> None:
    if what := _what(patcher):
        log.warning(
            "%s: not in what is saved, which is the model's weights alone. Apply it again where the file is used.", what
        )
        notices.tell(notices.running_node(), "saved", what=what)
