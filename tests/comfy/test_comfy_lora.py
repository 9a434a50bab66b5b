"""A style LoRA made here gives the same numbers in ComfyUI as in diffusers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch


@torch.no_grad()
def test_a_style_lora_equals_diffusers(
    host: SimpleNamespace, emoji: SimpleNamespace, emoji_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from diffusers import UNet2DConditionModel
    from peft import LoraConfig

    from sun.lab.emoji.style import LORA_TARGETS, save_lora

    torch.manual_seed(0)
    x, text, t = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 128), torch.tensor([500])
    unet = UNet2DConditionModel.from_pretrained(emoji_folder / "unet").float()
    plain = unet(x, t, text).sample
    unet.add_adapter(LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=LORA_TARGETS))
    for name, parameter in unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    theirs = unet(x, t, text).sample
    weights = host.comfy.utils.load_torch_file(str(save_lora(unet, tmp_path)))
    with caplog.at_level("WARNING"):
        model, _ = host.comfy.sd.load_lora_for_models(emoji.model, None, weights, 1.0, 0.0)
    assert "lora key not loaded" not in caplog.text
    host.comfy.model_management.unload_all_models()  # a clone that is still loaded shares the weights, patched
    model.patch_model(device_to=torch.device("cpu"))
    try:
        ours = model.model.diffusion_model.float()(x, t.float(), context=text, transformer_options={})
    finally:
        model.unpatch_model()
    change = (theirs - plain).abs().max()
    assert change > 0.01
    assert (ours - theirs).abs().max() < 0.02 * change
