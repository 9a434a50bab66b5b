"""A script is run from its path under its file name; it is not importable by that name (script_loading.py)."""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def load_module(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(os.path.basename(path), path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
