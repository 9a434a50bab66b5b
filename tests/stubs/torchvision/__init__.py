"""Empty stand-in, see ../README.md."""

from . import models, ops, transforms

__version__ = "0.0.0"
