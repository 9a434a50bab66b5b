"""What a model predicts, and whether SUN can sample with it: one check for every host.

A model of the Stable Diffusion 1.x family predicts the noise (``epsilon``), v = a eps - s x0 (``v_prediction``,
arXiv 2202.00512) or the clean latents x0 (``sample``); a = sqrt(alphas_cumprod), s = sqrt(1 - alphas_cumprod).
With zero terminal SNR (arXiv 2305.08891) a is 0 at the first timestep, which is where SUN starts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

KINDS = {"epsilon": "the noise", "v_prediction": "v", "sample": "the clean latents"}
# Stable Diffusion 1.5 ends at .0047; hosts write 0, 2**-24 (diffusers) or 4.9e-8 (ComfyUI) for zero terminal SNR.
ZERO_SNR = 1e-6
_HEADER_KEYS = ("modelspec.prediction_type", "modelspec.predict_key")


class PredictionError(ValueError):
    """A model whose predictions cannot be sampled; the message says why."""


def check_prediction(kind: str, final_alpha_cumprod: float, adapter: bool = True) -> str:
    """A sentence for the user about a model that predicts ``kind`` (one of ``KINDS``); empty if there is none to say.

    final_alpha_cumprod: alphas_cumprod of the noisiest timestep; 0, or nearly, is zero terminal SNR. adapter: whether
    SUN runs on it: adapters are trained on models that predict the noise. Raises PredictionError for another kind, and
    for the noise at zero terminal SNR, where the prediction says nothing of the picture.
    """
    if kind not in KINDS:
        raise PredictionError(
            f"This model predicts {kind!r}, which SUN cannot sample. It works with models that predict "
            f"{', '.join(KINDS)}: Stable Diffusion 1.x and its fine-tunes."
        )
    if kind == "epsilon" and final_alpha_cumprod <= ZERO_SNR:
        raise PredictionError(
            "This model predicts the noise on a schedule that ends in nothing but noise (zero terminal SNR); there the "
            "noise says nothing of the picture. Set prediction_type to v_prediction if the model was trained so, or "
            "rescale_betas_zero_snr to false."
        )
    if kind == "epsilon" or not adapter:
        return ""
    return (
        f"this model predicts {KINDS[kind]} ({kind}), and SUN adapters are trained on models that predict the noise: "
        "look whether the pictures are right."
    )


def clean_latents(
    kind: str, output: torch.Tensor, x: torch.Tensor, a: torch.Tensor | float, s: torch.Tensor | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(x0, eps), the clean latents and the noise in ``x`` = a x0 + s eps by a model's ``output``; all [B, C, h, w].

    Only ``epsilon`` divides by a, and only ``sample`` by s, which is nowhere 0. Raises PredictionError.
    """
    if kind == "epsilon":
        return (x - s * output) / a, output
    if kind == "v_prediction":
        return a * x - s * output, a * output + s * x
    if kind == "sample":
        return output, (x - a * output) / s
    raise PredictionError(f"prediction type {kind!r} is not supported; SUN knows {', '.join(KINDS)}.")


def marked_prediction(names: Collection[str], header: Mapping[str, str] | None = None) -> tuple[str, bool]:
    """(kind, zero terminal SNR) that a single-file checkpoint states of itself; ("", False) where it says nothing.

    names: of its tensors: an entry ``v_pred`` is the mark of ComfyUI, NoobAI and others, ``ztsnr`` beside it that of
    zero terminal SNR. header: its safetensors metadata, where sd-scripts writes ModelSpec entries.
    """
    said = next((str(header[key]).lower() for key in _HEADER_KEYS if header and key in header), "")
    kind = "v_prediction" if "v_pred" in names or said in ("v", "v_prediction", "v-prediction") else ""
    if not kind and said in ("epsilon", "eps"):
        kind = "epsilon"
    return kind, "ztsnr" in names
