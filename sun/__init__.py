"""SUN (SpeedUpNet): few-step text-to-image with a working negative prompt, one U-Net call a step.

>>> import sun
>>> adapter = sun.SunAdapter.load("adapter.safetensors")
>>> sun.attach(pipe, adapter)
>>> pipe("a cat", negative_prompt="blurry", num_inference_steps=4)

Names load on first use, so that ``import sun`` costs nothing and needs neither torch nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapter import SunAdapter, SunLayer
    from .files import SunFileError, SunInfo
    from .layers import AttentionLayer, layers_of_ldm, layers_of_unet
    from .pipelines import attach, detach
    from .schedule import denoise_timesteps, trailing_timesteps

__version__ = "0.1.0"

_HOME_OF = {
    "SunAdapter": "adapter",
    "SunLayer": "adapter",
    "SunFileError": "files",
    "SunInfo": "files",
    "AttentionLayer": "layers",
    "layers_of_ldm": "layers",
    "layers_of_unet": "layers",
    "attach": "pipelines",
    "detach": "pipelines",
    "denoise_timesteps": "schedule",
    "trailing_timesteps": "schedule",
}

_PACKAGES = ("inheritance", "ltc")  # the accelerators beside SUN

__all__ = [
    "AttentionLayer",
    "SunAdapter",
    "SunFileError",
    "SunInfo",
    "SunLayer",
    "__version__",
    "attach",
    "denoise_timesteps",
    "detach",
    "layers_of_ldm",
    "layers_of_unet",
    "trailing_timesteps",
]


def __getattr__(name: str) -> Any:
    """Import the module that defines ``name`` the first time it is asked for (PEP 562)."""
    if name in _PACKAGES:
        return import_module(f".{name}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
