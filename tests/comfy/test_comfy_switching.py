"""Switching in ComfyUI's sampling: which model runs when, what reaches it, and that nothing is left behind."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from comfy_helpers import make_small, relative, short_models
from test_comfy_composition import ImageAttention

SCALE = 0.18215


@pytest.fixture(scope="module")
def models(host: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of two stages with two layers each."""
    return short_models(host, tmp_path_factory.mktemp("large"), 2)


@pytest.fixture(scope="module")
def pair(emoji: SimpleNamespace, emoji_folder) -> SimpleNamespace:
    """That model and one with fewer layers, with random weights; `.unet` is the latter in diffusers."""
    small, unet = make_small(emoji.model, emoji_folder, (1, 1))
    return SimpleNamespace(large=emoji.model, small=small, unet=unet)


@pytest.fixture
def switch(host: SimpleNamespace, pair: SimpleNamespace):
    def make(share: float = 0.4, order: str = "small first", large=None, small=None):
        node = host.nodes["SUN_SwitchUNets"]
        return node.execute(large or pair.large, small or pair.small, share, order).result[0]

    return make


@pytest.fixture
def watched(pair: SimpleNamespace):
    """The sigma-timesteps each U-Net is called for, and no hook afterwards."""
    seen: dict[str, list[float]] = {"large": [], "small": []}
    handles = [
        getattr(pair, name).model.diffusion_model.register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(float(args[1].flatten()[0]))
        )
        for name in seen
    ]
    yield seen
    for handle in handles:
        handle.remove()


def test_share_0_and_1_are_each_model_alone(host, run: SimpleNamespace, pair: SimpleNamespace, switch) -> None:
    def draw(model: Any, name: str = "dpmpp_2m") -> torch.Tensor:
        return run.ksampler(model, cfg=3.0, name=name)

    assert torch.equal(draw(switch(0.0)), draw(pair.large))
    both = switch(1.0)
    assert torch.equal(draw(both), draw(pair.small))
    host.comfy.model_management.unload_all_models()
    assert torch.equal(draw(both), draw(pair.small))
    # What a sampler itself does to predictions (CFG++) it does to those of either.
    assert torch.equal(draw(switch(1.0), "euler_cfg_pp"), draw(pair.small, "euler_cfg_pp"))
    assert not torch.equal(draw(pair.small, "euler_cfg_pp"), draw(pair.small, "euler"))


def test_a_multistep_solver_keeps_its_history(host, run, pair, switch, watched, caplog) -> None:
    """Equal to DPM-Solver++ 2M written by hand with the model chosen by sigma."""
    comfy, steps = host.comfy, 5
    with caplog.at_level("INFO"):
        ours = run.ksampler(switch(0.4), cfg=3.0, name="dpmpp_2m", steps=steps)
    assert [len(watched[name]) for name in ("small", "large")] == [2, 3]
    assert min(watched["small"]) > max(watched["large"])
    assert "2 calls of the small model and 3 of the large one; both stayed loaded" in caplog.text

    sampling = pair.large.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    euler = comfy.samplers.sampler_object("euler")

    def denoised(model: Any, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """One step of Euler to no noise at all."""
        levels, nothing = torch.stack([sigma, torch.zeros(())]), torch.zeros_like(x)
        found = comfy.sample.sample_custom(
            model, nothing, 3.0, euler, levels, run.positive, run.negative, x / SCALE, disable_pbar=True
        )
        return found * SCALE

    noise = comfy.sample.prepare_noise(run.latent()["samples"], 7)
    x, old = noise * torch.sqrt(1 + sigmas[0] ** 2), None
    for i in range(steps):
        found = denoised(pair.small if i < 2 else pair.large, x, sigmas[i])
        t, t_next = -sigmas[i].log(), -sigmas[i + 1].log()
        h = t_next - t
        used = found
        if old is not None and sigmas[i + 1] > 0:
            r = (t - -sigmas[i - 1].log()) / h
            used = (1 + 1 / (2 * r)) * found - old / (2 * r)
        x = (sigmas[i + 1] / sigmas[i]) * x - (-h).expm1() * used
        old = found
    assert relative(ours * SCALE, x) < 1e-3


def test_equals_the_diffusers_path(run, pair, switch, emoji_folder, host) -> None:
    from diffusers import StableDiffusionPipeline

    import sun.switching
    from sun.pipelines.schedulers import make_scheduler

    pipe = StableDiffusionPipeline.from_pretrained(emoji_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", pipe.scheduler.config)
    sun.switching.attach(pipe, pair.unet, 0.5, "large first")
    noise = host.comfy.sample.prepare_noise(run.latent()["samples"], 7)
    theirs = pipe(
        "large polar bear, yellow background", negative_prompt="blurry, red, a car", num_inference_steps=4,
        guidance_scale=3.0, latents=noise, output_type="latent",
    ).images  # fmt: skip
    assert relative(run.ksampler(switch(0.5, "large first"), cfg=3.0) * SCALE, theirs) < 1e-3


def test_a_lora_acts_on_the_model_it_was_put_on(run, pair, switch, caplog) -> None:
    changed = {}
    for name in ("large", "small"):
        model = getattr(pair, name)
        key = "diffusion_model.input_blocks.1.0.in_layers.2.weight"
        weight = dict(model.model.named_parameters())[key]
        changed[name] = model.clone()
        changed[name].add_patches({key: (0.5 * torch.randn(weight.shape, generator=torch.manual_seed(1)),)}, 1.0)
    plain = run.ksampler(switch(0.5))
    assert torch.equal(run.ksampler(switch(1.0, small=changed["small"])), run.ksampler(changed["small"]))
    assert torch.equal(run.ksampler(switch(0.0, small=changed["small"])), run.ksampler(pair.large))
    for name in changed:
        assert relative(run.ksampler(switch(0.5, **{name: changed[name]})), plain) > 1e-4
    assert "acts on the large" not in caplog.text
    late = switch(0.5)
    late.add_patches({key: (torch.zeros_like(dict(late.model.named_parameters())[key]),)}, 1.0)
    run.ksampler(late)
    assert "Switching: LoRA acts on the large model alone" in caplog.text
    assert torch.equal(run.ksampler(switch(0.5)), plain)


def test_a_controlnet_acts_on_whichever_runs(host, run, pair, switch, random_extras, caplog) -> None:
    """A Control-LoRA: it is made of the large model's encoder, whichever model asks it."""
    net = host.nodes["SUN_LoadEmojiControlNet"].execute(True).result[0]
    picture = torch.zeros(1, 128, 128, 3)
    picture[:, 32:96, 32:96] = 1.0

    def draw(share: float, strength: float) -> torch.Tensor:
        positive = [[run.positive[0][0], dict(run.positive[0][1])]]
        control = net.copy().set_cond_hint(picture.movedim(-1, 1), strength, (0.0, 1.0))
        positive[0][1] |= {"control": control, "control_apply_to_uncond": False}
        return run.ksampler(switch(share), positive=positive)

    kept: list[bool] = []

    def watch(_module: Any, _args: Any) -> None:
        for control in made:
            theirs, own = (net.input_blocks[1][0].in_layers[2].weight for net in (control, unet))
            kept.append(torch.equal(theirs.float(), own.float()))

    unet = pair.large.model.diffusion_model
    made: list[Any] = []
    pre_run = type(net).pre_run

    def remembered(self: Any, *args: Any) -> None:
        pre_run(self, *args)
        made[:] = [self.control_model]

    type(net).pre_run = remembered
    handle = pair.small.model.diffusion_model.register_forward_pre_hook(watch)
    try:
        for share in (0.5, 1.0):
            assert relative(draw(share, 1.0), draw(share, 0.0)) > 1e-3
    finally:
        type(net).pre_run = pre_run
        handle.remove()
    assert kept
    assert all(kept)
    assert "control could not be applied" not in caplog.text


def test_sun_on_both_with_an_adapter_each(host, run, pair, switch, tmp_path, caplog) -> None:
    from sun.surgery import from_unet

    torch.manual_seed(4)
    made = from_unet(pair.unet, positive=True)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    made.save(tmp_path / "small.safetensors", dtype=torch.float32)
    fits_small = host.part("nodes.loading").load_adapter(tmp_path / "small.safetensors")
    small = run.apply(pair.small, adapter=fits_small)
    with caplog.at_level("INFO"):
        both = run.sun(switch(0.5, large=run.apply(), small=small))
    assert caplog.text.count("SUN: 2 U-Net calls") == 2
    assert not [r for r in caplog.records if r.levelname == "WARNING"]
    assert torch.equal(run.sun(switch(1.0, large=run.apply(), small=small)), run.sun(small))
    assert torch.equal(run.sun(switch(0.0, large=run.apply(), small=small)), run.sun(run.apply()))
    changed = run.sun(switch(0.5, large=run.apply(), small=small), negative=run.encode("green leaves"))
    assert relative(changed, both) > 1e-3
    run.ksampler(switch(0.5, large=run.apply()))
    assert "SUN acts on the large model alone" in caplog.text
    caplog.clear()
    fitted = run.sun(run.apply(switch(0.5)))  # behind the node: on both, without the layers that the small one lacks
    assert "acts on the large model alone" not in caplog.text
    assert torch.equal(fitted, run.sun(switch(0.5, large=run.apply(), small=run.apply(pair.small))))
    assert relative(fitted, both) > 1e-4


def test_ltc_accel_never_repeats_the_other_model(host, run, pair, switch, watched, caplog) -> None:
    """Of 12 steps 5, 7 and 9 are skipped; 5 is the first of the large model's and runs, wherever the nodes stand."""
    apply = host.nodes["SUN_ApplyLtcAccel"]
    behind = apply.execute(switch(5 / 12), tau=0.0, every=2, calibration="automatic").result[0]
    before = switch(5 / 12, large=apply.execute(pair.large, tau=0.0, every=2, calibration="automatic").result[0])
    for model, counts in ((behind, [(5, 7), (5, 5)]), (before, [(5, 5)])):
        for expected in counts:
            watched["small"].clear(), watched["large"].clear()
            run.ksampler(model, steps=12)
            assert (len(watched["small"]), len(watched["large"])) == expected
    watched["small"].clear(), watched["large"].clear()
    run.ksampler(
        apply.execute(switch(0.25), tau=0.0, every=2, calibration="automatic").result[0], steps=12
    )  # another mixture measures
    assert (len(watched["small"]), len(watched["large"])) == (3, 9)
    with pytest.raises(ValueError, match="Put Apply LTC-Accel on the model that comes out"):
        switch(0.5, small=apply.execute(pair.small, tau=0.0, every=2, calibration="automatic").result[0])


def test_inherited_features_are_each_model_s_own(host, run, pair, switch, caplog) -> None:
    inherit = host.nodes["SUN_ApplyFeatureInheritance"]
    with caplog.at_level("INFO"):
        behind = run.ksampler(inherit.execute(switch(0.5), "fine", "stages=1").result[0], steps=6)
    assert caplog.text.count("2 full and 1 inherited U-Net calls") == 2
    one, other = (inherit.execute(model, "fine", "stages=1").result[0] for model in (pair.large, pair.small))
    assert torch.equal(run.ksampler(switch(0.5, large=one, small=other), steps=6), behind)
    assert relative(behind, run.ksampler(switch(0.5), steps=6)) > 1e-3


def test_interrupting_leaves_nothing_patched(host, run, pair, switch, monkeypatch) -> None:
    plain = [run.ksampler(model) for model in (pair.large, pair.small, switch(0.5))]
    model = switch(0.5)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = pair.large.model.diffusion_model.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run.ksampler(model)
    handle.remove()
    assert pair.small.model.current_patcher is None
    assert "sun_switching" not in model.model_options["transformer_options"]
    assert all(torch.equal(run.ksampler(m), p) for m, p in zip((pair.large, pair.small, model), plain, strict=True))


def test_a_switch_that_costs_loading_is_said(host, run, switch, monkeypatch, caplog) -> None:
    """As where memory holds one of the two: whatever is brought there takes the other's place."""
    module, brought = host.part("nodes.switching_patch"), []
    load = module.Side.load
    monkeypatch.setattr(module.Side, "load", lambda side, shape: (load(side, shape), brought.append(side.patcher)))
    monkeypatch.setattr(module.Side, "is_loaded", lambda side: side.patcher is brought[-1])
    with caplog.at_level("INFO"):
        run.ksampler(switch(0.5))
    assert "memory was short, so they took turns" in caplog.text
    assert len(brought) == 1  # the small model is there when its run begins; one switch, one load


def test_custom_guiders_and_masks(host, run, pair, switch) -> None:
    """What ComfyUI keeps outside of the model call: a mask, and guiders of other kinds."""
    model, advanced = switch(1.0), host.comfy.samplers
    start = torch.randn(1, 4, 16, 16, generator=torch.manual_seed(3))
    masked = {"samples": start, "noise_mask": torch.zeros(1, 1, 128, 128)}
    masked["noise_mask"][..., 64:] = 1.0
    ours, theirs = (run.ksampler(one, start=masked, denoise=0.5) for one in (model, pair.small))
    assert torch.equal(ours, theirs)
    sampling = pair.large.get_model_object("model_sampling")
    sigmas = advanced.calculate_sigmas(sampling, "simple", 4)
    noise = host.comfy.sample.prepare_noise(run.latent()["samples"], 7)
    found = []
    for one in (model, pair.small):
        guider = advanced.CFGGuider(one)
        guider.inner_set_conds({"positive": run.positive})  # as BasicGuider does
        found.append(guider.sample(noise, torch.zeros(1, 4, 16, 16), advanced.sampler_object("euler"), sigmas))
        assert not hasattr(guider, "conds")
    assert torch.equal(*found)


class Halved:
    """A combination of predictions that is an object with a state, which ComfyUI 0.3.75 copies with the options."""

    def __call__(self, args: dict[str, Any]) -> torch.Tensor:
        return args["input"] - 0.5 * (args["input"] - args["uncond_denoised"])


def test_what_combines_predictions_behind_the_node_does_so_for_both(run, pair, switch, caplog) -> None:
    """RescaleCFG and its like; what was on the large model before stays its own, however often options are copied."""

    def halved(model: Any) -> Any:
        patched = model.clone()
        patched.set_model_sampler_cfg_function(Halved())
        patched.set_model_sampler_post_cfg_function(Halved())
        return patched

    alone = run.ksampler(pair.small, cfg=3.0, steps=2)
    assert torch.equal(run.ksampler(switch(1.0, large=halved(pair.large)).clone(), cfg=3.0, steps=2), alone)
    behind = run.ksampler(halved(switch(1.0)), cfg=3.0, steps=2)
    assert torch.equal(behind, run.ksampler(halved(pair.small), cfg=3.0, steps=2))
    assert relative(behind, alone) > 1e-2
    wrapped = switch(0.5)
    wrapped.set_model_unet_function_wrapper(lambda apply, given: apply(given["input"], given["timestep"], **given["c"]))
    run.ksampler(wrapped, steps=2)
    assert "model_function_wrapper acts on the large model alone" in caplog.text


def test_an_ip_adapter_acts_on_the_model_it_was_put_on(run, pair, switch, caplog) -> None:
    """By block: the blocks of the small model have other numbers, and those of the large one are not asked there."""
    large, small = (ImageAttention.put_on(model) for model in (pair.large, pair.small))
    assert torch.equal(run.ksampler(switch(1.0, large=large)), run.ksampler(pair.small))
    assert torch.equal(run.ksampler(switch(1.0, small=small)), run.ksampler(small))
    assert relative(run.ksampler(small), run.ksampler(pair.small)) > 1e-4
    assert relative(run.ksampler(switch(0.5, small=small)), run.ksampler(switch(0.5))) > 1e-5
    assert "acts on the large" not in caplog.text
    run.ksampler(ImageAttention.put_on(switch(0.5)))
    assert "attn2_replace acts on the large model alone" in caplog.text


def test_models_that_cannot_take_turns_are_refused(host, run, pair, switch, random_extras, caplog, monkeypatch) -> None:
    inpainting = host.nodes["SUN_LoadEmojiDiffusion"].execute("inpainting").result[0]
    with pytest.raises(ValueError, match="takes latents of 9 channels, the large one 4"):
        switch(small=inpainting)

    class VPrediction(host.comfy.model_sampling.ModelSamplingDiscrete, host.comfy.model_sampling.V_PREDICTION):
        pass

    velocity = pair.small.clone()
    velocity.add_object_patch("model_sampling", VPrediction(pair.small.model.model_config))
    with pytest.raises(ValueError, match="small one predicts v, the large one the noise"):
        switch(small=velocity)
    late = switch(0.5)  # and where a node behind this one changes the sampling
    late.add_object_patch("model_sampling", VPrediction(pair.large.model.model_config))
    with pytest.raises(ValueError, match="small one predicts the noise"):
        run.ksampler(late)
    with pytest.raises(ValueError, match="Connect the plain model"):
        switch(large=switch())
    told: list[str] = []
    monkeypatch.setattr(host.part("nodes.notices"), "tell", lambda _node, text, **_values: told.append(text))
    run.ksampler(switch(small=pair.large))
    assert "are the same one, so nothing becomes faster" in caplog.text
    assert math.isfinite(float(run.ksampler(switch(large=pair.small, small=pair.large)).sum()))
    assert "exchange them" in caplog.text
    assert told == ["switched_same", "switched_reversed"]


def test_a_small_unet_built_of_the_hosts_own_layers_is_the_assembled_one(shipped) -> None:
    """As the web UIs build it, here of ComfyUI's modules: every list, by the names of a single file."""
    from diffusers import UNet2DConditionModel

    from sun.compact import LISTS, assemble
    from sun.compact import plan as make_plan
    from sun.compact.ldm import unet_tensors
    from sun.layers import kept_positions, layers_of_unet
    from sun.switching.slim import slim

    original = UNet2DConditionModel.from_pretrained(shipped.folder / "unet").float()
    large, names = shipped.emoji.model.model.diffusion_model, [layer.ldm for layer in layers_of_unet(original)]
    x, t, text = (
        torch.randn(1, 4, 16, 16),
        torch.tensor([500.0]),
        torch.randn(1, 7, original.config.cross_attention_dim),
    )
    for name in LISTS:
        small = assemble(original, make_plan(original, named=name))
        made = slim(large, unet_tensors(small.state_dict(), small.config, prefix=""))
        with torch.no_grad():
            assert relative(made.unet.float()(x, t, context=text), small(x, t, text).sample) < 1e-4, name
        origins = sorted(names.index(like) for like in made.attentions().values())
        assert origins == sorted(kept_positions([layer.name for layer in layers_of_unet(original)], small)), name
