"""Builds workflows in the format ComfyUI's page saves, from the nodes' own schemas, laid out from left to right."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from workflow_layout import NODE_GAP, Item, Layout, Wire
from workflows import NOTES, WIDGETS, declared

TITLE, BADGE, COLUMN_GAP, GROUP_MARGIN, GROUP_GAP, BAND_GAP = 30, 26, 90, 20, 50, 150
WIDTH = 320
WIDTHS = {
    "VAEDecode": 160, "VAEEncode": 160, "SUN_LoadAdapter": 460, "MarkdownNote": 400, "CLIPTextEncode": 340,
    "SetLatentNoiseMask": 220, "SUN_Guider": 220,
}  # fmt: skip
PICTURE_NODES = ("SaveImage", "PreviewImage")
# Heights for what the page shows below the inputs of some nodes: the run's line, facts of an adapter.
LINES = {
    "SUN_Sampler": 30,
    "SUN_LoadAdapter": 60,
    "SUN_ApplyLtcAccel": 30,
    "SUN_ApplyFeatureInheritance": 30,
    "SUN_SwitchUNets": 30,
}
SLOT, WIDGET, TEXT, PICTURE = 20, 26, 100, 300
HTML_SLOT, HTML_WIDGET, HTML_FOOT = 22, 32, 36  # of the page's other way to draw nodes, which needs more room
STEEP = 0.27  # of a wire's height is what its curve takes in width
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


@dataclass
class Group:
    """A frame. `columns` are counted from its own left; `band` 1 stands below the group before it."""

    title: str
    band: int = 0
    first: int = 0  # its first column in the whole graph
    members: list[int] = field(default_factory=list)


class Graph:
    """A workflow in the making. Every node belongs to a group; groups follow each other from left to right.

    ``schemas``: for every node id, ``input`` as in ComfyUI's /object_info, ``output`` and ``output_name``.
    """

    def __init__(self, name: str, schemas: Mapping[str, Any]) -> None:
        self.name, self.schemas = name, schemas
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []
        self._groups: list[Group] = []
        self._needs: dict[int, float] = {}  # node: its height at its highest, whichever way the page draws it

    @contextlib.contextmanager
    def group(self, title: str, below: bool = False) -> Iterator[None]:
        """Frames the nodes that are added inside, right of the group before or, if it needs none of it, below."""
        self._groups.append(Group(title, band=int(below)))
        yield

    def add(self, kind: str, title: str = "", colors: tuple[str, str] | None = None, **given: Any) -> Added:
        """Adds a node. ``given`` are its inputs: outputs of other nodes, or values of widgets (else their defaults)."""
        schema = self.schemas[kind]
        entries = declared(schema)
        unknown = set(given) - {name for name, _, _ in entries}
        assert not unknown, f"{kind} has no inputs {sorted(unknown)}"
        number = len(self.nodes) + 1
        inputs: list[dict[str, Any]] = []
        values: list[Any] = []
        rows = texts = 0
        for name, type_, options in sorted(entries, key=lambda entry: entry[1] in WIDGETS):
            value = given.get(name)
            entry = {"name": name, "type": type_, "link": None}
            if isinstance(value, Ref):
                entry["link"] = self._link(value, number, len(inputs), type_)
            if type_ in WIDGETS:
                entry["widget"] = {"name": name}
                values.append(_default(type_, options) if value is None or isinstance(value, Ref) else value)
                controlled = bool(options.get("control_after_generate"))
                values.extend(["randomize"] * controlled)
                texts += bool(options.get("multiline"))
                rows += 0 if options.get("multiline") else 1 + controlled
            inputs.append(entry)
        names = list(schema["output_name"])
        outputs = [
            {"name": name, "type": type_, "links": [], "slot_index": slot}
            for slot, (name, type_) in enumerate(zip(names, schema["output"], strict=True))
        ]
        slots = max(sum(i["type"] not in WIDGETS for i in inputs), len(outputs))
        more = TEXT * texts + LINES.get(kind, 0) + (PICTURE if kind in PICTURE_NODES else 0)
        height = 20 + SLOT * slots + WIDGET * rows + more
        self._node(number, kind, height, inputs, outputs, values)
        self._needs[number] = max(height, 8 + HTML_SLOT * slots + HTML_WIDGET * rows + more + HTML_FOOT)
        if title:
            self.nodes[-1]["title"] = title
        if colors or (kind.startswith("SUN_") and kind != "SUN_LoadEmojiDiffusion"):
            self.nodes[-1]["color"], self.nodes[-1]["bgcolor"] = colors or BROWN
        return Added(number, names)

    def note(self, text: str) -> None:
        number, width = len(self.nodes) + 1, WIDTHS["MarkdownNote"] // 7
        lines = sum(1 + len(line) // width for line in text.splitlines())
        self._node(number, "MarkdownNote", 60 + 19 * lines, [], [], [text])
        self._needs[number] = self.nodes[-1]["size"][1]
        self.nodes[-1] |= {"title": "Read me", "color": BROWN[0], "bgcolor": BROWN[1]}

    def _node(self, number: int, kind: str, height: int, inputs: list, outputs: list, values: list) -> None:
        self._groups[-1].members.append(number)
        self.nodes.append(
            {
                "id": number, "type": kind, "pos": [0, 0], "size": [WIDTHS.get(kind, WIDTH), height], "flags": {},
                "order": number - 1, "mode": 0, "inputs": inputs, "outputs": outputs,
                "properties": {"Node name for S&R": kind}, "widgets_values": values,
            }
        )  # fmt: skip

    def _link(self, source: Ref, target: int, slot: int, type_: str) -> int:
        output = self.nodes[source.node - 1]["outputs"][source.slot]
        assert output["type"] == type_, f"a {output['type']} does not fit an input for {type_}"
        number = len(self.links) + 1
        self.links.append([number, *source, target, slot, type_])
        output["links"].append(number)
        return number

    # ---------------------------------------------------------------------------------------------------------- layout

    def _columns(self) -> dict[int, int]:
        """Node: its column. In a group, a node stands right of those of the group that it gets something from."""
        columns: dict[int, int] = {}
        end = before = 0
        for group in self._groups:
            depth = self._depths(group)
            group.first = before if group.band else end
            columns |= {node: group.first + depth[node] for node in group.members}
            before, end = group.first, max(end, group.first + max(depth.values()) + 1)
        for _, source, _, target, _, _ in self.links:
            assert columns[source] < columns[target], f"{self.name}: link from node {source} to {target} runs backwards"
        return columns

    def _depths(self, group: Group) -> dict[int, int]:
        """Columns of a group's nodes, from its left."""
        depth: dict[int, int] = {}
        for node in group.members:  # a node is added after those it gets something from
            sources = [link[1] for link in self.links if link[3] == node and link[1] in depth]
            depth[node] = max((depth[source] + 1 for source in sources), default=0)
        return depth

    def _arrange(self) -> dict[str, Any]:
        """Places the nodes. Returns what goes into `extra`: the reroutes that lead wires past nodes."""
        columns = self._columns()
        bands = {node: group.band for group in self._groups for node in group.members}
        trunks = {(link[1], link[2]): 0 for link in self.links}  # output: the column of its farthest consumer
        for _, source, slot, target, _, _ in self.links:
            trunks[source, slot] = max(trunks[source, slot], columns[target])
        items = [
            Item(node, columns[node], self._needs[node], TITLE + BADGE * self._badged(node), bands[node])
            for node in columns
            if not self._is_note(node)
        ]
        stacked = {c for node, c in columns.items() if bands[node]}
        items += [
            Item((*output, column), column, band=bands[output[0]] if column in stacked else 0)
            for output, last in trunks.items()
            for column in range(columns[output[0]] + 1, last)
        ]
        wires = self._wires(columns, trunks)
        y = Layout(items, wires).place(BAND_GAP)
        climbs = dict.fromkeys(columns.values(), 0.0)  # of the steepest wire right of a column
        for wire in wires:
            column = columns[wire.source] if wire.source in columns else wire.source[2]
            climb = abs(y[wire.source] + wire.source_offset - y[wire.target] - wire.target_offset)
            climbs[column] = max(climbs[column], climb)
        lefts, widths = self._across(columns, climbs)
        for node in self.nodes:
            node["size"][0] = widths[columns[node["id"]]]
            if node["id"] in y:
                node["pos"] = [lefts[columns[node["id"]]], round(y[node["id"]])]
        self._place_notes()
        return self._reroutes(columns, trunks, y, lefts, widths)

    def _place_notes(self) -> None:
        """Each below the others of its group, at its left."""
        for group in self._groups:
            others = [self.nodes[node - 1] for node in group.members if not self._is_note(node)]
            for note in (self.nodes[node - 1] for node in group.members if self._is_note(node)):
                bottom = max(node["pos"][1] + self._needs[node["id"]] for node in others)
                note["pos"] = [min(node["pos"][0] for node in others), bottom + TITLE + NODE_GAP]

    def _is_note(self, node: int) -> bool:
        return self.nodes[node - 1]["type"] in NOTES

    def _badged(self, node: int) -> bool:
        return self.nodes[node - 1]["type"].startswith("SUN_")

    @staticmethod
    def _slot(slot: int) -> float:
        return (slot + 0.7) * SLOT

    def _wires(self, columns: Mapping[int, int], trunks: Mapping[tuple[int, int], int]) -> list[Wire]:
        wires = []
        for (node, slot), last in trunks.items():
            before: Any = node
            for column in range(columns[node] + 1, last):
                wires.append(Wire(before, (node, slot, column), self._slot(slot) if before == node else 0.0))
                before = (node, slot, column)
        for _, source, slot, target, place, _ in self.links:
            lane = columns[target] - 1
            start: Any = source if lane == columns[source] else (source, slot, lane)
            wires.append(Wire(start, target, self._slot(slot) if start == source else 0.0, self._slot(place)))
        return wires

    def _across(
        self, columns: Mapping[int, int], climbs: Mapping[int, float]
    ) -> tuple[dict[int, float], dict[int, float]]:
        """(left edge, width) of every column. Steep wires get room: else the page draws them with a loop backwards."""
        starts = {group.first for group in self._groups}
        lefts: dict[int, float] = {}
        widths: dict[int, float] = {}
        x = 0
        for column in range(max(columns.values()) + 1):
            x += GROUP_GAP if column in starts and column else 0
            widths[column] = max(node["size"][0] for node in self.nodes if columns[node["id"]] == column)
            lefts[column] = x
            x += widths[column] + max(COLUMN_GAP, round(STEEP * climbs[column]))
        return lefts, widths

    def _reroutes(
        self, columns: Mapping[int, int], trunks: Mapping[tuple[int, int], int], y: Mapping[Any, float],
        lefts: Mapping[int, float], widths: Mapping[int, float],
    ) -> dict[str, Any]:  # fmt: skip
        """One at each end of a lane, but not in the middle of a straight. Links of one output share them as far as
        they go together."""
        reroutes: list[dict[str, Any]] = []
        leaves: dict[int, int] = {}  # link: its last reroute
        for (node, slot), last in trunks.items():
            parent = None
            for column in range(columns[node] + 1, last):
                links = [n for n, source, at, target, _, _ in self.links
                         if (source, at) == (node, slot) and columns[target] > column]  # fmt: skip
                left, right, level = lefts[column], lefts[column] + widths[column], round(y[node, slot, column])
                before, after = (y.get((node, slot, column + side)) for side in (-1, 1))
                ends = [left] if before is None or round(before) != level else []
                leaving = any(columns[self.links[link - 1][3]] == column + 1 for link in links)
                ends += [right] if leaving or after is None or round(after) != level else []
                for x in ends:
                    entry = {"id": len(reroutes) + 1, "pos": [x, level], "linkIds": links}
                    reroutes.append(entry if parent is None else {**entry, "parentId": parent})
                    parent = len(reroutes)
                leaves |= dict.fromkeys(links, parent)
        if not reroutes:
            return {}
        extensions = [{"id": link, "parentId": parent} for link, parent in sorted(leaves.items())]
        return {"reroutes": reroutes, "linkExtensions": extensions}

    def _frames(self) -> list[dict[str, Any]]:
        tops = {0: min(n["pos"][1] - TITLE - BADGE for n in self.nodes)}
        frames = []
        for group in self._groups:
            members = [self.nodes[node - 1] for node in group.members]
            left = min(n["pos"][0] for n in members) - GROUP_MARGIN
            right = max(n["pos"][0] + n["size"][0] for n in members) + GROUP_MARGIN
            bottom = max(n["pos"][1] + self._needs[n["id"]] for n in members) + GROUP_MARGIN
            top = tops.get(group.band, min(n["pos"][1] - TITLE - BADGE for n in members)) - GROUP_MARGIN - 30
            frames.append(
                {
                    "id": len(frames) + 1, "title": group.title, "bounding": [left, top, right - left, bottom - top],
                    "color": GROUP_COLOR, "font_size": 24, "flags": {},
                }
            )  # fmt: skip
        return frames

    def workflow(self) -> dict[str, Any]:
        ways = self._arrange()
        for node in self.nodes:
            for output in node["outputs"]:
                output["links"] = output["links"] or None
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"sun/example_workflows/{self.name}")), "revision": 0,
            "last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links,
            "groups": self._frames(), "config": {},
            "extra": {"ds": {"scale": 0.6, "offset": [60, 140]}, "sun_example": True, **ways}, "version": 0.4,
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
