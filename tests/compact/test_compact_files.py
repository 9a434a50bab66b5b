"""Files of a compact U-Net: LDM names, the config file A1111 reads, and a U-Net of the hosts' kind made of both."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family import family_unet
from safetensors.torch import load_file, save_file

from sun.compact import CompactError, Plan, assemble, plan, save_folder, save_single_file, shape_of
from sun.compact.ldm import UNET, a1111_config, unet_tensors, vae_tensors, why_no_config
from sun.pipelines.loading import ModelError, load_pipeline, load_unet

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY / "tests" / "cli"))  # the LDM names written independently, for the command line's tests


def test_names_of_the_whole_u_net_are_those_of_checkpoints() -> None:
    """Against the table written for the loader's tests, for SD 1.x with two layers in each stage."""
    from ldm import _unet

    unet = family_unet("sd1")
    names = {key.removeprefix(UNET) for key in unet_tensors(unet.state_dict(), unet.config)}
    assert names == {_unet(key) for key in unet.state_dict()}


def stand_in(config: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The web UIs' U-Net as a config file describes it."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tests" / "stubs" / "webui"))
    monkeypatch.delitem(sys.modules, "ldm_unet", raising=False)
    from ldm_unet import UNet

    settings = yaml.safe_load(config)["model"]["params"]["unet_config"]["params"]
    widths = tuple(settings["model_channels"] * m for m in settings["channel_mult"])
    assert settings["attention_resolutions"] == [4, 2, 1]
    blocks = tuple(settings["num_res_blocks"])
    return UNet(widths, settings["context_dim"], settings["num_heads"], groups=8, blocks=blocks).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["shallow", "bk-base"])
def test_a_web_ui_builds_the_same_u_net_from_file_and_config(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    unet = family_unet("sd1")
    small = assemble(unet, plan(unet, named=name))
    said = save_single_file(small, tmp_path / "small.safetensors")
    assert "U-Net alone" in said[0]
    theirs = stand_in(a1111_config(small.config), monkeypatch)
    tensors = load_file(tmp_path / "small.safetensors")
    theirs.load_state_dict({key.removeprefix(UNET): value for key, value in tensors.items()})
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([900, 20]), torch.randn(2, 5, 16)
    ours = small(x, t, text).sample
    assert (theirs(x, t, text) - ours).abs().max() < 1e-4 * ours.abs().max()


def test_what_a1111_cannot_be_told_is_said() -> None:
    unet = family_unet("sd1")
    small = assemble(unet, plan(unet, named="bk-small"))
    assert "without removing the middle" in why_no_config(small.config)
    with pytest.raises(CompactError, match="middle"):
        a1111_config(small.config)
    assert "Forge, ComfyUI" in why_no_config(family_unet("sdxl").config)
    second = family_unet("sd2", cross_attention_dim=1024)
    written = yaml.safe_load(a1111_config(second.config, "v_prediction"))["model"]["params"]
    assert written["parameterization"] == "v"
    assert written["cond_stage_config"]["target"].endswith("OpenCLIPEmbedder")
    assert written["unet_config"]["params"]["num_head_channels"] == 16
    assert written["unet_config"]["params"]["use_linear_in_transformer"] is True


def test_a_checkpoint_holds_every_part(make_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    """From a diffusers folder and from a checkpoint: the same file, by names an independent writer gives."""
    import ldm

    pipe = make_pipeline()
    pipe.register_modules(vae=ldm.make_vae())
    pipe.save_pretrained(tmp_path / "model")
    ldm.save_single_file(pipe, tmp_path / "whole.safetensors")
    small = assemble(pipe.unet, plan(pipe.unet, named="shallow"))
    for source in ("model", "whole.safetensors"):
        assert save_single_file(small, tmp_path / f"{source}-small.safetensors", tmp_path / source) == []
    one, other = (load_file(tmp_path / f"{s}-small.safetensors") for s in ("model", "whole.safetensors"))
    whole = load_file(tmp_path / "whole.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert all(torch.equal(other[key], value) for key, value in whole.items() if not key.startswith(UNET))
    assert yaml.safe_load((tmp_path / "model-small.yaml").read_text())["model"]["params"]["unet_config"]
    with pytest.raises(ModelError, match=r"holds a compact U-Net: 1, 1, 2, 2 layers .* where model has 2, 2, 2, 2"):
        load_pipeline(tmp_path / "model-small.safetensors", config=str(tmp_path / "model"))
    half = tmp_path / "half.safetensors"
    save_single_file(small, half, tmp_path / "model", torch.float16)
    assert {t.dtype for t in load_file(half).values()} == {torch.float16}


def test_a_model_that_predicts_v_says_so_in_its_compact_file_too(
    make_pipeline: Callable[..., Any], tmp_path: Path
) -> None:
    """A1111 takes it from the config file, which is written anew; ComfyUI from the mark, which is kept."""
    import ldm

    pipe = make_pipeline()
    pipe.register_modules(vae=ldm.make_vae())
    ldm.save_single_file(pipe, tmp_path / "whole.safetensors")
    save_file({**load_file(tmp_path / "whole.safetensors"), "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    small = assemble(pipe.unet, plan(pipe.unet, named="shallow"))
    for name, stated in (("v", "v"), ("whole", None)):
        save_single_file(small, tmp_path / f"{name}-small.safetensors", tmp_path / f"{name}.safetensors")
        params = yaml.safe_load((tmp_path / f"{name}-small.yaml").read_text())["model"]["params"]
        assert params.get("parameterization") == stated
    assert "v_pred" in load_file(tmp_path / "v-small.safetensors")


def test_a_text_encoder_with_another_activation_is_left_out(make_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    """A checkpoint does not say which it is: hosts would take SD 1.x's."""
    import ldm

    pipe = make_pipeline()
    pipe.register_modules(vae=ldm.make_vae())
    pipe.text_encoder.config.hidden_act = "gelu"
    pipe.save_pretrained(tmp_path / "model")
    said = save_single_file(pipe.unet, tmp_path / "x.safetensors", tmp_path / "model")
    assert "The text encoder of model is not SD 1.x's" in said[0]
    assert all(name.startswith(UNET) for name in load_file(tmp_path / "x.safetensors"))


def test_a_whole_u_net_of_another_family_is_not_called_compact(tmp_path: Path) -> None:
    save_single_file(family_unet("sdxl"), tmp_path / "xl.safetensors")
    with pytest.raises(ModelError, match="Give --config a diffusers folder of the same architecture"):
        load_unet(tmp_path / "xl.safetensors")


def test_names_of_an_autoencoder_are_those_of_checkpoints() -> None:
    import ldm

    vae = ldm.make_vae()
    mine = vae_tensors(vae.state_dict())
    assert set(mine) == {f"first_stage_model.{ldm._vae(key)}" for key in vae.state_dict()}


def test_a_small_autoencoder_has_no_place_in_a_checkpoint(make_pipeline: Callable[..., Any], tmp_path: Path) -> None:
    pipe = make_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    said = save_single_file(pipe.unet, tmp_path / "x.safetensors", tmp_path / "model")
    assert "AutoencoderTiny" in said[0]
    assert not (tmp_path / "x.yaml").exists()


def test_a_saved_folder_names_no_machine(tmp_path: Path) -> None:
    unet = family_unet("sd1")
    save_folder(unet, tmp_path / "unet")
    again = type(unet).from_pretrained(tmp_path / "unet")
    small = assemble(again, Plan(("mid",), shape_of(unet.config)))
    save_folder(small, tmp_path / "small")
    assert str(tmp_path) not in (tmp_path / "small" / "config.json").read_text()
    assert type(unet).from_pretrained(tmp_path / "small").mid_block is None
