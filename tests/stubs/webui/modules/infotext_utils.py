"""Infotext: values with a comma, colon or line break are JSON strings; buttons that send pictures to other tabs."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import Any

bindings: list[Any] = []


def quote(text: Any) -> Any:
    return json.dumps(text, ensure_ascii=False) if any(c in str(text) for c in ",:\n") else text


def parse_generation_parameters(infotext: str) -> dict[str, str]:
    *_, last = infotext.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    return {key: json.loads(value) if value[:1] == '"' and value[-1:] == '"' else value for key, value in found}


class ParamBinding(SimpleNamespace):
    pass


def register_paste_params_button(binding: Any) -> None:
    bindings.append(binding)
