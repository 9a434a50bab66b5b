"""The nodes most graphs need: what one sees in ComfyUI, and one call each. The work is in other modules and sun/."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sun.schedule import DenoiseMode
from . import folders, loading, patch, sampling

SunAdapterIO = io.Custom("SUN_ADAPTER")
CATEGORY = "SUN"


def effect_inputs() -> list[io.Input]:
    """start_percent and end_percent of SUN's effect, as ComfyUI's own nodes count them."""
    limits = {"min": 0.0, "max": 1.0, "step": 0.001, "optional": True}
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


def denoise_mode_input(optional: bool) -> io.Input:
    return io.Combo.Input(
        "denoise_mode",
        options=["trained", "respaced"],
        default="trained",
        optional=optional,
        tooltip=(
            "What a denoise below 1 does. trained: keeps the trained timesteps and leaves out the first ones (fewer "
            "steps). respaced: always runs all steps, spread over what is left, as KSampler does."
        ),
    )


class LoadSunAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_LoadAdapter",
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
        try:
            folders.find(adapter_name)
        except FileNotFoundError as error:
            return str(error)
        return True

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
        cls, model: Any, adapter: loading.LoadedAdapter, strength: float, negative: Any = None,
        start_percent: float = 0.0, end_percent: float = 1.0, guidance: float = 0.0,
    ) -> io.NodeOutput:  # fmt: skip
        effect = (start_percent, end_percent)
        return io.NodeOutput(patch.apply(model, adapter, strength, negative, effect, guidance or None))


class SunSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_Sampler",
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
                io.Int.Input(
                    "steps",
                    default=4,
                    min=1,
                    max=50,
                    tooltip="U-Net calls. SUN is trained for 4; 1 to 12 work, more than 8 seldom help.",
                ),
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
                io.Combo.Input(
                    "final_step",
                    options=["host", "diffusers"],
                    default="host",
                    optional=True,
                    tooltip=(
                        "host: the last step ends without any noise, as every sampler of ComfyUI does. diffusers: it "
                        "ends where diffusers' DDIM does with Stable Diffusion 1.5's settings, to compare numbers."
                    ),
                ),
                *effect_inputs(),
            ],
            outputs=[io.Latent.Output("samples", display_name="latent", tooltip="The result, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: dict, seed: int, steps: int, denoise: float,
        denoise_mode: DenoiseMode = "trained", final_step: sampling.FinalStep = "host", start_percent: float = 0.0,
        end_percent: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        samples, line = sampling.sample(
            model, positive, negative, latent, seed, steps, denoise, denoise_mode, final_step,
            (start_percent, end_percent),
        )  # fmt: skip
        return io.NodeOutput(samples, ui={"text": [line]})
