"""Builds workflows in the format ComfyUI's page saves, from the nodes' own schemas, with a layout in columns."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from workflows import WIDGETS, declared

WIDTH, COLUMN_GAP, NODE_GAP, TITLE, GROUP_MARGIN, GROUP_GAP = 340, 50, 60, 30, 20, 60
PICTURE_NODES = ("SaveImage", "PreviewImage")
# Heights the page gives nodes that show more than their inputs, and room for the badge above their titles.
LEAST_HEIGHTS = {"SUN_Sampler": 310, "SUN_Apply": 170, "SUN_LoadAdapter": 120}
BADGES, BADGE = ("SUN_Sampler", "SUN_LoadAdapter"), 30
BROWN, GREEN, RED = ("#432", "#653"), ("#232", "#353"), ("#322", "#533")
GROUP_COLOR = "#3f789e"


class Ref(NamedTuple):
    """An output of a node."""

    node: int
    slot: int


@dataclass
class Added:
    """A node in a graph: ``node["model"]`` or ``node[0]`` is one of its outputs."""

    id: int
    names: list[str]

    def __getitem__(self, output: str | int) -> Ref:
        return Ref(self.id, output if isinstance(output, int) else self.names.index(output))


class Graph:
    """A workflow in the making. Nodes go below each other in the present column; groups are made of whole columns.

    ``schemas``: for every node id, ``input`` as in ComfyUI's /object_info, ``output`` and ``output_name``.
    """

    def __init__(self, name: str, schemas: Mapping[str, Any]) -> None:
        self.name, self.schemas = name, schemas
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self.groups: list[dict[str, Any]] = []
        self._x, self._y = -WIDTH - COLUMN_GAP, 0

    def column(self) -> None:
        self._x, self._y = self._x + WIDTH + COLUMN_GAP, 0

    @contextlib.contextmanager
    def group(self, title: str) -> Iterator[None]:
        """Frames the nodes that are added inside; begins a column."""
        first = len(self.nodes)
        self._x += GROUP_GAP if self.nodes else 0
        self.column()
        yield
        members = self.nodes[first:]
        left = min(n["pos"][0] for n in members) - GROUP_MARGIN
        right = max(n["pos"][0] + n["size"][0] for n in members) + GROUP_MARGIN
        bottom = max(n["pos"][1] + n["size"][1] for n in members) + GROUP_MARGIN
        top = -TITLE - GROUP_MARGIN - 40
        self.groups.append(
            {
                "id": len(self.groups) + 1, "title": title, "bounding": [left, top, right - left, bottom - top],
                "color": GROUP_COLOR, "font_size": 24, "flags": {},
            }
        )  # fmt: skip

    def add(self, kind: str, title: str = "", colors: tuple[str, str] | None = None, **given: Any) -> Added:
        """Adds a node. ``given`` are its inputs: outputs of other nodes, or values of widgets (else their defaults)."""
        schema = self.schemas[kind]
        entries = declared(schema)
        unknown = set(given) - {name for name, _, _ in entries}
        assert not unknown, f"{kind} has no inputs {sorted(unknown)}"
        number = len(self.nodes) + 1
        inputs, values, tall = [], [], 0
        for name, type_, options in sorted(entries, key=lambda entry: entry[1] in WIDGETS):
            value = given.get(name)
            entry = {"name": name, "type": type_, "link": None}
            if isinstance(value, Ref):
                entry["link"] = self._link(value, number, len(inputs), type_)
            if type_ in WIDGETS:
                entry["widget"] = {"name": name}
                values.append(_default(type_, options) if value is None or isinstance(value, Ref) else value)
                if options.get("control_after_generate"):
                    values.append("randomize")
                tall += 100 if options.get("multiline") else 26 * (2 if options.get("control_after_generate") else 1)
            inputs.append(entry)
        names = list(schema["output_name"])
        outputs = [
            {"name": name, "type": type_, "links": [], "slot_index": slot}
            for slot, (name, type_) in enumerate(zip(names, schema["output"], strict=True))
        ]
        height = 20 + 20 * max(sum(i["type"] not in WIDGETS for i in inputs), len(outputs)) + tall
        height = max(height, LEAST_HEIGHTS.get(kind, 0)) + (320 if kind in PICTURE_NODES else 0)
        self._place(number, kind, height, inputs, outputs, values)
        if title:
            self.nodes[-1]["title"] = title
        if colors or (kind.startswith("SUN_") and kind != "SUN_LoadEmojiDiffusion"):
            self.nodes[-1]["color"], self.nodes[-1]["bgcolor"] = colors or BROWN
        return Added(number, names)

    def note(self, text: str) -> None:
        lines = sum(1 + len(line) // 46 for line in text.splitlines())
        self._place(len(self.nodes) + 1, "MarkdownNote", 40 + 21 * lines, [], [], [text])
        self.nodes[-1] |= {"title": "Read me", "color": BROWN[0], "bgcolor": BROWN[1]}

    def _place(self, number: int, kind: str, height: int, inputs: list, outputs: list, values: list) -> None:
        self._y += BADGE if kind in BADGES and self._y else 0
        self.nodes.append(
            {
                "id": number, "type": kind, "pos": [self._x, self._y], "size": [WIDTH, height], "flags": {},
                "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
                "properties": {"Node name for S&R": kind}, "widgets_values": values,
            }
        )  # fmt: skip
        self._y += height + NODE_GAP

    def _link(self, source: Ref, target: int, slot: int, type_: str) -> int:
        output = self.nodes[source.node - 1]["outputs"][source.slot]
        assert output["type"] == type_, f"a {output['type']} does not fit an input for {type_}"
        number = len(self.links) + 1
        self.links.append([number, *source, target, slot, type_])
        output["links"].append(number)
        return number

    def workflow(self) -> dict[str, Any]:
        for node in self.nodes:
            for output in node["outputs"]:
                output["links"] = output["links"] or None
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"sun/example_workflows/{self.name}")), "revision": 0,
            "last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links,
            "groups": self.groups, "config": {}, "extra": {"ds": {"scale": 0.8, "offset": [60, 120]}}, "version": 0.4,
        }  # fmt: skip

    def save(self, folder: Path) -> Path:
        path = folder / f"{self.name}.json"
        path.write_text(json.dumps(self.workflow(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def _default(type_: str, options: Mapping[str, Any]) -> Any:
    if "default" in options:
        return options["default"]
    if type_ == "COMBO":
        return options["options"][0] if options.get("options") else ""
    return {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[type_]
