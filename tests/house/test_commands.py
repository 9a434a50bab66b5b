"""The commands of the Makefile: together `make test` and `make test-slow` run every test, and so does `.ci/run`."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pytest_of(target: str) -> str:
    """How the Makefile's target starts pytest, its variables filled in."""
    text = (ROOT / "Makefile").read_text()
    (recipe,) = re.findall(rf"^{re.escape(target)}:[^\n]*\n((?:\t[^\n]*\n)+)", text, re.M)
    (command,) = (line.strip() for line in recipe.splitlines() if "$(PYTEST)" in line)
    (pytest,) = re.findall(r"^PYTEST = (.*)$", text, re.M)
    return command.replace("$(PYTEST)", pytest)


def test_quick_and_slow_tests_are_all_there_are() -> None:
    quick, slow, everything = (pytest_of(target) for target in ("test", "test-slow", "test-all"))
    assert quick.removesuffix(' -m "not slow"') == slow.removesuffix(" -m slow") == everything.split(" ", 2)[2]
    for command in (quick, slow, everything):
        assert command.split(" -m ")[1].startswith("pytest -c tests/pytest.ini ")
        assert " tests" in command
        assert not any(option in command for option in (" -k", "--ignore", "--deselect"))


def test_continuous_integration_runs_both() -> None:
    commands = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make ")]
    assert commands == ["make test", "make test-slow"]
    assert "set -euo pipefail" in (ROOT / ".ci" / "run").read_text()


def test_pytest_leaves_nothing_out_by_itself() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "tests" / "pytest.ini")
    assert settings["pytest"]["addopts"] == "--strict-markers -ra"
    assert "slow" in settings["pytest"]["markers"]
