"""Reads workflows in the format ComfyUI's page saves and turns them into the prompts its server runs."""

from __future__ import annotations

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of a workflow. `object_info` is the server's answer to /object_info."""
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {entry["name"]: origin[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, kind, options in _declared(object_info[node["type"]]):
            if kind in WIDGETS:
                inputs[name] = next(values)
                if options.get("control_after_generate"):
                    next(values)  # "fixed" or "randomize": the page's business
            if name in linked:
                inputs[name] = linked.pop(name)
        left = [*linked, *values]
        assert not left, f"{node['type']} does not declare {left}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def _declared(info: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of every input, in the order the page lays out widgets."""
    result = []
    for group in ("required", "optional"):
        for name, declaration in info["input"].get(group, {}).items():
            kind, options = declaration[0], declaration[1] if len(declaration) > 1 else {}
            result.append((name, "COMBO" if isinstance(kind, list) else kind, options))
    return result
