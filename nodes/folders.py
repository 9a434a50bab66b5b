"""Where adapters live: `models/sun`, the folders of extra_model_paths.yaml, and the one shipped with the pack."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import folder_paths

from ..sun.compact.expertfile import IN_FOLDER, SUFFIX
from ..sun.shipped import EMOJI_LORA, EMOJI_SUN

FOLDER = "sun"
SHIPPED = "emoji-sun (shipped with SUN)"  # no file name looks like this, so it can never hide one of the user's


def register() -> None:
    """Adds the model folder "sun", and the shipped LoRA's to "loras", keeping what extra_model_paths.yaml put there."""
    default = Path(folder_paths.models_dir) / FOLDER
    folder_paths.add_model_folder_path(FOLDER, str(default))
    paths, _ = folder_paths.folder_names_and_paths[FOLDER]
    # A folder made by add_model_folder_path lists every kind of file until it is given extensions.
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(folder_paths.supported_pt_extensions))
    with contextlib.suppress(OSError):  # a read-only models folder: the other paths and the shipped adapter still work
        default.mkdir(parents=True, exist_ok=True)
    if EMOJI_LORA.is_file():  # so that ComfyUI's own loader has it
        folder_paths.add_model_folder_path("loras", str(EMOJI_LORA.parent))


def names() -> list[str]:
    """Every adapter one can choose, the shipped one first."""
    return [SHIPPED, *(name for name in folder_paths.get_filename_list(FOLDER) if not is_experts(name))]


def experts() -> list[str]:
    """Every file of experts one can choose."""
    return [name for name in folder_paths.get_filename_list(FOLDER) if is_experts(name)]


def is_experts(name: str) -> bool:
    """Whether a file is one of experts, by its name."""
    return Path(name).name.endswith((SUFFIX, IN_FOLDER))


def find(name: str, what: str = "SUN adapter") -> Path:
    """The file behind a name of the list. Raises FileNotFoundError that lists every path searched.

    what: is looked for, for the message.
    """
    if name == SHIPPED:
        if EMOJI_SUN.is_file():
            return EMOJI_SUN
        raise FileNotFoundError(
            f"The adapter shipped with SUN is missing: {EMOJI_SUN}. Install the SUN node pack again."
        )
    # Only listed names are opened: a name from a workflow file cannot lead out of the model folders.
    path = folder_paths.get_full_path(FOLDER, name) if name in folder_paths.get_filename_list(FOLDER) else None
    if path is None:
        searched = "\n".join(f"  {folder}" for folder in folder_paths.get_folder_paths(FOLDER))
        raise FileNotFoundError(
            f"No {what} named {name!r}. Searched:\n{searched}\n"
            f"Put the .safetensors file into one of these folders (or name another under `sun:` in "
            f"extra_model_paths.yaml), then press R in ComfyUI to refresh the list."
        )
    return Path(path)


def check(name: str, what: str = "SUN adapter") -> bool | str:
    """For a node's validate_inputs: True, or why there is no such file."""
    try:
        find(name, what)
    except FileNotFoundError as error:
        return str(error)
    return True


def fingerprint(path: Path) -> str:
    """Changes when the file does, without reading it: modification time and size."""
    stat = os.stat(path)
    return f"{stat.st_mtime_ns}-{stat.st_size}"
