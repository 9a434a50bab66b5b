"""The commands of the Makefile: together `make test` and `make test-slow` run every test, and so does `.ci/run`."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def recipe_of(target: str) -> str:
    """The command of the Makefile's target that starts pytest."""
    text = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(rf"^{re.escape(target)}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.M)
    (command,) = (line.strip() for line in recipe.splitlines() if "$(PYTEST)" in line)
    return command


def pytest_of(target: str) -> str:
    """What that command says to pytest, its variables filled in."""
    (pytest,) = re.findall(r"^PYTEST = (.*)$", (ROOT / "Makefile").read_text(), re.M)
    command = recipe_of(target)
    return command[command.index("$(PYTEST)") :].replace("$(PYTEST)", pytest)


def test_quick_and_slow_tests_are_all_there_are() -> None:
    quick, slow, everything = (pytest_of(target) for target in ("test", "test-slow", "test-all"))
    assert quick.removesuffix(' -m "not slow"') == slow.removesuffix(" -m slow") == everything
    for command in (quick, slow, everything):
        assert command.split(" -m ")[1].startswith("pytest -c tests/pytest.ini ")
        assert " tests" in command
        assert not any(option in command for option in (" -k", "--ignore", "--deselect"))


def run_with_types(tmp_path: Path, types: str, tests: str) -> subprocess.CompletedProcess[str]:
    """`.ci/with-types` with these two programs for mypy and pytest."""
    mypy = tmp_path / "mypy"
    mypy.write_text(f"#!/bin/sh\n{types}\n")
    mypy.chmod(0o755)
    command = [ROOT / ".ci" / "with-types", mypy, "sh", "-c", tests]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_types_are_checked_beside_the_tests_and_count_as_they_do(tmp_path: Path) -> None:
    for target in ("test", "test-all"):
        assert ".ci/with-types $(TEST)/bin/mypy $(PYTEST)" in recipe_of(target)
    fine = run_with_types(tmp_path, "echo no issues", "echo passed")
    assert (fine.returncode, fine.stdout) == (0, "passed\nno issues\n")
    wrong = run_with_types(tmp_path, "echo a wrong type >&2; exit 1", "echo passed")
    assert (wrong.returncode, wrong.stdout) == (1, "passed\na wrong type\n")
    assert run_with_types(tmp_path, "exit 0", "exit 5").returncode == 5
    assert run_with_types(tmp_path, "exit 1", "exit 5").returncode == 5


def test_continuous_integration_runs_both() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make test", "make test-slow"]
    assert "set -euo pipefail" in (ROOT / ".ci" / "run").read_text()


def test_pytest_leaves_nothing_out_by_itself() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "tests" / "pytest.ini")
    assert settings["pytest"]["addopts"] == "--strict-markers -ra"
    assert "slow" in settings["pytest"]["markers"]
