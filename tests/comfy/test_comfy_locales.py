"""Names, tooltips and help pages in English and Chinese against the nodes' schemas: neither may lag behind.

`pytest -c tests/pytest.ini tests/comfy/test_comfy_locales.py --update-texts` writes locales/en/nodeDefs.json anew from
the schemas. The Chinese file and the pages are written by hand; the tests say what they lack.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from comfyui_host import REPOSITORY

LOCALES = REPOSITORY / "locales"
DOCS = REPOSITORY / "web" / "docs"
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def read(language: str, file: str) -> dict[str, Any]:
    return json.loads((LOCALES / language / f"{file}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schemas(host: SimpleNamespace) -> dict[str, Any]:
    """Node id -> schema, of every node of this pack."""
    return {name: node.GET_SCHEMA() for name, node in host.nodes.items() if name.startswith("SUN_")}


def english(schema: Any) -> dict[str, Any]:
    """A node's entry of nodeDefs.json, in the form ComfyUI's page looks texts up."""
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {part.id: {"name": part.display_name or part.id, "tooltip": part.tooltip} for part in schema.inputs},
        "outputs": {
            str(i): {"name": part.display_name or part.id, "tooltip": part.tooltip}
            for i, part in enumerate(schema.outputs)
        },
    }


def texts(entry: dict[str, Any]) -> dict[str, str]:
    """Path -> text: {"inputs.model.tooltip": ...}."""
    flat: dict[str, str] = {}
    for key, value in entry.items():
        inner = texts(value) if isinstance(value, dict) else {"": value}
        flat |= {f"{key}.{path}".rstrip("."): text for path, text in inner.items()}
    return flat


def test_english_texts_are_those_of_the_nodes(schemas: dict[str, Any], pytestconfig: pytest.Config) -> None:
    expected = {name: english(schemas[name]) for name in sorted(schemas)}
    file = LOCALES / "en" / "nodeDefs.json"
    if pytestconfig.getoption("update_texts"):
        file.write_text(json.dumps(expected, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read("en", "nodeDefs") == expected, "run this file's tests once with --update-texts"


def test_chinese_texts_are_complete(schemas: dict[str, Any]) -> None:
    chinese = read("zh", "nodeDefs")
    for name, schema in schemas.items():
        here, there = texts(chinese.get(name, {})), texts(english(schema))
        assert not there.keys() - here.keys(), f"locales/zh/nodeDefs.json lacks texts of {name}"
        for path, text in here.items():
            prose = path.endswith(("tooltip", "description"))
            assert CHINESE.search(text) if prose else text.strip(), f"{name}.{path} is not translated"


def test_chinese_texts_have_nothing_that_is_gone(schemas: dict[str, Any]) -> None:
    chinese = read("zh", "nodeDefs")
    assert chinese.keys() == schemas.keys()
    for name, schema in schemas.items():
        gone = chinese[name]["inputs"].keys() - {part.id for part in schema.inputs}
        assert not gone, f"{name} has no inputs {gone}"
        assert len(chinese[name]["outputs"]) == len(schema.outputs)


def test_the_page_s_own_texts_have_the_same_gaps_to_fill() -> None:
    english_words, chinese_words = read("en", "main")["sun"], read("zh", "main")["sun"]
    script = (REPOSITORY / "web" / "sun.js").read_text(encoding="utf-8")
    gaps = re.compile(r"\{\w+\}")
    assert english_words.keys() == chinese_words.keys()
    for key, text in english_words.items():
        assert sorted(gaps.findall(text)) == sorted(gaps.findall(chinese_words[key]))
        assert f'"{key}"' in script, f"sun.js does not use {key}"
    assert {"SUN_ADAPTER"} == read("en", "main")["dataTypes"].keys() == read("zh", "main")["dataTypes"].keys()


def test_texts_of_the_example_workflows_are_chinese_too() -> None:
    """Notes, and titles of nodes and groups: each has its translation, and none is left over."""
    shown = set()
    for file in (REPOSITORY / "example_workflows").glob("*.json"):
        workflow = json.loads(file.read_text(encoding="utf-8"))
        assert workflow["extra"]["sun_example"], "the page translates what is marked"
        shown |= {node["title"] for node in workflow["nodes"] if "title" in node}
        shown |= {node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "MarkdownNote"}
        shown |= {group["title"] for group in workflow["groups"]}
    chinese = read("zh", "main")["sun_workflows"]
    assert chinese.keys() == shown
    # Code, file names and names of options are the same in every language.
    code = re.compile(r"`[^`]+`")
    for english, text in chinese.items():
        assert CHINESE.search(text)
        assert set(code.findall(english)) == set(code.findall(text))


@pytest.mark.parametrize("language", ["en", "zh"])
def test_every_node_has_a_page_that_tells_of_every_input_and_output(schemas: dict[str, Any], language: str) -> None:
    """The page's places: NODE/LANGUAGE.md, and NODE.md for English and languages without one of their own."""
    titles = {name: entry["display_name"] for name, entry in read("zh", "nodeDefs").items()}
    for name, schema in schemas.items():
        file = DOCS / f"{name}.md" if language == "en" else DOCS / name / "zh.md"
        page = file.read_text(encoding="utf-8")
        title = schema.display_name if language == "en" else titles[name]
        assert page.startswith(f"# {title}\n"), file
        for part in [*schema.inputs, *schema.outputs]:
            shown = part.display_name or part.id
            name_in_page = f"**{shown}**" if language == "en" else f"`{shown}`"
            assert name_in_page in page, f"{file} does not tell of {shown}"


@pytest.mark.parametrize("file", sorted(DOCS.rglob("*.md")), ids=lambda file: file.relative_to(DOCS).as_posix())
def test_pages_lead_nowhere_outside(file: Path, schemas: dict[str, Any]) -> None:
    """They are read without a network; and each belongs to a node."""
    assert "://" not in file.read_text(encoding="utf-8")
    node = file.stem if file.parent == DOCS else file.parent.name
    assert node in schemas
