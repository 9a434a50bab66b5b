"""The host reports exceptions of scripts and callbacks here and goes on (scripts.py, script_callbacks.py)."""

reports: list[str] = []


def report(message: str, exc_info: bool = False) -> None:
    import sys

    reports.append(f"{message}: {sys.exc_info()[1]!r}")
