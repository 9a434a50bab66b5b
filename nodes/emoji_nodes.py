"""The nodes of Emoji Diffusion, the small model that comes with the pack. The work is in emoji.py and sun/."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..sun.shipped import EMOJI_CONTROLNET, EMOJI_DIFFUSION, EMOJI_INPAINTING
from . import emoji

CATEGORY = "SUN"
VARIANTS = {"base": None, "inpainting": EMOJI_INPAINTING}


class LoadEmojiDiffusion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_LoadEmojiDiffusion",
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
                        "model, which looks at the picture around the mask: use it with InpaintModelConditioning."
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
        prints = [emoji.fingerprint(folder) for folder in (EMOJI_DIFFUSION, changes and changes.parent) if folder]
        return ";".join(prints)

    @classmethod
    def execute(cls, variant: str = "base") -> io.NodeOutput:
        return io.NodeOutput(*emoji.load(EMOJI_DIFFUSION, VARIANTS[variant]))


class LoadEmojiControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SUN_LoadEmojiControlNet",
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
        return emoji.fingerprint(EMOJI_CONTROLNET.parent)

    @classmethod
    def execute(cls, find_edges: bool) -> io.NodeOutput:
        control_net: Any = emoji.load_controlnet(EMOJI_CONTROLNET, find_edges)
        return io.NodeOutput(control_net)
