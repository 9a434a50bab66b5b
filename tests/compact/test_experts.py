"""ME-CondConv: where experts sit, what they start from, that passes share a routing, and the way back to one kernel."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from family import family_unet
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sun import compact
from sun.compact import CompactError, Plan, State, assemble, read_experts, write_experts
from sun.compact.experts import Alike, Experts, alike_of, passes_of, places
from sun.compact.measuring import noise_of


def compact_unet(kind: str = "sd1", remove: tuple[str, ...] = ("pair.0.1", "pair.1.1")) -> tuple[Any, Any, Plan]:
    unet = family_unet(kind)
    plan = Plan(remove, compact.shape_of(unet.config))
    return unet, assemble(unet, plan), plan


def state(rows: int = 1, passes: int = 1, seed: int = 3) -> State:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, 8, 8, generator=generator).repeat(passes, 1, 1, 1)
    return State(x, torch.tensor(700), torch.randn(rows * passes, 5, 16, generator=generator))


def stir(experts: Experts, seed: int = 1) -> Experts:
    """Experts as a training might leave them: every routing depends on what is seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in experts.by_name():
            for parameter in layer.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
            layer.choose.weight.mul_(10)
    return experts


def test_experts_sit_beside_removed_layers_alone() -> None:
    unet, small, plan = compact_unet()
    found = {place.name: place for place in places(plan)}
    # on the way down a layer is left before the removed one, on the way up one on each side of it
    for stage, up in ((0, 3), (1, 2)):
        assert f"down_blocks.{stage}.resnets.0.conv2" in found
        assert {f"up_blocks.{up}.resnets.{n}.conv2" for n in (0, 1)} <= {*found}
    assert not any(name.startswith(("down_blocks.2", "up_blocks.1", "up_blocks.0", "mid")) for name in found)
    assert found["up_blocks.3.resnets.1.conv2"].own == "up_blocks.3.resnets.2.conv2"
    assert found["up_blocks.3.resnets.1.conv2"].donors[0] == "up_blocks.3.resnets.1.conv2"
    experts = dict(compact.experts_for(unet, small, plan).by_name())
    layer = experts["down_blocks.1.resnets.0.conv2"]
    original = unet.state_dict()
    assert torch.equal(layer.kernels[0], original["down_blocks.1.resnets.0.conv2.weight"])
    assert torch.equal(layer.kernels[1], original["down_blocks.1.resnets.1.conv2.weight"])
    assert torch.equal(layer.kernels[2], original["down_blocks.1.resnets.1.conv1.weight"])
    assert len(layer.kernels) == 4
    assert all(not torch.equal(a, b) for i, a in enumerate(layer.kernels) for b in layer.kernels[:i])


@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_they_start_as_the_pruned_u_net(kind: str) -> None:
    """To the last bit for a picture, at any temperature; and from there both the router and the experts learn."""
    unet = family_unet(kind)
    plan = compact.plan(unet, named="shallow")
    small = assemble(unet, plan)
    from sun.compact.measuring import random_state

    given = random_state(small, 8, 8, tokens=5)
    plain = noise_of(small, given)
    experts = compact.experts_for(unet, small, plan)
    compact.attach_experts(small, experts)
    for temperature in (10.0, 1.0):
        experts.temperature = temperature
        assert torch.equal(noise_of(small, given), plain)
    small.requires_grad_(True)
    added = {"added_cond_kwargs": given.added} if given.added else {}
    small(given.x, given.t, given.text, **added).sample.square().sum().backward()
    assert all(layer.choose.weight.grad.abs().max() > 0 for _, layer in experts.by_name())
    stir(experts).zero_grad()
    small(given.x, given.t, given.text, **added).sample.square().sum().backward()
    assert all(layer.kernels.grad.flatten(1).abs().amax(1).min() > 0 for _, layer in experts.by_name())
    assert compact.detach_experts(small)
    assert torch.equal(noise_of(small, given), plain)
    assert not compact.detach_experts(small)
    assert not any("_conv_forward" in vars(module) for module in small.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in small.modules())


def test_a_kernel_is_the_mixture_by_the_formula() -> None:
    """One convolution written out: sum_e r_e W_e with W_e = W + K_e - mean K, r by hand."""
    unet, small, plan = compact_unet()
    experts = stir(compact.experts_for(unet, small, plan))
    experts.temperature = 2.0
    name = "down_blocks.1.resnets.0.conv2"
    layer, conv = dict(experts.by_name())[name], small.get_submodule(name)
    given: dict[str, Any] = {}
    conv.register_forward_hook(lambda _m, args, out: given.update(x=args[0], y=out))
    resnet = small.get_submodule(name.rpartition(".")[0])
    resnet.register_forward_pre_hook(lambda _m, args: given.update(time=args[1]))
    compact.attach_experts(small, experts)
    noise_of(small, state())
    seen = torch.cat([given["x"].mean((2, 3)), torch.nn.functional.silu(given["time"])], 1)
    r = (layer.choose(torch.nn.functional.silu(layer.squeeze(seen))) / 2).softmax(1)[0]
    assert r.max() < 0.999
    kernels = conv.weight + layer.kernels - layer.kernels.mean(0)
    biases = conv.bias + layer.biases - layer.biases.mean(0)
    y = sum(
        share * torch.nn.functional.conv2d(given["x"], kernel, bias, padding=1)
        for share, kernel, bias in zip(r, kernels, biases, strict=True)
    )
    assert torch.allclose(given["y"], y, atol=1e-4)


def test_each_picture_of_a_batch_has_its_own_kernels_and_passes_share_them() -> None:
    unet, small, plan = compact_unet()
    experts = stir(compact.experts_for(unet, small, plan))
    compact.attach_experts(small, experts)
    both = state(rows=2, passes=2)
    together = noise_of(small, both)
    with torch.no_grad():
        for picture in range(2):
            rows = [picture, picture + 2]
            alone = noise_of(small, State(both.x[rows], both.t, both.text[rows]))
            assert torch.allclose(together[rows], alone, atol=1e-5)
    separate = noise_of(small, State(both.x[:1], both.t, both.text[:1]))
    assert not torch.allclose(together[:1], separate, atol=1e-5)  # without the other pass the routing is another one
    with compact.attaching.watching(experts):
        noise_of(small, both)
        assert {tuple(seen[0].shape) for seen in experts.seen.values()} == {(2, 4)}
        assert all(torch.allclose(seen[0].sum(1), torch.ones(2)) for seen in experts.seen.values())


def test_which_rows_are_passes() -> None:
    one, other = torch.randn(1, 4, 2, 2), torch.randn(1, 4, 2, 2)
    assert passes_of(one) == passes_of(torch.cat([one, other])) == 1
    assert passes_of(torch.cat([one, one])) == passes_of(torch.cat([one, other, one, other])) == 2
    assert passes_of(torch.cat([one, other, one])) == 0
    assert passes_of(torch.cat([one, one, other, other])) == 0
    mixed = alike_of(torch.cat([one, one, other]))  # prompts of one picture after the other, as AND in web UIs
    assert torch.equal(mixed.same, torch.tensor([[1.0, 1, 0], [1, 1, 0], [0, 0, 1]]))
    assert passes_of(torch.cat([one, one, one])) == 3
    logits = torch.randn(4, 3)
    same = Alike(same=torch.tensor([[1.0, 0, 1, 0], [0, 1, 0, 1]]).repeat(2, 1)).mean(logits)
    assert torch.allclose(same, Alike(2).mean(logits).repeat(2, 1))


@pytest.mark.slow  # compiling even a tiny U-Net takes half a minute
def test_a_compiled_u_net_is_the_same() -> None:
    unet, small, plan = compact_unet()
    compact.attach_experts(small, stir(compact.experts_for(unet, small, plan)))
    both = state(rows=2, passes=2)
    plain = noise_of(small, both)
    torch._dynamo.reset()
    compiled = torch.compile(small, backend="eager", fullgraph=True)
    assert torch.allclose(noise_of(compiled, both), plain, atol=1e-5)


def test_collapsed_it_is_an_ordinary_u_net() -> None:
    """With one routing for all it is exact, with several it is their mean; the U-Net with experts stays as it was."""
    unet, small, plan = compact_unet()
    experts = stir(compact.experts_for(unet, small, plan))
    compact.attach_experts(small, experts)
    one = state()
    mixed = noise_of(small, one)
    folded = compact.collapse(small, [one])
    assert type(folded) is type(small)
    assert folded.state_dict().keys() == small.state_dict().keys()
    assert compact.experts_of(folded) is None
    assert torch.allclose(noise_of(folded, one), mixed, atol=1e-4)
    assert torch.equal(noise_of(small, one), mixed)
    other = compact.collapse(small, [one, state(seed=9)])
    assert not torch.allclose(noise_of(other, one), mixed, atol=1e-4)
    compact.detach_experts(small)
    with pytest.raises(CompactError, match="no experts to collapse"):
        compact.collapse(small, [one])


def test_weights_are_settled_without_changing_the_whole(tmp_path: Path) -> None:
    """What a training saves: the plain file is the collapsed U-Net, and with the experts' file all is as it was."""
    unet, small, plan = compact_unet()
    experts = stir(compact.experts_for(unet, small, plan))
    compact.attach_experts(small, experts)
    one, other = state(), state(seed=9)
    mixed = [noise_of(small, s) for s in (one, other)]
    folded = compact.collapse(small, [one, other])
    weights = dict(small.state_dict())
    with compact.attaching.watching(experts):
        for s in (one, other):
            noise_of(small, s)
        compact.attaching.settle(weights, experts)
    write_experts(experts, tmp_path / "e.safetensors", torch.float32)
    again = copy.deepcopy(folded)
    again.load_state_dict(weights)
    assert torch.allclose(noise_of(again, one), noise_of(folded, one), atol=1e-5)
    compact.attach_experts(again, read_experts(tmp_path / "e.safetensors"))
    for s, before in zip((one, other), mixed, strict=True):
        assert torch.allclose(noise_of(again, s), before, atol=1e-4)


def test_a_copy_has_experts_of_its_own() -> None:
    unet, small, plan = compact_unet()
    compact.attach_experts(small, stir(compact.experts_for(unet, small, plan)))
    twin, one = copy.deepcopy(small), state()
    mixed = noise_of(small, one)
    compact.detach_experts(small)
    assert torch.equal(noise_of(twin, one), mixed)
    assert not torch.equal(noise_of(small, one), mixed)
    compact.detach_experts(twin)
    assert torch.equal(noise_of(twin, one), noise_of(small, one))


def test_a_host_s_own_convolution_gets_the_change_as_a_second_one() -> None:
    """Some convolutions of hosts never ask ``_conv_forward``."""
    unet, small, plan = compact_unet()
    compact.attach_experts(small, stir(compact.experts_for(unet, small, plan)))
    both = state(rows=2, passes=2)
    mixed = noise_of(small, both)
    conv = small.get_submodule("down_blocks.1.resnets.0.conv2")
    conv.forward = lambda x: torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1)
    assert torch.allclose(noise_of(small, both), mixed, atol=1e-4)


def test_a_lora_acts_beside_them() -> None:
    from peft import LoraConfig

    unet, small, plan = compact_unet()
    compact.attach_experts(small, stir(compact.experts_for(unet, small, plan)))
    one = state()
    mixed = noise_of(small, one)
    small.add_adapter(LoraConfig(r=2, target_modules=["conv2"], init_lora_weights=False))
    with_lora = noise_of(small, one)
    assert not torch.allclose(with_lora, mixed, atol=1e-3)
    experts = compact.experts_of(small)
    assert experts is not None
    compact.attach_experts(small, experts)  # anew, now that a LoRA is around the convolutions
    assert torch.equal(noise_of(small, one), with_lora)


# --- files and what does not fit -------------------------------------------------------------------------------------


def test_experts_of_another_u_net_are_refused_and_nothing_stays() -> None:
    unet, small, plan = compact_unet()
    experts = compact.experts_for(unet, small, plan)
    with pytest.raises(CompactError, match="for another compact U-Net: its layers"):
        compact.attach_experts(unet, experts)
    assert not any("_conv_forward" in vars(module) for module in unet.modules())
    other, other_small, _ = compact_unet("sdxl", ("pair.1.1",))
    with pytest.raises(CompactError, match="for another compact U-Net"):
        compact.attach_experts(other_small, experts)
    with pytest.raises(CompactError, match="The plan is for another U-Net"):
        compact.experts_for(other, other_small, plan)


def test_a_plan_without_removed_layers_has_no_experts() -> None:
    unet = family_unet("sd1")
    plan = Plan(("transformers.1",), compact.shape_of(unet.config))
    with pytest.raises(CompactError, match="this plan removes none"):
        compact.experts_for(unet, assemble(unet, plan), plan)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    unet, small, plan = compact_unet()
    return write_experts(compact.experts_for(unet, small, plan), tmp_path / "e.safetensors")


def changed(file: Path, change: Any = None, **metadata: str) -> Path:
    with safe_open(str(file), "pt") as content:
        known = content.metadata()
    tensors = load_file(file)
    if change:
        change(tensors)
    save_file(tensors, file, {**known, **metadata})
    return file


KERNELS, CENTRE = "down_blocks.0.resnets.0.conv2.kernels", "down_blocks.0.resnets.0.conv2.centre"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop(CENTRE), "is incomplete"),
        (lambda t: t.update({CENTRE: torch.zeros(7)}), "which cannot be"),
        (lambda t: t.update({KERNELS: t[KERNELS][0]}), "which cannot be"),
        (lambda t: t.update({"mid_block.resnets.0.conv2.kernels": torch.zeros(1)}), "cannot belong to experts"),
        (lambda t: t.update({CENTRE: torch.zeros(4, dtype=torch.int64)}), "cannot belong to experts"),
        (lambda t: t[KERNELS].view(-1)[:1].fill_(float("nan")), "NaN or infinity"),
        (lambda t: t.clear(), "no experts at all"),
    ],
)
def test_a_damaged_file_is_refused(file: Path, change: Any, words: str) -> None:
    with pytest.raises(CompactError, match=words):
        read_experts(changed(file, change))


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": "sun-adapter-1"}, "holds no experts"),
        ({"temperature": "nan"}, "no positive number"),
        ({"temperature": "0"}, "no positive number"),
        ({"unet": "[" * 99999}, "nested too deeply"),
        ({"unet": json.dumps({"widths": "x"})}, "does not describe its U-Net"),
    ],
)
def test_a_wrong_header_is_refused(file: Path, metadata: dict[str, str], words: str) -> None:
    with pytest.raises(CompactError, match=words):
        read_experts(changed(file, **metadata))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content in (("a.safetensors", b""), ("b.safetensors", b"x" * 99), ("c.pt", b"PK\x03\x04" + b"0" * 99)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CompactError):
            read_experts(tmp_path / name)
    with pytest.raises(CompactError, match="does not exist"):
        read_experts(tmp_path / "nothing.safetensors")


def test_an_untrained_number_is_not_written(tmp_path: Path) -> None:
    unet, small, plan = compact_unet()
    experts = compact.experts_for(unet, small, plan)
    with torch.no_grad():
        next(experts.parameters())[:] = float("inf")
    with pytest.raises(CompactError, match="was not written"):
        write_experts(experts, tmp_path / "e.safetensors")
    assert not any(tmp_path.iterdir())
