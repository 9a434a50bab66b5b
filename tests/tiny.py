"""Tiny random models with Stable Diffusion 1.5's topology, built without any download.

Everything is seeded: two calls give equal weights. 64 x 64 pixels, latents 8 x 8 x 4, text width 16, attention
widths 8, 16, 24.
"""

from __future__ import annotations

from typing import Any

import torch

TEXT_WIDTH = 16
STAGES = (8, 16, 24, 24)
SHORT_STAGES = (8, 16)


def make_unet(
    seed: int = 0, in_channels: int = 4, stages: tuple[int, ...] = STAGES, text_width: int = TEXT_WIDTH
) -> Any:
    """A ``UNet2DConditionModel`` with Stable Diffusion 1.5's blocks and very few channels."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=stages,
        layers_per_block=2,
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def make_short_unet(seed: int = 0, in_channels: int = 4, text_width: int = TEXT_WIDTH) -> Any:
    """Two of those stages with one layer each: four layers of SUN, and a call takes a quarter of the time.

    For tests of what happens around a U-Net, of compilers and of exporters, which follow every layer.
    """
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        block_out_channels=SHORT_STAGES,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def make_single_stage_unet(seed: int = 0) -> Any:
    """One stage with a layer and no middle: three layers of SUN, for compilers that follow each several times."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=SHORT_STAGES[:1],
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()


def make_adapter(unet: Any, positive: bool = True, seed: int = 7) -> Any:
    """A random adapter for ``unet`` whose every part matters to the output."""
    from sun.surgery import from_unet

    adapter = from_unet(unet, positive=positive)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapter.eval()


class CallLog:
    """Records every call of a module: batch rows, timestep and text tokens."""

    def __init__(self, module: Any) -> None:
        self.rows: list[int] = []
        self.timesteps: list[int] = []
        self.texts: list[Any] = []
        self.handle = module.register_forward_pre_hook(self._record, with_kwargs=True)

    def _record(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        self.rows.append(values["sample"].shape[0])
        self.timesteps.append(int(values["timestep"]))
        self.texts.append(values["encoder_hidden_states"])

    def __len__(self) -> int:
        return len(self.rows)
