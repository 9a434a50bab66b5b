"""Errors that many rooms know, in a module that needs nothing: not torch, nor what reads settings files (3.11)."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the key and what it takes."""


class SunFileError(ValueError):
    """A file or adapter that cannot be used; the message says which, why and what to do."""


class NotAnAdapterError(SunFileError):
    """A readable file that holds something else than a SUN adapter."""
