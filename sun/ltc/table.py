"""What a calibration found, as a small JSON file, and the folder where such files are kept."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import LtcError
from .interval import LtcSettings

FORMAT = "sun-ltc-1"


@dataclass(frozen=True)
class LtcKey:
    """What a table depends on.

    model: fingerprint. sampler: name, as ``dpmpp_2m``. sigmas: the noise levels of the steps, then the last one
    reached, so one more than there are steps. w: scale of classifier-free guidance.
    """

    model: str
    sampler: str
    sigmas: tuple[float, ...]
    w: float

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def schedule(self) -> str:
        """A short name of the noise levels. Three digits: hosts compute the same schedule with rounding errors."""
        return _digest([f"{sigma:.3g}" for sigma in self.sigmas])

    def file_name(self, settings: LtcSettings) -> str:
        """``dpmpp_2m-25-0123456789ab.json``."""
        own = _digest([self.model, self.sampler, self.schedule, self.steps, f"{self.w:.4g}", asdict(settings)])
        return f"{self.sampler}-{self.steps}-{own}.json"


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
        return {
            "format": FORMAT,
            "model": self.key.model,
            "sampler": self.key.sampler,
            "schedule": self.key.schedule,
            "steps": self.key.steps,
            "w": self.key.w,
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
        try:
            if content["format"] != FORMAT:
                raise LtcError(
                    f"{where} has format {content['format']!r}; this version reads {FORMAT}. Calibrate again."
                )
            key = LtcKey(
                content["model"], content["sampler"], tuple(map(float, content["sigmas"])), float(content["w"])
            )
            settings = LtcSettings(**content["settings"])
            found = {int(i): tuple(map(float, factors)) for i, factors in content["coefficients"].items()}
            turns = tuple(map(float, content["angles"]))
            table = cls(key, settings, found, turns, float(content["bias"]), int(content["pictures"]),
                        bool(content["error_aware"]), dict(content.get("notes", {})))  # fmt: skip
        except LtcError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise LtcError(
                f"{where} is not a table of LTC-Accel ({error!r}). Delete it and calibrate again."
            ) from error
        table._check(where)
        return table

    def _check(self, where: str) -> None:
        numbers = [*self.turns, self.bias, *(c for factors in self.coefficients.values() for c in factors)]
        steps_fit = all(self.settings.terms <= i < self.key.steps for i in self.coefficients)
        terms_fit = all(len(factors) == self.settings.terms for factors in self.coefficients.values())
        if not (steps_fit and terms_fit and all(map(math.isfinite, numbers))):
            raise LtcError(f"{where} does not fit its own {self.key.steps} steps. Delete it and calibrate again.")


class TableStore:
    """Tables in memory and, with a folder, in files that later runs find."""

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._tables: dict[str, LtcTable] = {}

    def find(self, key: LtcKey, settings: LtcSettings) -> LtcTable | None:
        """The table of these settings, or None. Raises LtcError for a damaged file."""
        name = key.file_name(settings)
        if name not in self._tables and self.folder and (self.folder / name).is_file():
            self._tables[name] = load_table(self.folder / name)
        return self._tables.get(name)

    def put(self, table: LtcTable) -> Path | None:
        """Keep a table; returns its file. Raises OSError."""
        name = table.key.file_name(table.settings)
        self._tables[name] = table
        if self.folder is None:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / name
        temporary = path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(table.to_json(), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
        return path

    def forget(self, key: LtcKey, settings: LtcSettings) -> None:
        """Drop a table and its file, so that the next run measures again."""
        name = key.file_name(settings)
        self._tables.pop(name, None)
        if self.folder:
            (self.folder / name).unlink(missing_ok=True)


def load_table(path: str | os.PathLike[str]) -> LtcTable:
    """Read a table. Raises LtcError, or OSError if there is no such file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise LtcError(f"{path} is not JSON ({error}). Delete it and calibrate again.") from error
    return LtcTable.from_json(content, str(path))


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
