"""The order of a run: before_process, options, process, each batch (process_batch, conditions, sampling), postprocess,
and Forge's reset of `forge_objects` before every sampling. Images are the latents, not decoded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from . import prompt_parser, sd_samplers, shared
from .shared import opts, state

FIELDS: dict[str, Any] = {
    "prompt": "", "negative_prompt": "", "seed": -1, "styles": None, "override_settings": None, "hr_scale": 2.0,
    "sampler_name": "DPM++ 2M", "scheduler": "Automatic", "steps": 20,
    "cfg_scale": 7.0, "width": 64, "height": 64, "batch_size": 1, "n_iter": 1,
    "outpath_samples": None, "outpath_grids": None, "do_not_save_samples": False, "do_not_save_grid": False,
    "denoising_strength": 0.75, "hr_scheduler": None, "hr_sampler_name": None, "hr_negative_prompt": "",
    "hr_second_pass_steps": 0, "enable_hr": False, "hr_prompt": "",
    "s_churn": 0.0, "eta": None, "s_min_uncond": 0.0,
}  # fmt: skip


class StableDiffusionProcessing:
    def __init__(self, **fields: Any) -> None:
        self.mask: Any = None
        self.noise: Any = None
        """The test's: noise [B, 4, H, W] in place of the random one."""
        for name, value in (FIELDS | fields).items():
            setattr(self, name, value)
        self.styles = self.styles or []
        self.override_settings = self.override_settings or {}
        self.extra_generation_params: dict[str, Any] = {}
        self.comments: dict[str, int] = {}
        self.sampler: Any = None
        self.is_hr_pass, self.is_api, self.scripts_setup_complete = False, False, False
        self.scripts: Any = None
        self.script_args: Any = ()
        self.cached_uc, self.cached_c, self.extra_network_data = [None, None], [None, None], {}

    @property
    def sd_model(self) -> Any:
        return shared.sd_model

    def comment(self, text: str) -> None:
        self.comments[text] = 1

    def close(self) -> None:
        self.sampler = None

    def get_conds_with_caching(
        self, function: Any, prompts: Any, steps: int, caches: Any, network: Any, hires_steps: Any = None
    ) -> Any:
        key = (list(prompts), steps, hires_steps, str(network))  # the checkpoint, but not its text encoder
        for cache in caches:
            if cache[0] is not None and cache[0] == key:
                return cache[1]
        caches[0][1] = function(shared.sd_model, prompts, steps, hires_steps, False)
        caches[0][0] = key
        return caches[0][1]

    def setup_conds(self) -> None:
        negatives = prompt_parser.SdConditioning(self.negative_prompts, is_negative_prompt=True)
        skipped = shared.family == "forge" and self.cfg_scale == 1
        learned = prompt_parser.get_learned_conditioning
        self.uc = None if skipped else self.get_conds_with_caching(learned, negatives, self.steps, [self.cached_uc], {})
        multi = prompt_parser.get_multicond_learned_conditioning
        self.c = self.get_conds_with_caching(multi, self.prompts, self.steps, [self.cached_c], {})

    def reset_forge(self) -> None:
        if shared.family != "a1111":
            self.sd_model.forge_objects = SimpleNamespace(**vars(self.sd_model.forge_objects_after_applying_lora))

    def first_noise(self) -> torch.Tensor:
        if self.noise is not None:
            return self.noise
        shape = (4, self.height // 8, self.width // 8)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in self.seeds])

    def image_conditioning(self, x: torch.Tensor) -> torch.Tensor:
        return x.new_zeros(x.shape[0], 5, 1, 1)


class StableDiffusionProcessingTxt2Img(StableDiffusionProcessing):
    def init(self) -> None:
        if shared.family in ("forge", "reforge"):
            self.hr_cfg = getattr(self, "hr_cfg", 7.0)

    def sample(self) -> torch.Tensor:
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)
        x = self.first_noise()
        self.reset_forge()
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(self, x=x, noise=x, c=self.c, uc=self.uc)
        samples = self.sampler.sample(self, x, self.c, self.uc, image_conditioning=self.image_conditioning(x))
        return self.sample_hr_pass(samples) if self.enable_hr and not state.interrupted else samples

    def sample_hr_pass(self, samples: torch.Tensor) -> torch.Tensor:
        self.is_hr_pass = True
        self.sampler = sd_samplers.create_sampler(self.hr_sampler_name or self.sampler_name, self.sd_model)
        samples = torch.nn.functional.interpolate(samples, scale_factor=self.hr_scale)
        noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(self.seeds[0]))
        self.reset_forge()
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(self, x=samples, noise=noise, c=self.c, uc=self.uc)
        steps = self.hr_second_pass_steps or self.steps
        samples = self.sampler.sample_img2img(
            self, samples, noise, self.c, self.uc, steps=steps, image_conditioning=self.image_conditioning(samples)
        )
        self.is_hr_pass = False
        return samples


class StableDiffusionProcessingImg2Img(StableDiffusionProcessing):
    """init_latent and mask (1 where the picture is kept) are latents, given by the test."""

    init_latent: Any = None

    def init(self) -> None:
        self.extra_generation_params["Denoising strength"] = self.denoising_strength
        self.sampler = sd_samplers.create_sampler(self.sampler_name, self.sd_model)

    def sample(self) -> torch.Tensor:
        x = self.first_noise()
        self.reset_forge()
        if self.scripts is not None:
            self.scripts.process_before_every_sampling(self, x=self.init_latent, noise=x, c=self.c, uc=self.uc)
        image_cond = self.image_conditioning(x)
        return self.sampler.sample_img2img(self, self.init_latent, x, self.c, self.uc, image_conditioning=image_cond)


def create_infotext(p: Any) -> str:
    params = {
        "Steps": p.steps, "Sampler": p.sampler_name, "CFG scale": p.cfg_scale, "Seed": p.all_seeds[0],
        **p.extra_generation_params,
    }  # fmt: skip
    from .infotext_utils import quote

    line = ", ".join(f"{key}: {quote(value)}" for key, value in params.items() if value is not None)
    negative = f"\nNegative prompt: {p.negative_prompt}" if p.negative_prompt else ""
    return f"{p.prompt}{negative}\n{line}"


def process_images(p: Any) -> Any:
    if p.scripts is not None:
        p.scripts.before_process(p)
    stored = {key: opts.data[key] for key in p.override_settings if key in opts.data}
    try:
        opts.data.update(p.override_settings)
        return process_images_inner(p)
    finally:
        opts.data.update(stored)


def process_images_inner(p: Any) -> Any:
    count = p.batch_size * p.n_iter
    seed = int(p.seed) if int(p.seed) != -1 else 1234
    p.all_seeds = [seed + i for i in range(count)]
    if p.scripts is not None:
        p.scripts.process(p)
    images: list[Any] = []
    infotexts: list[str] = []
    with torch.no_grad():
        p.init()
        for n in range(p.n_iter):
            p.iteration = n
            if state.interrupted:
                break
            p.prompts, p.negative_prompts = [p.prompt] * p.batch_size, [p.negative_prompt] * p.batch_size
            p.hr_negative_prompts = [p.hr_negative_prompt or p.negative_prompt] * p.batch_size
            p.hr_extra_network_data = {}
            p.hr_upscale_to_x, p.hr_upscale_to_y = int(p.width * p.hr_scale), int(p.height * p.hr_scale)
            p.seeds = p.all_seeds[n * p.batch_size : (n + 1) * p.batch_size]
            if p.scripts is not None:
                p.scripts.process_batch(p, batch_number=n, prompts=p.prompts)
            p.setup_conds()
            samples = p.sample()
            if p.scripts is not None:
                p.scripts.postprocess_batch(p, images=samples, batch_number=n)
            images += list(samples)
            infotexts += [create_infotext(p)] * p.batch_size
    processed = SimpleNamespace(
        images=images, infotexts=infotexts or [create_infotext(p)], index_of_first_image=0, seed=p.all_seeds[0],
        info=infotexts[0] if infotexts else "", comments="".join(f"{text}\n" for text in p.comments),
    )  # fmt: skip
    if p.scripts is not None:
        p.scripts.postprocess(p, processed=processed)
    return processed
