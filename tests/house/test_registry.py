"""What ComfyUI's registry asks of a pack: description, version, and no code that runs or installs other code."""

from __future__ import annotations

import ast
import fnmatch
import re
import subprocess
import tomllib
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest

import sun

REPOSITORY = Path(__file__).resolve().parents[2]
NEEDED = ["__init__.py", "nodes/extension.py", "sun/files.py", "web/sun.js", "web/icon.svg", "web/docs/SUN_Apply.md",
          "locales/zh/nodeDefs.json", "example_workflows/SUN text to image.json", "sun/models/emoji-sun.safetensors",
          "pyproject.toml", "README.md", "LICENSE", "NOTICE", "install.py"]  # fmt: skip


@pytest.fixture(scope="module")
def description() -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_description_is_what_the_registry_takes(description: dict[str, Any]) -> None:
    project, comfy = description["project"], description["tool"]["comfy"]
    assert re.fullmatch(r"[a-z][a-z0-9]*([-._][a-z0-9]+)*", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["version"] == sun.__version__
    assert project["dependencies"] == []  # the host has them all
    assert comfy["DisplayName"]
    assert re.fullmatch(r">=\d+\.\d+\.\d+", comfy["requires-comfyui"])
    icon = ElementTree.parse(REPOSITORY / comfy["Icon"]).getroot()
    assert icon.tag.endswith("svg")
    assert int(icon.attrib["width"]) == int(icon.attrib["height"]) <= 400


def test_the_floor_is_the_same_wherever_it_is_named(description: dict[str, Any]) -> None:
    floor = description["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    for file in ("__init__.py", "README.md", "docs/comfyui.md"):
        assert floor in (REPOSITORY / file).read_text(encoding="utf-8"), file


def test_the_archive_has_what_runs_and_leaves_out_what_does_not() -> None:
    patterns = (REPOSITORY / ".comfyignore").read_text(encoding="utf-8").split()

    def ignored(path: str) -> bool:
        return any(path.startswith(p) if p.endswith("/") else fnmatch.fnmatch(path, p) for p in patterns)

    assert not [path for path in NEEDED if ignored(path) or not (REPOSITORY / path).is_file()]
    assert ignored("tests/house/test_registry.py")
    assert ignored(".github/workflows/publish.yml")


def test_the_publish_workflow_completes_the_description(tmp_path: Path) -> None:
    """Its own commands, with a repository and a publisher, leave a file the registry can take."""
    workflow = (REPOSITORY / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    step = workflow.split("run: |\n", 1)[1].split("      - name: Publish\n", 1)[0]
    (tmp_path / "pyproject.toml").write_bytes((REPOSITORY / "pyproject.toml").read_bytes())
    known = {"GITHUB_REPOSITORY": "someone/SUN", "GITHUB_SHA": "abc", "PUBLISHER": "someone", "PATH": "/usr/bin:/bin"}
    subprocess.run(["bash", "-euc", step], cwd=tmp_path, env=known, check=True, capture_output=True)
    made = tomllib.loads((tmp_path / "pyproject.toml").read_text(encoding="utf-8"))
    assert made["tool"]["comfy"]["PublisherId"] == "someone"
    assert made["tool"]["comfy"]["Icon"].endswith("/someone/SUN/abc/web/icon.svg")
    assert made["project"]["urls"]["Repository"].endswith("/someone/SUN")
    assert made["project"]["scripts"] == {"sun": "sun.cli:main"}


def python_files() -> list[str]:
    found = [*(REPOSITORY / "nodes").rglob("*.py"), *(REPOSITORY / "sun").rglob("*.py")]
    return sorted(
        p.relative_to(REPOSITORY).as_posix() for p in [*found, REPOSITORY / "__init__.py", REPOSITORY / "install.py"]
    )


@pytest.mark.parametrize("file", python_files())
def test_no_file_runs_text_as_code_or_installs_anything(file: str) -> None:
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    for call in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        name = call.func.id if isinstance(call.func, ast.Name) else ""
        assert name not in ("eval", "exec", "compile", "__import__"), f"{file}:{call.lineno} calls {name}"
        strings = [node.value for node in ast.walk(call) if isinstance(node, ast.Constant)]
        assert not {"pip", "uv"} & set(map(str, strings)), f"{file}:{call.lineno} calls an installer"


def test_the_page_s_script_asks_nobody_else_and_runs_no_text() -> None:
    for script in (REPOSITORY / "web").rglob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert "://" not in text
        assert not re.search(r"\beval\(|new Function|innerHTML|document\.write|import\(", text), script


# --------------------------------------------------------------------------------------- what the pack is made with


def test_actions_are_pinned_by_commit_and_the_publisher_by_version() -> None:
    for workflow in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        text = workflow.read_text(encoding="utf-8")
        used = re.findall(r"uses: (\S+)(.*)", text)
        assert used
        for action, comment in used:
            assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action), action
            assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), f"{action} does not say which version this is"
        installed = re.findall(r"pip\"? install (.+)", text)
        assert installed
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", package) for package in installed), installed


def test_no_secret_is_on_a_command_line() -> None:
    for workflow in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        for line in workflow.read_text(encoding="utf-8").splitlines():
            if "secrets." in line:
                assert re.fullmatch(r" +[A-Z_]+: \$\{\{ secrets\.[A-Z_]+ \}\}", line), line
            assert "--token" not in line.split("#")[0]


def floors() -> dict[str, str]:
    lines = (REPOSITORY / "tests" / "floors.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_the_floors_that_are_tested_are_those_that_are_allowed(description: dict[str, Any]) -> None:
    extras = description["project"]["optional-dependencies"]
    wanted = [w.split(";")[0] for name in ("cli", "train") for w in extras[name] if not w.startswith("speedupnet-sun")]
    allowed = {}
    for requirement in wanted:
        match = re.fullmatch(r"([A-Za-z0-9_-]+)>=([\d.]+)(,<\d+)?", requirement.strip())
        assert match, f"{requirement} has no floor"
        allowed[match[1]] = match[2]
    tested = {name: version for name, version in floors().items() if name in allowed}
    assert set(tested) == set(allowed)
    for name, floor in allowed.items():
        assert (tested[name] + ".0.0").startswith(floor), f"{name}: {floor} is allowed and {tested[name]} tested"


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("torch", (2, 10)),  # CVE-2026-24747, CVE-2025-32434: weights_only
        ("diffusers", (0, 38)),  # CVE-2026-44513, CVE-2026-44827: code in a model's folder
        ("transformers", (5, 0)),  # CVE-2026-1839: pickled random states
        ("pillow", (12, 3)),  # GHSA-9hw9-ch79-4vh6 and others: writes out of bounds
    ],
)
def test_no_allowed_version_has_a_known_hole_on_our_path(name: str, safe: tuple[int, int]) -> None:
    assert tuple(int(part) for part in floors()[name].split(".")[:2]) >= safe


def test_what_is_not_ours_is_named_with_its_licence() -> None:
    notice = (REPOSITORY / "NOTICE").read_text(encoding="utf-8")
    for part in ("OpenAI", "Twemoji", "CC-BY 4.0", "Noto Emoji", "Apache-2.0", "emoji-datasource", "OpenMoji"):
        assert part in notice
    for model in (REPOSITORY / "sun" / "models").iterdir():
        assert model.name in notice or model.stem in notice, f"NOTICE says nothing of {model.name}"
