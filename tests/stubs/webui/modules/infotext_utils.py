"""Infotext: values with a comma, colon or line break are JSON strings; buttons that send pictures to other tabs."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

from . import script_callbacks

bindings: list[Any] = []


def quote(text: Any) -> Any:
    return json.dumps(text, ensure_ascii=False) if any(c in str(text) for c in ",:\n") else text


def parse_generation_parameters(infotext: str) -> dict[str, str]:
    *_, last = infotext.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    params = {key: json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value for key, value in found}
    return {"Hires resize-1": 0, "Hires resize-2": 0} | params


def paste(infotext: str) -> dict[str, Any]:
    """What every page gets when an infotext is pasted: the parameters as the extensions' callbacks leave them."""
    params = parse_generation_parameters(infotext)
    script_callbacks.call("infotext_pasted", infotext, params)
    return params


def hires_fix(params: dict[str, Any]) -> bool:
    """Whether txt2img switches Hires fix on for them (ui.py)."""
    return "Denoising strength" in params and bool({"Hires upscale", "Hires upscaler", "Hires resize-1"} & set(params))


class ParamBinding(SimpleNamespace):
    pass


def register_paste_params_button(binding: Any) -> None:
    bindings.append(binding)
