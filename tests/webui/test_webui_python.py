"""The extension runs on the Python of most A1111 installations, which is older than the rest of the project needs."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OLDEST = (3, 10)
NEWER = {
    "tomllib": {"*"}, "enum": {"StrEnum", "ReprEnum", "verify"}, "datetime": {"UTC"}, "contextlib": {"chdir"},
    "hashlib": {"file_digest"}, "itertools": {"batched"}, "asyncio": {"TaskGroup", "timeout", "Runner"},
    "typing": {"Self", "Never", "LiteralString", "assert_never", "assert_type", "reveal_type", "NotRequired",
               "Required", "Unpack", "TypeVarTuple", "dataclass_transform", "override"},
}  # fmt: skip
NEWER_BUILTINS = {"ExceptionGroup", "BaseExceptionGroup"}


def files_of(module: Path, seen: set[Path]) -> set[Path]:
    """``module`` and every file of this repository that importing it runs."""
    if module in seen or not module.is_file():
        return seen
    seen.add(module)
    package = module.parent
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package.joinpath(*[".."] * (node.level - 1), *(node.module or "").split(".")).resolve()
        for found in (base, *(base / alias.name for alias in node.names)):
            files_of(found.with_suffix(".py"), seen)
            files_of(found / "__init__.py", seen)
    return seen


def extension_files() -> list[Path]:
    seen: set[Path] = set()
    for start in (
        *(ROOT / "webui").rglob("*.py"),
        *(ROOT / "scripts").glob("*.py"),
        ROOT / "preload.py",
        ROOT / "install.py",
    ):
        files_of(start, seen)
    files_of(ROOT / "sun" / "__init__.py", seen)
    return sorted(seen)


@pytest.mark.parametrize("file", extension_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_a_file_of_the_extension_is_python_3_10(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"), feature_version=OLDEST)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            assert not [a.name for a in node.names if "*" in NEWER.get(a.name, ())]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            newer = NEWER.get(node.module or "", set())
            assert not [a.name for a in node.names if a.name in newer or "*" in newer]
        elif isinstance(node, ast.TryStar):
            pytest.fail("except* is newer")
        elif isinstance(node, ast.Name):
            assert node.id not in NEWER_BUILTINS


def test_the_list_reaches_into_the_core() -> None:
    names = {str(file.relative_to(ROOT)) for file in extension_files()}
    assert {"webui/script.py", "sun/attention.py", "sun/ltc/run.py", "sun/inheritance/plan.py"} <= names
