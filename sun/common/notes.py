"""What a user should know of a run that goes on: warnings of one kind, which the command line prints as notes."""

from __future__ import annotations

import warnings


class SunWarning(UserWarning):
    """A sentence for the user about a run that goes on: something is left out, or may not be what was meant."""


def note(sentence: str, stacklevel: int = 2) -> None:
    """Tell the user. ``stacklevel`` as in ``warnings.warn``, counted from the caller of this function."""
    warnings.warn(sentence, SunWarning, stacklevel=stacklevel + 1)
