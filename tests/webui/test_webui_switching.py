"""Switching in both families: a second checkpoint's small U-Net makes a share of the steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from webui_host import ADAPTER, STAGES, WIDTH, UnetLog, make_sdxl, make_unet, pasted, relative

TITLE = "small.safetensors [abcdef0123]"
PICTURE = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "steps": 5, "sampler_name": "DPM++ 2M"}
BLOCKS, LAYERS = (2, 2, 2), (1, 1, 2)


@pytest.fixture(scope="module")
def blocks() -> tuple[int, ...]:
    return BLOCKS


def small_weights(unet: Any, layers: tuple[int, ...] = LAYERS, seed: int = 1) -> dict[str, torch.Tensor]:
    """Weights of a U-Net with fewer layers a stage, near those of `unet` (the last slots of its stages on the way up
    go on, as in BK-SDM), by the names of a checkpoint."""
    down, n = [0], 1
    for stage, count in enumerate(layers):
        down += range(n, n + count)
        n += 2
        if stage < len(layers) - 1:
            down.append(n)
        n += 1
    up = [3 * i + j for i, count in enumerate(reversed(layers)) for j in (*range(count), 2)]
    places = {"input_blocks": down, "output_blocks": up}
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, weight in unet.state_dict().items():
        parts = name.split(".")
        if parts[0] in places:
            if int(parts[1]) not in places[parts[0]]:
                continue
            parts[1] = str(places[parts[0]].index(int(parts[1])))
        changed = weight + 0.05 * torch.randn(weight.shape, generator=generator)
        found["model.diffusion_model." + ".".join(parts)] = changed
    return found


def without_transformers(weights: dict[str, torch.Tensor], stage: int) -> dict[str, torch.Tensor]:
    """Weights of a checkpoint without the transformers of a stage (of two layers), on both ways."""
    first, found = 1 + 3 * stage, {}
    ups = range(3 * (len(BLOCKS) - 1 - stage), 3 * (len(BLOCKS) - stage))
    for name, weight in weights.items():
        parts = name.split(".")
        here = parts[2] == "input_blocks" and int(parts[3]) in (first, first + 1)
        here = here or (parts[2] == "output_blocks" and int(parts[3]) in ups)
        if here and parts[4] == "1" and parts[5] != "conv":
            continue
        if here and parts[2] == "output_blocks" and parts[4] == "2":
            parts[4] = "1"  # the upsampler moves up
        found[".".join(parts)] = weight
    return found


@pytest.fixture(scope="module")
def small(host: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, torch.Tensor]]:
    """A listed checkpoint with the small U-Net: its weights."""
    weights = small_weights(make_unet(host))
    path = tmp_path_factory.mktemp("checkpoints") / "small.safetensors"
    save_file(weights | {"first_stage_model.x": torch.zeros(1)}, path)
    listed = host.modules("sd_models").checkpoints_list
    listed[TITLE] = SimpleNamespace(title=TITLE, filename=str(path))
    yield weights
    listed.clear()


@pytest.fixture
def alone(host: SimpleNamespace, family: Any, small: dict[str, torch.Tensor]) -> Any:
    """The small U-Net as the host would have loaded it."""
    return host.stub("sd_webui_sun.sun.switching.slim").slim(
        family.unet, {name.removeprefix("model.diffusion_model."): weight for name, weight in small.items()}
    ).unet  # fmt: skip


def draw(family: Any, sun: Any = None, **more: Any) -> tuple[torch.Tensor, list[int], Any]:
    """Picture, timesteps at which the loaded U-Net ran, and the result."""
    own = type(family.unet)
    with UnetLog(family.unet) as log:
        result = family.run(sun, **{**PICTURE, **more})
    assert result.errors == []
    assert type(family.unet) is own
    assert not hasattr(result.p.sampler.func, "__wrapped__")
    return result.images, log.timesteps, result


@pytest.mark.parametrize("name", ["DPM++ 2M", "DDIM"])
def test_share_0_and_1_are_each_unet_alone(family: Any, alone: Any, host: SimpleNamespace, name: str) -> None:
    plain, every, _ = draw(family, sampler_name=name)
    nothing, _, _ = draw(family, {"switch": TITLE, "share": 0}, sampler_name=name)
    assert torch.equal(nothing, plain)
    only, none, _ = draw(family, {"switch": TITLE, "share": 1}, sampler_name=name)
    assert none == []
    mixed, later, _ = draw(family, {"switch": TITLE}, sampler_name=name)
    assert later == every[2:]  # 2 of 5 steps are the small U-Net's
    first, early, _ = draw(family, {"switch": TITLE, "switch_order": "large first"}, sampler_name=name)
    assert early == every[:-2]  # DDIM makes one step fewer there
    assert "Switching share: 0.4, Switching order: small first" in draw(family, {"switch": TITLE})[2].infotexts[0]
    host.load_model(family.name, alone, host.stub("models").any_text(16))
    expected = host.process(None, **{**PICTURE, "sampler_name": name}).images
    assert torch.equal(only, expected)
    assert len({float(image.sum()) for image in (plain, only, mixed, first)}) == 4


def test_sdxl_with_a_unet_of_ssd_1b_s_kind(family: Any, host: SimpleNamespace, tmp_path: Path) -> None:
    """Fewer transformers everywhere and none in the middle; it is told SDXL's vector as the large one is."""
    large, ssd = make_sdxl(host), make_sdxl(host, (0, 1, 2), 0, seed=1)
    texts, listed = host.stub("models").any_text(WIDTH), host.modules("sd_models").checkpoints_list
    save_file({f"model.diffusion_model.{n}": w for n, w in ssd.state_dict().items()}, tmp_path / "ssd.safetensors")
    listed["ssd"] = SimpleNamespace(title="ssd", filename=str(tmp_path / "ssd.safetensors"))
    pair = SimpleNamespace(unet=large, run=host.process)
    try:
        host.load_model(family.name, ssd, texts)
        expected = host.process(None, **PICTURE).images
        host.load_model(family.name, large, texts)
        plain, every, _ = draw(pair)
        alone, _, result = draw(pair, {"switch": "ssd", "share": 1.0})
        assert torch.equal(alone, expected)
        assert "nothing becomes faster" not in result.comments
        mixed, later, _ = draw(pair, {"switch": "ssd"})
        assert later == every[2:]
        assert min(relative(mixed, other) for other in (plain, expected)) > 1e-3
        draw(pair, {"switch": "ssd", "share": 0.5, "inherit": "stages=1", "ltc": True}, steps=12)
        save_file(large.state_dict(), tmp_path / "ssd.safetensors")
        assert "nothing becomes faster" in draw(pair, {"switch": "ssd"})[2].comments  # the loaded one itself
        host.load_model(family.name, ssd, texts)
        with pytest.raises(ValueError, match="not the loaded model's with layers"):  # the wrong way round
            host.process({"switch": "ssd"}, **PICTURE)
    finally:
        listed.pop("ssd")


def test_infotext_comes_back_and_other_pictures_switch_it_off(family: Any, host: SimpleNamespace, small: Any) -> None:
    _, _, result = draw(family, {"switch": TITLE, "share": 0.6, "switch_order": "large first"})
    values = pasted(host, result.infotexts[0])
    assert (values["switch"], values["share"], values["switch_order"]) == (TITLE, 0.6, "large first")
    assert pasted(host, draw(family)[2].infotexts[0])["switch"] == "off"


def test_sun_acts_in_both_by_the_layers_they_share(family: Any, small: Any, host: SimpleNamespace) -> None:
    sun = {"enabled": True, "adapter": ADAPTER}
    both, calls, _ = draw(family, {**sun, "switch": TITLE, "share": 0.5})
    assert len(calls) == 2
    only, none, _ = draw(family, {**sun, "switch": TITLE, "share": 1.0})
    assert none == []
    other, _, _ = draw(family, {**sun, "switch": TITLE, "share": 1.0}, negative_prompt="a house")
    assert relative(other, only) > 1e-4  # the negative acts in the small U-Net
    weak, _, _ = draw(family, {**sun, "switch": TITLE, "share": 1.0, "strength": 0.0})
    assert relative(weak, only) > 1e-3
    assert relative(both, only) > 1e-4


def test_inherited_features_are_each_unet_s_own(family: Any, small: Any, caplog: Any) -> None:
    with caplog.at_level("INFO"):
        draw(family, {"switch": TITLE, "share": 0.5, "inherit": "stages=1"}, steps=8)
    assert caplog.text.count("2 full and 2 inherited U-Net calls") == 2
    draw(family, {"switch": TITLE, "share": 1.0, "inherit": "stages=1"}, steps=8)


def test_control_residuals_are_those_of_the_layers_there_are(family: Any, small: Any, host: SimpleNamespace) -> None:
    if family.name != "forge":
        pytest.skip("A1111's ControlNet replaces the U-Net's forward, which is said")
    sizes = [(STAGES[0], 8)] * 3 + [(STAGES[0], 4)] + [(STAGES[1], 4)] * 2 + [(STAGES[1], 2)] + [(STAGES[2], 2)] * 2

    def residuals(x: torch.Tensor) -> dict[str, list[Any]]:
        scale = x.shape[-1] // 8
        generator = torch.Generator().manual_seed(0)
        made = [torch.randn(len(x), c, s * scale, s * scale, generator=generator) for c, s in sizes]
        return {"output": made, "middle": [], "input": []}

    plain, _, _ = draw(family, {"switch": TITLE, "share": 1.0})
    family.model.forge_objects_after_applying_lora.unet.controlnet_linked_list = residuals
    steered, _, _ = draw(family, {"switch": TITLE, "share": 1.0})
    assert relative(steered, plain) > 1e-3


def test_stages_may_lack_their_transformers_or_the_middle(host: SimpleNamespace, family: Any) -> None:
    slim = host.stub("sd_webui_sun.sun.switching.slim")
    every = small_weights(family.unet, BLOCKS)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 7, 16)
    whole = slim.slim(family.unet, slim.unet_weights(every)).unet(x, t, context=text)
    less = without_transformers(every, 1)
    made = slim.slim(family.unet, slim.unet_weights(less))
    assert len(made.attentions()) == 11 - 5
    assert not torch.equal(made.unet(x, t, context=text), whole)
    no_middle = {name: weight for name, weight in less.items() if ".middle_block." not in name}
    assert len(slim.slim(family.unet, slim.unet_weights(no_middle)).attentions()) == 11 - 6
    assert made.replaced({("input", 4): "a", ("input", 7, 0): "b"}) == {("input", 4): "a", ("input", 7, 0): "b"}


def test_a_forward_that_another_extension_replaced_is_said(family: Any, small: Any) -> None:
    family.unet.forward = family.unet.forward
    try:
        _, _, result = draw(family, {"switch": TITLE})
    finally:
        del family.unet.forward
    assert "acts on that one alone" in result.comments


def test_an_interrupted_run_leaves_nothing(family: Any, small: Any, host: SimpleNamespace) -> None:
    plain, _, _ = draw(family)
    own = type(family.unet)

    def stop(*_: Any) -> None:
        raise RuntimeError("stopped")

    handle = family.unet.register_forward_pre_hook(stop)
    with pytest.raises(RuntimeError, match="stopped"):
        family.run({"switch": TITLE}, **PICTURE)
    handle.remove()
    assert type(family.unet) is own
    assert torch.equal(draw(family)[0], plain)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"switch": "nowhere.safetensors"}, "no model named 'nowhere.safetensors'"),
        ({"switch": "../secret.safetensors"}, "no model named"),
        ({"switch": TITLE, "share": 1.5}, "share is 1.5"),
        ({"switch": TITLE, "switch_order": "both"}, "it is one of small first, large first"),
    ],
)
def test_what_cannot_be_gets_a_sentence(family: Any, small: Any, change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family.run(change, **PICTURE)


def test_files_that_do_not_fit_get_a_sentence(family: Any, small: Any, host: SimpleNamespace, tmp_path: Path) -> None:
    listed = host.modules("sd_models").checkpoints_list
    key = "model.diffusion_model.input_blocks.0.0.weight"
    wide = small | {key: torch.zeros(STAGES[0], 9, 3, 3)}
    layer = "model.diffusion_model.output_blocks.0.0.in_layers.2.weight"
    cases = {
        "inpainting": (wide, "takes latents of 9 channels"),
        "cut": (
            {name: weight for name, weight in small.items() if name != layer},
            "not the loaded model's with layers",
        ),
        "flat": (small | {key: torch.zeros(9)}, "holds no U-Net"),
        "middle": (small | {"model.diffusion_model.middle_block.x.y": torch.zeros(1)}, "not the loaded model's with"),
        "texts": (
            {n: torch.zeros(len(w), 24) if n.endswith("attn2.to_k.weight") else w for n, w in small.items()},
            "takes texts 24 wide, the large one 16",
        ),
        "lora": ({"lora_unet_x.lora_up.weight": torch.zeros(1)}, "holds no U-Net"),
        "velocity": (small | {"v_pred": torch.zeros(1)}, "predicts v, the large one the noise"),
    }
    for name, (weights, words) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        save_file(weights, path)
        listed[path.name] = SimpleNamespace(title=path.name, filename=str(path))
        with pytest.raises(ValueError, match=words):
            family.run({"switch": path.name}, **PICTURE)
        del listed[path.name]
    listed["pickled"] = SimpleNamespace(title="pickled", filename=str(tmp_path / "x.ckpt"))
    assert "pickled" not in host.part("switching").names()
    del listed["pickled"]


def test_unets_in_suns_folder_are_listed_and_others_are_not(host: SimpleNamespace, small: Any) -> None:
    folder = host.models_path / "sun"
    save_file(
        {name.removeprefix("model.diffusion_model."): w for name, w in small.items()}, folder / "bare.safetensors"
    )
    names = host.part("switching").names()
    assert "bare.safetensors" in names
    assert ADAPTER not in names
    (folder / "bare.safetensors").unlink()


def test_lora_state_of_the_host_stays_with_the_large_unet(family: Any, host: SimpleNamespace, small: Any) -> None:
    """A1111 keeps on each layer the weights without LoRA: put back into the small U-Net they would ruin it."""
    switching = host.part("switching")
    switching.forget()
    layer = family.unet.input_blocks[1][0].in_layers[2]
    layer.network_weights_backup, layer.network_layer_name = torch.zeros_like(layer.weight), "x"
    made = switching.small_of(family.model, TITLE).unet.input_blocks[1][0].in_layers[2]
    assert not hasattr(made, "network_weights_backup")
    assert made.network_layer_name == "x"  # by which LoRAs find it
    assert layer.network_weights_backup is not None
    del layer.network_weights_backup, layer.network_layer_name
    switching.forget()
