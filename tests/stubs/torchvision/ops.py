"""Empty stand-in, see ../README.md. ComfyUI newer than 0.3.75 names these in imports of models never made here."""

from typing import Any


def roi_align(*args: Any, **kwargs: Any) -> Any:
    raise NotImplementedError("tests/stubs stands in for torchvision; install torchvision to run this")


deform_conv2d = roi_align
