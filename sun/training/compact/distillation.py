"""``sun train-compact``: a compact U-Net learns from the original it was assembled from."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...common.settings import ConfigError, last_name
from ...compact.assembly import assemble
from ...compact.attaching import experts_for, settle, watching
from ...compact.expertfile import IN_FOLDER, write_experts
from ...compact.experts import Experts
from ...compact.pipelines import save_unet
from ...compact.planfile import Plan, read_plan, write_plan
from ...compact.planning import plan as make_plan
from ..algorithm import NoiseSchedule
from ..card import name_of, write_table_card
from ..data.negative_phrases import NegativePrompts
from ..data.sources import source_of
from ..models import encoder_of, latent_shape, load_frozen, use_fast_attention
from ..previews import sample_prompts, save_previews
from ..run import TrainingRun, start_run
from ..student import Teacher
from .inputs import Batch, Captions, NoisedPictures, TeacherBank
from .settings import CompactTrainConfig, check_compact, is_list
from .stages import CompactStudent, Features, Watcher, feature_loss, only


def train_compact(config: CompactTrainConfig) -> Path:
    """Train and write ``<output>/unet`` (fp16, a diffusers folder), ``plan.json`` and a card; returns the folder.

    Raises ConfigError, CompactError or DataError before training, NonFiniteLoss and OSError while it goes on.
    """
    check_compact(config)
    pipe = load_frozen(config.model)
    plan = plan_of(config, pipe.unet)
    small = assemble(pipe.unet, plan).float().requires_grad_(True).train()
    if config.gradient_checkpointing:
        small.enable_gradient_checkpointing()
    experts = experts_for(pipe.unet, small, plan, config.experts, config.router_width) if config.experts else None
    if experts is not None:
        experts.temperature = config.temperature
    student = CompactStudent(pipe.unet, small, plan, experts)
    removed = {"the plan removes": list(plan.remove)}
    run = start_run(config, {"student": student}, unused=config.incubation > 0, named=removed)
    if run.sharded and config.incubation:
        raise ConfigError("incubation trains one stage at a time, which FSDP's shards are not: set it 0, or use DDP.")
    pipe.vae.to(run.accelerator.device)
    run.place(pipe.unet, pipe.text_encoder)
    for unet in (pipe.unet, small):
        use_fast_attention(unet, run.accelerator.device)
        run.calls.watch(unet)
    run.unwrapped("student").watch(run.calls)
    loss = CompactLoss(config, run, pipe)
    inputs = make_inputs(config, run, pipe)
    for step in run.steps():
        if experts is not None:
            experts.temperature = temperature_at(config, run.fraction)
        stage = stage_of(config, run, loss.student.stages)
        with only(run.modules["student"], None if stage is None else loss.student.of_stage(stage)):
            with run.accelerator.autocast():
                losses = loss(inputs(step), stage)
            run.update(losses.pop("total"), **losses)
        if run.time_to_sample():
            show_and_save(config, run, pipe, plan, student)
    show_and_save(config, run, pipe, plan, student)
    return run.folder


def temperature_at(config: CompactTrainConfig, fraction: float) -> float:
    """What the experts' logits are divided by when so much of the run is over: down to 1 in a straight line."""
    left = 1 - fraction / config.temperature_share if config.temperature_share else 0.0
    return 1 + (config.temperature - 1) * max(0.0, left)


def plan_of(config: CompactTrainConfig, unet: Any) -> Plan:
    """The plan of a list or a file. Raises CompactError, FileNotFoundError."""
    return make_plan(unet, named=config.plan) if is_list(config.plan) else read_plan(config.plan)


def stage_of(config: CompactTrainConfig, run: TrainingRun, stages: list[int]) -> int | None:
    """The stage that is incubated now, finest first; None: the whole is distilled."""
    if not stages or run.fraction >= config.incubation:
        return None
    return stages[min(len(stages) - 1, int(run.fraction / config.incubation * len(stages)))]


class CompactLoss:
    """The losses of a batch, by the original's answer to it."""

    def __init__(self, config: CompactTrainConfig, run: TrainingRun, pipe: Any) -> None:
        self.config, self.run, self.pipe = config, run, pipe
        self.module = run.modules["student"]
        self.student: CompactStudent = run.unwrapped("student")
        self.watcher = Watcher(pipe.unet)
        self.schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(run.accelerator.device)
        self.encoder = image_encoder(config, run.accelerator.device) if config.semantic_weight else None

    def __call__(self, batch: Batch, stage: int | None) -> dict[str, Tensor]:
        """``total`` and its parts: incubation's where a stage is given, else distillation's."""
        with torch.no_grad():
            target = self.pipe.unet(batch.x, batch.t, batch.text).sample.float()
        features = self.watcher.take()
        predicted, own = self.module(batch.x, batch.t, batch.text, stage)
        self.watcher.take()  # a hybrid's frozen stages are the original's own
        output = nn.functional.mse_loss(predicted, target)
        if stage is not None:
            return self._incubation(own, features, output, stage)
        return self._distillation(batch, predicted, target, own, features, output)

    def _incubation(self, own: Features, features: Features, output: Tensor, stage: int) -> dict[str, Tensor]:
        at_stage = feature_loss(own, features, [f"down.{stage}", f"up.{stage}"])
        total = self.config.stage_weight * at_stage + self.config.final_weight * output
        return {"total": total, "stage": at_stage.detach(), "final": output.detach()}

    def _distillation(
        self, batch: Batch, predicted: Tensor, target: Tensor, own: Features, features: Features, output: Tensor
    ) -> dict[str, Tensor]:
        config, parts = self.config, {"output": output, "feature": feature_loss(own, features)}
        total = config.output_weight * output + config.feature_weight * parts["feature"]
        if batch.noise is not None:
            parts["noise"] = nn.functional.mse_loss(predicted, batch.noise)
            total = total + config.noise_weight * parts["noise"]
        if self.encoder is not None:
            parts["semantic"] = self._semantic(batch, predicted, target)
            total = total + config.semantic_weight * parts["semantic"]
        return {"total": total, **{name: part.detach() for name, part in parts.items()}}

    def _semantic(self, batch: Batch, predicted: Tensor, target: Tensor) -> Tensor:
        """1 - cosine of the image features of the clean pictures both predict, at late timesteps."""
        late = (batch.t < self.config.semantic_until * self.schedule.num_train_timesteps).nonzero().flatten()
        late = late[: self.config.semantic_rows]
        if not len(late):
            return predicted.sum() * 0
        a, sigma = self.schedule(batch.t[late])

        def features(noise: Tensor) -> Tensor:
            clean = (batch.x[late].float() - sigma * noise[late]) / a
            pixels = self.pipe.vae.decode(clean / self.pipe.vae.config.scaling_factor).sample
            assert self.encoder is not None
            return self.encoder(pixels)

        with torch.no_grad():
            wanted = features(target)
        return 1 - nn.functional.cosine_similarity(features(predicted), wanted, dim=-1).mean()


def image_encoder(config: CompactTrainConfig, device: torch.device) -> Any:
    """Pictures [B, 3, H, W] in -1..1 to the image features [B, D] of the CLIP in ``semantic_model``."""
    from transformers import CLIPModel

    from ...pipelines.loading import load_part

    clip = load_part(CLIPModel, Path(config.semantic_model), torch.float32).requires_grad_(False).to(device)
    side = clip.config.vision_config.image_size
    mean = torch.tensor((0.48145466, 0.4578275, 0.40821073), device=device).view(1, 3, 1, 1)
    deviation = torch.tensor((0.26862954, 0.26130258, 0.27577711), device=device).view(1, 3, 1, 1)

    def encode(pixels: Tensor) -> Tensor:
        resized = nn.functional.interpolate(pixels.float(), (side, side), mode="bilinear", antialias=True)
        output = clip.vision_model(((resized + 1) / 2 - mean) / deviation)
        projected: Tensor = clip.visual_projection(output.pooler_output)
        return projected

    return encode


def make_inputs(config: CompactTrainConfig, run: TrainingRun, pipe: Any) -> NoisedPictures | TeacherBank:
    """What a step trains on, kept in the run's checkpoints."""
    device, encode = run.accelerator.device, encoder_of(pipe)
    schedule = NoiseSchedule(pipe.scheduler.alphas_cumprod).to(device)
    if not config.captions:
        return NoisedPictures(config, source_of(config, pipe, run), encode, schedule, run.rng)
    negatives = NegativePrompts.load(config.negatives, config.captions, config.max_negative_phrases, 0.1)
    bank = TeacherBank(
        config,
        Teacher(pipe.unet, config.guidance_scale),
        Captions(config.captions, run.rng),
        negatives,
        encode,
        schedule,
        pipe.scheduler.config,
        latent_shape(pipe, config.resolution),
        device,
        run.rng,
    )
    return run.track("bank", bank)


# --- results ---------------------------------------------------------------------------------------------------------


def show_and_save(config: CompactTrainConfig, run: TrainingRun, pipe: Any, plan: Plan, student: CompactStudent) -> None:
    """The pictures of the moment, then the files. What the experts are asked for in the pictures is their routing
    without a router, which the U-Net's own file has.
    """
    with nullcontext() if student.experts is None else watching(student.experts):
        sample_grid(config, run, pipe, student.small)
        save_student(config, run, plan, student)


def save_student(config: CompactTrainConfig, run: TrainingRun, plan: Plan, student: CompactStudent) -> None:
    """Write the averaged U-Net in fp16, its experts, the plan and a card."""
    state = run.averaged_state("student")
    if not run.accelerator.is_main_process:
        return
    tensors = _part(state, "small.")
    experts = copy.deepcopy(student.experts)
    if experts is not None:
        experts.cpu().load_state_dict(_part(state, "experts."))
        if experts.seen:
            settle(tensors, experts)
    tensors = {name: weight.half() for name, weight in tensors.items()}
    with run.writing("unet"):
        write_plan(plan, run.folder / "plan.json")
        save_unet(student.small, tensors, run.folder / "unet")
        if experts is not None:
            write_experts(experts, run.folder / IN_FOLDER)
        write_card(config, run, plan, sum(weight.numel() for weight in tensors.values()), experts)


def _part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def write_card(
    config: CompactTrainConfig, run: TrainingRun, plan: Plan, parameters: int, experts: Experts | None = None
) -> None:
    """What the student is and how it was made, for a reader and, as ``training.json``, for a program."""
    base = name_of(config.model)
    rows = {
        "original": base,
        "removed": ", ".join(plan.remove),
        "parameters": f"{parameters / 1e6:.2f} M",
        "trained on": last_name(config.captions or config.data),
        "incubation": f"{config.incubation:g} of the training",
        **({} if experts is None else {"experts": _experts_in_words(experts)}),
    }
    usage = (
        'An ordinary U-Net of the family: `UNet2DConditionModel.from_pretrained("this folder", subfolder="unet")`. '
        "What was removed is in `plan.json`."
    )
    facts = {"parameters": parameters, "remove": list(plan.remove)}
    write_table_card(run, config, f"Compact U-Net of {base}", facts, rows, usage)


def _experts_in_words(experts: Experts) -> str:
    count = sum(parameter.numel() for parameter in experts.parameters())
    convolutions = [layer for _, layer in experts.by_name()]
    return (
        f"{len(convolutions[0].kernels)} kernels in each of {len(convolutions)} convolutions, {count / 1e6:.2f} M "
        f"parameters, in `{IN_FOLDER}`; without that file the U-Net has their mean routing"
    )


def sample_grid(config: CompactTrainConfig, run: TrainingRun, pipe: Any, small: Any) -> None:
    """Original over compact, 25 steps with guidance, as a PNG in the run's folder ``samples``."""
    texts = sample_prompts(config.model, config.captions or config.data)
    rows = [(Teacher(unet, config.guidance_scale), "dpmpp_2m", 25) for unet in (pipe.unet, small)]
    save_previews(run, pipe, texts, rows, latent_shape(pipe, config.resolution)[-1])
