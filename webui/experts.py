"""Experts of a compact U-Net in A1111 and Forge: NAME.experts.safetensors beside the checkpoint NAME.safetensors.

As the .yaml beside a checkpoint, they belong to it and are always used with it. They sit on the U-Net's convolutions
while one sampling runs, and the infotext names them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..sun.common.identity import Stamp, stamp
from ..sun.compact.expertfile import experts_beside, read_experts
from ..sun.compact.experts import Experts, alike_of
from ..sun.compact.ldm_experts import mixing_of
from .hosts import family

log = logging.getLogger(__name__)

WRITTEN = "SUN experts"
_kept: list[tuple[Stamp, Experts]] = []


def file_of(p: Any) -> Path | None:
    """The experts that lie beside the loaded checkpoint, or None."""
    name = getattr(getattr(p.sd_model, "sd_checkpoint_info", None), "filename", "")
    return experts_beside(name) if name and Path(name).is_file() else None


def forget() -> None:
    """Gives the memory of the last experts back."""
    _kept.clear()


@contextmanager
def sampling(p: Any, path: Path) -> Iterator[None]:
    """Experts on the loaded U-Net while the block runs. Raises CompactError for a file that is not for it."""
    unet, experts = family.of(p.sd_model).unet_of(p.sd_model), _load(path)
    mixing = mixing_of(unet, experts)

    def see(_unet: Any, args: tuple[Any, ...]) -> None:
        mixing.alike = alike_of(args[0])

    hook = unet.register_forward_pre_hook(see)
    log.info("SUN: experts of %s, %d convolutions", path.name, len(experts.layers))
    try:
        yield
    finally:
        hook.remove()
        mixing.remove()


def _load(path: Path) -> Experts:
    key = stamp(path)
    if not _kept or _kept[0][0] != key:
        _kept[:] = [(key, read_experts(path))]
    return _kept[0][1]
