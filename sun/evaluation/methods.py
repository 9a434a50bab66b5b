"""Every way of sampling that can be measured, by name: ``ddim-4``, ``sun[NAME]-4``, ``nag[phi=3]-8``.

A method is the scheduler it steps with and a function that makes a U-Net ready for it. Names end in the number of
steps; brackets hold the name of an adapter (SUN) and options as ``key=value``, separated by commas.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter import SunAdapter
from ..common.settings import ConfigError
from ..ltc import LtcSettings
from ..pipelines import NEGATIVE, RUN, new_run
from ..pipelines.attach import attach, detach
from ..pipelines.schedulers import SCHEDULERS, make_scheduler
from .accelerators import INHERIT_OPTIONS, LTC_OPTIONS, PRESET_NAMES, deepcache, inheriting, ltc_settings

REFERENCE = "dpmpp-25"

Predict = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(x [B, 4, h, w], t, positive [B, L, D], negative [B, L, D]) -> predicted noise [B, 4, h, w] in float32."""


@dataclass
class Assets:
    """What methods work with: the frozen U-Net, w of classifier-free guidance, and the files of SUN and its peers.

    ``adapters`` by name, the main one as ``""``. ``attached``: the U-Net carries SUN already (a training run's), so
    nothing is put on or taken off. ``loaded`` keeps the U-Nets made for peers.
    """

    unet: Any
    w: float = 8.0
    adapters: Mapping[str, SunAdapter] = field(default_factory=dict)
    attached: bool = False
    lcm_lora: str = ""
    guided_distill: str = ""
    loaded: dict[str, Any] = field(default_factory=dict)

    def adapter_of(self, call: MethodCall) -> SunAdapter | None:
        """The adapter a method puts on the U-Net, if it has one and it is there."""
        return self.adapters.get(call.variant if call.method.named else "") if call.method.adapter else None


@dataclass(frozen=True)
class Prepared:
    """A U-Net ready for a method, and how to ask it; U-Net calls are counted on ``unet``.

    begin: told the scheduler before every run. ltc: how LTC-Accel chooses the steps to skip, if it does.
    """

    unet: Any
    predict: Predict
    begin: Callable[[Any], None] = lambda _scheduler: None
    ltc: LtcSettings | None = None


@dataclass(frozen=True)
class Method:
    """``guided``: two U-Net rows a picture and step. ``options``: what brackets may set, beside ``scheduler``."""

    name: str
    scheduler: str
    title: str
    prepare: Callable[[Assets, MethodCall], AbstractContextManager[Prepared]]
    guided: bool = False
    uses_negative: bool = False
    options: tuple[str, ...] = ()
    named: bool = False  # brackets may name an adapter
    presets: tuple[str, ...] = ()  # names that brackets may hold
    adapter: bool = False  # needs a SUN adapter
    inside: bool = False  # what it leaves out is inside of a U-Net call


@dataclass(frozen=True)
class MethodCall:
    """A method's name taken apart."""

    text: str
    method: Method
    steps: int
    variant: str = ""
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def scheduler(self) -> str:
        return self.options.get("scheduler", self.method.scheduler)

    @property
    def family(self) -> str:
        """The name without steps: what one line of a plot joins."""
        return self.text.rpartition("-")[0]

    def number(self, option: str, default: float) -> float:
        return float(self.options.get(option, default))

    def numbers(self) -> dict[str, float]:
        """The options that are keyword arguments of a peer's ``attach``."""
        return {key: float(value) for key, value in self.options.items() if key != "scheduler"}


Prepare = Callable[[Assets, MethodCall], AbstractContextManager[Prepared]]


@contextmanager
def _guided(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """Classifier-free guidance: both texts in one batch of twice the rows."""
    unet = assets.unet

    def predict(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        e_positive, e_negative = unet(torch.cat([x, x]), t, torch.cat([positive, negative])).sample.float().chunk(2)
        return e_negative + assets.w * (e_positive - e_negative)

    yield Prepared(unet, predict)


@contextmanager
def _conditional(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    yield _plain(assets.unet)


def _plain(unet: Any) -> Prepared:
    return Prepared(unet, lambda x, t, positive, _negative: unet(x, t, positive).sample.float())


def _steered(unet: Any, keyword: str) -> Prepared:
    """One row a picture; the negative text goes to the attention processors as ``keyword``."""

    def predict(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return unet(x, t, positive, cross_attention_kwargs={keyword: negative}).sample.float()

    return Prepared(unet, predict)


def _sun_run(unet: Any) -> Prepared:
    """The same for SUN, which also keeps what it makes of texts that come again at the next step."""
    run = new_run(unet)

    def predict(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        return unet(x, t, positive, cross_attention_kwargs={NEGATIVE: negative, RUN: run}).sample.float()

    return Prepared(unet, predict)


@contextmanager
def _sun(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    if assets.attached:
        yield _sun_run(assets.unet)
        return
    adapter = _adapter(assets, call)
    # One that takes the guidance scale is asked for the reference's.
    scale = assets.w if adapter.guided else None
    attach(assets.unet, adapter, strength=call.number("strength", 1.0), guidance_scale=scale)
    try:
        yield _sun_run(assets.unet)
    finally:
        detach(assets.unet)


def _adapter(assets: Assets, call: MethodCall) -> SunAdapter:
    if call.variant in assets.adapters:
        return assets.adapters[call.variant]
    if not call.variant:
        raise ConfigError(f"{call.text} needs a SUN adapter: give one with the setting adapter.")
    known = ", ".join(sorted(filter(None, assets.adapters))) or "none"
    raise ConfigError(
        f"{call.text}: there is no adapter {call.variant!r} in the table adapters (there are: {known}). "
        f'Add [adapters] {call.variant} = "FILE".'
    )


def load_peer(module: str, call: MethodCall) -> Any:
    """A module of ``sun.evaluation.peers``. Raises ConfigError if this installation lacks it."""
    try:
        return import_module(f".peers.{module}", __package__)
    except ModuleNotFoundError as error:
        if error.name and ".peers" not in error.name:
            raise
        raise ConfigError(
            f"{call.text} needs the module sun.evaluation.peers.{module}, which this installation lacks. "
            "Install the whole package again, or leave the method out."
        ) from error


@contextmanager
def _training_free(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """NASA or NAG: ``attach_NAME`` and ``detach_NAME`` of ``sun.evaluation.peers.NAME``."""
    name = call.method.name
    peer = load_peer(name, call)
    getattr(peer, f"attach_{name}")(assets.unet, **call.numbers())
    try:
        yield _steered(assets.unet, "negative")
    finally:
        getattr(peer, f"detach_{name}")(assets.unet)


@contextmanager
def _lcm_lora(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    """The LoRA is fused into a copy of the U-Net: no time is lost, and the frozen weights stay exactly as they are."""
    if call.method.name not in assets.loaded:
        from diffusers import StableDiffusionPipeline

        path = _existing(assets.lcm_lora, "lcm_lora", "the folder of an LCM-LoRA as diffusers saves it", call)
        weights, alphas = StableDiffusionPipeline.lora_state_dict(str(path), local_files_only=True)
        unet = copy.deepcopy(assets.unet)
        StableDiffusionPipeline.load_lora_into_unet(weights, network_alphas=alphas, unet=unet)
        unet.fuse_lora()
        unet.unload_lora()
        assets.loaded[call.method.name] = unet.to(assets.unet.device, assets.unet.dtype).eval()
    yield _plain(assets.loaded[call.method.name])


@contextmanager
def _guided_distill(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    if call.method.name not in assets.loaded:
        from diffusers import UNet2DConditionModel

        path = _existing(assets.guided_distill, "guided_distill", "a folder with the distilled U-Net in unet/", call)
        unet = UNet2DConditionModel.from_pretrained(path, subfolder="unet", local_files_only=True)
        assets.loaded[call.method.name] = unet.to(assets.unet.device, assets.unet.dtype).eval().requires_grad_(False)
    yield _plain(assets.loaded[call.method.name])


def _with_ltc(base: Prepare) -> Prepare:
    """``base``, skipping steps."""

    @contextmanager
    def prepare(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
        with base(assets, replace(call, variant="")) as ready:
            yield replace(ready, ltc=ltc_settings(call))

    return prepare


def _inheriting(base: Prepare) -> Prepare:
    """``base``, with features of earlier steps."""

    @contextmanager
    def prepare(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
        with base(assets, replace(call, variant="")) as ready, inheriting(ready.unet, call):
            yield ready

    return prepare


@contextmanager
def _deepcache(assets: Assets, call: MethodCall) -> Iterator[Prepared]:
    with _guided(assets, call) as ready, deepcache(ready.unet, call) as begin:
        yield replace(ready, begin=begin)


def _existing(path: str, setting: str, what: str, call: MethodCall) -> Path:
    if not path:
        raise ConfigError(f"{call.text} needs the setting {setting}: {what}. Give it, or leave the method out.")
    if not Path(path).exists():
        raise ConfigError(f"{setting} = {path} does not exist; {call.text} needs {what}.")
    return Path(path)


# fmt: off
METHODS = {
    m.name: m
    for m in (
        Method("ddim", "ddim", "DDIM with CFG", _guided, guided=True, uses_negative=True),
        Method("dpmpp", "dpmpp_2m", "DPM-Solver++ with CFG", _guided, guided=True, uses_negative=True),
        Method("unipc", "unipc", "UniPC with CFG", _guided, guided=True, uses_negative=True),
        Method("euler", "euler", "Euler with CFG", _guided, guided=True, uses_negative=True),
        Method("cond", "dpmpp_2m", "DPM-Solver++ without guidance", _conditional),
        Method("sun", "ddim", "SUN", _sun, uses_negative=True, options=("strength",), named=True, adapter=True),
        Method("nasa", "ddim", "NASA", _training_free, uses_negative=True, options=("scale",)),
        Method("nag", "ddim", "NAG", _training_free, uses_negative=True, options=("phi", "tau", "alpha")),
        Method("lcm-lora", "lcm", "LCM-LoRA", _lcm_lora),
        Method("guided-distill", "ddim", "guided distillation", _guided_distill),
        Method("ltc", "dpmpp_2m", "LTC-Accel", _with_ltc(_guided), True, True, LTC_OPTIONS),
        Method("inherit", "dpmpp_2m", "feature inheritance", _inheriting(_guided), True, True, INHERIT_OPTIONS,
               presets=PRESET_NAMES, inside=True),
        Method("ltc+inherit", "dpmpp_2m", "LTC-Accel and feature inheritance", _with_ltc(_inheriting(_guided)),
               True, True, (*LTC_OPTIONS, *INHERIT_OPTIONS), presets=PRESET_NAMES, inside=True),
        Method("sun+ltc", "ddim", "SUN and LTC-Accel", _with_ltc(_sun), False, True, LTC_OPTIONS, adapter=True),
        Method("sun+inherit", "ddim", "SUN and feature inheritance", _inheriting(_sun), False, True, INHERIT_OPTIONS,
               presets=PRESET_NAMES, adapter=True, inside=True),
        Method("deepcache", "dpmpp_2m", "DeepCache", _deepcache, True, True, ("interval", "branch"), inside=True),
    )
}
# fmt: on
_PATTERN = re.compile(r"(?P<name>[a-z][a-z+-]*?)(?:\[(?P<inside>[^\[\]]*)\])?-(?P<steps>[1-9]\d*)")


def parse_method(text: str) -> MethodCall:
    """``"sun[late,strength=0.5]-4"`` -> its method, steps, adapter name and options.

    Raises ConfigError (a ValueError) that lists the known methods or options.
    """
    match = _PATTERN.fullmatch(text)
    if match is None or match["name"] not in METHODS:
        known = ", ".join(f"{name}-STEPS" for name in METHODS)
        raise ConfigError(f"unknown method {text!r}: choose from {known}")
    method = METHODS[match["name"]]
    variant, options = "", {}
    for part in filter(None, (p.strip() for p in (match["inside"] or "").split(","))):
        key, equals, value = part.partition("=")
        if not equals and not variant and (method.named or part in method.presets):
            variant = part
        elif equals and (key in method.options or key == "scheduler"):
            options[key] = _checked(key, value, text)
        else:
            known = ", ".join((*method.presets, *(f"{o}=VALUE" for o in (*method.options, "scheduler"))))
            raise ConfigError(f"{text}: {part!r} is no option of {method.name}; it takes {known}")
    return MethodCall(text, method, int(match["steps"]), variant, options)


def _checked(key: str, value: str, text: str) -> str:
    if key == "scheduler":
        if value not in (*SCHEDULERS, "lcm"):
            raise ConfigError(f"{text}: scheduler takes {', '.join(SCHEDULERS)} or lcm, not {value!r}")
        return value
    try:
        float(value)
    except ValueError:
        raise ConfigError(f"{text}: {key} takes a number, not {value!r}") from None
    return value


def split_method(method: str) -> tuple[str, int]:
    """``"dpmpp-25"`` -> ("dpmpp", 25). Raises ``ValueError`` that lists the known methods."""
    call = parse_method(method)
    return call.method.name, call.steps


def scheduler_of(call: MethodCall, config: Mapping[str, Any]) -> Any:
    """The scheduler a method steps with, on the noise schedule of ``config``.

    ``lcm`` is diffusers' multistep consistency sampling (Luo et al. 2023, arXiv 2310.04378) on its own timesteps.
    """
    if call.scheduler == "lcm":
        from diffusers import LCMScheduler

        return LCMScheduler.from_config(config, clip_sample=False)
    return make_scheduler(call.scheduler, config)
