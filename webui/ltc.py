"""LTC-Accel in A1111 and Forge: in the place of the sampler's function while one sampling runs.

The host calls `sampler.func(denoiser, x, sigmas=..., ...)`, where the denoiser evaluates both passes of guidance. Here
the function is the host's own, and the denoiser one that in a skipped step answers itself. Only what this one sampler
object holds is replaced, and only until its sampling ends, fails or is interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from modules import paths, sd_samplers_common, shared

from ..sun.common.identity import digest_of
from ..sun.ltc import LtcKey, LtcSettings, LtcTable, SkipRun, SkipSettings, TableStore, adapter_digest, fingerprint
from ..sun.ltc.counts import say
from ..sun.ltc.errors import unknown_sampler
from ..sun.ltc.kdiffusion import SOLVERS, SamplerRun, kind_of, solver_of
from ..sun.ltc.keep import running, summary
from . import infotext, switching
from .changes import ALTERNATES, Changes
from .hosts import family
from .sampler import function_replaced

# Written by the hosts themselves in the space of variance 1, where a step with eta 0 is one of Euler.
OWN_SOLVERS = {**SOLVERS, "ddim": "euler"}


def tables_folder() -> Path:
    """Where tables are kept: beside the adapters in the models folder, which updates and reinstalls leave alone."""
    return Path(paths.models_path) / "sun" / "ltc"


@contextmanager
def sampling(p: Any, settings: SkipSettings | LtcSettings, calibration: str) -> Iterator[None]:
    """Lets p.sampler skip steps. Raises LtcError where the paper's settings cannot be, saying which samplers can."""
    infotext.forget_counts(p)
    runs: list[SamplerRun | SkipRun] = []

    def skipping(
        function: Callable[..., torch.Tensor], given: Mapping[str, Any], denoiser: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        name = getattr(function, "__name__", "")
        known = levels_of(name, denoiser, given)
        levels = tuple(map(float, known)) if known is not None else ()
        changes = Changes(p, denoiser, guidance(p, given), negative_minimum(denoiser, given))
        with ExitStack() as stack:
            run = open_run(p, stack, name, given, levels, changes, settings, calibration)
            runs.append(run)
            answering = (Denoiser if given.get("timesteps") is None else UnitVarianceDenoiser)(denoiser, run, changes)
            samples = function(answering, *args, **kwargs)
            if isinstance(run, SamplerRun):
                run.run.finish(answering.plain(samples, levels[-1]))
        tell(p, run)
        return samples

    with function_replaced(p, skipping, unknown_sampler(p.sampler_name)):
        yield
    if not runs:
        raise unknown_sampler(p.sampler_name)  # it samples by something else than its function


def open_run(
    p: Any,
    stack: ExitStack,
    name: str,
    given: Mapping[str, Any],
    levels: tuple[float, ...],
    changes: Changes,
    settings: SkipSettings | LtcSettings,
    calibration: str,
) -> SamplerRun | SkipRun:
    """The run of one sampling by the function `name`, which is called with what is `given`."""
    label, both = label_of(p.sampler), switching.current(p)
    first = None if both is None or not levels else both.switching.switches_at(len(levels) - 1)
    anew = set() if first is None else {first}  # another U-Net takes over there
    if isinstance(settings, SkipSettings):
        noisy, why = kind_of(name, given, label)
        if not levels:
            why = why or f"{label} chooses its noise levels itself"
        return SkipRun(levels, settings, noisy=noisy, refused=why, anew=anew)
    solver = solver_of(name, given, OWN_SOLVERS, label)
    unet, loras = family.of(p.sd_model).unet_of(p.sd_model), loras_of(p)
    key = LtcKey(
        fingerprint(unet, attention=not loras),  # the host changes these weights when it first calls them
        solver,
        levels,
        guidance(p, given),
        " ".join(filter(None, (sun_of(p), loras, "" if both is None else both.for_table(), changes.for_table))),
    )

    def said(table: LtcTable) -> None:
        p.comment(summary(table))

    store = TableStore(tables_folder())
    published = stack.enter_context(running(key, settings, store, calibration, said))
    published.real |= anew
    if alone := {i for i, level in enumerate(levels[:-1]) if level < changes.minimum}:
        published.real |= alone if changes.alternating else {min(alone)}
        published.why = ALTERNATES if changes.alternating else ""
    return SamplerRun(solver, levels, published)


def tell(p: Any, run: SamplerRun | SkipRun) -> None:
    """What a run did: in the log, in the infotext, and under the picture where something kept it from skipping as
    much as its preset says."""
    published = run.run if isinstance(run, SamplerRun) else None
    measured = published is not None and published.measure is not None
    infotext.write_measured(p, measured)
    if published is not None and measured:
        if published.spoilt:
            p.comment(run.counts.sentence)
        return  # it has said what it measured
    say(run.counts)
    infotext.write_counts(p, run.counts.with_reason)
    if run.counts.guarded:
        infotext.write_batch(p)
    if run.counts.why or run.counts.guarded or run.counts.calls == run.counts.steps:
        p.comment(run.counts.sentence)


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


def levels_of(name: str, denoiser: Any, given: Mapping[str, Any]) -> Sequence[float] | None:
    """Noise levels [N + 1] of the steps that a sampler's function is about to make; None where it chooses them itself,
    as DPM fast does, which is told the first and the last one."""
    timesteps = given.get("timesteps")
    if timesteps is None:
        return given.get("sigmas")
    table = sigmas_of(denoiser)
    if name == "unipc":  # takes from its timesteps how many they are, and goes evenly from the last one that is trained
        return [*(table(float(t)) for t in torch.linspace(len(table) - 1, 0, len(timesteps) + 1)[:-1]), 0.0]
    return [table(float(t)) for t in timesteps.flip(0)]


class Sigmas:
    """Noise levels of the trained timesteps, and between them. sigmas: of timesteps 0, 1, ..."""

    def __init__(self, sigmas: torch.Tensor) -> None:
        self.logs: list[float] = sigmas.double().cpu().log().tolist()

    def __len__(self) -> int:
        return len(self.logs)

    def __call__(self, timestep: float) -> float:
        at = min(max(timestep, 0.0), len(self.logs) - 1.0)
        low = min(int(at), len(self.logs) - 2)
        return math.exp((1 - at + low) * self.logs[low] + (at - low) * self.logs[low + 1])


def negative_minimum(denoiser: Any, given: Mapping[str, Any]) -> float:
    """The sigma below which the host leaves out the negative prompt, in some steps or in all; 0 for none. A1111
    compares its setting with the timestep where a sampler walks those, Forge with the sigma there too."""
    least = float((given.get("extra_args") or {}).get("s_min_uncond") or 0.0)
    if least <= 0 or given.get("timesteps") is None or getattr(denoiser, "classic_ddim_eps_estimation", False):
        return least
    return sigmas_of(denoiser)(least)


def sigmas_of(denoiser: Any) -> Sigmas:
    alphas = denoiser.inner_model.inner_model.alphas_cumprod.double().cpu()
    return Sigmas(((1 - alphas) / alphas).sqrt())


class Denoiser:
    """The host's denoiser, except that in a skipped step it answers without a call of the U-Net."""

    def __init__(self, denoiser: Any, run: SamplerRun | SkipRun, changes: Changes) -> None:
        self._denoiser, self._run, self._changes = denoiser, run, changes
        skipped = [run.levels[i] for i in run.skipped] if isinstance(run, SkipRun) and run.levels else []
        self._stops = any(level < changes.alternating for level in skipped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        """`denoised` [B, ...] at latents x."""
        asked: list[bool] = []

        def model() -> torch.Tensor:
            asked.append(True)
            answer: torch.Tensor = self._denoiser(x, sigma, **extra)
            return answer

        level = self.level(float(sigma.flatten()[0]))
        if self._stops and level < self._changes.alternating and isinstance(self._run, SkipRun):
            self._run.stop(ALTERNATES)
        answer = self.answer(level, x, model, self._changes.at(level, extra))
        if not asked:
            self.go_on()
        return answer

    def level(self, sigma: float) -> float:
        """The noise level that the host means by `sigma`."""
        return sigma

    def answer(self, level: float, x: torch.Tensor, model: Callable[[], torch.Tensor], state: Hashable) -> torch.Tensor:
        return self._run.denoised(level, x, model, state)

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

    def __init__(self, denoiser: Any, run: SamplerRun | SkipRun, changes: Changes) -> None:
        super().__init__(denoiser, run, changes)
        self._sigma_at = sigmas_of(denoiser)

    def level(self, sigma: float) -> float:
        """The noise level of the host's timestep."""
        return self._sigma_at(sigma)

    def answer(self, level: float, x: torch.Tensor, model: Callable[[], torch.Tensor], state: Hashable) -> torch.Tensor:
        """Predicted noise [B, ...] at latents x."""
        if isinstance(self._run, SamplerRun):
            noise = self._run.direction(self.plain(x, self._run.sigma))
            return model() if noise is None else noise.to(x.dtype)
        latents = self.plain(x, level)
        denoised = self._run.denoised(level, latents, lambda: latents - level * model().float(), state)
        return ((latents - denoised) / level).to(x.dtype)

    @staticmethod
    def plain(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return x.float() * (1 + sigma**2) ** 0.5
