"""What models predict: v, zero terminal SNR, and what cannot be sampled."""

from __future__ import annotations

import warnings

import pytest
import torch
from diffusers import DDIMScheduler

import sun
from sun.pipelines.schedulers import SCHEDULERS, make_scheduler, prediction_of
from sun.prediction import KINDS, PredictionError, check_prediction, clean_latents, marked_prediction

SD15 = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
V_ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


def _sampled(scheduler, steps, clean, kind):
    """What the scheduler makes of a model that always knows ``clean``: a right one ends there."""
    scheduler.set_timesteps(steps)
    x = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).double() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        a = scheduler.alphas_cumprod[int(t)].double().sqrt()
        s = (1 - a.square()).sqrt()
        inner = scheduler.scale_model_input(x, t)
        eps = (inner - a * clean) / s
        output = {"epsilon": eps, "v_prediction": a * eps - s * clean, "sample": clean}[kind]
        x = scheduler.step(output, t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("steps", [1, 3, 4, 7, 25])
@pytest.mark.parametrize("config", [{"prediction_type": "v_prediction"}, V_ZERO_SNR], ids=["v", "v, zero SNR"])
def test_a_model_that_predicts_v_ends_at_what_it_predicts(name, steps, config):
    clean = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    scheduler = make_scheduler(name, DDIMScheduler(**SD15, **config).config)
    assert torch.allclose(_sampled(scheduler, steps, clean, "v_prediction"), clean, atol=2e-3)


def test_ddim_at_zero_snr_is_diffusers_own():
    """20 steps: there diffusers' DDIM, which only knows steps of T // steps, visits the same timesteps."""
    config = DDIMScheduler(**SD15, **V_ZERO_SNR, timestep_spacing="trailing", set_alpha_to_one=True).config
    outputs = torch.randn(20, 1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    ends = []
    for scheduler in (DDIMScheduler.from_config(config), make_scheduler("ddim", config)):
        scheduler.set_timesteps(20)
        x = torch.ones(1, 4, 8, 8)
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            x = scheduler.step(output, t, x, return_dict=False)[0]
        ends.append(x)
    assert torch.isfinite(ends[1]).all()
    assert torch.allclose(*ends, atol=1e-5)


def test_a_model_that_predicts_the_clean_latents_ends_there():
    clean = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)).double()
    for config in ({}, {"rescale_betas_zero_snr": True}):
        scheduler = make_scheduler("ddim", DDIMScheduler(**SD15, prediction_type="sample", **config).config)
        assert torch.allclose(_sampled(scheduler, 4, clean, "sample"), clean, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"trained_betas": [0.01] * 999 + [1.0]}, "zero terminal SNR"),
        ({"prediction_type": "flow_prediction"}, "flow_prediction"),
    ],
)
def test_what_cannot_be_sampled_is_refused_in_words(name, config, words):
    class Config(dict):
        pass

    with pytest.raises(PredictionError, match=words):
        make_scheduler(name, Config(**SD15 | {"prediction_type": "epsilon"} | config))


@pytest.mark.parametrize("kind", KINDS)
def test_noise_and_clean_latents_of_every_prediction(kind):
    clean, eps = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    a, s = torch.tensor(0.6).double(), torch.tensor(0.8).double()
    output = {"epsilon": eps, "v_prediction": a * eps - s * clean, "sample": clean}[kind]
    found = clean_latents(kind, output, a * clean + s * eps, a, s)
    assert torch.allclose(found[0], clean)
    assert torch.allclose(found[1], eps)


def test_only_the_noise_goes_without_a_word():
    assert check_prediction("epsilon", 0.0047) == ""
    assert "predicts v" in check_prediction("v_prediction", 0.0)
    assert check_prediction("v_prediction", 0.0, adapter=False) == ""  # the plain model is as it should be
    assert "clean latents" in check_prediction("sample", 0.0047)


@pytest.mark.parametrize(
    ("names", "header", "expected"),
    [
        ({"a"}, {}, ("", False)),
        ({"v_pred"}, {}, ("v_prediction", False)),
        ({"v_pred", "ztsnr"}, None, ("v_prediction", True)),
        ({"ztsnr"}, {}, ("", True)),
        (set(), {"modelspec.prediction_type": "v"}, ("v_prediction", False)),
        (set(), {"modelspec.predict_key": "v"}, ("v_prediction", False)),
        (set(), {"modelspec.prediction_type": "epsilon"}, ("epsilon", False)),
        ({"v_pred"}, {"modelspec.prediction_type": "epsilon"}, ("v_prediction", False)),
    ],
)
def test_the_marks_of_a_checkpoint(names, header, expected):
    assert marked_prediction(names, header) == expected


def test_attaching_to_a_model_that_predicts_v_says_so_and_draws(pipe, adapter):
    pipe.scheduler = DDIMScheduler(**SD15, **V_ZERO_SNR)
    with pytest.warns(UserWarning, match="predicts v"):
        sun.attach(pipe, adapter)
    latents = pipe("a", negative_prompt="b", num_inference_steps=4, output_type="latent").images
    assert torch.isfinite(latents).all()


def test_attaching_to_a_usual_model_says_nothing(pipe, adapter):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sun.attach(pipe, adapter)
    assert prediction_of(pipe.scheduler.config)[0] == "epsilon"


def test_attaching_where_the_noise_says_nothing_is_refused_and_leaves_the_pipeline(pipe, adapter):
    pipe.scheduler = before = DDIMScheduler(**SD15, rescale_betas_zero_snr=True)
    with pytest.raises(ValueError, match="zero terminal SNR"):
        sun.attach(pipe, adapter)
    assert pipe.scheduler is before
    assert "_sun" not in pipe.__dict__
