"""What an API answers when a run cannot be: a status, and the reason without the server's folders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from modules import paths

from ..sun.common.reading import printable
from ..sun.compact.structure import CompactError
from ..sun.files import SunFileError
from ..sun.inheritance import InheritanceError
from ..sun.ltc import LtcError
from ..sun.prediction import PredictionError
from ..sun.switching import SwitchingError
from . import folders

if TYPE_CHECKING:
    from fastapi import HTTPException

# What is left of a path after the folders known here: two separators or a drive at least, as no sentence has them.
_PATH = re.compile(r"(?<![\w:/\\<])(?:[A-Za-z]:[\\/]|[\\/]{1,2}(?=[^\s'\"\\/]+[\\/]))(?:[^\s'\":;,*?<>|\\/]+[\\/])+")


_OF_MODELS = (
    SunFileError,
    LtcError,
    InheritanceError,
    SwitchingError,
    CompactError,
    PredictionError,
    FileNotFoundError,
)


def refusal(error: Exception) -> HTTPException:
    """The answer for `error`: 422 for what was asked, 409 for what does not go with the model or the files, else 500.

    An HTTPException, because the hosts' servers lose the text of any other on its way out.
    """
    from fastapi import HTTPException

    if isinstance(error, HTTPException):
        return error
    return HTTPException(status_of(error), printable(without_folders(str(error)))[:2000] or type(error).__name__)


def status_of(error: Exception) -> int:
    if isinstance(error, _OF_MODELS):
        return 409
    return 422 if isinstance(error, ValueError) else 500


def without_folders(text: str) -> str:
    """`text` with the names of files but not the folders of this machine they are in."""
    known = [*folders.searched(), Path(paths.models_path), Path(__file__).resolve().parents[1], Path.home(), Path.cwd()]
    written = {(str(form), models_name(folder)) for folder in known for form in (folder, folder.resolve())}
    for path, name in sorted(written, key=lambda pair: -len(pair[0])):
        if len(Path(path).parts) > 1:  # "/" alone is in every sentence that has one
            inside = re.compile(re.escape(path) + r"[\\/]")
            text = inside.sub(f"{name}/" if name else "", text)
            text = re.sub(re.escape(path) + r"(?![\w-])", name or "a folder", text)
    return _PATH.sub("", text)


def models_name(folder: Path) -> str:
    """How a folder is called towards strangers: `models/sun`, which every user has, or nothing."""
    inside = folder == Path(paths.models_path) or Path(paths.models_path) in folder.parents
    return (Path("models") / folder.relative_to(paths.models_path)).as_posix() if inside else ""
