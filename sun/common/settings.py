"""Dataclass configurations from files and ``key=value`` texts, with errors that name the key and its neighbours."""

from __future__ import annotations

import ast
import difflib
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

from .errors import ConfigError
from .reading import MAX_DEPTH, ReadError, checked, finite, printable, read_json, read_text

T = TypeVar("T")
MAX_SETTINGS = 2**20
MAX_LINES = 2**30
"""Bytes of a list: of captions, prompts or phrases."""
_WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_config(path: str | Path) -> dict[str, Any]:
    """The content of a TOML or JSON file. Raises ConfigError."""
    path = Path(path)
    try:
        content = read_json(path, MAX_SETTINGS) if path.suffix.lower() == ".json" else read_toml(path, MAX_SETTINGS)
    except OSError as error:
        raise ConfigError(f"{printable(str(path))} cannot be read: {error.strerror or error}.") from error
    except ReadError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{printable(str(path))} should hold names and values, not a {type(content).__name__}.")
    return content


def read_toml(path: str | Path, most: int = MAX_SETTINGS) -> dict[str, Any]:
    """The content of a TOML file, with numbers and depth as in `reading.parse_json`. Raises ReadError, OSError."""
    where, text = printable(str(path)), read_text(path, most)
    # Asked before it is parsed: a name of ten thousand parts takes hours.
    if any(line.partition("=")[0].count(".") > MAX_DEPTH for line in text.splitlines()):
        raise ReadError(f"{where} is nested more than {MAX_DEPTH} levels deep.")
    try:
        content = tomllib.loads(text, parse_float=finite)
    except RecursionError:
        raise ReadError(f"{where} is nested too deeply.") from None
    except ValueError as error:
        raise ReadError(f"{where} is not valid TOML: {printable(str(error))}.") from error
    return dict(checked(content, where))


def apply(config: T, values: Mapping[str, Any], where: str = "the configuration") -> T:
    """Set nested ``values`` on a dataclass instance, converting each to its field's type. Returns ``config``.

    Raises ConfigError for unknown keys, values that do not fit, and settings that only a person at the command line may
    make (their field's metadata says ``typed``).
    """
    kinds = typing.get_type_hints(type(config))
    typed = {item.name for item in fields(config) if item.metadata.get("typed")}  # type: ignore[arg-type]
    for key, value in values.items():
        if key in typed and value not in (None, False):
            raise ConfigError(f"{where}: {key} is never taken from a file: it belongs on the command line.")
        if key not in kinds:
            raise ConfigError(f"{where}: there is no setting {_shown(key)}.{_suggest(key, sorted(kinds))}")
        current = getattr(config, key)
        if is_dataclass(current):
            if not isinstance(value, Mapping):
                raise ConfigError(f"{where}: {key} is a group of settings ({', '.join(kinds_of(current))}).")
            apply(current, value, f"{where}, {key}")
        else:
            setattr(config, key, convert(value, kinds[key], f"{where}: {key}"))
    return config


def assign(config: T, assignments: Sequence[str]) -> T:
    """Apply texts like ``run.lr=1e-3`` or, where the name is unique, ``lr=1e-3``. Raises ConfigError."""
    paths = dict(leaves(config))
    for text in assignments:
        key, equals, value = text.partition("=")
        key = key.strip()
        if not equals:
            raise ConfigError(f"--set {text!r} has no value. Write it as key=value.")
        full = key if key in paths else _by_last_name(key, list(paths))
        *groups, name = full.split(".")
        target: Any = config
        for group in groups:
            target = getattr(target, group)
        setattr(target, name, convert(value.strip(), paths[full], f"--set {key}"))
    return config


def configured(
    config: T, file: Path | None, given: Mapping[str, Any], run: Mapping[str, Any], assignments: Sequence[str] | None
) -> T:
    """``config`` with the file's settings, then the options (``run`` are those of its group ``run``; None was not
    given), then the assignments: the later wins. Raises ConfigError."""
    if file:
        apply(config, read_config(file), str(file))
    options = {key: value for key, value in given.items() if value is not None}
    run_options = {key: value for key, value in run.items() if value is not None}
    apply(config, {**options, "run": run_options} if run_options else options, "options")
    return assign(config, assignments or [])


def read_lines(path: Path) -> list[str]:
    """Lines of a text file in UTF-8, or what its byte order mark says. Raises OSError, ReadError.

    Not str.splitlines, which also divides at characters that a caption may hold, U+2028 among them.
    """
    return [line.removesuffix("\r") for line in read_text(path, MAX_LINES).split("\n")]


def without_folders(config: Any) -> dict[str, Any]:
    """All settings by name, groups nested, for a file that travels: of a path its :func:`last_name` alone, of where
    the results went and of what was allowed on this machine nothing."""
    settings: dict[str, Any] = _without_folders(asdict(config))
    for group in (settings, settings.get("run", {})):
        group.pop("output", None)
    settings.pop("allow_commands", None)
    return settings


def _without_folders(value: Any) -> Any:
    if isinstance(value, str):
        return last_name(value)
    if isinstance(value, dict):
        return {name: _without_folders(part) for name, part in value.items()}
    return tuple(map(_without_folders, value)) if isinstance(value, (tuple, list)) else value


def last_name(value: str) -> str:
    """Of a path the last part that says something: runs/emoji-blob/model is emoji-blob."""
    if "/" not in value and "\\" not in value:
        return value
    parts = [part for part in PurePath(value.replace("\\", "/")).parts if part not in ("/", "..", ".")]
    while len(parts) > 1 and parts[-1] in ("model", "unet", "adapter.safetensors"):
        parts.pop()
    return parts[-1] if parts else value


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, type) of every setting."""
    kinds = typing.get_type_hints(type(config))
    for item in fields(config):
        value = getattr(config, item.name)
        if is_dataclass(value):
            yield from leaves(value, f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, kinds[item.name]


def kinds_of(config: Any) -> list[str]:
    return [item.name for item in fields(config)]


def convert(value: Any, kind: Any, where: str) -> Any:
    """``value`` (from TOML, JSON or a text) as ``kind``. Raises ConfigError naming ``where``."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or (isinstance(value, str) and value.lower() in ("", "none"))):
            return None
        return convert(value, next(a for a in arguments if a is not type(None)), where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where} takes {', '.join(map(str, arguments))}, not {_shown(value)}.")
        return value
    if origin in (tuple, list):
        return _sequence(value, origin, arguments, where)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"{where} is a table of names and values, not {_shown(value)}. Put it into the --config file."
            )
        return {
            str(name): convert(item, arguments[1], f"{where}.{printable(str(name))[:80]}")
            for name, item in value.items()
        }
    if kind is Any:
        return value
    if kind is str or kind is Path:
        if isinstance(value, (list, dict)) or value is None or "\0" in str(value):
            raise ConfigError(f"{where} takes a text, not {_shown(value)}.")
        return kind(value)
    try:
        if kind is bool:
            return _WORDS[str(value).strip().lower()]
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)
            if kind is float and math.isfinite(number):
                return number
            if kind is int and number == int(number):
                return int(str(value)) if str(value).strip().lstrip("+-").isdigit() else int(number)
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}.get(kind, str(kind))
    raise ConfigError(f"{where} takes {wanted}, not {_shown(value)}.")


def _sequence(value: Any, origin: type, arguments: tuple[Any, ...], where: str) -> Any:
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):  # the last two of deep brackets
            # not at commas inside of brackets: nag[phi=3,tau=2]-4
            value = [part.strip() for part in re.split(r",(?![^\[\]]*\])", value) if part.strip()]
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    if origin is tuple and arguments and arguments[-1] is not Ellipsis:
        if len(items) != len(arguments):
            raise ConfigError(f"{where} takes {len(arguments)} values, not {len(items)}.")
        return tuple(convert(v, k, where) for v, k in zip(items, arguments, strict=True))
    kind = arguments[0] if arguments else Any
    return origin(convert(v, kind, where) for v in items)


def _shown(value: Any) -> str:
    """A value from elsewhere, fit for one line."""
    text = printable(repr(value))
    return text if len(text) <= 80 else text[:80] + "..."


def _by_last_name(key: str, paths: list[str]) -> str:
    matches = [p for p in paths if p.rpartition(".")[2] == key]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise ConfigError(f"--set {key}: several settings have this name; say which: {', '.join(matches)}.")
    raise ConfigError(f"--set {key}: there is no such setting.{_suggest(key, paths)}")


def _suggest(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known + [k.rpartition(".")[2] for k in known], n=3)
    return f" Did you mean {' or '.join(dict.fromkeys(near))}?" if near else f" There are: {', '.join(known)}."
