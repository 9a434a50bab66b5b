"""One picture run with SUN: its settings, its adapter, and the negative text in force, without any host's names."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..sun.attention import Attend, attend
from ..sun.conditioning import match_rows
from ..sun.files import SunFileError
from ..sun.layers import AttentionLayer, layers_of_ldm
from . import store

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..sun.adapter import SunAdapter
    from ..sun.schedule import DenoiseMode

UNCONDITIONAL = -1


@dataclass(frozen=True)
class SunSettings:
    """What the accordion, the tab and the API say."""

    adapter: str
    strength: float = 1.0
    steps: int = 4
    main_negative: bool = True
    negative: str = ""
    denoise_mode: DenoiseMode = "trained"
    sampling: str = "sun"
    """"sun": the sampler SUN; "schedule": the chosen sampler on the trained timesteps; "keep": both as chosen."""
    guidance: float = 0.0
    """w of an adapter that takes it; 0: the adapter's own."""


@dataclass
class SunRun:
    """State of one run. Lives on the processing object and is dropped with it."""

    settings: SunSettings
    adapter: SunAdapter | None = None
    guidance: torch.Tensor | None = None
    """What the adapter makes of the guidance scale."""
    error: Exception | None = None
    """What went wrong while preparing: hosts swallow exceptions of scripts, so it is raised where they do not."""
    layers: tuple[AttentionLayer, ...] = ()
    guarded: bool = False
    """Whether the sampler in use was made to call SUN, or to raise `error`."""
    schedules: Any = None
    """The encoded negative prompt over the steps, as the host's prompt parser keeps it."""
    layer_calls: int = 0
    _negative: torch.Tensor | None = None
    _rows: dict[Any, tuple[torch.Tensor | None, torch.Tensor]] = field(default_factory=dict)

    @property
    def images(self) -> int:
        """How many images the step that runs now paints."""
        return 0 if self._negative is None else self._negative.shape[0]

    def use_negative(self, text: torch.Tensor) -> None:
        """Takes the negative text [B, L, width] for the step that begins, one row an image."""
        self._negative = text
        self._rows.clear()

    def change(
        self,
        position: int,
        query: torch.Tensor,
        z_p: torch.Tensor,
        positive: torch.Tensor | None,
        heads: int,
        images: Sequence[int],
        attend: Attend = attend,
    ) -> torch.Tensor:
        """Z before ``to_out`` of the adapter's layer at `position`; all tensors are [rows, T or L, C or width].

        images: which image each row paints, UNCONDITIONAL for rows that SUN leaves alone.
        """
        if self.adapter is None or self._negative is None:
            raise RuntimeError("SUN: the U-Net was called outside of a step. Please report this with the log.")
        if not images:
            raise ValueError("SUN: the U-Net was called with an empty batch.")
        self.layer_calls += 1
        adapter = store.on(self.adapter, query.device, query.dtype)
        layer = adapter.sun_layers()[position]
        acting, negative = self._text(tuple(images), query)
        if self.guidance is not None and self.guidance.device != query.device:
            self.guidance = self.guidance.to(query.device)

        def changed(query: torch.Tensor, z_p: torch.Tensor, positive: torch.Tensor | None) -> torch.Tensor:
            return layer(
                query, z_p, match_rows(negative, query.shape[0]),
                None if positive is None else match_rows(positive.to(query), query.shape[0]),
                heads=heads, strength=self.settings.strength, guidance=self.guidance, attend=attend,
            )  # fmt: skip

        if acting is None:
            return changed(query, z_p, positive)
        if not len(acting):
            return z_p
        result = z_p.clone()
        result[acting] = changed(query[acting], z_p[acting], None if positive is None else positive[acting])
        return result

    def _text(self, images: tuple[int, ...], query: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """The rows that act (None: all) and their negative texts, on the query's device; made once a step."""
        key = (images, query.device, query.dtype)
        if key not in self._rows:
            assert self._negative is not None
            acting = [row for row, image in enumerate(images) if image != UNCONDITIONAL]
            text = self._negative.to(query.device, query.dtype)[[images[row] for row in acting]]
            whole = len(acting) == len(images)
            self._rows[key] = (None if whole else torch.tensor(acting, device=query.device, dtype=torch.long), text)
        return self._rows[key]


def batch_was_changed(rows: int, size: int) -> RuntimeError:
    """For U-Net calls of `rows` rows in a step whose rows are known to be `size`."""
    return RuntimeError(
        f"SUN: the U-Net got {rows} rows in a step of {size}; another extension changed the batch. Switch it off."
    )


def fit(adapter: SunAdapter, unet: Any, where: str) -> tuple[AttentionLayer, ...]:
    """The cross-attention layers of an LDM U-Net if the adapter fits them. Raises SunFileError that names both."""
    try:
        layers = layers_of_ldm(unet)
    except ValueError as error:
        raise SunFileError(
            f"SUN works on Stable Diffusion 1.x models, and {where} is none ({error}) Choose an SD 1.5 checkpoint."
        ) from error
    to_k = unet.get_submodule(layers[0].ldm).to_k
    text_width = getattr(to_k, "in_features", None) or to_k.weight.shape[-1]
    adapter.check_base([layer.channels for layer in layers], text_width, where)
    return tuple(layers)


_current: list[SunRun] = []


@contextmanager
def active(run: SunRun) -> Iterator[None]:
    """Makes `run` the one whose steps the host's callbacks serve. Hosts sample one thing at a time."""
    _current.append(run)
    try:
        yield
    finally:
        _current.remove(run)


def current() -> SunRun | None:
    """The run that is being sampled now."""
    return _current[-1] if _current else None
