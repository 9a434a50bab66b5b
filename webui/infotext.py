"""What SUN writes into a picture's infotext, and how it is read back."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sun import __version__
from ..sun.ltc import LtcSettings
from ..sun.ltc.keep import AGAIN, AUTOMATIC
from ..sun.ltc.presets import PAPER
from . import store, switching
from .choices import SunSettings

if TYPE_CHECKING:
    from .choices import AcceleratorSettings

ADAPTER = "SUN adapter"
HASH = "SUN adapter hash"
STRENGTH = "SUN strength"
GUIDANCE = "SUN guidance"
NEGATIVE = "SUN negative prompt"
MAIN_NEGATIVE = "SUN main negative prompt"
DENOISE_MODE = "SUN denoise mode"
SAMPLING = "SUN sampling"
VERSION = "SUN version"
PRESET = "LTC-Accel"
WARM_UP = "LTC-Accel warm-up"
TAIL = "LTC-Accel tail"
COUNTS = "LTC-Accel calls"
BATCH = "LTC-Accel batch"
TAU = "LTC-Accel tau"
EVERY = "LTC-Accel every"
MEASURED = "LTC-Accel measured"
INHERIT = "Feature inheritance"
SWITCH = "Switching model"
SWITCH_HASH = "Switching model hash"
SHARE = "Switching share"
ORDER = "Switching order"
WRITTEN = (ADAPTER, HASH, STRENGTH, GUIDANCE, NEGATIVE, MAIN_NEGATIVE, DENOISE_MODE, SAMPLING, VERSION)
"""What `write` writes."""
WRITTEN_BY_ACCELERATORS = (
    PRESET,
    WARM_UP,
    TAIL,
    COUNTS,
    BATCH,
    TAU,
    EVERY,
    MEASURED,
    INHERIT,
    SWITCH,
    SWITCH_HASH,
    SHARE,
    ORDER,
)
Params = dict[str, Any]


def write(settings: SunSettings, path: Path) -> dict[str, Any]:
    """Entries for p.extra_generation_params. The number of steps is the host's own "Steps"."""
    entries = {
        ADAPTER: settings.adapter,
        HASH: store.short_hash(path),
        STRENGTH: f"{settings.strength:g}",
        DENOISE_MODE: settings.denoise_mode,
        SAMPLING: settings.sampling,
        VERSION: __version__,
    }
    if settings.sampling == "keep":
        entries.pop(DENOISE_MODE)  # the page's schedule counts image to image in its own way
    if settings.guidance:
        entries[GUIDANCE] = f"{settings.guidance:g}"
    if settings.main_negative:
        return entries | {MAIN_NEGATIVE: "True"}
    return entries | ({NEGATIVE: settings.negative} if settings.negative else {})


def write_accelerators(settings: AcceleratorSettings) -> dict[str, Any]:
    """Entries of LTC-Accel, feature inheritance and switching. Raises what their settings that cannot be raise."""
    entries: dict[str, Any] = {}
    if settings.ltc:
        chosen = settings.ltc_settings()
        entries[PRESET] = settings.preset
        if isinstance(chosen, LtcSettings):
            entries |= {TAU: f"{chosen.tau:g}", EVERY: chosen.every}
        else:
            entries |= {WARM_UP: f"{chosen.first:g}", TAIL: chosen.last}
    if settings.inherits:
        entries[INHERIT] = str(settings.plan())
    if settings.switches:
        chosen_pair = settings.switching()
        entries |= {SWITCH: settings.switch, SWITCH_HASH: switching.short_hash(settings.switch)}
        entries |= {SHARE: f"{chosen_pair.share:g}", ORDER: chosen_pair.order}
    return entries


def write_measured(p: Any, measured: bool) -> None:
    """Notes whether LTC-Accel measured in this sampling: such a picture is the plain one, and comes back only so."""
    if measured:
        p.extra_generation_params[MEASURED] = "True"
    elif not getattr(p, "is_hr_pass", False):
        p.extra_generation_params.pop(MEASURED, None)


def forget_counts(p: Any) -> None:
    """A sampling begins: should it be interrupted, what the one before it saved is not said of its picture."""
    if not getattr(p, "is_hr_pass", False):
        p.extra_generation_params.pop(COUNTS, None)
        p.extra_generation_params.pop(BATCH, None)


def write_counts(p: Any, counts: str) -> None:
    """Notes what was saved: "13 of 20 calls, 35 % saved"; the host puts what has a comma between quotes."""
    if not getattr(p, "is_hr_pass", False):
        p.extra_generation_params[COUNTS] = counts


def write_batch(p: Any) -> None:
    """Notes which pictures were drawn together, where that decided which steps ran: no host says so itself, and alone
    each would be another one."""
    if len(p.seeds) > 1:
        p.extra_generation_params[BATCH] = f"{len(p.seeds)} from seed {p.seeds[0]}"


HIRES = ("Hires upscale", "Hires upscaler", "Hires steps")
IMAGE_TO_IMAGE = re.compile(r"(?:^|, )(?:Denoising strength|Mask blur|Inpaint area|Masked area padding): [^,\n]*")


def for_txt2img(infotext: str) -> str:
    """An infotext that txt2img can take over: the host reads a denoising strength as Hires fix switched on."""
    head, _, last = infotext.rpartition("\n")
    if any(f"{key}: " in last for key in HIRES):
        return infotext
    last = IMAGE_TO_IMAGE.sub("", last).removeprefix(", ")
    return f"{head}\n{last}" if head else last


def mend_pasted(_infotext: str, params: Params) -> None:
    """The host's `on_infotext_pasted`: a picture of image to image must not switch Hires fix on in txt2img.

    The host sees Hires fix in a denoising strength beside a size of 0 that it adds itself to every infotext.
    """
    ours = any(key in params for key in (ADAPTER, PRESET, TAU, INHERIT, SWITCH))
    if ours and not any(key in params for key in HIRES):
        for key in ("Hires resize-1", "Hires resize-2"):
            if str(params.get(key, 0)) == "0":
                params.pop(key, None)


def _of_sun(read: Callable[[Params], Any]) -> Callable[[Params], Any]:
    """A reader that leaves the field alone (None) for pictures without SUN."""
    return lambda params: read(params) if ADAPTER in params else None


def enabled(params: Params) -> bool:
    """Pasting a picture made without SUN switches it off."""
    return ADAPTER in params


def _of_ltc(read: Callable[[Params], Any]) -> Callable[[Params], Any]:
    return lambda params: read(params) if TAU in params else None


def _of_preset(read: Callable[[Params], Any]) -> Callable[[Params], Any]:
    return lambda params: read(params) if PRESET in params and params[PRESET] != PAPER else None


READERS: dict[str, Callable[[Params], Any]] = {
    "enabled": enabled,
    "adapter": _of_sun(lambda params: params[ADAPTER]),
    "strength": _of_sun(lambda params: float(params.get(STRENGTH, 1.0))),
    "steps": _of_sun(lambda params: int(params.get("Steps", 4))),
    "main_negative": _of_sun(lambda params: MAIN_NEGATIVE in params),
    "negative": _of_sun(lambda params: params.get(NEGATIVE, "")),
    "denoise_mode": _of_sun(lambda params: params.get(DENOISE_MODE, "trained")),
    "sampling": _of_sun(lambda params: params.get(SAMPLING, "sun")),
    "guidance": _of_sun(lambda params: float(params.get(GUIDANCE, 0.0))),
    "ltc": lambda params: TAU in params or PRESET in params,
    "tau": _of_ltc(lambda params: float(params[TAU])),
    "every": _of_ltc(lambda params: int(params.get(EVERY, 2))),
    "calibration": _of_ltc(lambda params: AGAIN if MEASURED in params else AUTOMATIC),
    "inherit": lambda params: params.get(INHERIT, "off"),
    "switch": lambda params: params.get(SWITCH, "off"),
    "share": lambda params: float(params[SHARE]) if SHARE in params else None,
    "switch_order": lambda params: params.get(ORDER),
    # pictures from before there were presets name none, and are the paper's
    "preset": lambda params: params.get(PRESET, PAPER if TAU in params else None),
    "warm_up": _of_preset(lambda params: float(params.get(WARM_UP, -1))),
    "tail": _of_preset(lambda params: int(params.get(TAIL, -1))),
}
"""A reader for each control of the accordion, by its name."""


class Field(str):
    """What the host is told of a control: as a function it reads the control's value out of an infotext, as a text it
    is the name by which "Send to img2img" and its like choose what they carry over."""

    def __call__(self, params: Params) -> Any:
        return READERS[self.removeprefix("SUN ")](params)


def field(name: str) -> Field:
    """That of the control ``name``."""
    return Field(f"SUN {name}")
