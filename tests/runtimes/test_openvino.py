"""OpenVINO's numbers: a file of its own, for the second process of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from exports import Exported, check_four_steps, check_smaller_weights

for package in ("openvino", "nncf"):
    pytest.importorskip(package, reason='the tests of exports need the extra: pip install -e ".[export]"')


def test_four_steps_are_torch_s_at_any_size_and_batch(exported: Exported, files: Path) -> None:
    check_four_steps(exported, files, "openvino")


@pytest.mark.parametrize("weights", [pytest.param("fp16", marks=pytest.mark.slow), "int8"])
def test_smaller_weights_say_what_they_cost(exported: Exported, files: Path, weights: str) -> None:
    check_smaller_weights(exported, files, "openvino", weights)
