"""The error of settings and arguments that cannot be used, apart from what reads settings files (Python 3.11)."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what it takes."""


class SunFileError(ValueError):
    """A file or adapter that cannot be used; the message says which, why and what to do."""
