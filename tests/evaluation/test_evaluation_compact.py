"""Compact U-Nets as methods of an evaluation: undistilled from a list, trained from a folder, and with SUN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_adapter

from sun.common.settings import ConfigError
from sun.compact import assemble, experts_for, plan, save_folder, write_experts
from sun.evaluation.checks import check_models
from sun.evaluation.config import EvaluateConfig, ModelSpec
from sun.evaluation.measured import asset_fingerprint
from sun.evaluation.names import parse_method
from sun.evaluation.sampler import Sampler


def test_compact_u_nets_draw_in_the_original_s_place(make_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    pipe = make_pipeline()
    unet, adapter = pipe.unet, make_adapter(pipe.unet)
    small = assemble(unet, plan(unet, named="shallow"))
    save_folder(small, tmp_path / "unet")
    unets = {"listed": "shallow", "saved": str(tmp_path / "unet"), "base": "bk-base"}

    def sampler(unet: Any, **more: Any) -> Sampler:
        parts = (pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
        return Sampler(unet, *parts, w=3.0, **more)

    made = sampler(unet, adapter=adapter, unets=unets)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}

    def drawn(sampler: Sampler, method: str) -> torch.Tensor:
        return sampler(method, ["a"], ["b"], made.noise(1, 0)).latents

    listed, saved, base = (drawn(made, f"compact[{name}]-3") for name in unets)
    close = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(listed, saved, **close)
    torch.testing.assert_close(listed, drawn(sampler(small), "dpmpp-3"), **close)
    assert (base - listed).abs().max() > 1e-3
    with_sun = drawn(made, "compact+sun[saved]-2")
    torch.testing.assert_close(with_sun, drawn(sampler(small, adapter=adapter.for_unet(small)), "sun-2"), **close)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    experts = experts_for(unet, small, plan(unet, named="shallow"))
    torch.nn.init.normal_(next(iter(experts.by_name()))[1].choose.bias)
    write_experts(experts, tmp_path / "experts.safetensors", torch.float32)  # the folder is a run's now
    mixing = sampler(unet, adapter=adapter, unets={"run": str(tmp_path), "saved": unets["saved"]})
    torch.testing.assert_close(drawn(mixing, "compact[saved]-3"), saved, **close)
    assert (drawn(mixing, "compact[run]-3") - saved).abs().max() > 1e-3
    assert asset_fingerprint(mixing, "compact[run]-3") != asset_fingerprint(mixing, "compact[saved]-3")
    prints = {asset_fingerprint(made, f"compact[{name}]-3") for name in unets}
    assert len(prints | {asset_fingerprint(made, "compact+sun[saved]-3")}) == 4


def test_names_and_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"compact\[NAME\]-25"):
        parse_method("compact-25")
    specs = {"emoji": ModelSpec()}
    with pytest.raises(ConfigError, match=r"unets\.gone = .*none.* does not exist"):
        check_models(EvaluateConfig(methods=("compact[gone]-4",), unets={"gone": str(tmp_path / "none")}), specs)
    with pytest.raises(ConfigError, match=r"needs the setting unets\.small"):
        check_models(EvaluateConfig(methods=("compact[small]-4",)), specs)
