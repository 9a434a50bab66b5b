"""Model assembly: what may go, what stays, that the result is an ordinary U-Net with the original's weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import UNet2DConditionModel
from family import KINDS, family_unet

import sun
from sun import compact
from sun.common.notes import SunWarning
from sun.compact import CompactError, Plan, State, assemble, candidates, read_plan, shape_of, write_plan
from sun.compact.assembly import weights_by_plan
from sun.compact.choice import choose, compatible_sets
from sun.compact.measuring import importances, modules_of, noise_of, part_seconds, random_state
from sun.compact.structure import kept, named_list, new_name, old_name
from sun.shipped import SINGLE_FILE_CONFIG


def sizes(unet: Any) -> int:
    return sum(p.numel() for p in unet.parameters())


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("bk-base", 579_384_964), ("bk-small", 482_346_884), ("bk-tiny", 323_384_964)],
)
def test_bk_s_lists_make_u_nets_of_the_published_sizes(name: str, parameters: int) -> None:
    """BK-SDM publishes .58, .48 and .32 billion parameters for its U-Nets of SD 1.4."""
    with torch.device("meta"):
        original = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SINGLE_FILE_CONFIG / "unet"))
        small = assemble(original, compact.plan(original, named=name), share=True)
    assert sizes(small) == parameters
    assert small.config.layers_per_block == 1


@pytest.mark.parametrize("kind", ["sd1", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "sd1")])
def test_every_candidate_alone_leaves_an_ordinary_u_net(kind: str, tmp_path: Path) -> None:
    """It runs before any training, and a folder of it is read by diffusers' own class with the same result."""
    unet = family_unet(kind)
    shape = shape_of(unet.config)
    state = random_state(unet, 8, 8, tokens=5)
    names = candidates(shape)
    assert {name.split(".")[0] for name in names} >= {"pair", "transformers", "mid"}
    for number, name in enumerate(names):
        small = assemble(unet, Plan((name,), shape))
        assert type(small) is UNet2DConditionModel
        stays = kept(shape, [name])
        named = {new_name(old, stays): old for old in unet.state_dict()}
        assert set(named) - {None} == set(small.state_dict())
        assert all(old_name(new, stays) == old for new, old in named.items() if new is not None)
        taken = weights_by_plan(unet.state_dict(), Plan((name,), shape))
        assert all(torch.equal(taken[key], tensor) for key, tensor in small.state_dict().items())
        assert sizes(small) < sizes(unet)
        assert shape_of(small.config) == kept(shape, [name]).result  # what is planned is what diffusers builds
        noise = noise_of(small, state)
        assert bool(noise.isfinite().all())
        if number % 3 == 0:
            small.save_pretrained(tmp_path / name)
            again = UNet2DConditionModel.from_pretrained(tmp_path / name)
            torch.testing.assert_close(noise_of(again, state), noise)


def test_what_stays_has_the_original_s_weights_and_the_original_keeps_its_own() -> None:
    """BK's rule: the middle layer of an up stage goes, since the last one's skip has the width of the stage above."""
    unet = family_unet("sd1")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    small = assemble(unet, compact.plan(unet, named="shallow"))
    own, new = unet.state_dict(), small.state_dict()
    pairs = {
        "down_blocks.0.resnets.0": "down_blocks.0.resnets.0",
        "up_blocks.3.resnets.0": "up_blocks.3.resnets.0",
        "up_blocks.3.attentions.1": "up_blocks.3.attentions.2",
        "up_blocks.2.resnets.1": "up_blocks.2.resnets.2",
        "up_blocks.1.resnets.1": "up_blocks.1.resnets.1",
        "mid_block.attentions.0": "mid_block.attentions.0",
    }
    for mine, theirs in pairs.items():
        compared = [n for n in new if n.startswith(f"{mine}.")]
        assert compared
        assert all(torch.equal(new[n], own[n.replace(mine, theirs, 1)]) for n in compared)
    assert small.config.layers_per_block == [1, 1, 2, 2]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())


def test_without_removal_it_is_the_original_bit_for_bit() -> None:
    for kind in KINDS:
        unet = family_unet(kind)
        state = random_state(unet, 8, 8, tokens=5)
        assert torch.equal(noise_of(assemble(unet, Plan((), shape_of(unet.config))), state), noise_of(unet, state))


def test_the_innermost_stage_goes_where_its_neighbour_has_another_width() -> None:
    """As in Emoji Diffusion, whose last stage is narrower than the one above: the new inputs start at zero."""
    unet = family_unet("sd1", block_out_channels=(16, 32, 32, 16))
    plan = compact.plan(unet, named="bk-tiny")
    small = assemble(unet, plan)
    state = random_state(unet, 8, 8, tokens=5)
    assert bool(noise_of(small, state).isfinite().all())
    first = small.up_blocks[0].resnets[0].conv1.weight
    assert float(first[:, :32].detach().abs().max()) == 0.0
    assert torch.equal(first[:, 32:], unet.up_blocks[1].resnets[0].conv1.weight[:, 16:])


def test_three_layers_a_stage_lose_them_one_by_one() -> None:
    unet = family_unet("sd1", layers_per_block=3)
    shape = shape_of(unet.config)
    small = assemble(unet, Plan(("pair.0.1",), shape))
    assert small.config.layers_per_block == [2, 3, 3, 3]
    # layer 1's skip connection feeds layer 2 of the four on the way up
    assert torch.equal(small.up_blocks[3].resnets[2].conv1.weight, unet.up_blocks[3].resnets[3].conv1.weight)
    assert torch.equal(small.up_blocks[3].resnets[1].conv1.weight, unet.up_blocks[3].resnets[1].conv1.weight)
    assert torch.equal(small.down_blocks[0].resnets[1].conv1.weight, unet.down_blocks[0].resnets[2].conv1.weight)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_seconds_of_a_candidate_are_those_of_the_layers_that_go(kind: str) -> None:
    """The modules counted for a candidate hold exactly the parameters that the assembled U-Net has fewer."""
    unet = family_unet(kind)
    shape = shape_of(unet.config)
    modules = dict(unet.named_modules())
    for name in candidates(shape):
        gone = sum(sizes(modules[m]) for m in modules_of(name, unet, shape))
        assert sizes(unet) - sizes(assemble(unet, Plan((name,), shape))) == gone, name
    seconds = part_seconds(unet, shape, random_state(unet, 8, 8), repeats=1)
    assert set(seconds) == {"whole", *candidates(shape)}
    assert all(0 < seconds[name] < seconds["whole"] for name in candidates(shape))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_the_knapsack_is_exact() -> None:
    """Against trying every subset of the candidates there is, those at odds with each other left out."""
    unet = family_unet("sd1")
    shape = shape_of(unet.config)
    names = candidates(shape)
    generator = torch.Generator().manual_seed(3)
    for budget in (0.9, 0.75, 0.6):
        seconds = dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
        importance = dict(zip(names, torch.rand(len(names), generator=generator).tolist(), strict=True))
        seconds["whole"] = sum(seconds.values())
        allowed = {frozenset(s) for s in compatible_sets(shape)}
        every = chain.from_iterable(combinations(names, n) for n in range(len(names) + 1))
        fits = [
            s
            for s in every
            if frozenset(s) in allowed and sum(seconds[n] for n in s) >= (1 - budget) * seconds["whole"]
        ]
        best = min(sum(importance[n] for n in s) for s in fits)
        assert sum(importance[n] for n in choose(shape, budget, seconds, importance)) == pytest.approx(best)
    with pytest.raises(CompactError, match=r"cannot be met.*are left"):
        choose(shape, 0.01, seconds | {"whole": 10 * seconds["whole"]}, importance)


def test_importance_is_measured_on_states_of_the_pipeline_and_its_sum_checked(
    make_pipeline: Callable[..., Any],
) -> None:
    pipe = make_pipeline()
    states = compact.record_states(pipe, ["a", "b"], ["c", "d"], every=2, num_inference_steps=4, guidance_scale=3.0)
    assert [s.x.shape[0] for s in states] == [4, 4, 4][: len(states)]
    assert len({int(s.t) for s in states}) == len(states) > 1
    assert not torch.equal(states[0].x, states[1].x)
    said: list[str] = []
    plan = compact.plan(pipe.unet, 0.85, states, repeats=1, say=said.append)
    assert plan.chosen == "knapsack"
    assert plan.share is not None
    assert plan.share <= 0.85
    # the figure is the mean squared change of the noise: once more, by hand
    small = assemble(pipe.unet, Plan(("mid",), plan.shape))
    full = [noise_of(pipe.unet, s) for s in states]
    by_hand = sum(float((noise_of(small, s) - f).square().mean()) for s, f in zip(states, full, strict=True))
    assert plan.importance["mid"] == pytest.approx(by_hand / sum(float(f.square().mean()) for f in full), rel=1e-4)
    (together,) = importances(pipe.unet, plan.shape, states, [plan.remove])
    assert plan.measured["additivity"]["importance_together"] == pytest.approx(together, rel=1e-3)
    assert "add up to" in said[0]


def test_without_states_the_shallow_layers_go_first() -> None:
    unet = family_unet("sd1")
    plan = compact.plan(unet, 0.97, repeats=1)
    assert plan.remove[0] == "pair.0.1"
    assert plan.importance == {}
    assert plan.measured["latents"] == [8, 8]
    with pytest.raises(CompactError, match="between 0 and 1"):
        compact.plan(unet, 1.0)


def test_a_plan_is_a_file_that_comes_back(tmp_path: Path) -> None:
    unet = family_unet("sd2")
    plan = compact.plan(unet, 0.95, repeats=1)
    write_plan(plan, tmp_path / "plan.json")
    back = read_plan(tmp_path / "plan.json")
    assert (back.remove, back.shape, back.budget, back.chosen) == (plan.remove, plan.shape, 0.95, "shallow-first")
    assert back.share == pytest.approx(plan.share, rel=1e-4)
    assert torch.equal(assemble(unet, back).conv_in.weight, unet.conv_in.weight)


def test_a_plan_for_another_u_net_is_refused() -> None:
    plan = compact.plan(family_unet("sd1"), named="bk-base")
    with pytest.raises(CompactError, match="for another U-Net"):
        assemble(family_unet("sdxl"), plan)
    with pytest.raises(CompactError, match="text_width is 16 there and 24 here"):
        assemble(family_unet("sd1", cross_attention_dim=24), plan)
    small = assemble(family_unet("sd1"), plan)
    with pytest.raises(CompactError, match=r"layers is .* compact already: give the original"):
        assemble(small, plan)
    with pytest.raises(CompactError, match="a compact one"):
        compact.plan(small, 0.8)
    with pytest.raises(CompactError, match="a compact one"):
        compact.plan(small, named="shallow")
    half = assemble(family_unet("sd1"), compact.plan(family_unet("sd1"), named="shallow"))
    with pytest.raises(CompactError, match="2 finest stages already: it is a compact one"):
        compact.plan(half, named="shallow")  # would remove nothing
    with pytest.warns(SunWarning, match="has 1, 1, 2, 2 layers in its stages: it is a compact one already"):
        assert compact.plan(half, named="bk-base").remove == ("pair.2.1", "pair.3.1")
    with pytest.raises(CompactError, match="A str is no plan"):
        assemble(family_unet("sd1"), "shallow")


def test_importance_is_a_finite_number_or_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision overflows in some U-Nets that lack a layer, and a plan by NaN would be any plan."""
    unet, broken = family_unet("sd1"), family_unet("sd1")
    state = State(torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 5, unet.config.cross_attention_dim))
    with torch.no_grad():
        broken.conv_out.bias.fill_(math.inf)
    monkeypatch.setattr("sun.compact.measuring.assemble", lambda *_args, **_given: broken)
    with pytest.raises(CompactError, match=r"the U-Net without mid, pair\.0\.1 gives NaN or infinity"):
        importances(unet, shape_of(unet.config), [state], [("mid", "pair.0.1")])
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
    with pytest.raises(CompactError, match="nothing but zeros"):
        importances(unet, shape_of(unet.config), [state], [("mid",)])


def test_states_of_another_model_and_weights_that_are_elsewhere_are_named() -> None:
    unet = family_unet("sd1")
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor(500), torch.randn(1, 5, unet.config.cross_attention_dim)
    for state, words in (
        (State(torch.randn(1, 9, 8, 8), t, text), "channels of latents 9 there, 4 here"),
        (State(x, t, torch.randn(1, 5, 7)), "width of texts 7 there"),
        (State(x, t, text, {"time_ids": x}), "size and pooled text"),
        (State(x * math.nan, t, text), "NaN or infinity"),
    ):
        with pytest.raises(CompactError, match=words):
            importances(unet, shape_of(unet.config), [state], [])
    plan = compact.plan(unet, named="bk-base")
    cpu_offload(unet, execution_device=torch.device("cpu"))  # what enable_sequential_cpu_offload does
    with pytest.raises(CompactError, match="not in memory"):
        assemble(unet, plan)


def test_u_nets_of_other_families_are_refused() -> None:
    from diffusers import UNet2DModel

    with pytest.raises(CompactError, match="Stable Diffusion"):
        compact.plan(UNet2DModel(block_out_channels=(32, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D")))  # fmt: skip


def test_adapters_on_the_original_do_not_get_into_the_compact_one(make_pipeline: Callable[..., Any]) -> None:
    """SUN, which sits beside the layers, stays behind; a LoRA, which is mixed into their names, has to be fused."""
    from peft import LoraConfig
    from tiny import make_adapter

    pipe = make_pipeline()
    plan = compact.plan(pipe.unet, named="shallow")
    plain = assemble(pipe.unet, plan).state_dict()
    sun.attach(pipe, make_adapter(pipe.unet))
    small = assemble(pipe.unet, plan)
    assert {n: t.shape for n, t in small.state_dict().items()} == {n: t.shape for n, t in plain.items()}
    assert not any("sun" in type(p).__name__.lower() for p in small.attn_processors.values())
    sun.detach(pipe)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(CompactError, match="carries a LoRA"):
        assemble(pipe.unet, plan)


GOOD = {"format": "sun-compact-plan-1", "remove": ["pair.0.1"]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "no plan of model assembly"),
        ({"remove": "pair.0.1"}, "names nothing to remove"),
        ({"remove": [1]}, "names nothing to remove"),
        ({"remove": ["pair.7.1"]}, "has no pair.7.1"),
        ({"remove": ["pair.0"]}, "names nothing that can be removed"),
        ({"remove": ["pair.0.1", "pair.0.1"]}, "twice"),
        ({"remove": ["innermost", "mid"]}, "innermost"),
        ({"remove": ["transformers.0", "pair.9.9"]}, "has no pair.9.9"),
        ({"unet": {}}, "does not describe its U-Net"),
        ({"unet": []}, "does not describe its U-Net"),
        ({"seconds": {"whole": 0}}, "no positive numbers"),
        ({"seconds": {"whole": 2.0}}, "no seconds"),
        ({"importance": ["x"]}, "no positive numbers"),
        ({"budget": 2}, "no share between 0 and 1"),
        ({"budget": True}, "no share between 0 and 1"),
        ({"chosen": ["shallow"]}, "chosen is a text"),
        ({"measured": 3}, "measured a table"),
        ({"remove": ["\x1b[2J" + "x" * 10**5]}, r"'\\x1b"),
    ],
)
def test_a_damaged_plan_is_refused_in_a_sentence(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    shape = shape_of(family_unet("sd1").config)
    file.write_text(json.dumps({**GOOD, "unet": shape.as_json(), **change}))
    with pytest.raises(CompactError, match=words) as caught:
        read_plan(file)
    assert "plan.json" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": [10**9, 2, 2, 2]}, "layers as .* whole numbers from 1 to 32"),
        ({"layers": [0, 2, 2, 2]}, "layers as .* whole numbers from 1 to 32"),
        ({"depths": [1, 1, 1, 10**6]}, "depths as .* from 0 to 64"),
        ({"widths": [-8, 16, 24, 24]}, "widths as"),
        ({"widths": [1] * 10**5, "layers": [1] * 10**5, "depths": [0] * 10**5}, "no list of stages"),
        ({"text_width": True}, "text_width as True, not whole"),
        ({"mid_depth": 1.0}, "mid_depth as 1.0, not whole"),
        ({"linear": "yes"}, "linear as 'yes', not true or false"),
        ({"channels": [4]}, "different numbers of stages"),
        ({"channels": "4"}, "no list of stages"),
        ({"more": 1}, "does not describe its U-Net"),
    ],
)
def test_a_shape_that_no_u_net_has_is_refused_at_once(change: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Before names of what it could lose are counted out, of which there would be billions."""
    shape = shape_of(family_unet("sd1").config).as_json()
    (tmp_path / "plan.json").write_text(json.dumps({**GOOD, "unet": {**shape, **change}}))
    with pytest.raises(CompactError, match=words) as caught:
        read_plan(tmp_path / "plan.json")
    assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_files_that_are_no_plans_at_all(tmp_path: Path) -> None:
    for text in ("", "[]", "{", '{"format": NaN}', "[" * 100_000):
        (tmp_path / "plan.json").write_text(text)
        with pytest.raises(CompactError, match=r"plan\.json"):
            read_plan(tmp_path / "plan.json")
    with pytest.raises(FileNotFoundError, match=r"shalow does not exist. Give a list \(shallow, bk-base"):
        read_plan("shalow")
    with pytest.raises(CompactError, match="folder"):
        read_plan(tmp_path)
    (tmp_path / "plan.json").write_bytes('{"format": "ü"}'.encode("latin-1"))
    with pytest.raises(CompactError, match="not text in UTF-8"):
        read_plan(tmp_path / "plan.json")
    os.mkfifo(tmp_path / "pipe")
    for endless in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(CompactError, match="not a regular file"):
            read_plan(endless)


def test_lists_say_what_they_cannot_do() -> None:
    shape = shape_of(family_unet("sdxl").config)
    with pytest.raises(CompactError, match="innermost stage, where this U-Net keeps most"):
        named_list("bk-tiny", shape)
    with pytest.raises(CompactError, match="the lists are shallow"):
        named_list("bk-large", shape)
    assert named_list("shallow", shape) == ("pair.0.1", "pair.1.1")
