"""The nodes of SUN: what one sees in ComfyUI, and one call each. The work is in patch.py, sampling.py and sun/."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from . import folders, patch, sampling

SunAdapterIO = io.Custom("SUN_ADAPTER")
CATEGORY = "SUN"


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
        return io.NodeOutput(patch.load_adapter(folders.find(adapter_name), adapter_name))


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
            ],
            outputs=[
                io.Model.Output("sun_model", display_name="model", tooltip="The model with SUN, for any sampler.")
            ],
        )

    @classmethod
    def execute(cls, model: Any, adapter: patch.LoadedAdapter, strength: float, negative: Any = None) -> io.NodeOutput:
        return io.NodeOutput(patch.apply(model, adapter, strength, negative))


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
                    tooltip="U-Net calls. SUN is trained for 4; up to 8 add detail, more seldom helps.",
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
            ],
            outputs=[io.Latent.Output("samples", display_name="latent", tooltip="The result, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: dict, seed: int, steps: int, denoise: float
    ) -> io.NodeOutput:
        return io.NodeOutput(sampling.sample(model, positive, negative, latent, seed, steps, denoise))
