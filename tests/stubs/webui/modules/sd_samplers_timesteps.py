"""DDIM and PLMS, which both families have from LDM: latents of variance 1, ascending timesteps walked from their end, a
denoiser that is asked for noise, and a step count of one less than there are timesteps."""

from __future__ import annotations

from typing import Any

import torch

from . import sd_samplers_cfg_denoiser, sd_samplers_common


def ddim(
    model: Any, x: Any, timesteps: Any, extra_args: Any = None, callback: Any = None, disable: Any = None,
    eta: float = 0.0,
) -> torch.Tensor:  # fmt: skip
    alphas = model.inner_model.inner_model.alphas_cumprod[timesteps]
    for index in range(len(timesteps) - 1, 0, -1):
        noise = model(x, timesteps[index].item() * x.new_ones(x.shape[0]), **extra_args)
        here, there = alphas[index], alphas[index - 1]
        x = there.sqrt() * (x - (1 - here).sqrt() * noise) / here.sqrt() + (1 - there).sqrt() * noise
    return x


def plms(
    model: Any, x: Any, timesteps: Any, extra_args: Any = None, callback: Any = None, disable: Any = None
) -> torch.Tensor:
    return ddim(model, x, timesteps, extra_args)  # another sampler of the host's list; its formula does not matter


def unipc(
    model: Any, x: Any, timesteps: Any, extra_args: Any = None, callback: Any = None, disable: Any = None,
    is_img2img: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Takes from its timesteps nothing but how many they are."""
    return ddim(model, x, torch.linspace(1, 999, len(timesteps) + 1).long(), extra_args)


class CompVisSampler(sd_samplers_common.Sampler):
    def __init__(self, function: Any, sd_model: Any) -> None:
        super().__init__()
        self.func = function
        self.model_wrap_cfg = sd_samplers_cfg_denoiser.make_timesteps(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def get_timesteps(self, p: Any, steps: int) -> torch.Tensor:
        return torch.clip(torch.arange(0, 1000, 1000 // steps) + 1, 0, 999)

    def sample_img2img(
        self, p: Any, x: Any, noise: Any, cond: Any, uncond: Any, steps: Any = None, image_conditioning: Any = None
    ) -> Any:
        """Noise as at the timestep after the last one that is sampled, as LDM's own script has it."""
        steps, t_enc = sd_samplers_common.setup_img2img_steps(p, steps)
        timesteps = self.get_timesteps(p, steps)
        alpha = self.model_wrap.inner_model.alphas_cumprod[timesteps[t_enc]]
        x_in = x * alpha.sqrt() + noise * (1 - alpha).sqrt()
        self.model_wrap_cfg.init_latent = x
        extra = self.initialize(p, x, cond, uncond, image_conditioning) | {"timesteps": timesteps[:t_enc]}
        return self.launch_sampling(
            t_enc + 1,
            lambda: self.func(
                self.model_wrap_cfg, x_in, extra_args=self.sampler_extra_args, disable=False, callback=None, **extra
            ),
        )

    def sample(self, p: Any, x: Any, cond: Any, uncond: Any, steps: Any = None, image_conditioning: Any = None) -> Any:
        steps = steps or p.steps
        extra = self.initialize(p, x, cond, uncond, image_conditioning) | {"timesteps": self.get_timesteps(p, steps)}
        return self.launch_sampling(
            steps,
            lambda: self.func(
                self.model_wrap_cfg, x, extra_args=self.sampler_extra_args, disable=False, callback=None, **extra
            ),
        )
