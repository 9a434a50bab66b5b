"""Feature inheritance in ComfyUI's sampling."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import relative, short_models


@pytest.fixture(scope="module")
def models(host: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of two stages with two layers each."""
    return short_models(host, tmp_path_factory.mktemp("two-stages"), 2)


@pytest.fixture
def apply(host: SimpleNamespace, emoji: SimpleNamespace):
    def make(model=None, plan: str = "stages=1", preset: str = "balanced"):
        node = host.nodes["SUN_ApplyFeatureInheritance"]
        return node.execute(model or emoji.model, preset, plan).result[0]

    return make


@pytest.mark.parametrize("plan", ["stages=1", "outer=2", "layers=up.1.1,down.0.1", "units=up.1.0.resnet,up.1.1.self"])
def test_equals_the_diffusers_path(run: SimpleNamespace, apply, emoji_folder, adapter_file, plan: str) -> None:
    """With SUN on both sides; the attention of SUN is in the parts that run."""
    from diffusers import StableDiffusionPipeline

    import sun
    import sun.inheritance

    pipe = StableDiffusionPipeline.from_pretrained(emoji_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    sun.attach(pipe, sun.SunAdapter.load(adapter_file, dtype=torch.float32))
    sun.inheritance.attach(pipe, plan)
    noise = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(7))
    theirs = pipe(
        "large polar bear, yellow background", negative_prompt="blurry, red, a car", num_inference_steps=4,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    ours = run.sun(run.apply(apply(plan=plan))) * 0.18215
    assert relative(ours, theirs) < 1e-4
    assert relative(ours, run.sun(run.apply()) * 0.18215) > 1e-3


def test_order_does_not_matter_and_the_model_is_as_before(
    run: SimpleNamespace, emoji: SimpleNamespace, apply, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run.ksampler(emoji.model, cfg=3.0)
    with caplog.at_level("INFO"):
        before, after = run.sun(run.apply(apply())), run.sun(apply(run.apply()))
    assert torch.equal(before, after)
    assert "2 full and 2 inherited U-Net calls" in caplog.text
    assert "MB of features kept" in caplog.text
    inherited = run.ksampler(apply(), cfg=3.0)
    assert relative(inherited, plain) > 1e-3
    assert torch.equal(run.ksampler(emoji.model, cfg=3.0), plain)
    assert not [m for m in emoji.model.model.diffusion_model.modules() if "forward" in vars(m)]


def test_a_batch_is_its_single_pictures(run: SimpleNamespace, apply) -> None:
    model = apply()
    assert relative(run.ksampler(model, cfg=3.0, start=run.latent(batch=2))[:1], run.ksampler(model, cfg=3.0)) < 1e-4


def test_control_residuals(run: SimpleNamespace, emoji: SimpleNamespace, apply, caplog) -> None:
    """Residuals reach the parts that run, and ComfyUI is not asked to add those of parts that do not."""

    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        def __init__(self, strength: float) -> None:
            super().__init__()
            self.strength = strength

        def get_control(self, x, *_):
            sizes = [(32, 16)] * 3 + [(32, 8)] + [(64, 8)] * 2
            torch.manual_seed(0)
            made = [self.strength * torch.randn(len(x), c, s, s) for c, s in sizes]
            return {"output": made, "middle": [self.strength * torch.randn(len(x), 64, 8, 8)]}

    def draw(model, strength: float):
        positive = [[run.positive[0][0], {**run.positive[0][1], "control": Control(strength)}]]
        return run.ksampler(model, positive=positive)

    plain = draw(emoji.model, 0.3)
    ours = draw(apply(), 0.3)
    assert "control could not be applied" not in caplog.text
    assert relative(ours, draw(apply(), 0.0)) > 1e-3
    assert relative(ours, plain) < relative(draw(emoji.model, 0.0), plain) + 1.0


def test_plans_that_do_not_fit_get_a_sentence(host: SimpleNamespace, apply) -> None:
    node = host.nodes["SUN_ApplyFeatureInheritance"]
    assert node.validate_inputs("fine", "") is True
    assert "no part of a plan" in node.validate_inputs("fine", "quick")
    with pytest.raises(ValueError, match="Use 1 to 1"):
        apply(plan="stages=7")
