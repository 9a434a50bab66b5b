"""Whether two U-Nets can take turns on the same latents, and which of a ControlNet's residuals the small one takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .plan import SwitchingError

if TYPE_CHECKING:
    from torch import nn

SAME_UNET = "Switching: both U-Nets are the same one, so nothing becomes faster. Choose a smaller one as the second."
SWAPPED = (
    "Switching: the U-Net given as the small one is the larger of the two ({small:.1f} against {large:.1f} million "
    "parameters). If that is a mistake, exchange them."
)


@dataclass(frozen=True)
class Traits:
    """What two U-Nets must have in common. What is not known is None, or an empty prediction, and not compared.

    latents, output: channels in and out. text: width of the text states. vector: of SDXL's size and pooled text.
    time_embedding: width of the guidance embedding of distilled models. prediction: diffusers' names. sigmas: the
    least and the greatest noise level of the schedule. space: a name of the latent space.
    """

    latents: int | None = None
    output: int | None = None
    text: int | None = None
    vector: int | None = None
    time_embedding: int | None = None
    prediction: str = ""
    sigmas: tuple[float, float] | None = None
    space: str = ""


_WORDS = {
    "latents": ("takes latents of {} channels", "Take two models of the same latent space and kind (no inpainting)."),
    "output": ("predicts {} channels", "Take two models of the same latent space."),
    "text": ("takes texts {} wide", "Take two models with the same text encoder."),
    "vector": ("takes size and pooled text as {} numbers", "Take two models of the same family, as SDXL and SSD-1B."),
    "time_embedding": ("takes a guidance embedding of {} numbers", "Take two models distilled alike, or none."),
}
_PREDICTIONS = {"epsilon": "the noise (epsilon)", "v_prediction": "v", "sample": "the picture"}


def check_pair(large: Traits, small: Traits) -> None:
    """Raises SwitchingError, naming both sides, unless the two U-Nets can take turns."""
    for name, (words, mend) in _WORDS.items():
        ours, theirs = getattr(large, name), getattr(small, name)
        if (ours or None) != (theirs or None) and (name in ("vector", "time_embedding") or None not in (ours, theirs)):
            raise SwitchingError(
                f"Switching needs two U-Nets that go on with each other's latents: the small one "
                f"{words.format(theirs or 0)}, the large one {ours or 0}. {mend}"
            )
    if large.space and small.space and large.space != small.space:
        raise SwitchingError(
            f"Switching needs two U-Nets of one latent space: the small one works on latents of {small.space}, the "
            f"large one on those of {large.space}. Take two models of the same family, as SDXL and SSD-1B."
        )
    if large.prediction and small.prediction and large.prediction != small.prediction:
        ours, theirs = (_PREDICTIONS.get(t.prediction, t.prediction) for t in (large, small))
        raise SwitchingError(
            f"Switching needs two U-Nets that predict the same: the small one predicts {theirs}, the large one {ours}. "
            "Take a small U-Net made from a model of the same kind."
        )
    if large.sigmas and small.sigmas and any(_apart(a, b) for a, b in zip(large.sigmas, small.sigmas, strict=True)):
        ours, theirs = (f"{t.sigmas[0]:.3g} to {t.sigmas[1]:.4g}" for t in (large, small) if t.sigmas)
        raise SwitchingError(
            f"Switching needs one noise schedule: the small U-Net's goes from sigma {theirs}, the large one's from "
            f"{ours}. Take models of the same schedule (zero terminal SNR with both or neither)."
        )


def _apart(a: float, b: float) -> bool:
    return abs(a - b) > 0.01 * max(abs(a), abs(b))


def what_to_say(large: nn.Module, small: nn.Module) -> str:
    """A sentence where the two are one, or the wrong way round; else nothing."""
    if large is small:
        return SAME_UNET
    sizes = [sum(p.numel() for p in unet.parameters()) / 1e6 for unet in (large, small)]
    return SWAPPED.format(large=sizes[0], small=sizes[1]) if sizes[1] > 1.01 * sizes[0] else ""


# ----------------------------------------------------------------------------------------------------- ControlNet


def layers_a_stage(unet: Any) -> tuple[int, ...]:
    """Layers of each stage on the way down, of a diffusers ``UNet2DConditionModel`` or a U-Net in LDM layout."""
    if hasattr(unet, "down_blocks"):
        return tuple(len(stage.resnets) for stage in unet.down_blocks)
    return tuple(map(len, ldm_stages(unet.input_blocks)))


def ldm_stages(blocks: Iterable[Any]) -> list[list[int]]:
    """Positions of the layers of each stage among the ``input_blocks`` of a U-Net in LDM layout.

    The first block is a convolution, and a downsampler ends a stage.
    """
    stages: list[list[int]] = [[]]
    for i, block in enumerate(blocks):
        if i and hasattr(next(iter(block)), "in_layers"):
            stages[-1].append(i)
        elif i:
            stages.append([])
    return stages


def residuals_for(large: Sequence[int], small: Sequence[int]) -> list[int]:
    """Which residuals of a ControlNet made for the large U-Net belong to the skip connections of the small one.

    large, small: ``layers_a_stage``. A skip connection leaves the first convolution, every layer, and the downsampler
    of every stage but the last; a layer of the small U-Net is the one of the same number in the same stage. Raises
    SwitchingError where the small U-Net has a layer that the large one has not.
    """
    if len(small) > len(large) or any(s > n for s, n in zip(small, large, strict=False)):
        raise SwitchingError(
            f"This ControlNet is made for a U-Net with {' + '.join(map(str, large))} layers, and the U-Net that runs "
            f"now has {' + '.join(map(str, small))}. Leave the ControlNet out, or exchange the two U-Nets."
        )
    chosen, begin = [0], 1
    for stage, (wanted, there) in enumerate(zip(small, large, strict=False)):
        chosen += range(begin, begin + wanted)
        begin += there
        if stage < len(small) - 1:
            chosen.append(begin)
        begin += 1
    return chosen


def control_for_small(control: Any, large: Sequence[int], small: Sequence[int]) -> Any:
    """ControlNet's residuals by name, as ComfyUI and Forge hand them to the U-Net, for the small one.

    Lists are taken from the end: by the input blocks from the first, by the output blocks from the last skip
    connection. Residuals made for the small U-Net itself stay as they are. Raises SwitchingError.
    """
    if not control or tuple(large) == tuple(small):
        return control
    control = {name: list(values) for name, values in control.items()}
    there, own = (sum(layers) + len(layers) for layers in (large, small))
    if any(len(control.get(name) or ()) == there for name in ("input", "output")):
        chosen = residuals_for(large, small)
        if control.get("output"):
            control["output"] = [control["output"][i] for i in chosen if i < len(control["output"])]
        if control.get("input"):
            rising = control["input"][::-1]
            control["input"] = [rising[i] for i in chosen if i < len(rising)][::-1]
        if len(small) < len(large) and control.get("middle"):
            control["middle"] = [None] * len(control["middle"])  # of the innermost stage, which the small one lacks
    elif control.get("output") and len(control["output"]) != own:
        raise SwitchingError(
            f"This ControlNet has {len(control['output'])} residuals, and the small U-Net has {own} places for them. "
            "Leave the ControlNet out, or take one made for these models."
        )
    return control
