"""The two rules by which rows are repeated, against the field's notation written out."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange, repeat

from sun.conditioning import repeated_in_turn, repeated_side_by_side

TEXT = rearrange(torch.arange(3 * 4 * 5).float(), "(b l d) -> b l d", b=3, l=4)


def test_in_turn_every_image_comes_before_the_first_comes_again() -> None:
    rows = repeated_in_turn(TEXT, 6)
    assert torch.equal(rows, torch.cat([TEXT, TEXT]))
    assert torch.equal(rows, repeat(TEXT, "b l d -> (n b) l d", n=2))
    assert repeated_in_turn(TEXT, 3) is TEXT
    assert torch.equal(repeated_in_turn(TEXT[:1], 4), TEXT[[0, 0, 0, 0]])


def test_side_by_side_the_images_of_a_prompt_stay_together() -> None:
    rows = repeated_side_by_side(TEXT, 6, "sun_negative")
    assert torch.equal(rows, TEXT[[0, 0, 1, 1, 2, 2]])
    assert repeated_side_by_side(TEXT, 3, "sun_negative") is TEXT
    features = TEXT[:, 0, :2]  # values of other shapes: guidance
    assert torch.equal(repeated_side_by_side(features, 6, "w"), features[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize(("given", "rows"), [(3, 2), (3, 4), (2, 3), (0, 4)])
def test_rows_that_do_not_divide_are_refused(given: int, rows: int) -> None:
    text = TEXT[:given]
    with pytest.raises(ValueError, match=f"changed the batch to {rows} rows.* has {given}, which does not"):
        repeated_in_turn(text, rows)
    with pytest.raises(ValueError, match=f"sun_negative has {given} rows for a batch of {rows}"):
        repeated_side_by_side(text, rows, "sun_negative")
