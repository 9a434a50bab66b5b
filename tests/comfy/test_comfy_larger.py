"""LTC-Accel on larger models in a real ComfyUI, at their shape and with very few random weights."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

TEXT = 16  # width of the texts
STEPS = 12

SHAPES: dict[str, tuple[str, dict[str, Any], tuple[int, ...], str]] = {
    # ComfyUI's class, its network's settings, latents, the network's last part
    "SDXL": ("SDXL", {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
        "channel_mult": (1, 2), "transformer_depth": [0, 1], "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1, "context_dim": TEXT, "num_heads": -1, "num_head_channels": 16,
        "use_spatial_transformer": True, "use_linear_in_transformer": True, "legacy": False,
        "num_classes": "sequential", "adm_in_channels": TEXT + 6 * 256, "use_temporal_attention": False,
    }, (1, 4, 8, 8), "out"),
    "SD 3": ("SD3", {
        "in_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": TEXT,
        "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT, "out_features": 64}},
    }, (1, 16, 8, 8), "final_layer"),
    "Flux": ("Flux", {
        "image_model": "flux", "in_channels": 16, "out_channels": 16, "patch_size": 2, "vec_in_dim": TEXT,
        "context_in_dim": TEXT, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1,
        "depth_single_blocks": 1, "axes_dim": [4, 4, 8], "theta": 10000, "qkv_bias": True, "guidance_embed": True,
    }, (1, 16, 8, 8), "final_layer"),
    "Wan": ("WAN21_T2V", {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "dim": 24, "ffn_dim": 16,
        "freq_dim": 32, "text_dim": TEXT, "in_dim": 16, "out_dim": 16, "num_heads": 2, "num_layers": 1,
    }, (1, 16, 2, 8, 8), "head"),
    "LTX": ("LTXV", {
        "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 16, "attention_head_dim": 8,
        "num_attention_heads": 2, "caption_channels": TEXT, "num_layers": 1,
    }, (1, 128, 2, 4, 4), "proj_out"),
}  # fmt: skip


def make(name: str, seed: int = 0, **changes: Any) -> tuple[Any, dict[str, torch.Tensor], torch.nn.Module]:
    """MODEL, LATENT and the last part of a network with random weights."""
    import comfy.model_patcher
    import comfy.supported_models

    kind, settings, shape, last = SHAPES[name]
    config = getattr(comfy.supported_models, kind)({**settings, **changes})
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.diffusion_model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    patcher = comfy.model_patcher.ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))
    return patcher, {"samples": torch.zeros(shape)}, getattr(model.diffusion_model, last)


@pytest.mark.parametrize("name", SHAPES)
def test_larger_models_skip_a_third_and_are_restored(host: SimpleNamespace, run: SimpleNamespace, name: str) -> None:
    model, latent, last = make(name)
    text = torch.randn(1, 5, TEXT, generator=torch.manual_seed(1))
    mask = torch.ones(1, 5).long()  # LTX asks for one
    texts = [[[sign * text, {"pooled_output": sign * text[:, 0], "attention_mask": mask}]] for sign in (1, -1)]
    calls: list[int] = []
    last.register_forward_hook(lambda *_: calls.append(1))

    def sample(model: Any) -> torch.Tensor:
        calls.clear()
        sampler = "uni_pc" if name == "Wan" else "euler"
        return run.ksampler(model, *texts, start=latent, steps=STEPS, cfg=3.0, name=sampler)

    plain = sample(model)
    passes = len(calls) // STEPS
    fast = sample(host.nodes["SUN_ApplyLtcAccel"].execute(model, "balanced").result[0])
    assert len(calls) == 8 * passes
    assert fast.isfinite().all()
    assert 0 < (fast - plain).norm() < 0.7 * plain.norm()
    assert torch.equal(sample(model), plain)
    assert len(calls) == STEPS * passes


@pytest.mark.parametrize("name", ["Flux", "LTX"])  # their networks are called with more than a U-Net is
def test_transformers_take_turns(host: SimpleNamespace, run: SimpleNamespace, name: str) -> None:
    (large, latent, last), (small, _, small_last) = make(name), make(name, seed=1)
    text = torch.randn(1, 5, TEXT, generator=torch.manual_seed(1))
    texts = [[[sign * text, {"pooled_output": sign * text[:, 0], "attention_mask": torch.ones(1, 5).long()}]]
             for sign in (1, -1)]  # fmt: skip
    calls: list[str] = []
    last.register_forward_hook(lambda *_: calls.append("large"))
    small_last.register_forward_hook(lambda *_: calls.append("small"))
    both = host.nodes["SUN_SwitchUNets"].execute(large, small, 0.5, "small first").result[0]
    assert run.ksampler(both, *texts, start=latent, steps=4, cfg=1.0).isfinite().all()
    assert calls == ["small"] * 2 + ["large"] * 2


def test_one_patched_model_through_all_that_a_graph_does_with_it(
    host: SimpleNamespace, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the node says is what was called: few and many steps, a start picture, a mask, a second pass at another
    size, a batch, texts of other lengths, a sampler without a name, and a run after one that broke off."""
    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(host.part("nodes.notices"), "tell", lambda _node, text, **values: told.append((text, values)))
    plain, latent, last = make("SDXL")
    model = host.nodes["SUN_ApplyLtcAccel"].execute(plain, "balanced").result[0]
    calls: list[int] = []
    last.register_forward_hook(lambda *_: calls.append(1))
    text = torch.randn(1, 5, TEXT, generator=torch.manual_seed(1))

    def texts(*lengths: int) -> list[Any]:
        return [[[text.repeat(1, n, 1), {"pooled_output": text[:, 0]}]] for n in lengths]

    def said() -> tuple[int, int]:
        ((kind, values),) = told
        assert kind == ("ltc_real" if values["calls"] == values["steps"] else "ltc_saved")
        assert values["saved"] == round(100 - 100 * values["calls"] / values["steps"])
        assert len(calls) == values["calls"]
        told.clear()
        return values["calls"], values["steps"]

    def draw(steps: int, both: list[Any] | None = None, start: Any = latent, **options: Any) -> tuple[int, int]:
        calls.clear()
        assert run.ksampler(model, *(both or texts(1, 1)), start=start, steps=steps, **options).isfinite().all()
        return said()

    assert [draw(steps) for steps in (1, 2, 3, 4)] == [(1, 1), (2, 2), (3, 3), (4, 4)]
    start = {"samples": 0.2 * torch.randn(1, 4, 8, 8, generator=torch.manual_seed(3))}
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 32:] = 1
    for options in (
        {"start": start, "denoise": 0.3},
        {"start": {**start, "noise_mask": mask}, "denoise": 0.6, "name": "euler_ancestral"},
        {"start": {"samples": torch.zeros(2, 4, 16, 8)}, "name": "dpmpp_2m"},  # a batch, at another size
        {"both": texts(1, 3), "cfg": 1.0},
        {"name": "dpmpp_3m_sde"},
    ):
        saved, steps = draw(STEPS, **options)
        assert (saved < steps, steps) == (True, STEPS), options
    whole = run.ksampler(model, *texts(1, 1), start=latent, steps=STEPS)
    told.clear()

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = last.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run.ksampler(model, *texts(1, 1), start=latent, steps=STEPS)
    handle.remove()
    assert told == []
    assert "sun_ltc" not in model.model_options["transformer_options"]
    calls.clear()
    assert torch.equal(run.ksampler(model, *texts(1, 1), start=latent, steps=STEPS), whole)
    said()

    samplers, calls[:] = host.comfy.samplers, []
    nameless = samplers.KSAMPLER(functools.partial(host.comfy.k_diffusion.sampling.sample_lms))
    sigmas = samplers.calculate_sigmas(plain.get_model_object("model_sampling"), "simple", STEPS)
    noise, empty = torch.randn(1, 4, 8, 8, generator=torch.manual_seed(7)), torch.zeros(1, 4, 8, 8)
    host.comfy.sample.sample_custom(model, noise, 1.0, nameless, sigmas, *texts(1, 1), empty, disable_pbar=True)
    assert said() == (8, STEPS)


def test_sdxl_switches_with_a_unet_of_ssd_1b_s_kind(host: SimpleNamespace, run: SimpleNamespace, caplog: Any) -> None:
    """Fewer transformers in every stage, none in one slot on the way up and in the middle; both take SDXL's vector."""
    large, latent, _ = make("SDXL", transformer_depth=[0, 2], transformer_depth_output=[0, 0, 2, 2])
    small, _, _ = make("SDXL", 1, transformer_depth=[0, 1], transformer_depth_output=[0, 0, 0, 1],
                       transformer_depth_middle=-1)  # fmt: skip
    text = torch.randn(1, 5, TEXT, generator=torch.manual_seed(1))

    def texts(pooled: float) -> list[Any]:
        return [[[sign * text, {"pooled_output": pooled * sign * text[:, 0]}]] for sign in (1, -1)]

    def draw(model: Any, pooled: float = 1.0) -> torch.Tensor:
        return run.ksampler(model, *texts(pooled), start=latent, steps=5, cfg=3.0, name="dpmpp_2m")

    def switched(share: float) -> Any:
        return host.nodes["SUN_SwitchUNets"].execute(large, small, share, "small first").result[0]

    alone, plain = draw(small), draw(large)
    assert torch.equal(draw(switched(1.0)), alone)
    assert not torch.equal(draw(switched(1.0), 0.2), alone)  # sizes and pooled text reach it
    with caplog.at_level("INFO"):
        both = draw(switched(0.4))
    assert "2 calls of the small model and 3 of the large one" in caplog.text
    assert min(float((both - other).norm()) for other in (alone, plain)) > 0
    skipping = host.nodes["SUN_ApplyLtcAccel"].execute(switched(0.4), "balanced").result[0]
    with caplog.at_level("INFO"):
        assert run.ksampler(skipping, *texts(1.0), start=latent, steps=STEPS, cfg=3.0).isfinite().all()
    assert "LTC-Accel: 9 of 12 calls" in caplog.text  # the step in which the U-Nets change is not skipped
    assert torch.equal(draw(large), plain)
    with pytest.raises(ValueError, match="takes texts 128 wide, the large one 16"):
        host.nodes["SUN_SwitchUNets"].execute(large, sd15(host), 0.5, "small first")


def sd15(host: SimpleNamespace) -> Any:
    """A model of Stable Diffusion 1.x."""
    return host.nodes["SUN_LoadEmojiDiffusion"].execute().result[0]
