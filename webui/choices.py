"""What a user chooses for one run: the values, their bounds, and reading them from whatever somebody sends.

The accordion sends numbers and booleans. The API sends what its caller wrote, where `"false"`, `null` and `1e400` are
possible and must not become a "yes" or a crash.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..sun.inheritance import Plan, parse_plan
from ..sun.ltc import LtcError, LtcSettings, SkipSettings
from ..sun.ltc.keep import AGAIN, unused
from ..sun.ltc.keep import AUTOMATIC as ONCE
from ..sun.ltc.presets import BALANCED, NAMES, PAPER, preset
from ..sun.switching import ORDERS, SMALL_FIRST, Switching

if TYPE_CHECKING:
    from ..sun.schedule import DenoiseMode

AUTOMATIC = "Automatic"
"""In the place of an adapter's name: the one that fits the loaded model."""
OFF = "off"
CALIBRATIONS = [ONCE, AGAIN]
DENOISE_MODES = ["trained", "respaced"]
SAMPLINGS = ["sun", "schedule", "keep"]
LTC_PRESETS = list(NAMES)


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


@dataclass(frozen=True)
class AcceleratorSettings:
    """What the section "without training" says; all are off by default.

    ltc: skip steps. preset: fine, balanced, fast, fastest or paper. warm_up: the share of the steps, at the start,
    that always run; tail: how many at the end do; -1 is the preset's. Of the paper alone are tau (radians), every
    and calibration (one of CALIBRATIONS). inherit: off, a preset, or a plan in words. switch: off, or the listed
    model whose U-Net makes a share of the steps, in this order.
    """

    ltc: bool = False
    tau: float = 0.1
    every: int = 2
    calibration: str = ONCE
    inherit: str = OFF
    preset: str = BALANCED
    warm_up: float = -1.0
    tail: int = -1
    switch: str = OFF
    share: float = 0.4
    switch_order: str = SMALL_FIRST

    @property
    def on(self) -> bool:
        """Whether anything is to be done."""
        return self.ltc or self.inherits or self.switches

    @property
    def switches(self) -> bool:
        return self.switch.strip() not in ("", OFF)

    @property
    def inherits(self) -> bool:
        return self.inherit.strip() not in ("", OFF)

    def ltc_settings(self) -> SkipSettings | LtcSettings:
        """How LTC-Accel chooses the steps. Raises LtcError for numbers and words that cannot be."""
        if self.calibration not in CALIBRATIONS:
            raise LtcError(f"LTC-Accel's calibration is one of {CALIBRATIONS}, not {self.calibration!r}.")
        if self.preset == PAPER:
            if self.warm_up >= 0 or self.tail >= 0:
                raise LtcError(f"LTC-Accel's preset {PAPER} has no warm-up and no tail: set both to -1.")
            return LtcSettings(tau=float(self.tau), every=int(self.every))
        given: dict[str, Any] = {"first": float(self.warm_up), "last": int(self.tail)}
        return preset(self.preset, **{name: value for name, value in given.items() if value >= 0})

    def unused(self) -> str:
        """Which of the paper's settings were set and have no effect, as another preset is chosen; empty for none."""
        return unused(self.preset, tau=self.tau, every=self.every, calibration=self.calibration)

    def switching(self) -> Switching:
        """Which share of the steps the small U-Net makes. Raises SwitchingError for what cannot be."""
        return Switching(float(self.share), self.switch_order)

    def plan(self) -> Plan:
        """What feature inheritance leaves out. Raises InheritanceError for words that are no plan."""
        return parse_plan(self.inherit)


Settings = TypeVar("Settings", SunSettings, AcceleratorSettings)
SUN_CONTROLS = ("enabled", "adapter", "strength", "steps", "main_negative", "negative", "denoise_mode", "sampling")
ACCELERATOR_CONTROLS = tuple(field.name for field in fields(AcceleratorSettings))
_LATER = ("switch", "share", "switch_order", "preset", "warm_up", "tail")
OF_THE_PAPER = ("tau", "every", "calibration")
CONTROLS = (*SUN_CONTROLS, *(name for name in ACCELERATOR_CONTROLS if name not in _LATER), "guidance", *_LATER)
"""Names of the script's arguments, in order; the API's `alwayson_scripts` may give them by name in one object."""

Bounds = tuple[float, float]
STRENGTH: Bounds = (0, 2)
GUIDANCE: Bounds = (0, 30)
STEPS: Bounds = (1, 50)
TAU: Bounds = (0, 1.6)
EVERY: Bounds = (2, 10)
SHARE: Bounds = (0, 1)
MAX_TEXT = 20_000
MAX_PLAN = 400
MAX_SEED = 2**53
"""Above it a browser no longer writes every whole number."""
MAX_PIXELS = 4096 * 4096
"""Of all pictures of a batch: 16 of 1024 x 1024."""
MAX_WORK = 2**28
"""Pixels times steps, of all pictures of a batch: 16 pictures of 1024 x 1024 in 16 steps."""

WARM_UP: Bounds = (-1, 1)
TAIL: Bounds = (-1, 100)
BOUNDS = {
    "strength": STRENGTH,
    "guidance": GUIDANCE,
    "steps": STEPS,
    "tau": TAU,
    "every": EVERY,
    "share": SHARE,
    "warm_up": WARM_UP,
    "tail": TAIL,
}
WHOLE = ("steps", "every", "tail")
TRUTHS = ("enabled", "main_negative", "ltc")
WORDS = {
    "denoise_mode": DENOISE_MODES,
    "sampling": SAMPLINGS,
    "calibration": CALIBRATIONS,
    "switch_order": list(ORDERS),
    "preset": LTC_PRESETS,
}
YES, NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0", "none", "null", "")


def read_arguments(args: tuple[Any, ...]) -> tuple[bool, SunSettings, AcceleratorSettings]:
    """Whether SUN is on, its settings and the accelerators', from the controls' values or one object with some.

    null is as good as leaving a value out. An object that names only accelerators leaves SUN off. Who gives settings of
    LTC-Accel's paper and no preset, as was done before there were presets, means the paper's. Raises ValueError for
    names that there are not and for values that cannot be.
    """
    if args and isinstance(args[0], dict):
        unknown = set(args[0]) - set(CONTROLS)
        if unknown:
            raise ValueError(f"SUN has no arguments {sorted(map(str, unknown))}; it has {', '.join(CONTROLS)}.")
        given = {"enabled": not args[0] or bool(set(args[0]) - set(ACCELERATOR_CONTROLS)), **args[0]}
    else:
        given = dict(zip(CONTROLS, args, strict=False))
    values = {name: read(name, value) for name, value in given.items() if value is not None}
    if "preset" not in values and any(name in values for name in OF_THE_PAPER):
        values["preset"] = PAPER
    enabled = values.pop("enabled", False)
    accelerators = AcceleratorSettings(**{name: values.pop(name) for name in ACCELERATOR_CONTROLS if name in values})
    return enabled, SunSettings(**{"adapter": AUTOMATIC, **values}), accelerators


def read(name: str, value: Any) -> Any:
    """The value of the argument `name`. Raises ValueError that says what it can be."""
    if name in TRUTHS:
        return truth(name, value)
    if name in BOUNDS:
        return number(name, value, BOUNDS[name], whole=name in WHOLE)
    text = plain_text(name, value, MAX_PLAN if name == "inherit" else MAX_TEXT)
    if name in WORDS and text not in WORDS[name]:
        raise ValueError(f"SUN: {name} is {text!r:.60}; it is one of {', '.join(WORDS[name])}.")
    return text


def truth(name: str, value: Any) -> bool:
    """true or false, as JSON, a checkbox or a form writes it."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    word = value.strip().lower() if isinstance(value, str) else None
    if word in YES or word in NO:
        return word in YES
    raise ValueError(f"SUN: {name} is {value!r:.60}; it is true or false.")


def number(name: str, value: Any, bounds: Bounds, whole: bool = False) -> Any:
    """A finite number within `bounds`, an int where it has to be whole."""
    low, high = bounds
    wrong = ValueError(
        f"SUN: {name} is {value!r:.60}; it is a {'whole ' * whole}number from {low:g} to {high:g}, both included."
    )
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise wrong
    try:
        parsed = float(value)
    except (ValueError, OverflowError):
        raise wrong from None
    if not math.isfinite(parsed) or not low <= parsed <= high or (whole and parsed != int(parsed)):
        raise wrong
    return int(parsed) if whole else parsed


def plain_text(name: str, value: Any, most: int = MAX_TEXT) -> str:
    """Text that can be written into a picture. Raises ValueError for lone surrogates, and for more than `most`."""
    if not isinstance(value, str):
        raise ValueError(f"SUN: {name} is {value!r:.60}; it is text.")
    if len(value) > most:
        raise ValueError(f"SUN: {name} has {len(value)} characters; at most {most} are taken.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"SUN: {name} has half a character (a lone surrogate). Write it as valid Unicode.") from None
    return value


def check_size(width: int, height: int, batch: int, steps: int) -> None:
    """Raises ValueError for more than one run should be asked for; each number alone may be fine."""
    pixels = width * height * batch
    if pixels > MAX_PIXELS or pixels * steps > MAX_WORK:
        raise ValueError(
            f"{batch} pictures of {width} x {height} in {steps} steps are too much for one run. At most "
            f"{MAX_PIXELS / 2**20:g} million pixels, and {MAX_WORK / 2**20:g} million times steps: ask for fewer or "
            "smaller pictures."
        )


def override(p: Any, **values: Any) -> None:
    """Sets fields of the run's settings on this processing object only, whatever the accordion says."""
    p.sun_overrides = {**getattr(p, "sun_overrides", {}), **values}


def overridden(p: Any, settings: Settings) -> Settings:
    """Settings with those of their fields that `override` has set. Raises ValueError for values that cannot be."""
    names = {field.name for field in fields(settings)}
    chosen = {name: read(name, v) for name, v in getattr(p, "sun_overrides", {}).items() if name in names}
    return replace(settings, **chosen)


def arguments(settings: SunSettings | None, accelerators: AcceleratorSettings | None = None) -> list[Any]:
    """The script's arguments for these settings; None switches SUN, or the accelerators, off."""
    chosen, more = settings or SunSettings(AUTOMATIC), accelerators or AcceleratorSettings()
    values = {field.name: getattr(of, field.name) for of in (chosen, more) for field in fields(of)}
    return [{**values, "enabled": settings is not None}[name] for name in CONTROLS]
