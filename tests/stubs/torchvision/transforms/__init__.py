"""Empty stand-in, see ../../README.md."""

from . import functional
