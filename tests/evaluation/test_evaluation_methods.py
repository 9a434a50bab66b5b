"""Every method beside an independent way to the same picture; times; metrics; feature networks."""

from __future__ import annotations

import copy
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from sun.common.settings import ConfigError
from sun.evaluation import EvaluateConfig, Sampler, build_prompts, parse_method
from sun.evaluation.features import load_features
from sun.evaluation.metrics import (
    PSNR_CEILING,
    frechet_distance,
    frechet_interval,
    kernel_statistics,
    map_distance,
    mean_and_interval,
    psnr,
    ssim,
)
from sun.evaluation.negative import compare_change
from sun.evaluation.sampler import picture_generators
from sun.evaluation.timing import Timing, time_methods, time_unet_calls
from sun.lab.emoji.scenes import BACKGROUNDS
from sun.pipelines.schedulers import make_scheduler
from sun.surgery import from_unet
from sun.training.data.negative_phrases import NegativePrompts

PROMPTS, NEGATIVES = ["polar bear", "red apple"], ["snake", ""]


def load(tiny_model: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)


@pytest.fixture(scope="module")
def peers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA in ``lora/`` and another U-Net in ``distilled/unet/``."""
    folder = tmp_path_factory.mktemp("peers")
    unet = load(tiny_model).unet
    torch.manual_seed(5)
    student = copy.deepcopy(unet)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    student.save_pretrained(folder / "distilled" / "unet")
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    weights = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    StableDiffusionPipeline.save_lora_weights(folder / "lora", unet_lora_layers=weights)
    return folder


@pytest.fixture(scope="module")
def sampler(tiny_model: Path, peers: Path) -> Sampler:
    pipe = load(tiny_model)
    return Sampler(
        pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, w=3.0,
        adapter=from_unet(pipe.unet, alpha=0.5),
        adapters={"weak": from_unet(pipe.unet, alpha=0.1)},
        lcm_lora=str(peers / "lora"), guided_distill=str(peers / "distilled"),
    )  # fmt: skip


def test_names_are_taken_apart() -> None:
    call = parse_method("sun[late,strength=0.5]-12")
    assert (call.method.name, call.variant, call.steps, call.family) == ("sun", "late", 12, "sun[late,strength=0.5]")
    assert call.number("strength", 1.0) == 0.5
    assert parse_method("lcm-lora-4").method.name == "lcm-lora"
    assert parse_method("nag[phi=3,tau=2]-4").numbers() == {"phi": 3.0, "tau": 2.0}
    assert parse_method("sun[scheduler=euler]-4").scheduler == "euler"


@pytest.mark.parametrize(
    ("name", "part"),
    [("nag[psi=3]-4", "phi=VALUE"), ("ddim[late]-4", "no option"), ("sun[strength=much]-4", "number"),
     ("lcm-lora+nag[phi=nan]-4", "number"), ("nag[tau=inf]-4", "number"),
     ("sun[scheduler=best]-4", "euler"), ("sun-0", "choose from")],
)  # fmt: skip
def test_wrong_names_say_what_there_is(name: str, part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        parse_method(name)


@pytest.mark.parametrize("name", ["nag[phi=-1]-2", "nag[alpha=2]-2", "lcm-lora+nag[tau=0]-2"])
def test_settings_that_a_peer_refuses_are_said_with_the_method(sampler: Sampler, name: str) -> None:
    with pytest.raises(ConfigError, match=r"nag\[.*\]-2: NAG needs phi >= 0"):
        sampler(name, PROMPTS, NEGATIVES, sampler.noise(2, 0))
    assert sampler("cond-2", PROMPTS, NEGATIVES, sampler.noise(2, 0)).unet_calls == 2, "nothing is left attached"


def test_an_unknown_adapter_is_named(sampler: Sampler) -> None:
    with pytest.raises(ConfigError, match=r"no adapter 'late'.*there are: weak"):
        sampler("sun[late]-2", PROMPTS, NEGATIVES, sampler.noise(2, 0))


def test_adapters_and_strength_by_name(sampler: Sampler) -> None:
    noise = sampler.noise(2, 0)
    plain = sampler("cond[scheduler=ddim]-2", PROMPTS, NEGATIVES, noise).latents
    main, weak = (sampler(m, PROMPTS, NEGATIVES, noise).latents for m in ("sun-2", "sun[weak]-2"))
    assert (weak - plain).norm() < 0.5 * (main - plain).norm()
    assert torch.equal(sampler("sun[strength=0]-2", PROMPTS, NEGATIVES, noise).latents, plain)


def test_lcm_lora_is_diffusers_own_pipeline(sampler: Sampler, tiny_model: Path, peers: Path) -> None:
    pipe = load(tiny_model)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.load_lora_weights(peers / "lora")
    noise = sampler.noise(2, 7)
    expected = pipe(
        PROMPTS, num_inference_steps=3, guidance_scale=1.0, latents=noise, generator=picture_generators(noise),
        output_type="latent",
    ).images  # fmt: skip
    before = {k: v.clone() for k, v in sampler.unet.state_dict().items()}
    found = sampler("lcm-lora-3", PROMPTS, NEGATIVES, noise)
    assert found.unet_calls == 3
    assert torch.allclose(found.latents, expected, atol=1e-3, rtol=1e-3)
    swapped = sampler("lcm-lora-3", PROMPTS[::-1], NEGATIVES[::-1], noise.flip(0)).latents
    assert torch.allclose(swapped.flip(0), found.latents, atol=1e-4), "its noise does not depend on the batch"
    after = sampler.unet.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())


def test_lcm_lora_takes_negatives_through_nag_and_skips_steps(sampler: Sampler) -> None:
    """One row a picture; NAG changes what the negative changes and is taken off again; skipped steps are not asked."""
    noise = sampler.noise(2, 7)
    plain = sampler("lcm-lora-8", PROMPTS, NEGATIVES, noise)
    steered, other = (sampler("lcm-lora+nag-8", PROMPTS, texts, noise) for texts in (NEGATIVES, NEGATIVES[::-1]))
    assert steered.unet_calls == plain.unet_calls == 8
    assert not torch.allclose(steered.latents, other.latents, atol=1e-5)
    assert not torch.allclose(steered.latents, plain.latents, atol=1e-5)
    skipped = sampler("lcm-lora+ltc[fast]-8", PROMPTS, NEGATIVES, noise)
    assert skipped.unet_calls < 8
    assert not torch.equal(skipped.latents, plain.latents)
    assert torch.equal(sampler("lcm-lora-8", PROMPTS, NEGATIVES, noise).latents, plain.latents)
    with pytest.raises(ConfigError, match=r"without fresh noise. Name a preset, as in lcm-lora\+ltc\[balanced\]-8"):
        sampler("lcm-lora+ltc-8", PROMPTS, NEGATIVES, noise)


def test_switching_lets_two_unets_take_turns(tiny_model: Path, tmp_path: Path) -> None:
    """As sun.switching does in a pipeline, and each U-Net alone at share 0 and 1, for one call a step and row."""
    from diffusers import UNet2DConditionModel

    import sun.switching

    pipe = load(tiny_model)
    torch.manual_seed(3)
    config = dict(pipe.unet.config) | {"layers_per_block": (1, 1)}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path)
    made = Sampler(
        pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, w=4.0, unets={"small": str(tmp_path)}
    )
    noise = made.noise(2, 7)
    late = "switch[small,large_first=1,share=0.5]-4"
    switching = ("switch[small,share=0]-4", "switch[small]-4", late, "switch[small,share=1]-4")
    found = {name: made(name, PROMPTS, NEGATIVES, noise) for name in ("dpmpp-4", *switching)}
    assert torch.equal(found["switch[small,share=0]-4"].latents, found["dpmpp-4"].latents)
    assert {sample.unet_calls for sample in found.values()} == {8}
    pipe.scheduler = make_scheduler("dpmpp_2m", pipe.scheduler.config)
    for name, share, order in (
        ("switch[small]-4", 0.4, "small first"),
        (late, 0.5, "large first"),
    ):
        sun.switching.attach(pipe, UNet2DConditionModel.from_pretrained(tmp_path), share, order)
        expected = pipe(
            PROMPTS, negative_prompt=NEGATIVES, num_inference_steps=4, guidance_scale=4.0, latents=noise,
            output_type="latent",
        ).images  # fmt: skip
        assert torch.allclose(found[name].latents, expected, atol=1e-3, rtol=1e-3)
    with pytest.raises(ConfigError, match="from 0 to 1, not"):
        made("switch[small,share=1.5]-4", PROMPTS, NEGATIVES, noise)


def test_guided_distillation_runs_its_own_unet(sampler: Sampler, peers: Path) -> None:
    from diffusers import UNet2DConditionModel

    noise = sampler.noise(2, 7)
    found = sampler("guided-distill-2", PROMPTS, NEGATIVES, noise)
    student = Sampler(
        UNet2DConditionModel.from_pretrained(peers / "distilled" / "unet"), sampler.vae, sampler.text_encoder,
        sampler.tokenizer, type("Scheduler", (), {"config": sampler.scheduler_config}),
    )  # fmt: skip
    assert found.unet_calls == 2
    assert torch.allclose(
        found.latents, student("cond[scheduler=ddim]-2", PROMPTS, NEGATIVES, noise).latents, atol=1e-5
    )


@pytest.mark.parametrize("name", ["nasa", "nag"])
def test_training_free_peers_see_the_negative_and_leave_no_trace(sampler: Sampler, name: str) -> None:
    noise = sampler.noise(2, 0)
    plain = sampler("cond-2", PROMPTS, NEGATIVES, noise).latents
    found = sampler(f"{name}-2", PROMPTS, NEGATIVES, noise)
    other = sampler(f"{name}-2", PROMPTS, ["red apple", ""], noise)
    assert found.unet_calls == 2
    assert not torch.allclose(found.latents[0], other.latents[0], atol=1e-5)
    assert torch.equal(found.latents[1], other.latents[1])
    assert torch.equal(sampler("cond-2", PROMPTS, NEGATIVES, noise).latents, plain)


def test_a_peer_without_its_folder_says_which_setting(tiny_model: Path) -> None:
    pipe = load(tiny_model)
    bare = Sampler(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler)
    for method, setting in (
        ("lcm-lora-2", "lcm_lora"),
        ("guided-distill-2", "guided_distill"),
        ("sun-2", "adapter"),
    ):
        with pytest.raises(ConfigError, match=setting):
            bare(method, PROMPTS, NEGATIVES, bare.noise(2, 0))


# --- time ------------------------------------------------------------------------------------------------------------


def test_speedups_compare_neighbours_in_time() -> None:
    slow_second_round = Timing((1.0, 10.0), (2.0, 20.0), 4.0), Timing((10.0, 100.0), (12.0, 120.0), 50.0)
    figures = slow_second_round[0].figures(slow_second_round[1])
    assert figures["speedup"] == 10
    assert figures["pipeline_speedup"] == 6
    assert figures["seconds_interval"] == (1.0, 10.0)


def test_methods_take_turns(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    prepared = Sampler.prepared

    def noted(self: Sampler, method: Any, strength: float = 1.0) -> Any:
        order.append(str(method))
        return prepared(self, method, strength)

    monkeypatch.setattr(Sampler, "prepared", noted)
    found = time_methods(sampler, ["ddim-1", "sun-1"], PROMPTS, NEGATIVES, 2, "fp32")
    assert order == ["ddim-2", "sun-2", "ddim-1", "sun-1", "sun-1", "ddim-1"]
    assert [found[m].unet_calls for m in found] == [2, 1]
    assert all(loop < whole for t in found.values() for loop, whole in zip(t.loop, t.pipeline, strict=True))


def test_one_call_of_every_kind(sampler: Sampler) -> None:
    found = time_unet_calls(sampler, ["sun-4", "sun-8", "ddim-4"], PROMPTS, NEGATIVES, 1, "fp32")
    assert list(found) == ["cond", "sun", "ddim"]
    assert found["cond"]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in found.values())


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_psnr_and_ssim_of_known_pictures() -> None:
    torch.manual_seed(0)
    picture = torch.rand(2, 3, 32, 32) * 1.8 - 0.9
    shifted = picture + torch.tensor([0.0, 0.02]).view(2, 1, 1, 1)
    found = psnr(shifted, picture)
    assert found[0] == PSNR_CEILING
    assert found[1] == pytest.approx(20 * math.log10(2 / 0.02), abs=0.01)
    similar = ssim(torch.stack([picture[0], picture[1].flip(1)]), picture)
    assert similar[0] == pytest.approx(1.0, abs=1e-4)
    assert similar[1] < 0.5


def test_map_distance_is_about_direction() -> None:
    one, other = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 3)
    one[:, 0], other[:, 1] = 1.0, 5.0
    assert map_distance([one, one], [one * 7, one]) == pytest.approx(0.0, abs=1e-6)
    assert map_distance([one], [other]) == pytest.approx(2.0)
    assert map_distance([one, one], [one, other]) == pytest.approx(1.0)


def test_intervals_hold_their_estimate() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(100, 4), torch.randn(100, 4) + 1.0
    state = torch.get_rng_state()
    low, high = frechet_interval(a, b, draws=10)
    assert low < frechet_distance(a, b) < high
    mean, deviation = kernel_statistics(a, b)
    assert mean > deviation > 0
    assert torch.equal(torch.get_rng_state(), state), "measuring does not disturb the noise of what follows"
    found = mean_and_interval("x", torch.tensor([1.0, torch.nan, 3.0]))
    assert found["x"] == 2
    assert mean_and_interval("x", torch.tensor([torch.nan])) == {}


def test_change_by_the_negative_is_compared_in_direction_and_size() -> None:
    torch.manual_seed(0)
    reference = torch.randn(8, 4, 4, 4)
    found = compare_change(0.5 * reference, reference)
    assert found["cosine"] == pytest.approx(1.0)
    assert found["relative_size"] == pytest.approx(0.5)
    assert abs(found["cosine_with_other_pairs_change"]) < 0.3
    assert compare_change(-reference, reference)["positive_share"] == 0


# --- prompts and features --------------------------------------------------------------------------------------------


def test_unseen_negatives_are_none_of_the_list(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a | b\nc\nd\n")
    config = EvaluateConfig(prompts_file=str(tmp_path / "p.txt"), negative_groups=("seen", "unseen"), negative_pairs=3)
    prompts = build_prompts(config)
    known = set(NegativePrompts.load("auto", "photo", 8, 0.0).phrases)
    assert prompts.negatives == ["b", "", ""]
    assert all(set(text.split(", ")) <= known for text in prompts.groups["seen"])
    assert all(text and text not in known for text in prompts.groups["unseen"])
    config.negative_groups = ("odd",)
    with pytest.raises(ConfigError, match="seen and unseen"):
        build_prompts(config)


def test_random_negatives_name_no_other_background_than_the_prompts() -> None:
    config = EvaluateConfig(prompts=300, negative_groups=("seen", "unseen"), negative_pairs=300)
    prompts = build_prompts(config)
    tones = "|".join(BACKGROUNDS)
    named, open_, other = re.compile(rf"({tones}) background"), 0, 0
    for i, prompt in enumerate(prompts.positives):
        negatives = [prompts.negatives[i], *(prompts.groups[name][i] for name in ("seen", "unseen"))]
        assert all(negatives[1:])
        found = [text for text in negatives if re.search(rf"({tones}) background|(^|, )(on an? )?({tones})(,|$)", text)]
        if named.search(prompt):
            assert not found, (prompt, found)
            other += 1
        else:
            open_ += len(found)
    assert other > 200
    assert open_ > 20, "where the prompt leaves it open, a negative may say which it is not"


def test_features_say_what_they_lack(sampler: Sampler, tmp_path: Path) -> None:
    assert load_features("auto", sampler, emoji_model=False).name == "none"
    with pytest.raises(ConfigError, match="clip_model"):
        load_features("clip", sampler, emoji_model=False)
    with pytest.raises(ConfigError, match="auto, emoji, clip, none"):
        load_features("vision", sampler, emoji_model=False)
    own = load_features("none", sampler, emoji_model=False)
    assert own.of_sets(torch.zeros(2, 3, 32, 32), torch.randn(2, 4, 4, 4)).ndim == 2


def test_clip_features(sampler: Sampler, tokenizer_folder: Path, tmp_path: Path) -> None:
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    torch.manual_seed(0)
    CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": len(tokenizer), **ends},
            vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=12,
        )
    ).save_pretrained(tmp_path)  # fmt: skip
    tokenizer.save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    found = load_features("clip", sampler, emoji_model=False, clip_model=str(tmp_path))
    pixels = torch.rand(2, 3, 48, 48) * 2 - 1
    network = found.network
    assert network is not None
    images, texts = network.image_features(pixels), network.text_features(["owl", ""])
    assert images.shape == texts.shape == (2, 12)
    assert torch.allclose(images.norm(dim=1), torch.ones(2), atol=1e-5)
    assert [m.shape for m in network.image_maps(pixels)] == [(2, 16, 4, 4)] * 4
    assert found.of_sets(pixels, torch.empty(0)).norm(dim=1)[0] == pytest.approx(12**0.5, rel=1e-4)
    with pytest.raises(ConfigError, match="inception"):
        load_features("clip", sampler, emoji_model=False, clip_model=str(tmp_path), inception=str(tmp_path / "no.pth"))
