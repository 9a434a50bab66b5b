"""One step of both families.

A1111 1.10 (sd_samplers_cfg_denoiser.py): rows are each image's AND sub-prompts, then the unconditional ones; callbacks;
the unconditional rows are left out where skip_early_cond or s_min_uncond says so, and image_cond is NOT cut with them;
chunks of the batch size without batch_cond_uncond; the first sub-prompt's prediction stands in for the unconditional
one.

reForge and Forge Classic have Forge's way here; reForge encodes the unconditional prompt at CFG 1, too.

Forge (sampling_function.py): conditions with model_conds and a strength, conditioning modifiers, the unconditional part
left out at scale 1, one batch for each sub-prompt stacked to chunks, and the sum of strengths multiplies the picture.
"""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from . import prompt_parser, script_callbacks, sd_samplers_common, shared
from .shared import opts, state


def make(sampler: Any) -> Any:
    return (A1111Denoiser if shared.family == "a1111" else ForgeDenoiser)(sampler)


def make_timesteps(sampler: Any) -> Any:
    return (A1111TimestepsDenoiser if shared.family == "a1111" else ForgeTimestepsDenoiser)(sampler)


class Denoiser:
    def denoise(self, x: Any, sigma: Any, **extra: Any) -> torch.Tensor:
        raise NotImplementedError

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.step, self.total_steps = sampler, 0, 1
        self.init_latent: Any = None
        self.mask: Any = None
        self.inner_model = SimpleNamespace(sigmas=shared.sd_model.sigmas, inner_model=shared.sd_model)

    def begin(self, p: Any) -> None:
        self.p, self.step, self.mask = p, 0, getattr(p, "mask", None)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        if state.interrupted or state.skipped:
            raise sd_samplers_common.InterruptedException
        self.asked_at = sigma
        denoised = self.denoise(x, sigma, **extra)
        if self.mask is not None:
            denoised = denoised * (1 - self.mask) + self.init_latent * self.mask
        self.sampler.last_latent = denoised
        self.step += 1
        return denoised


def leaves_out(denoiser: Denoiser, sigma: torch.Tensor, least: float) -> bool:
    """Negative Guidance minimum sigma."""
    return bool((denoiser.step % 2 or opts.s_min_uncond_all) and least > 0 and sigma[0] < least)


class A1111Denoiser(Denoiser):
    def denoise(
        self, x: Any, sigma: Any, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float, image_cond: Any
    ) -> torch.Tensor:
        lists, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        size = len(lists)
        owners = [i for i, parts in enumerate(lists) for _ in parts] + list(range(size))
        params = SimpleNamespace(
            x=x[owners], sigma=sigma[owners], image_cond=image_cond[owners], text_cond=tensor, text_uncond=uncond,
            denoiser=self,
        )  # fmt: skip
        script_callbacks.call("cfg_denoiser", params)
        x_in, sigma_in, image_in = params.x, params.sigma, params.image_cond
        tensor, uncond = params.text_cond, params.text_uncond
        skip = opts.skip_early_cond != 0 and self.step / self.total_steps <= opts.skip_early_cond
        early = skip
        skip = skip or leaves_out(self, self.asked_at, s_min_uncond)  # a timestep, where the sampler walks those
        if skip:
            x_in, sigma_in = x_in[:-size], sigma_in[:-size]
        if early:
            self.p.extra_generation_params["Skip Early CFG"] = opts.skip_early_cond
        if opts.pad_cond_uncond and tensor.shape[1] < uncond.shape[1]:
            tensor = torch.cat(
                [tensor, tensor.new_zeros(len(tensor), uncond.shape[1] - tensor.shape[1], tensor.shape[2])], 1
            )
        assert skip or tensor.shape[1] == uncond.shape[1], "the stand-in has no separate calls for unequal lengths"
        text = tensor if skip else torch.cat([tensor, uncond])
        chunk = len(x_in) if opts.batch_cond_uncond else size
        outputs = [
            shared.sd_model.apply_model(
                x_in[i : i + chunk], sigma_in[i : i + chunk], text[i : i + chunk], image_in[i : i + chunk]
            )
            for i in range(0, len(x_in), chunk)
        ]
        x_out = torch.cat(outputs)
        if skip:
            x_out = torch.cat([x_out, x_out[[parts[0][0] for parts in lists]]])
        script_callbacks.call("cfg_denoised", SimpleNamespace(x=x_out, inner_model=self.inner_model))
        plain = x_out[-uncond.shape[0] :]
        denoised = plain.clone()
        for i, parts in enumerate(lists):
            for row, weight in parts:
                denoised[i] += (x_out[row] - plain[i]) * (weight * (1.0 if skip else cond_scale))
        return denoised


class ForgeDenoiser(Denoiser):
    def denoise(
        self, x: Any, sigma: Any, uncond: Any, cond: Any, cond_scale: float, s_min_uncond: float, image_cond: Any
    ) -> torch.Tensor:
        lists, tensor = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step) if uncond is not None else None
        params = SimpleNamespace(
            x=x, sigma=sigma, image_cond=image_cond, text_cond=tensor, text_uncond=uncond, denoiser=self
        )
        script_callbacks.call("cfg_denoiser", params)
        if self.p.is_hr_pass:
            cond_scale = getattr(self.p, "hr_cfg", cond_scale)
        early = opts.skip_early_cond > 0 and self.step / self.total_steps <= opts.skip_early_cond
        if early or leaves_out(self, sigma, s_min_uncond):
            cond_scale = 1.0
        unet = shared.sd_model.forge_objects.unet
        parts = [
            {"model_conds": {"c_crossattn": tensor[[row for row, _ in column]]}, "strength": column[0][1]}
            for column in zip(*lists, strict=True)
        ]
        plain = None if uncond is None else [{"model_conds": {"c_crossattn": uncond}}]
        model, options = unet.model, unet.model_options
        for modifier in options.get("conditioning_modifiers", []):
            model, x, sigma, plain, parts, cond_scale, options, _ = modifier(
                model, x, sigma, plain, parts, cond_scale, options, 0
            )
        return sampling_function(model, x, sigma, plain, parts, cond_scale, options)


class TimestepsDenoiser(Denoiser):
    """Asked at a timestep and latents of variance 1 for noise."""

    def denoise(self, x: Any, sigma: Any, **extra: Any) -> torch.Tensor:
        sigma = shared.sd_model.sigmas[sigma.round().long()]
        level = sigma.view(-1, 1, 1, 1)
        x = x * (1 + level**2).sqrt()
        return (x - super().denoise(x, sigma, **extra)) / level


class A1111TimestepsDenoiser(TimestepsDenoiser, A1111Denoiser):
    pass


class ForgeTimestepsDenoiser(TimestepsDenoiser, ForgeDenoiser):
    classic_ddim_eps_estimation = True


def sampling_function(
    model: Any, x: Any, sigma: Any, uncond: Any, cond: Any, scale: float, options: Any
) -> torch.Tensor:
    total = sum(part.get("strength", 1.0) for part in cond)
    if math.isclose(scale, 1.0):
        uncond = None
    chunks = [(part, 0) for part in cond] + [(part, 1) for part in uncond or []]
    kinds = [kind for _, kind in chunks]
    transformer = {**options.get("transformer_options", {}), "cond_or_uncond": kinds, "sigmas": sigma}
    text = torch.cat([part["model_conds"]["c_crossattn"] for part, _ in chunks])
    rows = len(chunks)
    linked = shared.sd_model.forge_objects.unet.controlnet_linked_list
    control = None if linked is None else linked(x.repeat(rows, 1, 1, 1))
    predicted = model.apply_model(x.repeat(rows, 1, 1, 1), sigma.repeat(rows), text, transformer, control).chunk(rows)
    strengths = [part.get("strength", 1.0) for part, _ in chunks]
    with_text = sum(w * p for w, p, (_, kind) in zip(strengths, predicted, chunks, strict=True) if kind == 0) / total
    without = next((p for p, (_, kind) in zip(predicted, chunks, strict=True) if kind == 1), torch.zeros_like(x))
    return without + (with_text - without) * scale * (1.0 if math.isclose(total, 1.0) else total)
