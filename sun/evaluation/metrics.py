"""Distances between pictures and between sets of them, by torchmetrics; intervals by bootstrap.

Means carry a 95 % percentile interval over pictures. torchmetrics is imported on first use.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ..common.settings import ConfigError

PSNR_CEILING = 100.0  # dB; equal pictures would be infinite, and no mean survives that


class _Given(torch.nn.Module):
    """Feature "network" for torchmetrics that passes given features through."""

    def __init__(self, count: int):
        super().__init__()
        self.num_features = count

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """FID formula (Heusel et al. 2017) on given features [N, D]."""
    metric = import_torchmetrics("image.fid").FrechetInceptionDistance(feature=_Given(features.shape[1]))
    metric.set_dtype(torch.float64)
    metric.update(reference.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return float(metric.compute())


def frechet_interval(features: Tensor, reference: Tensor, draws: int = 40) -> tuple[float, float]:
    """95 % interval of :func:`frechet_distance`: the estimate plus and minus 1.96 bootstrap standard deviations.

    The same pictures are drawn from both sets, which are paired. The percentile interval would not hold the estimate:
    a set with repeated pictures is always further away.
    """
    if draws < 2:
        return float("nan"), float("nan")
    generator = torch.Generator().manual_seed(0)
    drawn = []
    for _ in range(draws):
        picks = torch.randint(0, len(features), (len(features),), generator=generator)
        drawn.append(frechet_distance(features[picks], reference[picks]))
    half = 1.96 * float(torch.tensor(drawn, dtype=torch.float64).std())
    centre = frechet_distance(features, reference)
    return max(0.0, centre - half), centre + half


def kernel_statistics(features: Tensor, reference: Tensor) -> tuple[float, float]:
    """KID (Binkowski et al. 2018; unbiased at small N) on given features [N, D]: its mean and standard deviation over
    random subsets of half the pictures, 256 at most."""
    size = min(256, max(2, min(len(features), len(reference)) // 2))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # that it keeps the features, which is wanted
        torch.manual_seed(0)
        metric = import_torchmetrics("image.kid").KernelInceptionDistance(
            feature=_Given(features.shape[1]), subsets=50, subset_size=size
        )
        metric.update(reference.float().cpu(), real=True)
        metric.update(features.float().cpu(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def psnr(pixels: Tensor, reference: Tensor) -> Tensor:
    """[B]: peak signal-to-noise ratio in dB of pictures [B, 3, H, W] in -1..1, at most ``PSNR_CEILING``."""
    ratio = import_torchmetrics("functional.image").peak_signal_noise_ratio
    return ratio(pixels, reference, data_range=2.0, reduction="none", dim=(1, 2, 3)).clamp(max=PSNR_CEILING)


def ssim(pixels: Tensor, reference: Tensor) -> Tensor:
    """[B]: structural similarity (Wang et al. 2004; 11 x 11 Gaussian) of pictures [B, 3, H, W] in -1..1."""
    similarity = import_torchmetrics("functional.image").structural_similarity_index_measure
    result: Tensor = similarity((pixels + 1) / 2, (reference + 1) / 2, data_range=1.0, reduction="none")
    return result


def map_distance(maps: list[Tensor], reference: list[Tensor], eps: float = 1e-10) -> Tensor:
    """[B]: LPIPS-like distance (Zhang et al. 2018, without learned weights) of feature maps, each [B, C, h, w].

    Channels are normalised to unit length at every place; squared differences are summed over channels and averaged
    over places and layers: 0 for equal maps, 2 for orthogonal ones.
    """
    layers = []
    for a, b in zip(maps, reference, strict=True):
        a, b = (x.float() / (x.float().norm(dim=1, keepdim=True) + eps) for x in (a, b))
        layers.append((a - b).square().sum(1).mean((1, 2)))
    return torch.stack(layers).mean(0)


def bootstrap_interval(values: Tensor, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of the mean of ``values`` [N]."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(values), (draws, len(values)), generator=generator)
    means = values.cpu()[picks].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def mean_and_interval(name: str, values: Tensor) -> dict[str, Any]:
    """``{name: mean, name_interval: (low, high)}`` of the values [N] that are numbers; empty if none is."""
    known = values[~values.isnan()].double()
    if not len(known):
        return {}
    return {name: float(known.mean()), f"{name}_interval": bootstrap_interval(known)}


def import_torchmetrics(module: str) -> Any:
    """``torchmetrics.<module>``. Raises ConfigError with what to install."""
    from importlib import import_module

    try:
        return import_module(f"torchmetrics.{module}")
    except ModuleNotFoundError as error:
        raise ConfigError(
            'measuring distances needs torchmetrics: pip install -e ".[eval]" in a clone of the repository.'
        ) from error
