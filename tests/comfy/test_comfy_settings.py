"""Settings that do not go with SUN: said once a run, an error where the picture would be wrong, else a warning."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import sample_with
from comfyui_host import load_builtin_extras


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelname == "WARNING" and "SUN" in record.getMessage()
    ]


@pytest.fixture
def photo() -> dict[str, torch.Tensor]:
    """The latent of a picture, for image to image."""
    return {"samples": torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))}


def test_right_settings_are_silent(host: SimpleNamespace, run: SimpleNamespace, photo, caplog) -> None:
    model = run.apply()
    run.sun(model)
    for steps in (1, 2, 3, 5, 8, 12):
        run.sun(model, steps=steps)
    for scheduler in ("simple", "sgm_uniform"):
        run.ksampler(model, scheduler=scheduler)
    for mode in ("trained", "respaced"):
        for denoise in (0.5, 0.75):
            run.sun(model, start=photo, denoise=denoise, denoise_mode=mode)
    run.sun(model, final_step="diffusers")
    run.ksampler(model, start=photo, denoise=0.6)
    run.ksampler(model, name="dpmpp_2m")
    assert warnings_of(caplog) == []


def test_two_samplers_in_a_row_are_silent(host: SimpleNamespace, run: SimpleNamespace, caplog) -> None:
    """KSampler (Advanced) ends with noise left, the next one goes on from there: each sees a part of the steps."""
    import nodes

    model = run.apply()
    half = lambda start, add, first, last, left: nodes.KSamplerAdvanced().sample(  # noqa: E731
        model, add, 7, 4, 1.0, "euler", "simple", run.positive, run.negative, start, first, last, left
    )[0]
    noisy = half(run.latent(), "enable", 0, 2, "enable")
    result = half(noisy, "disable", 2, 10000, "disable")["samples"]
    assert warnings_of(caplog) == []
    torch.testing.assert_close(result, run.sun(model), rtol=1e-4, atol=1e-4)


def test_leading_sigmas_on_an_empty_latent_are_an_error(run: SimpleNamespace) -> None:
    with pytest.raises(
        ValueError, match=r"(?s)starts at timestep 751 of 999, and the latent is empty.*scheduler simple"
    ):
        run.ksampler(run.apply(), scheduler="ddim_uniform")


def test_denoise_below_1_on_an_empty_latent_is_an_error(run: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"(?s)starts at timestep 499 of 999.*connect VAE Encode"):
        run.sun(run.apply(), denoise=0.5)


@pytest.mark.parametrize("scheduler", ["karras", "exponential", "normal", "beta"])
def test_uneven_sigmas_are_a_warning(run: SimpleNamespace, caplog, scheduler: str) -> None:
    run.ksampler(run.apply(), scheduler=scheduler)
    (warning,) = warnings_of(caplog)
    assert "these sigmas visit the timesteps 999, " in warning
    assert "scheduler simple" in warning


def test_leading_sigmas_of_image_to_image_are_a_warning(run: SimpleNamespace, photo, caplog) -> None:
    run.ksampler(run.apply(), start=photo, scheduler="ddim_uniform")
    (warning,) = warnings_of(caplog)
    assert "visit the timesteps 751, 501, 251, 1," in warning


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "ddpm", "lcm", "er_sde"])
def test_samplers_that_add_noise_are_a_warning(run: SimpleNamespace, caplog, name: str) -> None:
    run.ksampler(run.apply(), name=name)
    (warning,) = warnings_of(caplog)
    assert f"the sampler {name} adds new noise at every step" in warning


def test_an_ancestral_sampler_without_its_noise_is_fine(host: SimpleNamespace, run: SimpleNamespace, caplog) -> None:
    import comfy_extras.nodes_custom_sampler as custom

    model = run.apply()
    sampler = custom.SamplerEulerAncestral.execute(0.0, 1.0).result[0]
    sigmas = host.nodes["SUN_Scheduler"].execute(model, 4, 1.0, "trained").result[0]
    custom.SamplerCustom.execute(model, True, 7, 1.0, run.positive, run.negative, sampler, sigmas, run.latent())
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("name", ["heun", "dpm_2"])
def test_samplers_with_two_calls_a_step_are_a_warning(run: SimpleNamespace, caplog, name: str) -> None:
    model = run.apply()
    sigmas = torch.cat([model.get_model_object("model_sampling").sigmas[[999, 749, 499, 249]], torch.zeros(1)])
    with run.count(model) as counts:
        sample_with("SamplerCustom", model, run, name=name, sigmas=sigmas)
    assert counts.unet > 4
    (warning,) = warnings_of(caplog)
    assert f"the sampler {name} asks the U-Net more than once a step" in warning


def test_each_run_says_it_once(run: SimpleNamespace, caplog) -> None:
    model = run.apply()
    for _ in range(2):
        run.ksampler(model, cfg=3.0)
    (first, second) = warnings_of(caplog)
    assert first == second
    assert "set cfg to 1.0" in first


# ------------------------------------------------------------------------------- what the model predicts, and nothing


def predicting(host: SimpleNamespace, run: SimpleNamespace, sampling: str, zsnr: bool = False):
    load_builtin_extras("nodes_model_advanced")
    return host.nodes["ModelSamplingDiscrete"]().patch(run.apply(), sampling, zsnr)[0]


def test_the_noise_is_predicted_in_silence(host: SimpleNamespace, run: SimpleNamespace, caplog) -> None:
    run.sun(predicting(host, run, "eps"))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("zsnr", [False, True])
@pytest.mark.parametrize(("sampling", "what"), [("v_prediction", "predicts v"), ("x0", "predicts the clean latents")])
def test_other_predictions_are_sampled_and_told_of(
    host: SimpleNamespace, run: SimpleNamespace, caplog, sampling: str, what: str, zsnr: bool
) -> None:
    result = run.sun(predicting(host, run, sampling, zsnr))
    assert result.isfinite().all()
    (warning,) = warnings_of(caplog)
    assert what in warning


@pytest.mark.parametrize("sampling", ["lcm", "img_to_img"])
def test_what_sun_cannot_sample_is_refused(host: SimpleNamespace, run: SimpleNamespace, sampling: str) -> None:
    with pytest.raises(ValueError, match=f"predicts '{sampling}', which SUN cannot sample.*ModelSamplingDiscrete"):
        run.ksampler(predicting(host, run, sampling))


def test_the_noise_at_zero_snr_is_refused(host: SimpleNamespace, run: SimpleNamespace) -> None:
    with pytest.raises(ValueError, match=r"zero terminal SNR.*ModelSamplingDiscrete"):
        run.sun(predicting(host, run, "eps", zsnr=True))


@pytest.mark.parametrize("denoise", [0.0, 0.1, 0.24])
def test_nothing_to_run_on_an_empty_latent_is_an_error(
    host: SimpleNamespace, run: SimpleNamespace, denoise: float
) -> None:
    """In the sampler, and in the custom one with SUN's scheduler and guider."""
    model = run.apply()
    with pytest.raises(ValueError, match=r"no step to run, and the latent is empty.*VAE Encode"):
        run.sun(model, denoise=denoise)
    sigmas = host.nodes["SUN_Scheduler"].execute(model, 4, denoise, "trained").result[0]
    guider = host.nodes["SUN_Guider"].execute(model, run.positive, run.negative).result[0]
    with pytest.raises(ValueError, match="no step to run, and the latent is empty"):
        sample_with("SamplerCustomAdvanced", model, run, sigmas=sigmas, guider=guider)


# -------------------------------------------------------------------------------------- what doubles the calls at cfg 1


@pytest.mark.parametrize("name", ["euler_cfg_pp", "dpmpp_2m_cfg_pp", "res_multistep_cfg_pp"])
def test_cfg_pp_is_a_warning(run: SimpleNamespace, caplog, name: str) -> None:
    model = run.apply()
    with run.count(model) as counts:
        run.ksampler(model, name=name)
    assert counts.unet == 8
    (warning,) = warnings_of(caplog)
    assert f"{name} (CFG++) asks for the picture without guidance too" in warning
    assert "two U-Net calls" in warning


class NAGuidance:
    """ComfyUI's node of that name in what matters here (0.3.75 has none): it acts where both prompts share a call."""

    @staticmethod
    def execute(model, scale: float):
        def patch(out, extra_options):
            given = extra_options.get("cond_or_uncond") or []
            if 0 in given and 1 in given:
                positive, negative = (out.chunk(len(given))[given.index(kind)] for kind in (0, 1))
                out = torch.cat([positive * scale - negative * (scale - 1.0), negative])
            return out

        patched = model.clone()
        patched.set_model_attn1_output_patch(patch)
        patched.model_options["disable_cfg1_optimization"] = True
        return patched


def test_nag_beside_sun_is_a_warning(host: SimpleNamespace, run: SimpleNamespace, caplog) -> None:
    plain = run.ksampler(run.apply())
    model = NAGuidance.execute(run.apply(), 5.0)
    with run.count(model) as counts:
        torch.testing.assert_close(run.ksampler(model), plain, rtol=1e-4, atol=1e-4)
    assert counts.unet == 8
    (warning,) = warnings_of(caplog)
    assert "NAGuidance does nothing here" in warning
    assert "two U-Net calls" in warning


def test_whoever_asks_for_the_unguided_picture_is_named(host: SimpleNamespace, run: SimpleNamespace, caplog) -> None:
    load_builtin_extras("nodes_sag")
    model = host.nodes["SelfAttentionGuidance"].execute(run.apply(), 0.5, 2.0).result[0]
    run.ksampler(model)
    assert any("SelfAttentionGuidance asks for the picture without guidance" in w for w in warnings_of(caplog))


# -------------------------------------------------------------------------------- who answers in the U-Net's place


@pytest.mark.parametrize("order", ["before SUN", "behind SUN"])
@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_are_counted_and_named(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, caplog, name: str, order: str
) -> None:
    """The line of a run tells the U-Net calls that there were, wherever the cache stands."""
    load_builtin_extras("nodes_easycache")

    def cached(model):
        return host.nodes[name].execute(model, 3.0, 0.0, 1.0, False).result[0]

    model = run.apply(cached(emoji.model)) if order == "before SUN" else cached(run.apply())
    with run.count(model) as counts:
        blocks = []
        handle = model.model.diffusion_model.time_embed.register_forward_pre_hook(lambda *_: blocks.append(1))
        (line,) = run.output(model).ui["text"]
        handle.remove()
    really = len(blocks)
    assert 0 < really < 4
    assert line.startswith(f"{really} U-Net call")
    assert "more answered without it" in line or "in 4 steps" in line
    (warning,) = warnings_of(caplog)
    assert f"{name} has answered {4 - really} of 4 calls in the place of the U-Net" in warning
    assert counts.sun == run.layers * really


def test_a_run_without_a_cache_counts_as_before(run: SimpleNamespace, caplog) -> None:
    (line,) = run.output(run.apply()).ui["text"]
    assert line.startswith("4 U-Net calls, ")
    assert warnings_of(caplog) == []


# -------------------------------------------------------------------------------- weights without their SUN


def test_a_merge_and_a_saved_checkpoint_say_what_they_leave_behind(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, caplog
) -> None:
    load_builtin_extras("nodes_model_merging")
    merge = host.nodes["ModelMergeSimple"]()
    first = merge.merge(run.apply(), emoji.model, 0.5)[0]
    assert run.sun(first).isfinite().all()  # as the first model it goes along
    assert warnings_of(caplog) == []
    second = merge.merge(emoji.model, run.apply(), 0.5)[0]
    (warning,) = warnings_of(caplog)
    assert "a merge keeps it of its first model alone" in warning
    with pytest.raises(ValueError, match="has no SUN adapter"):
        run.sun(second)
    caplog.clear()
    host.nodes["CheckpointSave"]().save(run.apply().clone(), emoji.clip, emoji.vae, "sun-test")
    (warning,) = warnings_of(caplog)
    assert "not in what is saved" in warning
    for path in (host.base / "output").rglob("sun-test*"):
        path.unlink()


def test_accelerators_say_it_too(host: SimpleNamespace, emoji: SimpleNamespace, caplog) -> None:
    load_builtin_extras("nodes_model_merging")
    model = host.nodes["SUN_ApplyFeatureInheritance"].execute(emoji.model, "fine").result[0]
    model = host.nodes["SUN_ApplyLtcAccel"].execute(model, "balanced").result[0]
    host.nodes["ModelMergeSimple"]().merge(emoji.model, model, 0.5)
    assert "LTC-Accel and Feature inheritance: no part of a model's weights" in caplog.text


def test_sampling_leaves_nothing_behind_unsaid(run: SimpleNamespace, caplog) -> None:
    """Loading and patching the weights for a run is no saving."""
    run.sun(run.apply())
    assert warnings_of(caplog) == []
