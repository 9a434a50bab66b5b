"""The nodes for graphs with a sampler of their own, and the one that tells what an adapter is."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sun.schedule import DenoiseMode
from . import loading, sampling
from .nodes import CATEGORY, SunAdapterIO, denoise_mode_input


class SunScheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_Scheduler",
            display_name="SUN Scheduler",
            category=CATEGORY,
            description=(
                "The sigmas SUN is trained for, exact for every number of steps, for SamplerCustom and "
                "SamplerCustomAdvanced with euler, ddim or dpmpp_2m."
            ),
            inputs=[
                io.Model.Input("model", tooltip="The model that is sampled: its noise schedule decides the sigmas."),
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


class SunAdapterInfo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_AdapterInfo",
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
