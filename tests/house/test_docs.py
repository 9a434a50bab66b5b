"""What the pages say exists: links and their headings, files, commands with their options, targets of make."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from typer.main import get_command

from sun.cli import app

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("docs", "reports", "sun", "web", "tests")
PAGES = [
    page.relative_to(ROOT).as_posix()
    for page in sorted(
        {*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("[!.]*.md"))}
    )
    if not any(part.startswith(".") for part in page.relative_to(ROOT).parts)
]
GUIDES = [page for page in PAGES if page.startswith(("README", "CONTRIBUTING", "docs/", "reports/", "sun/"))]
# of other programs, where an option stands in the text without its command
OTHERS = {"--api", "--api-auth", "--lowvram", "--medvram", "--screenshots", "--sun-dir"}
ROOMS = ("tests/", "configs/", "docs/", "sun/", "reports/", "example_workflows/", "nodes/", "webui/", "scripts/")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"```.*?```", re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
"""Text between backticks."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def code_lines(page: str) -> Iterator[str]:
    """Lines of fenced and indented code, those that end in a backslash joined with the next, and spans in the text."""
    text = re.sub(r"\\\n\s*", " ", read(page))
    for block in FENCE.findall(text):
        yield from block.split("\n")[1:-1]
    prose = FENCE.sub("", text)
    yield from (line.strip() for line in prose.split("\n") if line.startswith("    "))
    yield from SPAN.findall("\n".join(line for line in prose.split("\n") if not line.startswith("    ")))


@cache
def anchors(page: str) -> frozenset[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


@cache
def commands() -> dict[str, frozenset[str]]:
    """The options of each command, ``train-peer lcm-lora`` and its like included."""
    found: dict[str, frozenset[str]] = {}

    def add(group: Any, before: str) -> None:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                add(command, f"{before}{name} ")
            options = [
                option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
            ]
            found[f"{before}{name}"] = frozenset((*options, "--help"))

    group = get_command(app)
    add(group, "")
    found[""] = frozenset(option for parameter in group.params for option in parameter.opts)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    dead = []
    for link in LINK.findall(FENCE.sub("", read(page))):
        if re.match(r"[a-z]+:", link):
            continue
        file, _, heading = unquote(link).partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (heading and heading not in anchors(target.resolve().relative_to(ROOT).as_posix())):
            dead.append(link)
    assert dead == []


def unknown_in(line: str) -> list[str]:
    """What a line of code asks of ``sun`` that it has not."""
    wrong = []
    for call in re.split(r"&&|\||;", line.partition(" #")[0]):
        begin = re.match(r"\s*(?:.*\s-m )?sun ((?:train-(?:emoji|peer) )?[a-z][a-z-]*)(.*)", call)
        if begin is None:
            continue
        name, rest = begin.groups()
        known = commands().get(name)
        if known is None:
            wrong.append(f"sun {name}")
        else:
            given = re.findall(r"(?<![\w-])(--[a-z][a-z-]*)", rest)
            wrong += [f"sun {name} {option}" for option in given if option not in known]
    return wrong


@pytest.mark.parametrize("page", GUIDES)
def test_commands_and_options_exist(page: str) -> None:
    every = frozenset.union(*commands().values(), OTHERS)
    wrong = []
    for line in code_lines(page):
        wrong += unknown_in(line)
        if alone := re.match(r"(--[a-z][a-z-]*)", line):
            wrong += [option for option in alone.groups() if option not in every]
    assert wrong == []


def test_a_wrong_command_and_a_wrong_option_are_seen() -> None:
    assert unknown_in("sun generate x --no-such-option") == ["sun generate --no-such-option"]
    assert unknown_in("pip install x && sun draw x") == ["sun draw"]
    assert unknown_in("accelerate launch -m sun train-peer lcm-lora --config x --modle y") == [
        "sun train-peer lcm-lora --modle"
    ]
    assert unknown_in("sun train --no-resume  # sun nothing --at-all") == []


@pytest.mark.parametrize("page", GUIDES)
def test_files_that_are_named_exist(page: str) -> None:
    """Paths that begin at the repository's root; what a run makes (in `runs/`, say) is left out."""
    named = [
        word for line in code_lines(page) for word in re.findall(r"(?<![\w/.~-])[\w./-]+\.(?:toml|py|md|json)\b", line)
    ]
    paths = [word for word in named if word.startswith(ROOMS)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_targets_of_make_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE))
    named = {target for page in GUIDES for line in code_lines(page) for target in re.findall(r"^make ([a-z-]+)", line)}
    assert "demo" in named
    assert named <= targets


def test_extras_that_are_named_exist() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    named = {
        name for page in GUIDES for some in re.findall(r"\.\[([a-z,-]+)\]\"", read(page)) for name in some.split(",")
    }
    assert "cli" in named
    assert named <= set(extras)


def test_the_page_of_comfyui_has_every_node_and_workflow() -> None:
    page = read("docs/comfyui.md")
    nodes = {node["display_name"] for node in json.loads(read("locales/en/nodeDefs.json")).values()}
    assert {name for name in nodes if f"| **{name}** |" not in page} == set()
    workflows = {file.stem for file in (ROOT / "example_workflows").glob("*.json")}
    assert {name for name in workflows if f"*{name}*" not in page} == set()


def test_the_readme_is_short() -> None:
    """For three readers: what is not in 460 words is in docs/ and reports/."""
    assert len(read("README.md").split()) <= 460
