"""Which number format a device computes in by default."""

from __future__ import annotations

import pytest
import torch

from sun.common import devices as precision
from sun.common.devices import autocast, has_bf16, resolve


def test_the_cpu_is_asked_for_what_torchs_own_kernels_need() -> None:
    assert has_bf16("cpu") == torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.parametrize(("capability", "expected"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_have_bf16_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_bf16("cuda") == expected
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert has_bf16("cuda")


def test_a_device_nothing_is_known_of_computes_in_float32() -> None:
    assert resolve("auto", "mps") == "fp32"


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_casts_only_where_it_is_fast(monkeypatch: pytest.MonkeyPatch, fast: bool, expected: torch.dtype) -> None:
    monkeypatch.setattr(precision, "has_bf16", lambda _: fast)
    layer = torch.nn.Linear(4, 4)
    with autocast("cpu"):
        assert layer(torch.ones(1, 4)).dtype == expected
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("bf16-weights", torch.float32)):
        assert resolve(name, "cpu") == name
        with autocast("cpu", name):
            assert layer(torch.ones(1, 4)).dtype == dtype
