"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def attributes(package: str, home_of: Mapping[str, str]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: ``home_of`` names the submodule that defines each name, or, for a submodule of the
    package, ``""``.
    """

    def getattribute(name: str) -> Any:
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        if not home_of[name]:
            return import_module(f".{name}", package)
        return getattr(import_module(f".{home_of[name]}", package), name)

    return getattribute
