"""LTC-Accel in A1111 and Forge: in the place of the sampler's function while one sampling runs.

The host calls `sampler.func(denoiser, x, sigmas=..., ...)`, where the denoiser evaluates both passes of guidance. Here
the function is the host's own, and the denoiser one that in a skipped step answers itself. Only what this one sampler
object holds is replaced, and only until its sampling ends, fails or is interrupted.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from modules import paths, sd_samplers_common, shared

from ..sun.common.identity import digest_of
from ..sun.ltc import LtcKey, LtcSettings, LtcTable, TableStore, adapter_digest, fingerprint
from ..sun.ltc.errors import unknown_sampler
from ..sun.ltc.kdiffusion import SOLVERS, SamplerRun, solver_of
from ..sun.ltc.keep import running, summary
from . import infotext
from .hosts import family

# Written by the hosts themselves in the space of variance 1, where a step with eta 0 is one of Euler.
OWN_SOLVERS = {**SOLVERS, "ddim": "euler"}


def tables_folder() -> Path:
    """Where tables are kept: beside the adapters in the models folder, which updates and reinstalls leave alone."""
    return Path(paths.models_path) / "sun" / "ltc"


@contextmanager
def sampling(p: Any, settings: LtcSettings, calibration: str) -> Iterator[None]:
    """Lets p.sampler skip steps. Raises LtcError for a sampler that cannot be accelerated, saying which can."""
    sampler = p.sampler
    function = getattr(sampler, "func", None)
    if not callable(function):
        raise unknown_sampler(p.sampler_name)
    runs: list[SamplerRun] = []

    @functools.wraps(function)  # hosts ask it for its parameters
    def skipping(denoiser: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        given = inspect.signature(function).bind(denoiser, *args, **kwargs).arguments
        solver = solver_of(getattr(function, "__name__", ""), given, OWN_SOLVERS, label_of(sampler))
        timesteps, model = given.get("timesteps"), family.of(p.sd_model)
        levels = given["sigmas"] if timesteps is None else levels_at(denoiser, timesteps)
        unet, loras = model.unet_of(p.sd_model), loras_of(p)
        key = LtcKey(
            fingerprint(unet, attention=not loras),  # the host changes these weights when it first calls them
            solver,
            tuple(map(float, levels)),
            guidance(p, given),
            " ".join(filter(None, (sun_of(p), loras))),
        )

        def said(table: LtcTable) -> None:
            p.comment(summary(table))

        with running(key, settings, TableStore(tables_folder()), calibration, said) as run:
            runs.append(SamplerRun(solver, key.sigmas, run))
            answering = (Denoiser if timesteps is None else UnitVarianceDenoiser)(denoiser, runs[-1])
            samples = function(answering, *args, **kwargs)
            run.finish(answering.plain(samples, key.sigmas[-1]))
        infotext.write_measured(p, run.measure is not None)
        return samples

    sampler.func = skipping
    try:
        yield
    finally:
        if sampler.func is skipping:
            sampler.func = function
    if not runs:
        raise unknown_sampler(p.sampler_name)  # it samples by something else than its function


def sun_of(p: Any) -> str:
    """The SUN of a processing object, for `LtcKey`; empty where it is off."""
    run = getattr(p, "sun_run", None)
    if run is None or run.adapter is None:
        return ""
    return f"sun {adapter_digest(run.adapter)} {run.strength:.4g} {run.guidance or ''}"


def loras_of(p: Any) -> str:
    """The extra networks that the prompt names, with their weights, for `LtcKey`; empty if there are none."""
    hires = getattr(p, "is_hr_pass", False) and getattr(p, "hr_extra_network_data", None)
    networks = (hires or getattr(p, "extra_network_data", None)) or {}
    named = sorted(f"{kind} {' '.join(map(str, n.items))}" for kind, ones in networks.items() for n in ones)
    return f"networks {digest_of(named)}" if named else ""


def label_of(sampler: Any) -> str:
    """The sampler's name in the host's list."""
    return str(getattr(sampler.config, "name", ""))


def guidance(p: Any, given: Mapping[str, Any]) -> float:
    """The scale that guidance has in this sampling; Forge has one of its own for the second pass of hires fix."""
    scale = (given.get("extra_args") or {}).get("cond_scale", p.cfg_scale)
    return float(getattr(p, "hr_cfg", scale) if getattr(p, "is_hr_pass", False) else scale)


def levels_at(denoiser: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """Sigma at each of the ascending `timesteps` [N + 1], in the order in which DDIM visits them."""
    alphas = denoiser.inner_model.inner_model.alphas_cumprod.double()[timesteps.flip(0).to("cpu").tolist()]
    return ((1 - alphas) / alphas).sqrt()


class Denoiser:
    """The host's denoiser, except that in a skipped step it answers without a call of the U-Net."""

    def __init__(self, denoiser: Any, run: SamplerRun) -> None:
        self._denoiser, self._run = denoiser, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        """`denoised` [B, ...] at latents x."""
        asked: list[bool] = []

        def model() -> torch.Tensor:
            asked.append(True)
            return self._denoiser(x, sigma, **extra)

        answer = self._run.denoised(x, model)
        if not asked:
            self.go_on()
        return answer

    def go_on(self) -> None:
        """What the host's denoiser does beside calling the model: ends interrupted runs, counts for prompt editing."""
        if shared.state.interrupted or shared.state.skipped:
            raise sd_samplers_common.InterruptedException
        self._denoiser.step += 1

    @staticmethod
    def plain(x: torch.Tensor, sigma: float) -> torch.Tensor:
        """Latents of the sampler in the sigma parametrisation."""
        return x


class UnitVarianceDenoiser(Denoiser):
    """The same for samplers whose latents are scaled by 1 / sqrt(1 + sigma^2) and whose denoiser predicts noise."""

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        """Predicted noise [B, ...] at latents x. sigma: the host's timestep."""
        noise = self._run.direction(self.plain(x, self._run.sigma))
        if noise is None:
            predicted: torch.Tensor = self._denoiser(x, sigma, **extra)
            return predicted
        self.go_on()
        return noise.to(x.dtype)

    @staticmethod
    def plain(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x.float() * (1 + sigma**2) ** 0.5
