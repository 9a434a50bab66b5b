"""What a calibration found, as a small JSON file, and the folder where such files are kept."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..common.atomic import file_name, write_json
from ..common.identity import digest_of
from ..common.reading import ReadError, printable, read_json
from .errors import LtcError
from .interval import LtcSettings

FORMAT = "sun-ltc-1"
MAX_STEPS = 1000
MAX_TABLE = 2**20
"""Bytes of a table's file; one of 1000 steps has 60,000."""


@dataclass(frozen=True)
class LtcKey:
    """What a table depends on.

    model: fingerprint. sampler: name, as ``dpmpp_2m``. sigmas: the noise levels of the steps, then the last one
    reached, so one more than there are steps. w: scale of classifier-free guidance. steering: what else acts, as SUN
    and its adapter or a LoRA; empty if nothing does.
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    w: float
    steering: str = ""

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return len(self.sigmas) - 1

    @property
    def schedule(self) -> str:
        """A short name of the noise levels. Three digits: hosts compute the same schedule with rounding errors."""
        return digest_of([f"{sigma:.3g}" for sigma in self.sigmas], 12)

    def parts(self) -> list[Any]:
        """What tells keys apart: all of it, to the digits that hosts agree on."""
        return [self.model, self.sampler, self.schedule, self.steps, f"{self.w:.4g}", *filter(None, [self.steering])]

    def file_name(self, settings: LtcSettings) -> str:
        """``dpmpp_2m-25-0123456789ab.json``: a plain name whatever the sampler is called, in no folder of its own."""
        own = digest_of([*self.parts(), asdict(settings)], 12)
        return f"{file_name(self.sampler, 60)}-{self.steps}-{own}.json"


@dataclass(frozen=True)
class LtcTable:
    """The coefficients of one model, sampler, schedule, number of steps and w.

    coefficients: for each skipped step the factor of each earlier transition, the latest first. turns: angles theta_i
    of the steps i = 1, ..., N - 1. bias: factor on all coefficients. pictures: how many were measured. error_aware:
    fitted on trajectories that had skips before.
    """

    key: LtcKey
    settings: LtcSettings
    coefficients: Mapping[int, tuple[float, ...]]
    turns: tuple[float, ...] = ()
    bias: float = 1.0
    pictures: int = 0
    error_aware: bool = False
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Steps that call the model."""
        return self.key.steps - len(self.coefficients)

    def to_json(self) -> dict[str, Any]:
        """As :meth:`from_json` reads it, and people do."""
        return {
            "format": FORMAT,
            "model": self.key.model,
            "sampler": self.key.sampler,
            "schedule": self.key.schedule,
            "steps": self.key.steps,
            "w": self.key.w,
            "steering": self.key.steering,
            "sigmas": list(self.key.sigmas),
            "settings": asdict(self.settings),
            "coefficients": {str(step): list(factors) for step, factors in self.coefficients.items()},
            "angles": list(self.turns),
            "bias": self.bias,
            "pictures": self.pictures,
            "error_aware": self.error_aware,
            "notes": dict(self.notes),
        }

    @classmethod
    def from_json(cls, content: Any, where: str = "The table") -> LtcTable:
        """Raises LtcError that names ``where`` unless this is a complete table."""
        where = printable(where)
        try:
            if content["format"] != FORMAT:
                raise LtcError(
                    f"{where} has format {_shown(content['format'])}; this version reads {FORMAT}. Calibrate again."
                )
            table = _table(content)
        except LtcError as error:
            raise error if str(error).startswith(where) else LtcError(f"{where}: {error}") from error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LtcError(
                f"{where} is not a table of LTC-Accel ({_shown(error)}). Delete it and calibrate again."
            ) from error
        table._check(where)
        return table

    def _check(self, where: str) -> None:
        steps, terms = self.key.steps, self.settings.terms
        steps_fit = 1 <= steps <= MAX_STEPS and all(terms <= i < steps for i in self.coefficients)
        terms_fit = all(len(factors) == terms for factors in self.coefficients.values())
        if not (steps_fit and terms_fit and len(self.turns) in (0, steps - 1)):
            raise LtcError(f"{where} does not fit its own {steps} steps. Delete it and calibrate again.")


def _table(content: Mapping[str, Any]) -> LtcTable:
    """The table in JSON that may be anything. Raises KeyError, TypeError, ValueError, AttributeError, LtcError."""
    key = LtcKey(
        _text(content["model"]),
        _text(content["sampler"]),
        _numbers(content["sigmas"]),
        _number(content["w"]),
        _text(content.get("steering", "")),
    )
    coefficients = {}
    for step, factors in content["coefficients"].items():
        if not re.fullmatch(r"[0-9]{1,4}", step):
            raise ValueError(f"{step!r} is no step")
        coefficients[int(step)] = _numbers(factors)
    notes = {_text(name, 200): _text(note, 2000) for name, note in content.get("notes", {}).items()}
    return LtcTable(
        key,
        _settings(content["settings"]),
        coefficients,
        _numbers(content["angles"]),
        _number(content["bias"]),
        _whole(content["pictures"]),
        _true_or_false(content["error_aware"]),
        notes,
    )


def _settings(content: Mapping[str, Any]) -> LtcSettings:
    readers: dict[str, Callable[[Any], float]] = {
        "tau": _number,
        "every": _whole,
        "first": _number,
        "last": _whole,
        "terms": _whole,
    }
    unknown = [name for name in content if name not in readers]
    if unknown:
        raise ValueError(f"there is no setting {unknown[0]!r}")
    values: dict[str, Any] = {name: readers[name](value) for name, value in content.items()}
    return LtcSettings(**values)


def _text(value: Any, longest: int = 200) -> str:
    if not isinstance(value, str) or len(value) > longest:
        raise TypeError(f"{value!r} is no text of at most {longest} characters")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no finite number")
    return float(value)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**53:
        raise TypeError(f"{value!r} is no count")
    return value


def _true_or_false(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _numbers(values: Any) -> tuple[float, ...]:
    if not isinstance(values, (list, tuple)) or len(values) > MAX_STEPS + 1:
        raise TypeError(f"{type(values).__name__} is no list of at most {MAX_STEPS + 1} numbers")
    return tuple(_number(value) for value in values)


def _shown(value: Any) -> str:
    """What a stranger's table says, fit for one line."""
    text = printable(repr(value))
    return text if len(text) <= 120 else text[:120] + "..."


class TableStore:
    """Tables in memory and, with a folder, in files that later runs find."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._tables: dict[str, LtcTable] = {}

    def find(self, key: LtcKey, settings: LtcSettings) -> LtcTable | None:
        """The table of these settings, or None. Raises LtcError for a damaged file or another's under its name."""
        name = key.file_name(settings)
        if name not in self._tables and self.folder and (self.folder / name).is_file():
            table = load_table(self.folder / name)
            if table.key.parts() != key.parts() or table.settings != settings:
                raise LtcError(
                    f"{self.folder / name} is the table of another model, schedule or setting under this one's name. "
                    "Delete it and calibrate again."
                )
            self._tables[name] = table
        return self._tables.get(name)

    def put(self, table: LtcTable) -> Path | None:
        """Keep a table; returns its file. Raises OSError."""
        name = table.key.file_name(table.settings)
        self._tables[name] = table
        return None if self.folder is None else write_json(self.folder / name, table.to_json(), indent=1)


def load_table(path: str | os.PathLike[str]) -> LtcTable:
    """Read a table. Raises LtcError, or OSError if there is no such file."""
    try:
        content = read_json(path, MAX_TABLE)
    except ReadError as error:
        raise LtcError(f"{error} Delete it and calibrate again.") from error
    return LtcTable.from_json(content, str(path))
