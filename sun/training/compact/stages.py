"""The student of a compact U-Net's training: alone, or one of its stages inside the frozen original."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...compact.assembly import assemble
from ...compact.attaching import attach_experts
from ...compact.experts import Alike, Experts
from ...compact.planfile import Plan
from ...compact.structure import slimmed_stages
from ..calls import UNetCalls

Features = dict[str, Tensor]
"""Outputs of stages by name: down.0 the finest on the way down, up.0 its mirror, mid."""


def stage_modules(unet: Any, stages: int) -> dict[str, nn.Module]:
    """A U-Net's stages by the names of the original's, which has ``stages`` of them: its mirror of stage s is up.s."""
    own = len(unet.down_blocks)
    modules = {f"down.{s}": block for s, block in enumerate(unet.down_blocks)}
    modules |= {f"up.{own - 1 - i}": block for i, block in enumerate(unet.up_blocks)}
    return modules | ({"mid": unet.mid_block} if unet.mid_block is not None else {})


class Watcher:
    """Keeps what a U-Net's stages gave in the last call."""

    def __init__(self, unet: Any) -> None:
        self.features: Features = {}
        for name, module in stage_modules(unet, len(unet.down_blocks)).items():
            module.register_forward_hook(self._keeper(name))

    def _keeper(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            self.features[name] = output[0] if isinstance(output, tuple) else output

        return keep

    def take(self) -> Features:
        """The features of the last call; they are forgotten here."""
        found, self.features = self.features, {}
        return found


class CompactStudent(nn.Module):
    """The compact U-Net as the one trainable module of a run.

    unet: the frozen original. small: assembled from it by ``plan``. experts: of ``small``, trained with it.
    ``stages``: those slimmed, each of which can be called inside the original.
    """

    def __init__(self, unet: Any, small: Any, plan: Plan, experts: Experts | None = None) -> None:
        super().__init__()
        self.small, self.experts = small, experts
        self._mixing = (None if experts is None else attach_experts(small, experts),)
        self.stages = slimmed_stages(plan.kept)
        self._watcher = Watcher(small)
        # in a tuple: not registered, so that nothing of the original is trained or saved
        self._hybrids = ({stage: hybrid(unet, small, plan, stage) for stage in self.stages},)

    def forward(self, x: Tensor, t: Tensor, text: Tensor, stage: int | None = None) -> tuple[Tensor, Features]:
        """Predicted noise [B, 4, h, w] and the stages' outputs, of the compact U-Net or a stage in the original."""
        unet = self.small if stage is None else self._hybrids[0][stage]
        if stage is not None and self._mixing[0] is not None:
            self._mixing[0].alike = Alike()  # every row is a picture of its own
        self._watcher.take()
        noise = unet(x, t, text).sample.float()
        return noise, self._watcher.take()

    def watch(self, calls: UNetCalls) -> None:
        """Count the calls of stages inside the original as well."""
        for unet in self._hybrids[0].values():
            calls.watch(unet)

    def of_stage(self, stage: int) -> list[nn.Parameter]:
        """The parameters that train when ``stage`` is incubated."""
        modules = stage_modules(self.small, 0)
        experts = [] if self.experts is None else self.experts.of_stage(stage)
        return [*modules[f"down.{stage}"].parameters(), *modules[f"up.{stage}"].parameters(), *experts]


def hybrid(unet: Any, small: Any, plan: Plan, stage: int) -> Any:
    """The frozen original with one stage and its mirror replaced by the compact U-Net's: a U-Net of shared modules."""
    names = [n for n in plan.remove if n.split(".")[:2][1:] == [str(stage)]]
    alone = Plan(tuple(names), plan.shape)
    made = assemble(unet, alone, share=True)
    last = len(unet.down_blocks) - 1
    for name in ("conv_in", "time_proj", "time_embedding", "mid_block", "conv_norm_out", "conv_act", "conv_out"):
        setattr(made, name, getattr(unet, name))
    made.down_blocks = nn.ModuleList(unet.down_blocks)
    made.up_blocks = nn.ModuleList(unet.up_blocks)
    made.down_blocks[stage] = small.down_blocks[stage]
    made.up_blocks[last - stage] = small.up_blocks[len(small.up_blocks) - 1 - stage]
    return made


@contextmanager
def only(student: nn.Module, parameters: list[nn.Parameter] | None) -> Iterator[None]:
    """Inside, nothing but these parameters asks for gradients (None: all do), so an update leaves the rest alone."""
    if parameters is None:
        yield
        return
    kept = {id(p) for p in parameters}
    others = [p for p in student.parameters() if p.requires_grad and id(p) not in kept]
    for p in others:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in others:
            p.requires_grad_(True)


def feature_loss(
    student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], names: list[str] | None = None
) -> Tensor:
    """Sum over stages of ||f_S - f_T||^2 / ||f_T||^2 (LAPTOP-Diff's normalisation), of those both have in one size."""
    total = torch.zeros((), device=next(iter(student.values())).device)
    for name, feature in student.items():
        other = teacher.get(name)
        if (names is None or name in names) and other is not None and other.shape == feature.shape:
            target = other.float()
            total = total + (feature.float() - target).square().sum() / target.square().sum().clamp_min(1e-12)
    return total
