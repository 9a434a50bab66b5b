"""LTC-Accel, feature inheritance and their peers as methods: ``ltc[terms=2]-30``, ``spectrum[sdcpp]-20``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from .. import inheritance
from ..common.settings import ConfigError
from ..inheritance import PRESETS, InheritanceError, Plan
from ..inheritance.plan import changed
from ..ltc import LtcError, LtcSettings, SkipRun, SkipSettings
from ..ltc.presets import preset
from .names import MethodCall
from .peers import adaptive_diffusion
from .peers.adaptive_diffusion import AdaptiveDiffusion
from .peers.easycache import END, START, THRESHOLD, CacheSettings, EasyCache, LazyCache
from .peers.sada import LAGRANGE_FROM, Sada
from .peers.spectrum import Spectrum, spectrum_settings
from .peers.step_skipping import Moment, Skipper


def ltc_settings(call: MethodCall) -> LtcSettings:
    """The published method. Steps are chosen by position unless tau is given, so that the number of calls is known.
    Raises ConfigError."""
    if odd := [key for key in ("row", "guard", "ridge", "memory") if key in call.options]:
        raise ConfigError(f"{call.text}: {odd[0]} belongs to a preset, as in ltc[balanced,{odd[0]}=...]-25.")
    try:
        return LtcSettings(
            tau=call.number("tau", 0.0),
            every=int(call.number("every", 2)),
            first=call.number("first", 0.25),
            last=int(call.number("last", 2)),
            terms=int(call.number("terms", 1)),
        )
    except LtcError as error:
        raise ConfigError(f"{call.text}: {error}") from error


def plan_of(call: MethodCall) -> Plan:
    """The preset in the brackets changed by the options; without one, a plan of the options, or balanced. Raises
    ConfigError.

    early, late: the power of key steps that are dense there. ``every`` of a combination is LTC-Accel's.
    """
    given: dict[str, Any] = {key: int(call.number(key, 0)) for key in ("stages", "outer") if key in call.options}
    plan = Plan(outer=1) if given and not call.variant else PRESETS[call.variant or "balanced"]
    if "every" in call.options and not call.method.ltc:
        given["every"] = int(call.number("every", 2))
    for word in ("early", "late"):
        if word in call.options:
            given |= {"mode": f"dense-{word}", "power": call.number(word, 1.4)}
    try:
        return changed(plan, {**given, "forecast": call.number("forecast", plan.forecast)})
    except InheritanceError as error:
        raise ConfigError(f"{call.text}: {error}") from error


@contextmanager
def inheriting(unet: Any, call: MethodCall) -> Iterator[None]:
    """A diffusers U-Net that inherits features. Raises ConfigError for a plan that does not fit it."""
    try:
        inheritance.attach(unet, plan_of(call), steps=call.steps)
    except InheritanceError as error:
        raise ConfigError(f"{call.text}: {error}") from error
    try:
        yield
    finally:
        inheritance.detach(unet)


class LtcSkipper:
    """LTC-Accel's forecast of one picture, as a peer is asked."""

    def __init__(self, settings: SkipSettings, noisy: bool = False) -> None:
        self.settings, self.noisy = settings, noisy
        self._run: SkipRun | None = None

    def __repr__(self) -> str:
        return f"{self.settings!r}{' on fresh noise' if self.noisy else ''}"

    def forecast(self, at: Moment) -> Tensor | None:
        if self._run is None:  # a run that begins at a picture has no steps before this one
            self._run = SkipRun(at.levels[at.step :], self.settings, noisy=self.noisy)
        level, x = at.sigma / at.alpha, (at.z / at.alpha)[None]
        return at.noise(self._run.answer(level, x)[0]) if self._run.skips(level) and self._run.suits(x) else None

    def learn(self, at: Moment, guided: Tensor, rows: Tensor) -> None:
        assert self._run is not None
        self._run.see(at.sigma / at.alpha, (at.z / at.alpha)[None], at.clean(guided)[None])


def skip_settings(call: MethodCall) -> SkipSettings:
    """The preset of LTC-Accel in the brackets, changed by the options. Raises ConfigError."""
    whole = ("last", "every", "row", "terms")
    given = {key: int(value) if key in whole else value for key, value in call.numbers().items()}
    try:
        return preset(call.variant, **given)
    except LtcError as error:
        raise ConfigError(f"{call.text}: {error}") from error


def skipper_of(call: MethodCall) -> Callable[[], Skipper]:
    """Makes what decides about steps anew for each picture: a peer, or LTC-Accel's forecast. Raises ConfigError."""
    name = call.method.name
    if call.method.ltc:
        chosen = skip_settings(call)
        return lambda: LtcSkipper(chosen, noisy=call.scheduler == "lcm")
    if name == "spectrum":
        spectrum = spectrum_settings(call.variant or "comfyui", **call.numbers())
        return lambda: Spectrum(spectrum)
    if name == "sada":
        return lambda: Sada(LAGRANGE_FROM if call.variant == "lagrange" else 1.0)
    if name == "adaptive":
        threshold = call.number("threshold", adaptive_diffusion.THRESHOLD)
        most = int(call.number("most", adaptive_diffusion.MOST))
        return lambda: AdaptiveDiffusion(threshold, most)
    settings = CacheSettings(call.number("threshold", THRESHOLD), call.number("start", START), call.number("end", END))
    return lambda: EasyCache(settings) if name == "easycache" else LazyCache(settings)


def import_deepcache() -> Any:
    """DeepCache's helper for Stable Diffusion. Raises ConfigError with what to install."""
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise ConfigError("deepcache needs the package DeepCache: pip install --no-deps DeepCache.") from error
    return DeepCacheSDHelper


@contextmanager
def deepcache(unet: Any, call: MethodCall) -> Iterator[Callable[[Any], None]]:
    """A U-Net under the package DeepCache; yields what tells it of a new run's scheduler."""
    pipe = SimpleNamespace(unet=unet, scheduler=SimpleNamespace(timesteps=range(1000)))
    helper = import_deepcache()(pipe=pipe)
    helper.set_params(cache_interval=int(call.number("interval", 2)), cache_branch_id=int(call.number("branch", 2)))
    helper.enable()

    def begin(scheduler: Any) -> None:
        pipe.scheduler, helper.start_timestep = scheduler, None
        helper.cached_output.clear()

    modules = list(unet.modules())
    try:
        yield begin
    finally:
        helper.disable()
        for module in modules:  # it leaves the original bound to each module, where a class's own would do
            module.__dict__.pop("forward", None)
