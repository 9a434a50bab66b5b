"""Empty stand-in, see ../README.md."""

from . import functional, transforms

__version__ = "0.0.0"
