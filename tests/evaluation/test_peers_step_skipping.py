"""Peers that leave out whole steps, each against something published or provable about it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from sun.common.settings import ConfigError
from sun.evaluation import Sampler, parse_method
from sun.evaluation.accelerators import skipper_of
from sun.evaluation.measured import asset_fingerprint
from sun.evaluation.names import PLAIN
from sun.evaluation.peers.adaptive_diffusion import AdaptiveDiffusion, changes_evenly
from sun.evaluation.peers.easycache import CacheSettings, EasyCache, LazyCache
from sun.evaluation.peers.sada import Sada, extrapolated, is_stable, lagrange
from sun.evaluation.peers.spectrum import SPECTRUM, Spectrum, computed_steps, spectrum_settings
from sun.evaluation.peers.step_skipping import Moment, Skipper, Skipping
from sun.pipelines.schedulers import make_scheduler

PROMPTS, NEGATIVES = ["polar bear", "red apple"], ["snake", ""]
CONFIG = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PEERS = ("spectrum[comfyui]", "spectrum[sdcpp]", "sada", "sada[lagrange]", "adaptive", "easycache", "lazycache")


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> Sampler:
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    return Sampler(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, w=3.0)


def moment(step: int, steps: int, latents: Tensor, alpha: float = 0.8, sigma: float = 0.6) -> Moment:
    """Step ``step`` of a run on evenly spaced timesteps."""
    times = [999.0 - i * 1000 / steps for i in range(steps)]
    later = times[step + 1] if step + 1 < steps else 0.0
    return Moment(step, steps, latents, latents, alpha, sigma, times[step], later, 1000, 0.01)


def skipped(skipper: Skipper, steps: int, model: Callable[[Moment], Tensor]) -> list[int]:
    """The steps a method leaves out when latents follow x' = x + noise / steps from a fixed start."""
    x, found = torch.full((4, 8, 8), 1.0), []
    for step in range(steps):
        at = moment(step, steps, x)
        noise = skipper.forecast(at)
        if noise is None:
            noise = model(at)
            skipper.learn(at, noise, torch.stack([noise, noise]))
        else:
            found.append(step)
        x = x + noise / steps
    return found


# ------------------------------------------------------------------------------------------------------------ Spectrum


def test_spectrum_reproduces_polynomials_of_its_degree() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = torch.randn(4, 3, 2, 2, generator=generator).double()

    def polynomial(step: int) -> Tensor:
        return sum((factors[n] * (step / 20) ** n for n in range(4)), torch.zeros(()))

    peer = Spectrum(spectrum_settings("comfyui", ridge=1e-12, weight=1.0))
    for step in (0, 1, 2, 4, 7, 9):
        peer.remember(step, polynomial(step))
    torch.testing.assert_close(peer.value(12, 20), polynomial(12), rtol=1e-6, atol=1e-6)
    line = Spectrum(spectrum_settings("comfyui", weight=0.0))
    line.remember(7, polynomial(7)), line.remember(9, polynomial(9))
    torch.testing.assert_close(line.value(10, 20), 2 * polynomial(9) - polynomial(7))


@pytest.mark.parametrize(
    ("preset", "steps", "speedup"),
    # stable-diffusion.cpp's 1.82 and 2.14 are calls; the ComfyUI pack's 1.83 of 30 steps is seconds, of 1.875 in calls
    [("sdcpp", 20, 1.82), ("sdcpp", 30, 2.14), ("comfyui", 30, 1.875)],
)  # fmt: skip
def test_spectrum_computes_as_many_steps_as_published(preset: str, steps: int, speedup: float) -> None:
    settings = SPECTRUM[preset]
    computed = computed_steps(steps, settings)
    assert steps / len(computed) == pytest.approx(speedup, abs=0.005)
    assert computed[: settings.warmup] == tuple(range(settings.warmup))
    distances = [b - a for a, b in pairwise(computed) if a >= settings.warmup]
    assert distances[:-3] == sorted(distances[:-3])  # ever rarer, up to the tail
    assert skipped(Spectrum(settings), steps, lambda at: at.latents) == sorted(set(range(steps)) - set(computed))


# ---------------------------------------------------------------------------------------------------------------- SADA


def test_sada_calls_a_path_with_known_solution_stable() -> None:
    # x = cos(3 t), read at equal distances against time; its error of third order has the sign opposite to D2 y
    dt = 0.01
    t = torch.linspace(0.2, 0.8, 7).double()
    x, y, y1, y2 = torch.cos(3 * t), *(-3 * torch.sin(3 * (t + k * dt)) for k in range(3))
    exact = torch.cos(3 * (t - dt))
    assert is_stable(exact, x, y, y1, y2, dt)
    bend = y - 2 * y1 + y2
    error = exact - extrapolated(x, y, y1, y2, dt)
    torch.testing.assert_close(error / (dt * bend), torch.full_like(t, -13 / 12), rtol=0.06, atol=0)
    assert not is_stable(exact + 2 * dt * bend, x, y, y1, y2, dt)  # driven off to the other side
    parabola = [(t + k * dt) ** 2 for k in range(-1, 1)]
    slopes = [2 * (t + k * dt) for k in range(3)]
    torch.testing.assert_close(extrapolated(parabola[1], *slopes, dt), parabola[0])  # exact to second order


def test_sada_interpolates_and_keeps_to_its_range() -> None:
    cubic = lambda t: torch.tensor([t**3 - 2 * t, 5.0])  # noqa: E731
    torch.testing.assert_close(lagrange([1.0, 5.0, 9.0, 13.0], [cubic(t) for t in (1, 5, 9, 13)], 15.0), cubic(15))
    left_out = skipped(Sada(half=0.48), 50, lambda at: at.latents)
    assert set(range(26, 48)) - set(left_out) == {29, 33, 37, 41, 45}  # one of four from step 25 on
    for steps in (15, 25, 50):
        left_out = skipped(Sada(), steps, lambda at: at.latents)
        assert min(left_out, default=9) > 3
        assert max(left_out, default=0) <= steps - 3


# --------------------------------------------------------------------------------------------------- AdaptiveDiffusion


def test_adaptive_diffusion_skips_four_in_a_row_at_most() -> None:
    assert changes_evenly([1.0, 1.0, 1.018], 0.01)
    assert not changes_evenly([1.0, 1.0, 1.022], 0.01)
    even = skipped(AdaptiveDiffusion(), 20, lambda at: torch.ones_like(at.latents))
    assert even == [4, 5, 6, 7, 9, 10, 11, 12, 14, 15, 16, 17, 19]
    restless = lambda at: torch.full_like(at.latents, 1.0 + at.step % 2)  # noqa: E731
    assert skipped(AdaptiveDiffusion(), 20, restless) == []


# --------------------------------------------------------------------------------------------- EasyCache and LazyCache


@pytest.mark.parametrize("kind", [EasyCache, LazyCache])
def test_caches_keep_to_their_part_of_the_run(kind: type[EasyCache] | type[LazyCache]) -> None:
    model = lambda at: at.latents.cumsum(-1)  # noqa: E731
    counts = []
    for threshold in (0.0, 0.2, 0.4, 1e9):
        left_out = skipped(kind(CacheSettings(threshold)), 40, model)
        counts.append(len(left_out))
        assert all(0.15 <= step / 40 <= 0.95 for step in left_out)
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[1] < counts[3]
    # EasyCache begins to look at .15 and knows a rate after two steps, LazyCache after one
    assert counts[3] == (38 - 6 - (2 if kind is EasyCache else 1))


# ------------------------------------------------------------------------------------------------- as ways of sampling


def gaussian(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
    """The exact noise for pictures drawn from a normal distribution about the value of a text, deviation 0.5."""
    signal = make_scheduler("ddim", CONFIG).alphas_cumprod[int(t)]
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()

    def noise(mean: Tensor) -> Tensor:
        clean = (alpha * 0.25 * x + sigma**2 * mean[:, :, None, None]) / (alpha**2 * 0.25 + sigma**2)
        return (x - alpha * clean) / sigma

    return noise(positive), noise(negative)


def sample(call: str, start: Tensor, texts: Tensor, rows: list[int]) -> Tensor:
    """Latents that a method leads to on the normal distribution; ``rows`` gets the rows of each model call."""
    method = parse_method(call)
    scheduler = make_scheduler(method.scheduler, CONFIG)
    scheduler.set_timesteps(method.steps)

    def ask(x: Tensor, t: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(x))
        return gaussian(x, t, positive, negative)

    make = skipper_of(method) if method.method.skips else lambda: AdaptiveDiffusion(most=0)
    model = Skipping(ask, make, w=2.0)
    model.begin(scheduler)
    x = start * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, t), t, texts, -texts), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("scheduler", ["dpmpp_2m", "euler", "unipc"])
def test_peers_work_with_three_solvers(scheduler: str) -> None:
    start, texts = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([[0.5], [1.0]])
    full = sample(f"{PLAIN[scheduler]}-24", start, texts, [])
    for peer in PEERS:
        name, _, inside = peer.removesuffix("]").partition("[")
        method = f"{name}[{','.join(filter(None, (inside, f'scheduler={scheduler}')))}]-24"
        made = sample(method, start, texts, rows := [])
        assert 12 <= sum(rows) < 48, method
        near = 9 if name == "lazycache" else 0.12  # which looks at latents of all sizes alike and goes far off here
        assert float((made - full).norm() / full.norm()) < near, method
        alone = sample(method, start[1:], texts[1:], [])  # a picture decides for itself
        torch.testing.assert_close(alone, made[1:], rtol=1e-4, atol=1e-4)


def test_peers_sample_a_unet(sampler: Sampler) -> None:
    noise = sampler.noise(2, 0)
    full = sampler("dpmpp-7", PROMPTS, NEGATIVES, noise)
    for peer, calls in (("spectrum[sdcpp]", 12), ("adaptive[threshold=9]", 8), ("lazycache[threshold=9]", 6)):
        made = sampler(f"{peer}-7", PROMPTS, NEGATIVES, noise)
        assert made.unet_calls == calls, peer
        assert 0 < (made.latents - full.latents).abs().max() < full.latents.abs().max()
    assert torch.equal(sampler("dpmpp-7", PROMPTS, NEGATIVES, noise).latents, full.latents)


def test_settings_of_peers(sampler: Sampler) -> None:
    prints = [asset_fingerprint(sampler, m) for m in ("easycache-9", "easycache[threshold=0.3]-9", "spectrum-9")]
    assert len(set(prints)) == 3
    assert prints[0] == asset_fingerprint(sampler, "easycache-9")
    for method in ("spectrum[window=0]-9", "spectrum[ridge=0]-9"):
        with pytest.raises(ConfigError, match="Spectrum takes"):
            skipper_of(parse_method(method))
    with pytest.raises(ConfigError, match="it takes comfyui, sdcpp"):
        parse_method("spectrum[sdxl]-9")
