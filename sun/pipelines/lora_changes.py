"""What the relatives of LoRA change in a weight: DoRA, LoHa, LoKr, CP decompositions, whole differences.

Each kind says what shape its product has before it is made: a few kilobytes can multiply to gigabytes. Scales are
alpha / rank, where a file states no alpha 1, as in LyCORIS (arXiv 2309.14859), whose names these are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
"""The tensors of one layer by their names in the file: ``down``, ``up``, ``alpha``, ``hada_w1_a`` and so on."""
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
WHOLE = ("diff", "diff_b", "w_norm", "b_norm")


def kind_of(parts: Parts) -> str:
    """The name of the method a layer's tensors belong to; ``LoRA`` for what peft applies."""
    if "dora" in parts:
        return "DoRA"
    if any(name in parts for name in LOHA):
        return "LoHa"
    if any(name in parts for name in LOKR):
        return "LoKr"
    if "mid" in parts:
        return "LoCon with lora_mid"
    return "LoRA" if "down" in parts or "up" in parts else "whole differences"


def changed(weight: Tensor, bias: Tensor | None, parts: Parts, strength: float) -> tuple[Tensor, Tensor | None]:
    """``weight`` and ``bias`` of a layer with ``strength`` times the change, float32. Raises ValueError or KeyError."""
    new, base = weight.float(), weight.float()
    if any(name not in (*WHOLE, "alpha") for name in parts):
        new = base + _product(base, parts)
        if "dora" in parts:
            new = _decomposed(new, parts["dora"].float())
        new = base + strength * (new - base)
    for name in ("diff", "w_norm"):
        if name in parts:
            new = new + strength * _shaped(parts[name].float(), base, name)
    for name in ("diff_b", "b_norm"):
        if name in parts:
            if bias is None:
                raise ValueError("it changes a bias that the layer does not have")
            bias = bias.float() + strength * _shaped(parts[name].float(), bias, name)
    return new, bias


def _product(weight: Tensor, parts: Parts) -> Tensor:
    p = {name: tensor.float() for name, tensor in parts.items()}
    if any(name in p for name in LOHA):
        delta, rank = _loha(weight, p)
    elif any(name in p for name in LOKR):
        delta, rank = _lokr(weight, p)
    else:
        delta, rank = _lora(weight, p), len(p["down"])
    scale = float(p["alpha"]) / rank if "alpha" in p and rank else 1.0
    return delta * scale * (float(p["scalar"]) if "scalar" in p else 1.0)


def _lora(weight: Tensor, p: dict[str, Tensor]) -> Tensor:
    up, down = p["up"].flatten(1), p["down"]
    if "mid" not in p:
        _expect(weight, len(up), down.flatten(1).shape[1])
        return _shaped(up @ down.flatten(1), weight, "up @ down")
    down, mid = down.flatten(1), p["mid"]
    _expect(weight, len(up), down.shape[1] * math.prod(mid.shape[2:]))
    return _shaped(torch.einsum("or,rs...,si->oi...", up, mid, down), weight, "up, mid and down")


def _loha(weight: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, int]:
    halves = []
    for half in ("1", "2"):
        a, b, t = p[f"hada_w{half}_a"], p[f"hada_w{half}_b"], p.get(f"hada_t{half}")
        if t is None:
            _expect(weight, len(a), b.shape[1])
            halves.append(a @ b)
        else:  # a: [rank, out], b: [rank, in], t: [rank, rank, kernel]
            _expect(weight, a.shape[1], b.shape[1] * math.prod(t.shape[2:]))
            halves.append(torch.einsum("ij...,jr,ip->pr...", t, b, a))
    return _shaped(halves[0] * halves[1], weight, "LoHa"), len(p["hada_w1_b"])


def _lokr(weight: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, int]:
    def shape(half: str) -> tuple[int, int]:
        if f"lokr_w{half}" in p:
            whole = p[f"lokr_w{half}"]
            return len(whole), whole[0].numel()
        a, b = p[f"lokr_w{half}_a"], p[f"lokr_w{half}_b"]
        if half == "2" and "lokr_t2" in p:  # a: [rank, out], b: [rank, in]
            return a.shape[1], b.shape[1] * math.prod(p["lokr_t2"].shape[2:])
        return len(a), b.shape[1:].numel()

    (rows1, columns1), (rows2, columns2) = shape("1"), shape("2")
    _expect(weight, rows1 * rows2, columns1 * columns2)
    w1 = p["lokr_w1"] if "lokr_w1" in p else p["lokr_w1_a"] @ p["lokr_w1_b"]
    if "lokr_w2" in p:
        w2 = p["lokr_w2"]
    elif "lokr_t2" in p:
        w2 = torch.einsum("ij...,jr,ip->pr...", p["lokr_t2"], p["lokr_w2_b"], p["lokr_w2_a"])
    else:
        b = p["lokr_w2_b"]
        w2 = (p["lokr_w2_a"] @ b.flatten(1)).unflatten(1, b.shape[1:])
    if w2.ndim == 2 and weight.ndim == 4:
        w2 = w2.view(*w2.shape, 1, 1) if weight.shape[2:].numel() == 1 else w2.unflatten(1, (-1, *weight.shape[2:]))
    ranks = [len(p[name]) for name in ("lokr_w2_b", "lokr_w1_b") if name in p]
    product = torch.kron(w1.view(*w1.shape[:2], *[1] * (w2.ndim - 2)), w2.contiguous())
    return _shaped(product, weight, "LoKr"), ranks[0] if ranks else 0


def _decomposed(merged: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA (arXiv 2402.09353): ``merged`` with the norms ``magnitude``, of its rows or, for LyCORIS, of its columns."""
    rows, flat = len(merged), merged.flatten(1)
    eps = torch.finfo(merged.dtype).eps  # a row of zeros stays one
    if magnitude.numel() == rows and (magnitude.ndim == 1 or len(magnitude) == rows or merged.shape[1] != rows):
        return (flat * (magnitude.reshape(rows, 1) / (flat.norm(dim=1, keepdim=True) + eps))).view_as(merged)
    if magnitude.numel() != merged.shape[1]:
        raise ValueError(f"its dora_scale has {magnitude.numel()} entries for a weight {list(merged.shape)}")
    columns = merged.transpose(0, 1).flatten(1)
    scale = magnitude.reshape(-1) / (columns.norm(dim=1) + eps)
    return merged * scale.view(1, -1, *[1] * (merged.ndim - 2))


def _expect(weight: Tensor, rows: int, columns: int) -> None:
    """Raise ValueError unless a product of this size is the weight's."""
    own = weight.flatten(1).shape if weight.ndim > 1 else (len(weight), 1)
    if (rows, columns) != tuple(own):
        raise ValueError(f"the layer is {list(weight.shape)} here, and the file's change {rows} by {columns}")


def _shaped(change: Tensor, weight: Tensor, name: str) -> Tensor:
    if change.numel() != weight.numel() or len(change) != len(weight):
        raise ValueError(f"the layer is {list(weight.shape)} here, and the file's {name} {list(change.shape)}")
    return change.reshape(weight.shape)
