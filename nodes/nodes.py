"""The nodes: what one sees in ComfyUI, and one call each. The work is in the modules beside this one and in sun/."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from comfy_api.latest import io

from ..sun.inheritance import PRESETS, InheritanceError, parse_plan
from ..sun.ltc import LtcSettings
from ..sun.ltc.keep import AGAIN, AUTOMATIC, unused
from ..sun.ltc.presets import BALANCED, PAPER
from ..sun.ltc.presets import NAMES as LTC_NAMES
from ..sun.ltc.presets import PRESETS as LTC_PRESETS
from ..sun.ltc.presets import preset as ltc_preset
from ..sun.ltc.presets import tooltip as presets_tooltip
from ..sun.schedule import DenoiseMode
from ..sun.shipped import EMOJI_COMPACT, EMOJI_CONTROLNET, EMOJI_DIFFUSION, EMOJI_INPAINTING
from ..sun.switching import ORDERS, SMALL_FIRST, Switching
from . import (
    controlnet_prompt,
    emoji_model,
    experts_patch,
    folders,
    inheritance_patch,
    loading,
    ltc_patch,
    sampling,
    sun_patch,
    switching_patch,
)

SunAdapterIO = io.Custom("SUN_ADAPTER")
CATEGORY = "SUN"
EXPERTS = "file of experts"
VARIANTS = {"base": None, "inpainting": EMOJI_INPAINTING, "compact": EMOJI_COMPACT}
# What people type who look for a node of this kind without knowing its name.
SPEED = ["SpeedUpNet", "speedup", "speed up", "accelerate", "faster", "few step", "4 steps", "LCM", "turbo", "加速"]
SKIPPING = ["cache", "caching", "speedup", "speed up", "accelerate", "faster", "skip steps", "加速", "缓存"]
NEGATIVE = ["negative prompt", "negative embedding", "CFG 1", "NAG", "负面提示词"]


def known(kind: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that this ComfyUI's `kind` takes: 0.3.75 has no search aliases and no advanced inputs."""
    taken = inspect.signature(kind).parameters
    return {name: value for name, value in options.items() if name in taken}


def effect_inputs() -> list[io.Input]:
    """start_percent and end_percent of SUN's effect, as ComfyUI's own nodes count them."""
    limits = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": True, **known(io.Float.Input, advanced=True)}
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            tooltip="Where SUN's effect begins, from pure noise (0) to the finished picture (1).",
            **limits,
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            tooltip=(
                "Where SUN's effect ends. The steps after it run the plain model without guidance; "
                "4 steps begin at 0, 0.25, 0.5 and 0.75."
            ),
            **limits,
        ),
    ]


def steps_input() -> io.Input:
    return io.Int.Input(
        "steps",
        default=4,
        min=1,
        max=50,
        tooltip="U-Net calls. SUN is trained for 4; 1 and 2 are rough, 8 are a little nearer, more seldom help.",
    )


def denoise_mode_input(optional: bool) -> io.Input:
    return io.Combo.Input(
        "denoise_mode",
        **known(io.Combo.Input, advanced=True),
        options=["trained", "respaced"],
        default="trained",
        optional=optional,
        tooltip=(
            "What a denoise below 1 does. trained: keeps the trained timesteps and leaves out the first ones (fewer "
            "steps). respaced: always runs all steps, spread over what is left, as KSampler does."
        ),
    )


def final_step_input() -> io.Input:
    return io.Combo.Input(
        "final_step",
        **known(io.Combo.Input, advanced=True),
        options=["host", "diffusers"],
        default="host",
        optional=True,
        tooltip=(
            "host: the last step ends without any noise, as every sampler of ComfyUI does. diffusers: it "
            "ends where diffusers' DDIM does with Stable Diffusion 1.5's settings, to compare numbers."
        ),
    )


def paper_inputs() -> list[io.Input]:
    """What LTC-Accel's preset paper, the published method, takes besides."""
    return [
        io.Float.Input(
            "tau",
            default=0.1,
            min=0.0,
            max=1.6,
            step=0.01,
            optional=True,
            **known(io.Float.Input, advanced=True),
            tooltip=(
                "For paper: steps are skipped where the course turns by less than this, in radians: more skips "
                "more. 0 skips by position alone, in the last three quarters."
            ),
        ),
        io.Int.Input(
            "every",
            default=2,
            min=2,
            max=10,
            optional=True,
            **known(io.Int.Input, advanced=True),
            tooltip="For paper: one step of this many is skipped there.",
        ),
        io.Combo.Input(
            "calibration",
            options=[AUTOMATIC, AGAIN],
            default=AUTOMATIC,
            optional=True,
            **known(io.Combo.Input, advanced=True),
            tooltip=(
                "For paper. automatic: the first run with a model, sampler, scheduler, steps and cfg measures "
                "at full cost and gives the usual picture; later runs are fast. measure again: forget what "
                "was measured before."
            ),
        ),
    ]


class LoadSunAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_LoadAdapter",
            **known(io.Schema, search_aliases=[*SPEED, "negative prompt", "SUN adapter", "LCM LoRA", "distillation"]),
            display_name="Load SUN Adapter",
            category=CATEGORY,
            description=(
                "Loads a SUN adapter: 4-step sampling with a negative prompt, on any Stable Diffusion 1.x model the "
                "adapter was made for. Files go into models/sun."
            ),
            inputs=[
                io.Combo.Input(
                    "adapter_name",
                    options=folders.names(),
                    default=folders.SHIPPED,
                    tooltip=(
                        "A file of models/sun (or of the `sun:` folders in extra_model_paths.yaml). "
                        "The shipped one belongs to Load Emoji Diffusion; "
                        "SD 1.5 models need the authors' sun_adapter_sdv15_4step_addpos.safetensors."
                    ),
                )
            ],
            outputs=[SunAdapterIO.Output("adapter", display_name="adapter", tooltip="For Apply SUN to Model.")],
        )

    @classmethod
    def validate_inputs(cls, adapter_name: str) -> bool | str:
        return folders.check(adapter_name)

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> str:
        return folders.fingerprint(folders.find(adapter_name))

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        return io.NodeOutput(loading.load_adapter(folders.find(adapter_name), adapter_name))


class ApplySun(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_Apply",
            **known(io.Schema, search_aliases=[*SPEED, *NEGATIVE, "LCM LoRA", "Lightning", "Hyper-SD", "distillation"]),
            display_name="Apply SUN to Model",
            category=CATEGORY,
            description=(
                "Makes the model sample in 4 steps with SUN. Works with LoRA, ControlNet and IP-Adapter in any order. "
                "Sample with SUN 4-step Sampler, or with KSampler: 4 steps, cfg 1.0, ddim or euler, simple."
            ),
            inputs=[
                io.Model.Input("model", tooltip="A Stable Diffusion 1.x model with the widths of the adapter's base."),
                SunAdapterIO.Input("adapter", tooltip="From Load SUN Adapter."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=2.0,
                    step=0.01,
                    tooltip="1 is the trained adapter; 0 is the plain model without guidance; between, less of it.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip=(
                        "What the picture should not show. Leave it open to take the sampler's negative prompt; "
                        "connect it for guiders that have none (BasicGuider), or to override the sampler's."
                    ),
                ),
                *effect_inputs(),
                io.Float.Input(
                    "guidance",
                    **known(io.Float.Input, advanced=True),
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    optional=True,
                    tooltip=(
                        "The cfg scale whose effect SUN reproduces, at one call a step; 0 is the adapter's own "
                        "scale. Only for adapters that take it: SUN Adapter Info shows which."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("sun_model", display_name="model", tooltip="The model with SUN, for any sampler.")
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        adapter: loading.LoadedAdapter,
        strength: float,
        negative: Any = None,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        guidance: float = 0.0,
    ) -> io.NodeOutput:
        effect = (start_percent, end_percent)

        def put_on(one: Any) -> Any:
            return sun_patch.apply(one, adapter, strength, negative, effect, guidance or None)

        return io.NodeOutput(switching_patch.on_each(model, put_on))


class SunSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_Sampler",
            **known(io.Schema, search_aliases=[*SPEED, *NEGATIVE, "KSampler", "fast sampler", "trailing"]),
            display_name="SUN 4-step Sampler",
            category=CATEGORY,
            description=(
                "Samples with SUN on exactly the timesteps it was trained for: one U-Net call a step, cfg fixed at 1, "
                "nothing to set wrong. Needs a model from Apply SUN to Model."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Apply SUN to Model."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What it should not show; it acts through the adapter and costs no extra U-Net call.",
                ),
                io.Latent.Input(
                    "latent", tooltip="An empty latent, or an encoded picture for image to image and inpainting."
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The noise to start from. The same seed gives the same picture.",
                ),
                steps_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Image to image: how much is painted anew. The first of the trained timesteps are left out, "
                        "so 4 steps at 0.5 are the last 2 of the 4. Below 1 / steps (0.25 for 4) nothing is painted."
                    ),
                ),
                denoise_mode_input(optional=True),
                final_step_input(),
                *effect_inputs(),
            ],
            outputs=[io.Latent.Output("samples", display_name="latent", tooltip="The result, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        negative: Any,
        latent: dict,
        seed: int,
        steps: int,
        denoise: float,
        denoise_mode: DenoiseMode = "trained",
        final_step: sampling.FinalStep = "host",
        start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:
        samples, line = sampling.sample(
            model,
            positive,
            negative,
            latent,
            seed,
            steps,
            denoise,
            denoise_mode,
            final_step,
            (start_percent, end_percent),
        )
        return io.NodeOutput(samples, ui={"text": [line]})


# ----------------------------------------------------------------------------------------------------- custom sampling


class SunScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_Scheduler",
            **known(
                io.Schema,
                search_aliases=["trailing", "sigmas", "timesteps", "timestep spacing", "LCM scheduler", "4 steps"],
            ),
            display_name="SUN Scheduler",
            category=CATEGORY,
            description=(
                "The sigmas SUN is trained for, exact for every number of steps, for SamplerCustom and "
                "SamplerCustomAdvanced with euler, ddim or dpmpp_2m."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled: its noise schedule decides the sigmas."),
                steps_input(),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Image to image: how much is painted anew; 1 starts from pure noise.",
                ),
                denoise_mode_input(optional=False),
            ],
            outputs=[
                io.Sigmas.Output("sigmas", display_name="sigmas", tooltip="For the sigmas input of a custom sampler.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, denoise: float, denoise_mode: DenoiseMode) -> io.NodeOutput:
        return io.NodeOutput(sampling.trained_sigmas(model, steps, denoise, denoise_mode))


class SunGuider(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_Guider",
            **known(io.Schema, search_aliases=[*NEGATIVE, "CFG guider", "BasicGuider"]),
            display_name="SUN Guider",
            category=CATEGORY,
            description=(
                "Both prompts for SamplerCustomAdvanced at cfg 1: the negative one acts through the adapter, so each "
                "step is one U-Net call."
            ),
            inputs=[
                io.Model.Input("model", tooltip="From Apply SUN to Model."),
                io.Conditioning.Input("positive", tooltip="What the picture should show."),
                io.Conditioning.Input(
                    "negative",
                    tooltip="What it should not show. A negative connected to Apply SUN to Model goes before it.",
                ),
            ],
            outputs=[
                io.Guider.Output("guider", display_name="guider", tooltip="For the guider of SamplerCustomAdvanced.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, positive: Any, negative: Any) -> io.NodeOutput:
        return io.NodeOutput(sampling.Guider(model, positive, negative))


class ControlNetReadsBoth(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_ControlNetReadsBoth",
            **known(io.Schema, search_aliases=[*NEGATIVE, "ControlNet prompt", "authors' ControlNet"]),
            display_name="ControlNet Reads Both Prompts",
            category=CATEGORY,
            description=(
                "Gives the ControlNets of a positive prompt the negative one's words to read as well, as the authors "
                "of SUN did. Without it they read the positive prompt alone, which is the default everywhere."
            ),
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the picture should show, before or after ControlNet."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
            ],
            outputs=[
                io.Conditioning.Output(
                    "controlled", display_name="positive", tooltip="For the positive input of the sampler."
                )
            ],
        )

    @classmethod
    def execute(cls, positive: Any, negative: Any) -> io.NodeOutput:
        return io.NodeOutput(controlnet_prompt.read_both(positive, negative))


class SunAdapterInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_AdapterInfo",
            **known(io.Schema, search_aliases=["inspect", "metadata", "hash", "SpeedUpNet"]),
            display_name="SUN Adapter Info",
            category=CATEGORY,
            description=(
                "Tells what an adapter is: the base model it belongs to, its branches and size, what it was trained "
                "for, and the hash of its file."
            ),
            inputs=[SunAdapterIO.Input("adapter", tooltip="From Load SUN Adapter.")],
            outputs=[
                io.String.Output("text", display_name="text", tooltip="A few lines to read, also shown in the node."),
                io.String.Output(
                    "json", display_name="json", tooltip="The same for programs; null stands for what is not recorded."
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: loading.LoadedAdapter) -> io.NodeOutput:
        text, facts = loading.describe(adapter)
        return io.NodeOutput(text, facts, ui={"text": [text]})


# -------------------------------------------------------------------------------------------------------- accelerators


class ApplyLtcAccel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_ApplyLtcAccel",
            **known(io.Schema, search_aliases=[*SKIPPING, "EasyCache", "LazyCache", "TeaCache", "LTC", "Spectrum"]),
            display_name="Apply LTC-Accel",
            category=CATEGORY,
            description=(
                "Skips sampling steps by carrying on what the model said in the steps before, from the first picture "
                "on. For any model and sampler; nothing is trained or measured beforehand."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Any model: SD 1.5, SDXL, SD 3, Flux, video; with or without SUN."),
                io.Combo.Input(
                    "preset", options=list(LTC_NAMES), default=BALANCED, optional=True, tooltip=presets_tooltip()
                ),
                io.Float.Input(
                    "warm_up",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "The share of the steps, at the start, that always run. -1 is the preset's: "
                        + ", ".join(f"{name} {settings.first:g}" for name, settings in LTC_PRESETS.items())
                        + ". Not for paper."
                    ),
                ),
                io.Int.Input(
                    "tail",
                    default=-1,
                    min=-1,
                    max=100,
                    optional=True,
                    tooltip=(
                        "How many steps at the end always run. -1 is the preset's: "
                        + ", ".join(f"{name} {settings.last}" for name, settings in LTC_PRESETS.items())
                        + ". Not for paper."
                    ),
                ),
                *paper_inputs(),
            ],
            outputs=[io.Model.Output("ltc_model", display_name="model", tooltip="The model, for any sampler.")],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        preset: str = PAPER,  # a workflow from before there were presets names none, and means this one
        warm_up: float = -1.0,
        tail: int = -1,
        tau: float = 0.1,
        every: int = 2,
        calibration: str = AUTOMATIC,
    ) -> io.NodeOutput:
        if preset == PAPER:
            if warm_up >= 0 or tail >= 0:
                raise ValueError(f"LTC-Accel's preset {PAPER} has no warm_up and no tail: set both to -1.")
            return io.NodeOutput(ltc_patch.apply(model, LtcSettings(tau=tau, every=every), calibration))
        chosen = {"first": warm_up, "last": tail}
        settings = ltc_preset(preset, **{name: value for name, value in chosen.items() if value >= 0})
        without_effect = unused(preset, tau=tau, every=every, calibration=calibration)
        return io.NodeOutput(ltc_patch.apply(model, settings, unused=without_effect))


class ApplyFeatureInheritance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_ApplyFeatureInheritance",
            **known(io.Schema, search_aliases=[*SKIPPING, "DeepCache", "A-SDM", "feature reuse", "FBCache"]),
            display_name="Apply Feature Inheritance",
            category=CATEGORY,
            description=(
                "Leaves out the inner parts of the U-Net in some steps and takes their output of an earlier step; "
                "nothing is trained. For Stable Diffusion 1.x, 2.x and SDXL, with any sampler."
            ),
            inputs=[
                io.Model.Input("model", tooltip="Stable Diffusion 1.x, 2.x or SDXL, with or without SUN."),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    default="balanced",
                    tooltip="fine stays nearest to the original, fast saves most.",
                ),
                io.String.Input(
                    "plan",
                    **known(io.String.Input, advanced=True),
                    default="",
                    optional=True,
                    tooltip=(
                        "For experts, instead of the preset: stages=1 every=3, or outer=2 mode=dense-early, or "
                        "layers=up.3.0,up.3.1 keys=0,2,5. The help page lists the words."
                    ),
                ),
            ],
            outputs=[io.Model.Output("inheriting_model", display_name="model", tooltip="The model, for any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, preset: str, plan: str = "") -> bool | str:
        try:
            parse_plan(plan.strip() or preset)
        except InheritanceError as error:
            return str(error)
        return True

    @classmethod
    def execute(cls, model: Any, preset: str, plan: str = "") -> io.NodeOutput:
        parsed = parse_plan(plan.strip() or preset)
        return io.NodeOutput(switching_patch.on_each(model, lambda one: inheritance_patch.apply(one, parsed)))


class SwitchUNets(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_SwitchUNets",
            **known(
                io.Schema,
                search_aliases=[*SPEED, "T-Stitch", "A-SDM", "model switch", "refiner", "BK-SDM", "SSD-1B", "切换"],
            ),
            display_name="Switch U-Nets by Step",
            category=CATEGORY,
            description=(
                "Two models take turns in one run of any sampler: a small, fast one makes a share of the steps, the "
                "large one the rest. For models of the same latents and prompts, as SDXL and SSD-1B."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The large model: the one the picture should look like."),
                io.Model.Input(
                    "small_model",
                    tooltip=(
                        "A compact model of the same family: an assembled U-Net, BK-SDM for Stable Diffusion 1.x, "
                        "SSD-1B for SDXL. LoRA, IP-Adapter and the like act on the model they were put on."
                    ),
                ),
                io.Float.Input(
                    "share",
                    default=0.4,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the steps that the small model makes: 0 is the large one alone, 1 the small.",
                ),
                io.Combo.Input(
                    "order",
                    options=list(ORDERS),
                    default=SMALL_FIRST,
                    tooltip="Which of the two begins. The first steps decide what is where, the last ones the details.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    "switching_model", display_name="model", tooltip="Both in one, for any sampler and for LTC-Accel."
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, small_model: Any, share: float, order: str) -> io.NodeOutput:
        return io.NodeOutput(switching_patch.apply(model, small_model, Switching(share, order)))


class ApplyExperts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_ApplyExperts",
            **known(io.Schema, search_aliases=["A-SDM", "ME-CondConv", "mixture of experts", "compact", "专家"]),
            display_name="Apply Experts to Compact U-Net",
            category=CATEGORY,
            is_experimental=True,
            description=(
                "Experimental. Lets a compact U-Net mix several kernels in some of its convolutions, for each picture "
                "and step anew. Experts are trained with a compact U-Net and fit no other."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The compact model that these experts were trained with."),
                io.Combo.Input(
                    "experts",
                    options=folders.experts(),
                    tooltip=(
                        "NAME.experts.safetensors or experts.safetensors in models/sun, as sun train-compact and sun "
                        "assemble write them."
                    ),
                ),
            ],
            outputs=[io.Model.Output("mixing_model", display_name="model", tooltip="For any sampler.")],
        )

    @classmethod
    def validate_inputs(cls, experts: str) -> bool | str:
        return folders.check(experts, EXPERTS)

    @classmethod
    def fingerprint_inputs(cls, experts: str, **_: Any) -> str:
        return folders.fingerprint(folders.find(experts, EXPERTS))

    @classmethod
    def execute(cls, model: Any, experts: str) -> io.NodeOutput:
        return io.NodeOutput(experts_patch.apply(model, folders.find(experts, EXPERTS)))


# ----------------------------------------------------------------------------------------------------- Emoji Diffusion


class LoadEmojiDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_LoadEmojiDiffusion",
            **known(io.Schema, search_aliases=["tiny model", "small checkpoint", "test model", "example"]),
            display_name="Load Emoji Diffusion",
            category=CATEGORY,
            description=(
                "The small Stable Diffusion shipped with SUN: emoji at 128 x 128 pixels, nothing to download. "
                'It knows prompts such as "large polar bear, yellow background".'
            ),
            inputs=[
                io.Combo.Input(
                    "variant",
                    options=list(VARIANTS),
                    default="base",
                    optional=True,
                    tooltip=(
                        "base draws from a prompt; it also does image to image and masks. inpainting is its 9-channel "
                        "model, which looks at the picture around the mask: use it with InpaintModelConditioning. "
                        "compact has a smaller, faster U-Net, assembled from the base's layers."
                    ),
                )
            ],
            outputs=[
                io.Model.Output("model", display_name="model", tooltip="The U-Net. 128 x 128 pixels is its size."),
                io.Clip.Output("clip", display_name="clip", tooltip="The text encoder; works with CLIP Text Encode."),
                io.Vae.Output(
                    "vae", display_name="vae", tooltip="A tiny autoencoder; works with VAE Decode and VAE Encode."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, variant: str = "base") -> str:
        changes = VARIANTS[variant]
        # a file's neighbours, or the folder itself
        other = changes.parent if changes is not None and changes.suffix else changes
        return ";".join(emoji_model.fingerprint(folder) for folder in (EMOJI_DIFFUSION, other) if folder)

    @classmethod
    def execute(cls, variant: str = "base") -> io.NodeOutput:
        if variant == "compact":
            return io.NodeOutput(*emoji_model.load(EMOJI_DIFFUSION, compact=VARIANTS[variant]))
        return io.NodeOutput(*emoji_model.load(EMOJI_DIFFUSION, VARIANTS[variant]))


class LoadEmojiControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_LoadEmojiControlNet",
            **known(io.Schema, search_aliases=["edges", "canny", "tiny ControlNet"]),
            display_name="Load Emoji ControlNet",
            category=CATEGORY,
            description=(
                "The edge ControlNet of Emoji Diffusion: what is drawn follows the edges of another picture. "
                "Connect it to Apply ControlNet."
            ),
            inputs=[
                io.Boolean.Input(
                    "find_edges",
                    default=True,
                    tooltip=(
                        "On: connect any picture to Apply ControlNet, its edges are found here. "
                        "Off: the picture shows white edges on black already."
                    ),
                )
            ],
            outputs=[
                io.ControlNet.Output(
                    "control_net",
                    display_name="control_net",
                    tooltip="For Apply ControlNet; strength and start and end are set there.",
                )
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, find_edges: bool) -> str:
        return emoji_model.fingerprint(EMOJI_CONTROLNET.parent)

    @classmethod
    def execute(cls, find_edges: bool) -> io.NodeOutput:
        control_net: Any = emoji_model.load_controlnet(EMOJI_CONTROLNET, find_edges)
        return io.NodeOutput(control_net)
