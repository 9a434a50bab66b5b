"""Callbacks by kind; exceptions in them are reported and swallowed."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from . import errors

callbacks: dict[str, list[Any]] = defaultdict(list)


def clear_callbacks() -> None:
    callbacks.clear()


def on_ui_settings(callback: Any) -> None:
    callbacks["ui_settings"].append(callback)


def on_ui_tabs(callback: Any) -> None:
    callbacks["ui_tabs"].append(callback)


def on_before_ui(callback: Any) -> None:
    callbacks["before_ui"].append(callback)


def on_app_started(callback: Any) -> None:
    callbacks["app_started"].append(callback)


def on_infotext_pasted(callback: Any) -> None:
    callbacks["infotext_pasted"].append(callback)


def on_cfg_denoiser(callback: Any) -> None:
    callbacks["cfg_denoiser"].append(callback)


def on_cfg_denoised(callback: Any) -> None:
    callbacks["cfg_denoised"].append(callback)


def call(kind: str, *args: Any) -> list[Any]:
    results = []
    for callback in callbacks[kind]:
        try:
            results.append(callback(*args))
        except Exception:
            errors.report(f"Error executing callback {kind}", exc_info=True)
    return results
