"""Reads workflows in the format ComfyUI's page saves and turns them into the prompts its server runs."""

from __future__ import annotations

from typing import Any

WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTES = ("Note", "MarkdownNote")
_END = object()


def to_prompt(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of a workflow. `object_info` is the server's answer to /object_info.

    Widgets that a node has got since the workflow was saved are left out: as in the page, their defaults count.
    """
    origin = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES:
            continue
        linked = {entry["name"]: origin[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, kind, options in declared(object_info[node["type"]]):
            if kind in WIDGETS:
                value = next(values, _END)
                if value is not _END:
                    inputs[name] = value
                if options.get("control_after_generate"):
                    next(values, None)  # "fixed" or "randomize": the page's business
            if name in linked:
                inputs[name] = linked.pop(name)
        left = [*linked, *values]
        assert not left, f"{node['type']} does not declare {left}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def with_defaults(prompt: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the defaults of widgets it leaves out."""
    full = {}
    for number, node in prompt.items():
        defaults = {
            name: options["default"]
            for name, kind, options in declared(object_info[node["class_type"]])
            if kind in WIDGETS and "default" in options
        }
        full[number] = {**node, "inputs": defaults | node["inputs"]}
    return full


def declared(info: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(name, type, options) of every input, in the order the page lays out widgets."""
    result = []
    for group in ("required", "optional"):
        for name, declaration in info["input"].get(group, {}).items():
            kind, options = declaration[0], dict(declaration[1]) if len(declaration) > 1 else {}
            if isinstance(kind, list):
                kind, options = "COMBO", {"options": kind, **options}
            result.append((name, kind, options))
    return result
