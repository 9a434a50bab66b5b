"""ME-CondConv: several kernels in a convolution of a compact U-Net, mixed anew for every picture and step.

    kernel = W + sum_e (r_e - c_e) K_e,    r = softmax(router(mean of the input, time embedding) / temperature)

W is the compact U-Net's own kernel and K_e the experts: that kernel and those of the layers that were removed beside
it. This is the mixture sum_e r_e W_e of CondConv (arXiv 1904.04971) and Dynamic Convolution (1912.03458) with experts
W_e = W + K_e - sum_i c_i K_i. Written so, the compact U-Net's file stays an ordinary one: without experts it is the
U-Net with the routing ``c``, which training starts from as an even one (so that it starts as the pruned U-Net, to the
bit, and every expert can be learned) and ends with as the mean one over what it was trained on.

A-SDM (arXiv 2406.00210; 2312.15516) names the method alone, so where experts sit and what they start from is inferred.
Nothing here needs a host or diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from .planfile import Plan
from .structure import CompactError, Shape

COUNT = 4
"""Experts of a convolution: as many as Dynamic Convolution has."""


@dataclass(frozen=True)
class Place:
    """A convolution of the compact U-Net that gets experts, and the original's whose kernels may be some.

    name: by diffusers' names in the compact U-Net. own: in the original. donors: in the original, the likeliest first.
    """

    name: str
    own: str
    donors: tuple[str, ...]


def places(plan: Plan) -> list[Place]:
    """The 3 x 3 convolutions of layers beside a removed one, in the same stage and direction."""
    stays, found = plan.kept, []
    last = plan.shape.stages - 1
    for stage, (down, up) in enumerate(zip(stays.down, stays.up, strict=True)):
        new_up = len(stays.down) - 1 - stage
        for numbers, count, old, new in (
            (down, plan.shape.layers[stage], f"down_blocks.{stage}", f"down_blocks.{stage}"),
            (up, plan.shape.layers[stage] + 1, f"up_blocks.{last - stage}", f"up_blocks.{new_up}"),
        ):
            gone = [j for j in range(count) if j not in numbers]
            for position, j in enumerate(numbers):
                beside = [f"{old}.resnets.{g}" for g in gone if abs(g - j) == 1]
                for conv, other in (("conv1", "conv2"), ("conv2", "conv1")):
                    donors = tuple(f"{layer}.{c}" for c in (conv, other) for layer in beside)
                    own = f"{old}.resnets.{j}.{conv}"
                    found += [Place(f"{new}.resnets.{position}.{conv}", own, donors)] if donors else []
    return found


class ExpertConv(nn.Module):
    """The experts of one convolution, and the router that mixes them.

    kernels: K_e [E, O, C, k, k]. biases: [E, O], mixed alike. time_width: of the time embedding. hidden: of the router.
    """

    centre: Tensor

    def __init__(self, kernels: Tensor, biases: Tensor, time_width: int, hidden: int) -> None:
        super().__init__()
        self.kernels, self.biases = nn.Parameter(kernels), nn.Parameter(biases)
        made: dict[str, Any] = {"device": kernels.device, "dtype": kernels.dtype}
        self.register_buffer("centre", torch.full((len(kernels),), 1 / len(kernels), **made))
        self.squeeze = nn.Linear(kernels.shape[2] + time_width, hidden, **made)
        self.choose = nn.Linear(hidden, len(kernels), **made)
        nn.init.zeros_(self.choose.weight)
        nn.init.zeros_(self.choose.bias)

    def logits(self, x: Tensor, time: Tensor) -> Tensor:
        """The router's answer [N, E] to inputs x [N, C, h, w] and time embeddings [N or 1, T], as layers get both."""
        like = self.squeeze.weight
        time = nn.functional.silu(time.to(like.dtype)).expand(len(x), -1)
        seen = torch.cat([x.mean((2, 3), dtype=torch.float32).to(like.dtype), time], 1)
        answer: Tensor = self.choose(nn.functional.silu(self.squeeze(seen)))
        return answer.float()

    def change(self, routing: Tensor) -> tuple[Tensor, Tensor]:
        """What is added to the convolution's kernel [G, O, C, k, k] and bias [G, O] for routings [G, E]."""
        share = routing.to(self.centre.dtype) - self.centre
        kernels = (share @ self.kernels.flatten(1)).view(len(share), *self.kernels.shape[1:])
        return kernels, share @ self.biases


class Experts(nn.Module):
    """All experts of a compact U-Net of ``shape``. temperature: what logits are divided by."""

    def __init__(self, layers: Mapping[str, ExpertConv], shape: Shape, temperature: float = 1.0) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({_key(name): layer for name, layer in layers.items()})
        self.shape, self.temperature = shape, temperature
        self.seen: dict[str, list[Tensor]] | None = None
        """Routings of the calls that went by, where somebody asked for them."""

    def by_name(self) -> Iterator[tuple[str, ExpertConv]]:
        """Diffusers' name of each convolution in the compact U-Net, and its experts."""
        for key, layer in self.layers.items():
            assert isinstance(layer, ExpertConv)
            yield key.replace("/", "."), layer

    def of_stage(self, stage: int) -> list[nn.Parameter]:
        """The parameters of a stage and its mirror, by the original's numbers."""
        begins = (f"down_blocks.{stage}.", f"up_blocks.{self.shape.stages - 1 - stage}.")
        return [p for name, layer in self.by_name() if name.startswith(begins) for p in layer.parameters()]

    def routing(self, name: str, layer: ExpertConv, x: Tensor, time: Tensor, alike: Alike) -> Tensor:
        """Weights [G, E] of a convolution's experts, one row for all passes of a picture; each row sums to 1."""
        routing = (alike.mean(layer.logits(x, time)) / self.temperature).softmax(1)
        if self.seen is not None:
            self.seen.setdefault(name, []).append(routing.detach().float().cpu())
        return routing

    def fits(self, convolutions: Mapping[str, nn.Module]) -> None:
        """Raise CompactError unless there is a convolution of the right kind for every expert."""
        for name, layer in self.by_name():
            weight = getattr(convolutions.get(name), "weight", None)
            wanted = layer.kernels.shape[1:]
            if weight is None or weight.shape != wanted:
                has = "no such layer" if weight is None else f"one of {list(weight.shape)}"
                raise CompactError(
                    f"These experts are for another compact U-Net: {name} is a convolution of {list(wanted)} there, "
                    f"and this one has {has}. Take the U-Net they were trained with."
                )


def _key(name: str) -> str:
    return name.replace(".", "/")  # torch allows no dots in the names of modules


@dataclass(frozen=True)
class Alike:
    """Which rows of a call are passes of one picture, as the two of guidance are: they share a routing.

    passes: rows n G ... are the same G pictures ``passes`` times in a row. same: instead, a matrix [N, N] with 1 where
    two rows are of one picture (for compiled calls, where nothing may depend on values); then G is N.
    """

    passes: int = 1
    same: Tensor | None = None

    def mean(self, logits: Tensor) -> Tensor:
        """Of logits [N, E] the mean over the passes of each picture: [G, E]."""
        if self.same is not None:
            return (self.same @ logits) / self.same.sum(1, keepdim=True)
        passes = self.passes if len(logits) % self.passes == 0 else 1
        return rearrange(logits, "(n g) e -> n g e", n=passes).mean(0)


def alike_of(x: Tensor) -> Alike:
    """Which rows of a call's inputs x [N, C, h, w] are one picture's: those with the same latents."""
    if not torch.compiler.is_compiling() and (passes := passes_of(x)):
        return Alike(passes)
    flat = x.flatten(1)
    return Alike(same=(flat[:, None] == flat[None]).all(2).float())


def passes_of(x: Tensor) -> int:
    """How often a call holds the same pictures, one after the other: 2 for guidance's halves, 1 where all rows differ,
    0 where they are the same in another order.
    """
    for passes in range(2, len(x) + 1):
        if len(x) % passes == 0:
            first, *others = x.chunk(passes)
            if all(torch.equal(first, other) for other in others) and len({*_hashes(first)}) == len(first):
                return passes
    return int(len({*_hashes(x)}) == len(x))


def _hashes(x: Tensor) -> list[float]:
    """A number of each row, the same for the same row."""
    numbers: list[float] = x.flatten(1).double().sum(1).tolist()
    return numbers


def make_experts(
    original: Mapping[str, Tensor],
    small: Mapping[str, Tensor],
    plan: Plan,
    time_width: int,
    count: int = COUNT,
    hidden: int = 64,
) -> Experts:
    """Experts of what ``plan`` removed, for the U-Net assembled by it: until they are trained they change nothing.

    original, small: state dicts of both by diffusers' names. time_width: of the time embedding. A convolution gets its
    own kernel and up to ``count`` - 1 of the same size of removed neighbours; where there are fewer, means of its own
    and theirs fill up. Raises CompactError where the plan leaves no such convolution.
    """
    if count < 2:
        raise CompactError(f"Experts are at least 2 kernels, not {count}.")
    made = {}
    for place in places(plan):
        own, bias = small[f"{place.name}.weight"], small[f"{place.name}.bias"]
        theirs = [(original[f"{d}.weight"], original[f"{d}.bias"]) for d in place.donors]
        theirs = [pair for pair in theirs if pair[0].shape == own.shape][: count - 1]
        if not theirs:
            continue
        halves = [((own + kernel) / 2, (bias + b) / 2) for kernel, b in theirs]
        pairs = [(own, bias), *theirs, *halves, *_further(own, bias, theirs, count)][:count]
        kernels, biases = (torch.stack(part).detach().clone() for part in zip(*pairs, strict=True))
        made[place.name] = ExpertConv(kernels, biases, time_width, hidden)
    if not made:
        raise CompactError(
            "Experts are made of the kernels of removed layers, and this plan removes none beside a layer of the same "
            "size (pair.S.J). Choose another plan, or train without experts."
        )
    return Experts(made, plan.kept.result)


def _further(
    own: Tensor, bias: Tensor, theirs: Sequence[tuple[Tensor, Tensor]], count: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Mixtures in ever other shares, so that no two experts are the same and would be learned alike."""
    for n in range(2, count + 2):
        kernel, other = theirs[n % len(theirs)]
        yield own + (kernel - own) / (n + 1), bias + (other - bias) / (n + 1)


# --- without a router ------------------------------------------------------------------------------------------------


def mean_routings(experts: Experts) -> dict[str, Tensor]:
    """For each convolution the mean [E] of the routings that were seen. Raises CompactError where none were."""
    seen = experts.seen or {}
    if missing := [name for name, _ in experts.by_name() if name not in seen]:
        raise CompactError(f"No call went through {missing[0]}, so there is no routing to fold in.")
    return {name: torch.cat(routings).mean(0) for name, routings in seen.items()}


@torch.no_grad()
def fold(weights: dict[str, Tensor], experts: Experts, routings: Mapping[str, Tensor]) -> None:
    """Put a fixed routing of every convolution into a compact U-Net's weights (by diffusers' names), in place."""
    for name, layer in experts.by_name():
        kernel, bias = layer.change(repeat(routings[name].to(layer.centre), "e -> 1 e"))
        for part, change in (("weight", kernel[0]), ("bias", bias[0])):
            old = weights[f"{name}.{part}"]
            weights[f"{name}.{part}"] = old + change.to(old)


@torch.no_grad()
def recentre(experts: Experts, routings: Mapping[str, Tensor]) -> None:
    """Count experts from these routings: with the weights that :func:`fold` gave the whole is what it was before."""
    for name, layer in experts.by_name():
        layer.centre.copy_(routings[name].to(layer.centre))
