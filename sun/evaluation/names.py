"""Names of ways of sampling, taken apart once: ``ddim-4``, ``sun[NAME]-4``, ``nag[phi=3]-8``.

A name ends in the number of steps; brackets hold the name of an adapter (SUN) or of a preset, and options as
``key=value``, separated by commas. :func:`parse_method` is the door; from there a :class:`MethodCall` travels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..common.settings import ConfigError
from ..inheritance import PRESETS
from ..ltc import PRESETS as LTC_PRESETS
from ..pipelines.schedulers import SCHEDULERS

LTC_OPTIONS = ("tau", "every", "first", "last", "terms")
FORECAST_OPTIONS = ("row", "guard", "ridge", "memory")  # of LTC-Accel's presets, beside some of the above
NAG_OPTIONS = ("phi", "tau", "alpha")
INHERIT_OPTIONS = ("stages", "outer", "every", "forecast", "early", "late")
PRESET_NAMES = tuple(PRESETS)
SPECTRUM_OPTIONS = ("weight", "degree", "ridge", "window", "growth", "warmup", "tail", "history")
CACHE_OPTIONS = ("threshold", "start", "end")
PLAIN = {"dpmpp_2m": "dpmpp", "euler": "euler", "unipc": "unipc", "ddim": "ddim"}
"""Schedulers and the methods that do nothing but step with them, guided."""
MOST_STEPS = 1000  # no noise schedule has more


@dataclass(frozen=True)
class Method:
    """A way of sampling; :mod:`.methods` says how a U-Net is made ready for it.

    scheduler: what it steps with. options: what brackets may set, beside ``scheduler``. peer: with which setting the
    files it needs are named, if it needs any.
    """

    name: str
    scheduler: str
    title: str
    guided: bool = False  # two U-Net rows a picture and step
    uses_negative: bool = False
    options: tuple[str, ...] = ()
    named: bool = False  # brackets may name an adapter
    presets: tuple[str, ...] = ()  # names that brackets may hold
    adapter: bool = False  # needs a SUN adapter
    inside: bool = False  # what it leaves out is inside of a U-Net call
    ltc: bool = False  # skips steps by LTC-Accel
    skips: bool = False  # a peer that skips steps
    peer: str = ""
    unet: bool = False  # brackets name a compact U-Net of the table ``unets``

    @property
    def inherits(self) -> bool:
        """Whether it is feature inheritance, or a combination with it."""
        return "inherit" in self.name


_CFG: dict[str, Any] = {"guided": True, "uses_negative": True}
_INHERIT: dict[str, Any] = {"options": INHERIT_OPTIONS, "presets": PRESET_NAMES, "inside": True}
_LTC: dict[str, Any] = {"options": (*LTC_OPTIONS, *FORECAST_OPTIONS), "presets": tuple(LTC_PRESETS), "ltc": True}
METHODS = {
    method.name: method
    for method in (
        Method("ddim", "ddim", "DDIM with CFG", **_CFG),
        Method("dpmpp", "dpmpp_2m", "DPM-Solver++ with CFG", **_CFG),
        Method("unipc", "unipc", "UniPC with CFG", **_CFG),
        Method("euler", "euler", "Euler with CFG", **_CFG),
        Method("cond", "dpmpp_2m", "DPM-Solver++ without guidance"),
        Method("sun", "ddim", "SUN", uses_negative=True, options=("strength",), named=True, adapter=True),
        Method("nasa", "ddim", "NASA", uses_negative=True, options=("scale",)),
        Method("nag", "ddim", "NAG", uses_negative=True, options=NAG_OPTIONS),
        Method("lcm-lora", "lcm", "LCM-LoRA", peer="lcm_lora"),
        Method("lcm-lora+nag", "lcm", "LCM-LoRA and NAG", uses_negative=True, options=NAG_OPTIONS, peer="lcm_lora"),
        Method("lcm-lora+ltc", "lcm", "LCM-LoRA and LTC-Accel", peer="lcm_lora", **_LTC),
        Method("guided-distill", "ddim", "guided distillation", peer="guided_distill"),
        Method("ltc", "dpmpp_2m", "LTC-Accel", **_CFG, **_LTC),
        Method("inherit", "dpmpp_2m", "feature inheritance", **_CFG, **_INHERIT),
        Method(
            "ltc+inherit",
            "dpmpp_2m",
            "LTC-Accel and feature inheritance",
            **_CFG,
            **_INHERIT | {"options": (*LTC_OPTIONS, *INHERIT_OPTIONS)},
            ltc=True,
        ),
        Method("sun+ltc", "ddim", "SUN and LTC-Accel", uses_negative=True, adapter=True, **_LTC),
        Method("sun+inherit", "ddim", "SUN and feature inheritance", uses_negative=True, adapter=True, **_INHERIT),
        Method(
            "switch",
            "dpmpp_2m",
            "switching",
            **_CFG,
            options=("share", "large_first"),
            inside=True,
            unet=True,
        ),
        Method("compact", "dpmpp_2m", "compact U-Net", **_CFG, unet=True),
        Method("compact+sun", "ddim", "compact U-Net and SUN", uses_negative=True, adapter=True, unet=True),
        Method("deepcache", "dpmpp_2m", "DeepCache", **_CFG, options=("interval", "branch"), inside=True),
        Method(
            "spectrum",
            "dpmpp_2m",
            "Spectrum",
            **_CFG,
            options=SPECTRUM_OPTIONS,
            presets=("comfyui", "sdcpp"),
            skips=True,
        ),
        Method("sada", "dpmpp_2m", "SADA", **_CFG, presets=("lagrange",), skips=True),
        Method("adaptive", "dpmpp_2m", "AdaptiveDiffusion", **_CFG, options=("threshold", "most"), skips=True),
        Method("easycache", "dpmpp_2m", "EasyCache", **_CFG, options=CACHE_OPTIONS, skips=True),
        Method("lazycache", "dpmpp_2m", "LazyCache", **_CFG, options=CACHE_OPTIONS, skips=True),
    )
}
_PATTERN = re.compile(r"(?P<name>[a-z][a-z+-]*?)(?:\[(?P<inside>[^\[\]]*)\])?-(?P<steps>[1-9]\d*)")


@dataclass(frozen=True)
class MethodCall:
    """A method's name taken apart; as text it is the name."""

    text: str
    method: Method
    steps: int
    variant: str = ""
    options: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __str__(self) -> str:
        return self.text

    @property
    def scheduler(self) -> str:
        return self.options.get("scheduler", self.method.scheduler)

    @property
    def family(self) -> str:
        """The name without steps: what one line of a plot joins."""
        return self.text.rpartition("-")[0]

    @property
    def title(self) -> str:
        """What a reader sees: the method in words, what the brackets hold, the steps."""
        return f"{self.method.title}{self.family.removeprefix(self.method.name)}, {self.steps} steps"

    @property
    def forecasts(self) -> bool:
        """Whether LTC-Accel skips by one of its presets, not as published."""
        return self.method.ltc and not self.method.inherits and bool(self.variant)

    def in_steps(self, steps: int) -> MethodCall:
        """The same method in another number of steps."""
        return replace(self, text=f"{self.family}-{steps}", steps=steps)

    def number(self, option: str, default: float) -> float:
        return float(self.options.get(option, default))

    def numbers(self) -> dict[str, float]:
        """The options that are keyword arguments of a peer's ``attach``."""
        return {key: float(value) for key, value in self.options.items() if key != "scheduler"}


def parse_method(name: str | MethodCall) -> MethodCall:
    """``"sun[late,strength=0.5]-4"`` -> its method, steps, adapter name and options; a call stays what it is.

    Raises ConfigError (a ValueError) that lists the known methods or options.
    """
    if isinstance(name, MethodCall):
        return name
    match = _PATTERN.fullmatch(name)
    if match is None or match["name"] not in METHODS:
        known = ", ".join(f"{method}-STEPS" for method in METHODS)
        raise ConfigError(f"unknown method {name!r}: choose from {known}")
    if int(match["steps"]) > MOST_STEPS:
        raise ConfigError(f"{name}: a method has {MOST_STEPS} steps at most")
    method = METHODS[match["name"]]
    variant, options = "", {}
    for part in filter(None, (p.strip() for p in (match["inside"] or "").split(","))):
        key, equals, value = part.partition("=")
        if not equals and not variant and (method.named or method.unet or part in method.presets):
            variant = part
        elif equals and (key in method.options or key == "scheduler"):
            options[key] = _checked(key, value, name)
        else:
            known = ", ".join((*method.presets, *(f"{o}=VALUE" for o in (*method.options, "scheduler"))))
            raise ConfigError(f"{name}: {part!r} is no option of {method.name}; it takes {known}")
    if method.unet and not variant:
        raise ConfigError(f"{name}: brackets name a U-Net of the table unets, as {method.name}[NAME]-{match['steps']}")
    return MethodCall(name, method, int(match["steps"]), variant, options)


def _checked(key: str, value: str, name: str) -> str:
    if key == "scheduler":
        if value not in (*SCHEDULERS, "lcm"):
            raise ConfigError(f"{name}: scheduler takes {', '.join(SCHEDULERS)} or lcm, not {value!r}")
        return value
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{name}: {key} takes a number, not {value!r}")
    return value


def parse_methods(names: Iterable[str], steps: Sequence[int] = ()) -> list[MethodCall]:
    """Calls in order and once; a name without steps stands for itself in each of ``steps``. Raises ConfigError."""
    found: list[MethodCall] = []
    for name in names:
        head, _, tail = name.rpartition("-")
        whole = bool(head and tail.isdigit()) or not steps
        found += [parse_method(name)] if whole else [parse_method(f"{name}-{count}") for count in steps]
    return list(dict.fromkeys(found))


REFERENCE = parse_method("dpmpp-25")
