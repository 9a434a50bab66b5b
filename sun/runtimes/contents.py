"""What a folder of ``sun export`` holds, as its ``sun_export.json`` says it: read, written and checked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from ..common.atomic import write_json
from ..common.errors import ConfigError
from ..common.identity import sha256_of
from ..common.reading import ReadError, printable, read_json
from ..shipped import USUAL_GUIDANCE

FORMAT = "sun-export-1"
CONTENTS = "sun_export.json"
RUNTIMES = ("openvino", "onnx")
WEIGHTS = ("fp32", "fp16", "int8")
PARTS = ("text_encoder", "unet", "vae_decoder", "vae_encoder", "controlnet")
_ALWAYS = PARTS[:4]
_AGAIN = "Export the model again."


class ExportError(ConfigError):
    """An exported model that cannot be made or used; the message says which, why and what to do."""


@dataclass(frozen=True)
class Contents:
    """What is in the folder. Raises ExportError unless every value is of its type."""

    runtime: str
    weights: str
    """Of U-Net, text encoder and ControlNet; in int8 exports the autoencoder's are fp16."""
    model: str
    """What the user called it."""
    adapter: str = "none"
    guidance: float | None = None
    """The adapter's own guidance scale; without an adapter the model's, where nobody names another."""
    guided: bool = False
    """Whether the U-Net takes the guidance scale as an input."""
    guidance_range: tuple[float, float] | None = None
    controlnet: str = ""
    loras: tuple[str, ...] = ()
    size: tuple[int, int] | None = None
    """(width, height) in pixels of the pictures that the graphs are fixed to; None: any multiples of 8."""
    inputs: Mapping[str, list[str]] = field(default_factory=dict)
    """Names of each graph's inputs, in order."""
    made_with: Mapping[str, str] = field(default_factory=dict)
    agreement: Mapping[str, float] = field(default_factory=dict)
    """Of a small 4-step picture with torch's: ``latents``, the relative difference, and ``psnr`` in dB."""
    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """``bytes`` and ``sha256`` of each file, by its name in the folder."""

    def __post_init__(self) -> None:
        pairs = {"runtime": RUNTIMES, "weights": WEIGHTS}
        for name, known in pairs.items():
            if getattr(self, name) not in known:
                raise ExportError(f"the {name} {printable(repr(getattr(self, name)))} is none of {', '.join(known)}.")
        texts = all(isinstance(getattr(self, name), str) for name in ("model", "adapter", "controlnet"))
        if not texts or not isinstance(self.guided, bool) or not _number_or_none(self.guidance):
            raise ExportError("model, adapter, controlnet, guided or guidance is of the wrong kind.")
        sides = self.size
        if sides is not None and (len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides)):
            raise ExportError(f"the size {printable(repr(sides))} is no width and height.")
        for part in self.parts:
            if not isinstance(self.inputs.get(part), list):
                raise ExportError(f"the inputs of {part} are not named.")

    @property
    def usual_guidance(self) -> float:
        """The scale to draw at without SUN where nobody names one. Older exports say none: Stable Diffusion's."""
        return USUAL_GUIDANCE if self.guidance is None else self.guidance

    @property
    def parts(self) -> tuple[str, ...]:
        """The graphs in the folder, by the names of their own folders."""
        return PARTS if self.controlnet else _ALWAYS

    @property
    def with_sun(self) -> bool:
        """Whether an adapter is in the U-Net."""
        return self.adapter != "none"


def is_exported(folder: str | Path) -> bool:
    """Whether ``folder`` was made by ``sun export``."""
    return (Path(folder) / CONTENTS).is_file()


def write_contents(folder: Path, contents: Contents) -> Contents:
    """Write ``sun_export.json``; where ``contents`` names no files, with size and hash of every one in ``folder``."""
    files = contents.files or {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != CONTENTS
    }
    contents = replace(contents, files=files)
    write_json(folder / CONTENTS, {"format": FORMAT, **asdict(contents)})
    return contents


def read_contents(folder: str | Path, verify: bool = True) -> Contents:
    """What ``folder`` holds, after looking that every file is there and, with ``verify``, that none has changed.

    Raises ExportError.
    """
    folder = Path(folder)
    if not is_exported(folder):
        raise ExportError(
            f"{printable(str(folder))} is not an exported model (no {CONTENTS}). Make one with "
            "`sun export MODEL --adapter ADAPTER --to openvino --out FOLDER`."
        )
    try:
        content = read_json(folder / CONTENTS)
    except (ReadError, OSError) as error:
        raise ExportError(f"{error} {_AGAIN}") from error
    where = printable(str(folder / CONTENTS))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = printable(repr(content.get("format") if isinstance(content, dict) else content))[:80]
        raise ExportError(f"{where} has the format {found}; this version reads {FORMAT}. {_AGAIN}")
    known = {f.name for f in fields(Contents)}
    try:
        values = {name: value for name, value in content.items() if name in known}
        for name in ("size", "guidance_range", "loras"):
            if isinstance(values.get(name), list):
                values[name] = tuple(values[name])
        contents = Contents(**values)
        _check_files(folder, contents, verify)
    except ExportError as error:
        raise ExportError(f"{where}: {error} {_AGAIN}") from error
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ExportError(f"{where} is damaged ({printable(str(error))[:120]}). {_AGAIN}") from error
    return contents


def _check_files(folder: Path, contents: Contents, verify: bool) -> None:
    names = set(contents.files)
    lacking = [part for part in contents.parts if not any(name.startswith(f"{part}/model.") for name in names)]
    if lacking:
        raise ExportError(f"it names no files of {', '.join(lacking)}.")
    for name, mark in contents.files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or "\\" in name:
            raise ExportError(f"it names the file {printable(name)}, which is not in the folder.")
        file = folder / name
        if not file.is_file():
            raise ExportError(f"{printable(name)} is missing.")
        if file.stat().st_size != mark["bytes"]:
            raise ExportError(f"{printable(name)} has {file.stat().st_size:,} bytes instead of {mark['bytes']:,}.")
        if verify and sha256_of(file) != mark["sha256"]:
            raise ExportError(f"{printable(name)} is damaged, or of another export: it is not what was written.")


def _number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
