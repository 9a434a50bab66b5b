"""One run at a time; errors of a tab's function become its last output, as HTML."""

from __future__ import annotations

import threading
from typing import Any

from . import shared

queue_lock = threading.Lock()


def wrap_gradio_gpu_call(func: Any, extra_outputs: Any = None) -> Any:
    def call(*args: Any) -> tuple[Any, ...]:
        with queue_lock:
            shared.state.begin(job=args[0])
            try:
                return tuple(func(*args))
            except Exception as error:
                return (*extra_outputs, f"<div class='error'>{type(error).__name__}: {error}</div>")
            finally:
                shared.state.end()

    return call
