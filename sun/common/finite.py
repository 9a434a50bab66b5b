"""NaN and infinity in what a model made: found before it becomes a black picture."""

from __future__ import annotations

from torch import Tensor


class NonFiniteError(ValueError):
    """A result that holds NaN or infinity; the message says of what and what to do."""


def require_finite(values: Tensor, what: str, remedy: str) -> None:
    """Raise NonFiniteError unless every row of ``values`` [B, ...] is finite.

    what: names the rows ("the latents"); remedy: a sentence that says what to do.
    """
    bad = ~values.isfinite().flatten(1).all(1)
    if count := int(bad.sum()):
        of = f" of {count} of {len(bad)} pictures" if len(bad) > 1 else ""
        raise NonFiniteError(f"{what}{of} hold NaN or infinity, so there is no picture. {remedy}")
