"""Fine-tunes that nobody trained: how far they are from the base, where they lie, and that they take their turns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

from sun.common.settings import ConfigError
from sun.training.config import SunTrainConfig, check_settings
from sun.training.models import FrozenModels
from sun.training.virtual import REACH, VirtualFineTune, virtual_fine_tunes


@pytest.fixture
def base() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {"conv.weight": torch.randn(16, 8, 3, 3), "to_k.weight": torch.randn(12, 10), "norm.bias": torch.randn(16)}


def test_a_matrix_moves_by_a_random_one_of_the_rank_and_strength(base: dict[str, torch.Tensor]) -> None:
    moved = VirtualFineTune(3, rank=2, strength=0.1).weights(base)
    for name in ("conv.weight", "to_k.weight"):
        delta = (moved[name] - base[name]).flatten(1)
        assert float(delta.norm() / base[name].norm()) == pytest.approx(0.1, rel=1e-3)
        assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 2
    assert torch.equal(moved["norm.bias"], base["norm.bias"])
    full = VirtualFineTune(3, rank=10**12, strength=0.1).weights(base)  # as far as a matrix has ranks
    assert torch.linalg.matrix_rank(full["to_k.weight"] - base["to_k.weight"], rtol=1e-4) == 10
    again, other = (VirtualFineTune(seed, 2, 0.1).weights(base) for seed in (3, 4))
    assert all(torch.equal(moved[name], again[name]) for name in base)
    assert not torch.equal(moved["to_k.weight"], other["to_k.weight"])


def test_with_real_fine_tunes_it_lies_on_the_way_to_them_and_beyond(base: dict[str, torch.Tensor]) -> None:
    """The base is moved nowhere else, and every model of many lies elsewhere."""
    real = [{name: weight + i + 1 for name, weight in base.items()} for i in range(2)]
    shares = []
    for seed in range(200):
        moved = VirtualFineTune(seed, 1, 0.0, real[:1]).weights(base)
        way = torch.cat([(moved[name] - base[name]).flatten() for name in base])
        torch.testing.assert_close(way, way[:1].expand_as(way))
        shares.append(float(way[0]))
    assert REACH[0] <= min(shares) < -0.3
    assert 1.3 < max(shares) <= REACH[1]
    mixed = VirtualFineTune(0, 1, 0.0, real).weights(base)["norm.bias"] - base["norm.bias"]
    first, second = 2 - float(mixed[0]), float(mixed[0]) - 1  # shares of the two, 1 together
    torch.testing.assert_close(mixed, torch.full_like(mixed, first + 2 * second))
    assert REACH[0] <= first <= REACH[1]


def test_they_take_turns_and_the_base_comes_back_as_it_was(tiny_model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(tiny_model, subfolder="unet")
    config = SunTrainConfig(trajectories=True, virtual_fine_tunes=2)
    models = FrozenModels(unet, (), lambda real: virtual_fine_tunes(config, real))
    before = {name: weight.clone() for name, weight in unet.named_parameters()}
    assert [models.turn(step, 2) for step in range(7)] == [0, 0, 1, 1, 2, 2, 0]
    seen = []
    for index in (1, 0, 1, 2):
        models.use(index)
        seen.append({name: weight.clone() for name, weight in unet.named_parameters()})
    assert all(torch.equal(seen[1][name], before[name]) for name in before)
    assert all(torch.equal(seen[0][name], seen[2][name]) for name in before)
    assert any(not torch.equal(seen[0][name], before[name]) for name in before)
    assert any(not torch.equal(seen[0][name], seen[3][name]) for name in before)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"virtual_fine_tunes": 2}, "needs trajectories"),
        ({"virtual_fine_tunes": 10**9, "trajectories": True}, "at most"),
        ({"virtual_fine_tunes": -1, "trajectories": True}, "0 or above"),
        ({"virtual_fine_tunes": 2, "virtual_rank": 0, "trajectories": True}, "1 or above"),
        ({"virtual_fine_tunes": 2, "virtual_strength": 0.0, "trajectories": True}, "the base itself"),
        ({"virtual_rank": 8, "trajectories": True}, "only acts with virtual_fine_tunes"),
    ],
)
def test_settings_that_cannot_work_or_do_nothing_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_settings(SunTrainConfig(**settings))
