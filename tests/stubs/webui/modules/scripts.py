"""Loading order and the script API: every file of scripts/ runs once, the extension's root is on sys.path only then,
each Script class found is made once for txt2img and once for img2img, and a script's exceptions never stop a run."""

from __future__ import annotations

import inspect
import os
import sys
from collections import namedtuple
from typing import Any

from . import errors, script_callbacks, script_loading

AlwaysVisible = object()
ScriptClassData = namedtuple("ScriptClassData", ["script_class", "path", "basedir", "module"])
scripts_data: list[ScriptClassData] = []
scripts_txt2img: Any = None
scripts_img2img: Any = None
HOOKS = (
    "before_process", "process", "before_process_batch", "process_batch", "process_before_every_sampling",
    "postprocess_batch", "postprocess",
)  # fmt: skip


class Script:
    filename: str | None = None
    args_from: int | None = None
    args_to: int | None = None
    alwayson = is_txt2img = is_img2img = False
    infotext_fields: Any = None
    paste_field_names: Any = None

    def title(self) -> str:
        raise NotImplementedError

    def show(self, is_img2img: bool) -> Any:
        return True

    def ui(self, is_img2img: bool) -> Any:
        return None

    def elem_id(self, item: str) -> str:
        return f"script_{'img2img' if self.is_img2img else 'txt2img'}_{self.title().lower()}_{item}"


def _nothing(self: Script, p: Any, *args: Any, **kwargs: Any) -> None:
    return None


for _name in HOOKS:
    setattr(Script, _name, _nothing)


def load_scripts(*folders: str) -> None:
    """Runs every script of the given extensions, as at start and at "Reload UI"."""
    global scripts_txt2img, scripts_img2img
    scripts_data.clear()
    script_callbacks.clear_callbacks()
    path = sys.path
    for folder in folders:
        for name in sorted(os.listdir(os.path.join(folder, "scripts"))):
            if not name.endswith(".py"):
                continue
            try:
                sys.path = [folder, *path]
                module = script_loading.load_module(os.path.join(folder, "scripts", name))
                for value in module.__dict__.values():
                    if inspect.isclass(value) and issubclass(value, Script):
                        scripts_data.append(
                            ScriptClassData(value, os.path.join(folder, "scripts", name), folder, module)
                        )
            except Exception:
                errors.report(f"Error loading script: {name}", exc_info=True)
            finally:
                sys.path = path
    script_callbacks.call("before_ui")
    scripts_txt2img, scripts_img2img = ScriptRunner(False), ScriptRunner(True)


class ScriptRunner:
    def __init__(self, is_img2img: bool) -> None:
        self.alwayson_scripts: list[Script] = []
        self.infotext_fields: list[Any] = []
        self.inputs: list[Any] = [None]
        for data in scripts_data:
            script = data.script_class()
            script.filename, script.is_img2img, script.is_txt2img = data.path, is_img2img, not is_img2img
            if script.show(is_img2img) is AlwaysVisible:
                script.alwayson = True
                self.alwayson_scripts.append(script)
        for script in self.alwayson_scripts:
            script.args_from = len(self.inputs)
            self.inputs += script.ui(is_img2img)
            script.args_to = len(self.inputs)
            self.infotext_fields += script.infotext_fields or []

    def _run(self, hook: str, p: Any, **kwargs: Any) -> None:
        for script in self.alwayson_scripts:
            try:
                getattr(script, hook)(p, *p.script_args[script.args_from : script.args_to], **kwargs)
            except Exception:
                errors.report(f"Error running {hook}: {script.filename}", exc_info=True)

    def __getattr__(self, name: str) -> Any:
        if name in HOOKS:
            return lambda p, **kwargs: self._run(name, p, **kwargs)
        raise AttributeError(name)
