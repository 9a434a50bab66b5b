"""``sun assemble``."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Annotated, Any

import typer

from ..common.settings import ConfigError, read_lines
from ..common.worlds import EMOJI, find, world_of
from ..shipped import SHIPPED, guidance_of
from .app import app
from .options import Dtype, Model, check_folder, check_target
from .show import out

_TOGETHER = 8  # pictures of one run that states are recorded of


@app.command(
    epilog="""Examples:

sun assemble --model sd15.safetensors --plan shallow --single-file compact.safetensors

sun assemble --model sd15-folder --budget 0.8 --states 8 --captions captions.txt --plan-only plan.json

sun assemble --model sd15-folder --plan plan.json --trained runs/compact/unet --single-file compact.safetensors"""
)
def assemble(
    model: Model = SHIPPED,
    plan: Annotated[str, typer.Option(help="A list (shallow, bk-base, bk-small, bk-tiny) or a plan's file.")] = "",
    budget: Annotated[
        float, typer.Option(help="Without --plan: the share of the original's seconds that may be left.")
    ] = 0.8,
    states: Annotated[
        int,
        typer.Option(help="Pictures whose trajectories importance is measured on; 0: outer layers go first.", min=0),
    ] = 0,
    captions: Annotated[str, typer.Option(help="Text file of captions for --states, one a line.")] = "",
    steps: Annotated[int, typer.Option(help="Steps of those trajectories.", min=1)] = 10,
    guidance: Annotated[float | None, typer.Option(help="Their guidance scale. (7.5; Emoji Diffusion 1.5)")] = None,
    size: Annotated[int, typer.Option(help="Pixels at which seconds are measured. (default: the model's own)")] = 0,
    seed: Annotated[int, typer.Option(help="Of captions and noise of --states.", min=0)] = 0,
    folder: Annotated[Path | None, typer.Option("--out", help="Write the U-Net as a diffusers folder.")] = None,
    single_file: Annotated[
        Path | None, typer.Option(help="Write a checkpoint in LDM layout, with A1111's config beside it.")
    ] = None,
    plan_only: Annotated[Path | None, typer.Option(help="Write the plan as JSON; alone, nothing is assembled.")] = None,
    trained: Annotated[
        Path | None, typer.Option(help="Folder of the U-Net `sun train-compact` made; its weights are written.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Number format of what is written; auto keeps the model's.")
    ] = Dtype.auto,
) -> None:
    """Put a compact U-Net together from a model's own: choose layers to leave out, keep the weights of the rest.

    The result is an ordinary U-Net; train it with `sun train-compact` before you use it: undistilled it draws badly.
    """
    _check_targets(folder, single_file, plan_only, trained)
    guidance = guidance_of(model) if guidance is None else guidance
    _check_numbers(size, guidance)
    if states and not captions and world_of(model) != EMOJI:
        raise typer.BadParameter("--states needs --captions: what the model is to draw", param_hint="--states")

    from ..compact import assemble as put_together
    from ..compact import write_plan
    from ..pipelines.loading import load_unet

    unet, recorded = _unet_and_states(model, states, captions, steps, guidance, seed)
    chosen = _plan(unet, plan, budget, recorded if states else None, size)
    out.print(chosen.words(), soft_wrap=True)
    if plan_only is not None:
        out.print(f"plan: {write_plan(chosen, plan_only)}", soft_wrap=True)
    if folder is None and single_file is None:
        return
    small = put_together(unet, chosen)
    if trained is not None:
        small = _trained(small, load_unet(trained), trained)
    if dtype is not Dtype.auto:
        import torch

        small = small.to(getattr(torch, dtype.value))
    _write(small, folder, single_file, model)
    if trained is not None:
        _write_experts(trained, folder, single_file)


def _check_numbers(size: int, guidance: float) -> None:
    if size and (size < 64 or size % 8):
        raise typer.BadParameter(f"{size} is no multiple of 8 pixels from 64 up", param_hint="--size")
    if not 0 < guidance < math.inf:
        raise typer.BadParameter(f"{guidance} guides nothing; give a number above 0", param_hint="--guidance")


def _check_targets(folder: Path | None, single_file: Path | None, plan_only: Path | None, trained: Path | None) -> None:
    if not (folder or single_file or plan_only):
        raise typer.BadParameter("say what to write: --out, --single-file or --plan-only")
    for path, option in ((single_file, "--single-file"), (plan_only, "--plan-only")):
        if path is not None:
            check_target(path, option)
    if folder is not None:
        check_folder(folder)
    if single_file is not None and single_file.suffix != ".safetensors":
        raise typer.BadParameter(f"{single_file} should end in .safetensors", param_hint="--single-file")
    if trained is not None and folder is None and single_file is None:
        raise typer.BadParameter("its weights go into --out or --single-file: give one", param_hint="--trained")


def _unet_and_states(
    model: str, count: int, captions: str, steps: int, guidance: float, seed: int
) -> tuple[Any, list[Any]]:
    from ..compact.pipelines import record_states
    from ..pipelines.loading import load_pipeline, load_unet

    if not count:
        return load_unet(model), []
    pipe, rng = load_pipeline(model), random.Random(seed)
    if captions:
        lines = [line.strip() for line in read_lines(Path(captions)) if line.strip()]
        if not lines:
            raise ConfigError(f"{captions} has no caption. Write one a line.")
        prompts = [rng.choice(lines) for _ in range(count)]
    else:
        prompts = find(EMOJI, "prompts")(count, rng)
    states: list[Any] = []
    for first in range(0, count, _TOGETHER):
        some = prompts[first : first + _TOGETHER]
        states += record_states(pipe, some, seed=seed + first, num_inference_steps=steps, guidance_scale=guidance)
    return pipe.unet, states


def _plan(unet: Any, name: str, budget: float, states: list[Any] | None, size: int) -> Any:
    from ..compact import LISTS, read_plan
    from ..compact import plan as make

    if name and name not in LISTS:
        return read_plan(name)
    if name:
        return make(unet, named=name)
    side = (size // 8, size // 8) if size else None
    return make(unet, budget, states, size=side, say=lambda text: out.print(text, soft_wrap=True))


def _trained(small: Any, other: Any, where: Path) -> Any:
    """The trained U-Net, if it is one of this plan."""
    mine, theirs = ({n: t.shape for n, t in u.state_dict().items()} for u in (small, other))
    if mine != theirs:
        raise ConfigError(f"{where} is the U-Net of another plan or model. Give the plan.json that lies beside it.")
    return other


def _write(small: Any, folder: Path | None, single_file: Path | None, model: str) -> None:
    """Write the U-Net in the forms asked for; the rest of a single file is that of ``model``."""
    from ..compact.pipelines import save_folder, save_single_file
    from ..pipelines.loading import model_path

    if folder is not None:
        save_folder(small, folder)
        out.print(f"U-Net: {folder}", soft_wrap=True)
    if single_file is not None:
        for sentence in save_single_file(small, single_file, model_path(model)):
            out.print(sentence, soft_wrap=True)
        out.print(f"single file: {single_file}", soft_wrap=True)


def _write_experts(trained: Path, folder: Path | None, single_file: Path | None) -> None:
    """Beside what was written, the experts that were trained with the U-Net, if there are any."""
    from ..compact.expertfile import IN_FOLDER, SUFFIX, experts_beside, read_experts, write_experts

    inside = trained.parent if trained.name == "unet" else trained
    found = experts_beside(inside)
    if found is None:
        return
    experts = read_experts(found)
    for target in (folder and folder / IN_FOLDER, single_file and single_file.with_suffix(SUFFIX)):
        if target:
            out.print(f"its experts: {write_experts(experts, target)}", soft_wrap=True)
