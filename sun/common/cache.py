"""Where things are kept that can be made again: downloads, encoded pictures."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Folder for what can be made again: ``$SUN_CACHE`` or ``~/.cache/sun``."""
    return Path(os.environ.get("SUN_CACHE") or Path.home() / ".cache" / "sun")
