"""``sun train-peer``: the trained methods SUN is measured against."""

from __future__ import annotations

from typing import Annotated

import typer

from .app import app
from .options import ConfigFile, Minutes, Output, Resume, Settings, Steps
from .show import out
from .training import _configured

peer_app = typer.Typer(no_args_is_help=True, help="Train the methods SUN is measured against.")
app.add_typer(peer_app, name="train-peer")

BaseModel = Annotated[str | None, typer.Option("--model", help="Diffusers folder. (emoji: the shipped one)")]
Data = Annotated[str | None, typer.Option(help="emoji:STYLE, folder of pictures and captions, or webdataset shards.")]


@peer_app.command(
    "lcm-lora",
    epilog="""Example:

sun train-peer lcm-lora --config configs/peers-lcm-lora.toml --model my-model --data emoji:noto --output runs/lcm""",
)
def lcm_lora(
    config: ConfigFile = None,
    model: BaseModel = None,
    data: Data = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train an LCM-LoRA: latent consistency distillation; it takes no negative prompt."""
    from ..peers.lcm_lora import LcmLoraConfig, train_lcm_lora

    given = {"model": model, "data": data}
    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    done = train_lcm_lora(_configured(LcmLoraConfig(), config, given, run, settings))
    out.print(f"LoRA: {done / 'pytorch_lora_weights.safetensors'}", soft_wrap=True)


@peer_app.command(
    "guided-distill",
    epilog="""Example:

sun train-peer guided-distill --config configs/peers-guided-distill.toml --model my-model --data emoji:noto""",
)
def guided_distill(
    config: ConfigFile = None,
    model: BaseModel = None,
    data: Data = None,
    output: Output = None,
    steps: Steps = None,
    minutes: Minutes = None,
    resume: Resume = None,
    settings: Settings = None,
) -> None:
    """Train the full U-Net on SUN's stage targets; to be done again for every model."""
    from ..peers.guided_distillation import GuidedDistillConfig, train_guided_distillation

    given = {"model": model, "data": data}
    run = {"output": output, "steps": steps, "minutes": minutes, "resume": resume}
    done = train_guided_distillation(_configured(GuidedDistillConfig(), config, given, run, settings))
    out.print(f"U-Net: {done / 'unet'}", soft_wrap=True)
