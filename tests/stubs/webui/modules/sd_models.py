"""The list of checkpoints."""

from typing import Any

checkpoints_list: dict[str, Any] = {}
"""By title: an object with .title and .filename."""


def checkpoint_tiles() -> list[str]:
    return ["emoji.safetensors [0123456789]"]


def list_models() -> None:
    return None


def get_closet_checkpoint_match(name: str) -> Any:
    return name if name in checkpoint_tiles()[0] else None
