"""Who learns from whom: the frozen U-Net with SUN, the same U-Net with classifier-free guidance, and the adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import SunAdapter
from ..common.settings import ConfigError, without_folders
from ..files import SunInfo
from ..shipped import adapter_file
from ..surgery import from_unet, recentre, widen
from .algorithm import guided_noise
from .card import name_of, progress_of
from .config import SunTrainConfig
from .run import TrainingRun


class Student(nn.Module):
    """The frozen U-Net with SUN as one trainable module: its parameters are the adapter's alone."""

    def __init__(self, unet: nn.Module, adapter: SunAdapter):
        super().__init__()
        self.adapter = adapter
        self._unet = (unet,)  # in a tuple: not registered, so never trained, saved or averaged

    def forward(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor, w: Tensor | None = None) -> Tensor:
        """Predicted noise [B, 4, H, W] in one call; ``positive`` and ``negative`` are text states [B, L, D], ``w`` [B]
        guidance scales."""
        kwargs = {"sun_negative": negative, "sun_guidance": w}
        return self._unet[0](x, t, positive, cross_attention_kwargs=kwargs).sample.float()


class Teacher:
    """e_cfg of the frozen U-Net: both prompts in one batch of twice the size."""

    def __init__(self, unet: nn.Module, guidance_scale: float):
        self.unet, self.w = unet, guidance_scale

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, positive: Tensor, negative: Tensor, w: Tensor | None = None) -> Tensor:
        """``w`` [B]: guidance scales of the rows, else the teacher's own."""
        both = self.unet(torch.cat([x, x]), torch.cat([t, t]), torch.cat([positive, negative])).sample.float()
        e_positive, e_negative = both.chunk(2)
        return guided_noise(e_positive, e_negative, self.w if w is None else w)


def make_adapter(config: SunTrainConfig, unet: Any) -> SunAdapter:
    """A new adapter with K/V copied from the U-Net, or the one to continue from. Raises ConfigError."""
    guided = any(config.guidance_range)
    if config.init_adapter:
        adapter = _earlier_adapter(config, guided)
    else:
        adapter = from_unet(
            unet,
            positive=config.positive_branch,
            alpha=config.init_alpha,
            w=config.guidance_scale,
            info=SunInfo(normalized=config.attention_normalization),
        )
        adapter = widen(adapter, growing=True) if guided else adapter
    return adapter.float().requires_grad_(True).train()


def _earlier_adapter(config: SunTrainConfig, guided: bool) -> SunAdapter:
    path = adapter_file(config.init_adapter)
    adapter = SunAdapter.load(path, dtype=torch.float32)
    if adapter.guided and not guided:
        raise ConfigError("init_adapter takes the guidance scale: set guidance_range.")
    if not guided:
        return adapter
    adapter = adapter if adapter.guided else widen(adapter, config.guidance_scale, growing=True)
    return recentre(adapter, config.guidance_scale)


def describe_training(
    config: SunTrainConfig, run: TrainingRun, adapter: SunAdapter, earlier: dict[str, Any] | None = None
) -> None:
    """Put into the adapter's header what a reader needs to know of its training and of the ``earlier`` one."""
    settings = without_folders(config)
    info = adapter.info
    info.base_model = name_of(config.model)
    info.guidance_scale, info.stage_length = config.guidance_scale, config.stage_length
    # What the adapter is; one to go on from brings its own.
    settings |= {"positive_branch": adapter.positive, "attention_normalization": info.normalized}
    info.training = {**settings, **progress_of(run), **({"from": earlier} if earlier else {})}
