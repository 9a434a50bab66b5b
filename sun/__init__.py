"""SUN (SpeedUpNet): few-step text-to-image with a working negative prompt, one U-Net call a step.

>>> import sun
>>> adapter = sun.SunAdapter.load("adapter.safetensors")
>>> sun.attach(pipe, adapter)
>>> pipe("a cat", negative_prompt="blurry", num_inference_steps=4)

Names load on first use, so that ``import sun`` costs nothing and needs neither torch nor diffusers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .common import lazy

if TYPE_CHECKING:
    from .adapter import SunAdapter, SunLayer
    from .files import SunFileError, SunInfo
    from .layers import AttentionLayer, layers_of_ldm, layers_of_unet
    from .pipelines.attach import attach, detach
    from .runtimes.pipeline import load_exported
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
    "attach": "pipelines.attach",
    "detach": "pipelines.attach",
    "load_exported": "runtimes.pipeline",
    "denoise_timesteps": "schedule",
    "trailing_timesteps": "schedule",
    "compact": "",
    "inheritance": "",  # the accelerators beside SUN
    "ltc": "",
    "surgery": "",
    "switching": "",
}

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
    "load_exported",
    "trailing_timesteps",
]

__getattr__ = lazy.attributes(__name__, _HOME_OF)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
