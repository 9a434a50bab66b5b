"""A compact U-Net of Emoji Diffusion in ComfyUI: the node's variant, and SUN on it, against diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sun.compact import Plan, assemble, plan, save_folder, shape_of, write_plan

CHOSEN: dict[str, Any] = {
    "lists": "shallow",
    "transformers": ("transformers.1", "transformers.2"),
    "no middle": ("mid",),
    "as shipped": ("transformers.2", "innermost"),
}


@pytest.fixture(params=list(CHOSEN))
def chosen(request: pytest.FixtureRequest, emoji_folder: Path) -> Plan:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(emoji_folder / "unet")
    wanted = CHOSEN[request.param]
    return plan(unet, named=wanted) if isinstance(wanted, str) else Plan(wanted, shape_of(unet.config))


@pytest.fixture
def small(chosen: Plan, emoji_folder: Path) -> Any:
    from diffusers import UNet2DConditionModel

    return assemble(UNet2DConditionModel.from_pretrained(emoji_folder / "unet").float(), chosen)


@torch.no_grad()
def test_the_variant_gives_diffusers_numbers_and_takes_sun(
    host: SimpleNamespace, small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_folder(small, tmp_path / "compact")
    monkeypatch.setitem(host.part("nodes.nodes").VARIANTS, "compact", tmp_path / "compact")
    load = host.nodes["SUN_LoadEmojiDiffusion"]
    model = load.execute("compact").result[0]
    x, text, t = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 128), torch.tensor([500])
    theirs = small(x, t, text).sample
    ours = model.model.diffusion_model.float()(x, t.float(), context=text, transformer_options={})
    assert (ours - theirs).abs().max() < 2e-2 * theirs.abs().max()
    assert load.fingerprint_inputs("compact") != load.fingerprint_inputs()

    adapter = host.nodes["SUN_LoadAdapter"].execute(host.part("nodes.folders").SHIPPED).result[0]
    patched = host.part("nodes.sun_patch").apply(model, adapter)
    settings = host.part("nodes.sun_patch").settings_of(patched)
    fitted = patched.get_additional_models_with_key("sun")[0].model
    assert len(settings.layers) == len(fitted.layers) <= len(adapter.adapter.layers)


@torch.no_grad()
def test_a_plan_alone_takes_the_weights_of_the_base(
    host: SimpleNamespace, small: Any, chosen: Plan, emoji_folder: Path, tmp_path: Path
) -> None:
    """The shipped one is so: what was not trained needs no second copy."""
    small.save_config(tmp_path / "compact")
    write_plan(chosen, tmp_path / "compact" / "plan.json")
    emoji_model = host.part("nodes.emoji_model")
    model = emoji_model.load_unet(emoji_folder, compact=tmp_path / "compact")
    x, text, t = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 128), torch.tensor([500])
    ours = model.model.diffusion_model.float()(x, t.float(), context=text, transformer_options={})
    theirs = small(x, t, text).sample
    assert (ours - theirs).abs().max() < 2e-2 * theirs.abs().max()
    (tmp_path / "compact" / "plan.json").write_text("{")
    with pytest.raises(emoji_model.EmojiDiffusionError, match="Install the SUN node pack again"):
        emoji_model.load_unet(emoji_folder, compact=tmp_path / "compact")


def test_a_compact_u_net_that_is_not_there_is_explained(
    host: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(host.part("nodes.nodes").VARIANTS, "compact", tmp_path / "gone")
    with pytest.raises(host.part("nodes.emoji_model").EmojiDiffusionError, match=r"(?s)compact U-Net.*train-compact"):
        host.nodes["SUN_LoadEmojiDiffusion"].execute("compact")
