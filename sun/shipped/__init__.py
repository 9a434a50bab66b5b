"""Where the models that come with the package are."""

from __future__ import annotations

from pathlib import Path

SHIPPED = "emoji"
"""What the shipped model, adapter, ControlNet and LoRA are called where a file is asked for."""

MODELS_DIR = Path(__file__).resolve().parents[1] / "models"
EMOJI_DIFFUSION = MODELS_DIR / "emoji-diffusion"
EMOJI_SUN = MODELS_DIR / "emoji-sun.safetensors"
EMOJI_CONTRAST = MODELS_DIR / "emoji-contrast"
EMOJI_CONTROLNET = MODELS_DIR / "emoji-controlnet" / "emoji-edges.safetensors"
EMOJI_INPAINTING = MODELS_DIR / "emoji-inpainting" / "emoji-inpainting.safetensors"
EMOJI_LORA = MODELS_DIR / "emoji-lora" / "emoji-google-style.safetensors"
EMOJI_GUIDANCE = 1.5  # the scale at which most of its pictures are right: see its card
USUAL_GUIDANCE = 7.5  # of Stable Diffusion, as diffusers has it
EMOJI_COMPACT = MODELS_DIR / "emoji-compact"
SINGLE_FILE_CONFIG = MODELS_DIR / "stable-diffusion-v1"


def adapter_file(name: str | Path) -> Path:
    """The file that is meant where an adapter is asked for: the shipped one by its name, else ``name`` itself."""
    return EMOJI_SUN if str(name) == SHIPPED else Path(name)


def guidance_of(model: str) -> float:
    """The guidance scale to draw with where nobody names one: the shipped model's own, else Stable Diffusion's."""
    return EMOJI_GUIDANCE if model == SHIPPED else USUAL_GUIDANCE
