"""The rooms of the house: who may import whom, type imports included. CONTRIBUTING.md says why."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("nodes", "webui", "scripts")
METHOD = {"common"}
CORE = {"common", "flat", "shipped"}
METHODS = {"compact", "inheritance", "ltc", "switching"}
MODELS = CORE | METHODS | {"pipelines"} | {f"{method}.pipelines" for method in METHODS}
IN_HOSTS = CORE | METHODS
MAY_IMPORT = {
    "common": set(),
    "shipped": {"common"},
    "flat": {"common"},
    "face": MODELS | {"runtimes"},  # sun/__init__.py, lazily
    "ltc": METHOD | {"ltc.pipelines"},  # its __init__.py, lazily
    "inheritance": METHOD | {"inheritance.pipelines"},
    "switching": METHOD | {"switching.pipelines"},
    "compact": METHOD | {"compact.pipelines"},
    "ltc.pipelines": MODELS,
    "inheritance.pipelines": MODELS,
    "switching.pipelines": MODELS,
    "compact.pipelines": MODELS,
    "pipelines": CORE,
    "runtimes": MODELS | {"face"},
    "pictures": MODELS | {"runtimes", "face"},
    "training": MODELS | {"pictures"},
    "evaluation": MODELS | {"pictures", "face"},
    "lab": MODELS | {"pictures", "training", "evaluation", "face"},
    "cli": MODELS | {"runtimes", "pictures", "training", "evaluation", "face"},
    "nodes": IN_HOSTS | {"face"},
    "webui": IN_HOSTS | {"face"},
    "scripts": {"webui"},
}


def modules() -> dict[str, Path]:
    """Every module of the package and of the hosts' folders by its dotted name."""
    files = [f for top in ("sun", *HOSTS) for f in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


MODULES = modules()


def room_of(module: str) -> str:
    """``flat`` for ``sun/*.py``, else the folder; the diffusers side of a method is a room of its own."""
    parts = module.split(".")
    if parts[0] in HOSTS:
        return parts[0]
    if len(parts) == 1:
        return "face"
    folder = MODULES[".".join(parts[:2])].name == "__init__.py"
    if not folder:
        return "cli" if parts[1] == "__main__" else "flat"
    if parts[1] in METHODS and parts[2:3] == ["pipelines"]:
        return f"{parts[1]}.pipelines"
    return parts[1]


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of this repository that ``module`` names in an import, wherever in the file it stands."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            names = {f"{home}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else home for name in names}
    return frozenset(found & MODULES.keys() - {module})


@pytest.mark.parametrize("room", sorted(MAY_IMPORT))
def test_a_room_imports_only_the_rooms_below_it(room: str) -> None:
    wrong = {
        (module, target)
        for module in MODULES
        if room_of(module) == room
        for target in imports_of(module)
        if room_of(target) not in {room, *MAY_IMPORT[room]}
    }
    assert wrong == set()


def reached_from(module: str, graph: dict[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = [module]
    while todo:
        fresh = graph.get(todo.pop(), set()) - seen
        seen |= fresh
        todo += fresh
    return seen


def test_no_circles() -> None:
    """No module needs itself, directly or through others, not even for its types."""
    graph = {m: set(imports_of(m)) for m in MODULES if MODULES[m].name != "__init__.py"}
    assert {m for m in graph if m in reached_from(m, graph)} == set()


def left_out(file: str) -> bool:
    """Whether .comfyignore keeps a file of the repository out of the registry's archive."""
    patterns = (ROOT / ".comfyignore").read_text(encoding="utf-8").split()
    return any(file.startswith(p) if p.endswith("/") else fnmatch(file, p) for p in patterns)


def test_the_registry_s_archive_has_all_that_a_node_imports(tmp_path: Path) -> None:
    lazy = {"face", *(f"{method}.pipelines" for method in METHODS)}  # for diffusers; a node asks for none of them
    needed, todo = set(), [m for m in MODULES if m.startswith("nodes")]
    while todo:
        if (module := todo.pop()) not in needed:
            needed.add(module)
            todo += [t for t in imports_of(module) if room_of(t) not in lazy]
    assert "sun.ltc.run" in needed
    assert [m for m in needed if left_out(str(MODULES[m].relative_to(ROOT)))] == []

    kept = [f for f in (ROOT / "sun").rglob("*.py") if not left_out(str(f.relative_to(ROOT)))]
    for file in kept:  # and it works without the rest
        copy = tmp_path / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    names = ", ".join(sorted(m for m in needed if m.startswith("sun")))
    subprocess.run(
        [sys.executable, "-c", f"import {names}"], cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""}, check=True
    )
