"""SUN outside torch: a model with its adapter as graphs of OpenVINO or ONNX Runtime (``sun export``), and the pipeline
that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .pipeline import ExportedPipeline, load_exported

__all__ = ["ExportedPipeline", "load_exported"]

__getattr__ = lazy.attributes(__name__, dict.fromkeys(__all__, "pipeline"))
