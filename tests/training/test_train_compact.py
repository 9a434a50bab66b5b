"""Compact U-Nets learn: a stage inside the frozen original, then the whole, on pictures or on the teacher's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel

from sun.common.settings import ConfigError, apply
from sun.compact import Plan, assemble, attach_experts, experts_for, plan, read_experts, read_plan, shape_of, write_plan
from sun.training import run as run_module
from sun.training.compact import distillation
from sun.training.compact.distillation import temperature_at, train_compact
from sun.training.compact.settings import CompactTrainConfig, check_compact
from sun.training.compact.stages import CompactStudent, Watcher, feature_loss, only


@pytest.fixture(autouse=True)
def _no_sample_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation, "sample_grid", lambda *_: None)


def settings(model: Path, output: Path, captions: Path | str = "", **values: Any) -> CompactTrainConfig:
    run = {
        "output": str(output),
        "steps": 4,
        "batch_size": 2,
        "lr": 1e-2,
        "precision": "fp32",
        "checkpoint_minutes": 0.0,
    }
    shared = {"model": str(model), "resolution": 64, "incubation": 0.5, "teacher_steps": 2, "target_reuse": 2}
    return apply(CompactTrainConfig(), {**shared, "captions": str(captions), **values, "run": run})


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    (tmp_path / "captions.txt").write_text("a bear\nred apple\n\n")
    return tmp_path / "captions.txt"


def load(folder: Path) -> Any:
    return UNet2DConditionModel.from_pretrained(folder)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 16, 16, generator=generator), torch.tensor([900, 40]), torch.randn(2, 77, 32)


def test_a_stage_inside_the_original_is_the_original_without_that_pair(full_depth_model: Path) -> None:
    """Every slimmed stage, of every list with several; and only its own parameters get a gradient."""
    unet = load(full_depth_model / "unet").requires_grad_(False)
    x, t, text = batch()
    for name in ("bk-base", "bk-tiny"):
        chosen = plan(unet, named=name)
        small = assemble(unet, chosen).requires_grad_(True)
        student = CompactStudent(unet, small, chosen)
        assert student.stages == ([0, 1, 2, 3] if name == "bk-base" else [0, 1])
        for stage in student.stages:
            alone = assemble(unet, Plan((f"pair.{stage}.1",), shape_of(unet.config)))
            with sdpa_kernel(SDPBackend.MATH):
                noise, features = student(x, t, text, stage)
                torch.testing.assert_close(noise, alone(x, t, text).sample, rtol=1e-4, atol=1e-5)
            assert {f"down.{stage}", f"up.{stage}"} == set(features)
            with only(student, student.of_stage(stage)):
                student(x, t, text, stage)[0].square().mean().backward()
            touched = {n for n, p in student.named_parameters() if p.grad is not None}
            places = (f"small.down_blocks.{stage}.", f"small.up_blocks.{len(small.up_blocks) - 1 - stage}.")
            assert touched
            assert all(n.startswith(places) for n in touched)
            student.zero_grad(set_to_none=True)
        assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in unet.parameters())


def test_the_features_loss_is_relative_and_leaves_out_what_only_one_has(full_depth_model: Path) -> None:
    unet = load(full_depth_model / "unet")
    watcher = Watcher(unet)
    with torch.no_grad():
        unet(*batch())
    features = watcher.take()
    assert set(features) == {"mid", *(f"{way}.{s}" for way in ("down", "up") for s in range(4))}
    assert watcher.take() == {}
    assert float(feature_loss(features, features)) == 0.0
    doubled = {name: 2 * feature for name, feature in features.items()}
    assert float(feature_loss(doubled, features)) == pytest.approx(len(features), rel=1e-5)
    assert float(feature_loss({**doubled, "mid": doubled["mid"][:1]}, features)) == pytest.approx(
        len(features) - 1, rel=1e-5
    )


@pytest.mark.parametrize("inputs", ["noised", "trajectories"])
def test_a_run_on_the_teacher_s_own_pictures(
    full_depth_model: Path, captions: Path, tmp_path: Path, inputs: str
) -> None:
    """What trains when, what is written, that the original's folder is as before, that no machine's path travels."""
    before = load(full_depth_model / "unet").state_dict()
    noise = 0.0 if inputs == "trajectories" else 1.0
    config = settings(full_depth_model, tmp_path / "run", captions, inputs=inputs, noise_weight=noise)
    folder = train_compact(config)
    trained, chosen = load(folder / "unet"), read_plan(folder / "plan.json")
    start = assemble(load(full_depth_model / "unet"), chosen).state_dict()
    assert trained.config.layers_per_block == [1, 1, 2, 2]
    moved = {n for n, t in trained.state_dict().items() if float((t.float() - start[n]).abs().max()) > 1e-3}
    assert {n.split(".")[0] for n in moved} >= {"conv_in", "down_blocks", "up_blocks", "mid_block", "conv_out"}
    assert all(torch.equal(before[n], t) for n, t in load(full_depth_model / "unet").state_dict().items())
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert {"stage", "final"} <= set(rows[0]["losses"])
    assert ("noise" in rows[-1]["losses"]) == (inputs == "noised")
    assert rows[-1]["unet_calls"] > 0
    for file in ("README.md", "training.json", "plan.json", "unet/config.json"):
        assert str(tmp_path) not in (folder / file).read_text()


def test_pictures_train_it_too(full_depth_model: Path, pictures: Path, tmp_path: Path) -> None:
    folder = train_compact(
        settings(full_depth_model, tmp_path / "run", data=str(pictures), incubation=0.0, plan="bk-tiny")
    )
    assert len(load(folder / "unet").down_blocks) == 3
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert set(rows[-1]["losses"]) == {"loss", "output", "feature", "noise"}


@pytest.mark.slow  # test_distributed.py has it of SUN
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(
    full_depth_model: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of incubation, with pictures of the teacher in the bank."""
    whole = load(train_compact(settings(full_depth_model, tmp_path / "whole", captions)) / "unet").state_dict()
    update, calls = run_module.TrainingRun.update, []

    def interrupted(self: run_module.TrainingRun, *args: torch.Tensor, **named: torch.Tensor) -> None:
        calls.append(self.progress.step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        update(self, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.TrainingRun, "update", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_compact(settings(full_depth_model, tmp_path / "parts", captions))
    parts = load(train_compact(settings(full_depth_model, tmp_path / "parts", captions)) / "unet").state_dict()
    assert all(torch.equal(whole[name], tensor) for name, tensor in parts.items())


def test_experts_train_with_it(
    full_depth_model: Path, captions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage by stage, then all; the files make what was trained, and the U-Net's own has the mean of the routings."""
    drawn, given = [], batch()

    def draw(_config: Any, run: Any, _pipe: Any, small: Any) -> None:
        with run.averaged(), torch.no_grad():
            drawn.append(small(*given).sample)

    monkeypatch.setattr(distillation, "sample_grid", draw)
    folder = train_compact(settings(full_depth_model, tmp_path / "run", captions, experts=3, router_width=8))
    experts, small = read_experts(folder / "experts.safetensors"), load(folder / "unet").float()
    assert experts.temperature == pytest.approx(1)
    start = experts_for(
        load(full_depth_model / "unet"),
        assemble(load(full_depth_model / "unet"), plan_of(folder)),
        plan_of(folder),
        3,
        8,
    )
    new, old = experts.state_dict(), start.state_dict()
    assert new.keys() == old.keys()
    assert all(not torch.equal(new[name].float(), old[name]) for name in new if not name.endswith("centre"))
    assert all(abs(float(layer.centre.sum()) - 1) < 1e-3 for _, layer in experts.by_name())
    with torch.no_grad():
        plain = small(*given).sample
        attach_experts(small, experts)
        mixed = small(*given).sample
    assert torch.allclose(mixed, drawn[0], atol=5e-3)  # written in half precision
    assert float((mixed - plain).abs().max()) > 1e-6
    assert "experts" in (folder / "README.md").read_text()


def plan_of(folder: Path) -> Plan:
    return read_plan(folder / "plan.json")


def test_the_temperature_falls_to_one() -> None:
    config = apply(CompactTrainConfig(), {"temperature": 10.0, "temperature_share": 0.2})
    assert [temperature_at(config, f) for f in (0.0, 0.1, 0.2, 1.0)] == [10.0, 5.5, 1.0, 1.0]
    assert temperature_at(apply(config, {"temperature_share": 0.0}), 0.0) == 1.0


def test_a_run_does_not_go_on_by_a_plan_that_was_exchanged_under_its_name(
    full_depth_model: Path, captions: Path, tmp_path: Path
) -> None:
    unet, file = load(full_depth_model / "unet"), tmp_path / "plan.json"
    config = settings(full_depth_model, tmp_path / "run", captions, plan=str(file), incubation=0.0)
    config.run.steps = 1
    write_plan(plan(unet, named="bk-base"), file)
    train_compact(config)
    write_plan(plan(unet, named="shallow"), file)
    with pytest.raises(ConfigError, match="other settings: the plan removes "):
        train_compact(config)


def test_the_semantic_term_compares_pictures(full_depth_model: Path, captions: Path, tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**small, "vocab_size": 9}, projection_dim=8))
    clip.save_pretrained(tmp_path / "clip")
    config = settings(
        full_depth_model, tmp_path / "run", captions, incubation=0.0, semantic_weight=0.1, semantic_until=1.0,
        resolution=128, semantic_model=str(tmp_path / "clip"),
    )  # fmt: skip
    config.run.steps = 1
    folder = train_compact(config)
    losses = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])["losses"]
    assert 0 < losses["semantic"] < 2


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"inputs": "pictures"}, "inputs is noised or trajectories"),
        ({"inputs": "trajectories"}, "give captions"),
        ({"inputs": "trajectories", "captions": "emoji"}, "noise_weight needs"),
        ({"incubation": 1.5}, "incubation is a share"),
        ({"feature_weight": -1.0}, "feature_weight is 0 or above"),
        ({"noise_weight": 0.0, "output_weight": 0.0, "feature_weight": 0.0}, "nothing would be learned"),
        ({"semantic_weight": 1.0}, "folder of a CLIP"),
        ({"teacher_steps": 0}, "at least 1"),
        ({"guidance_scale": 0.0}, "above 0"),
        ({"resolution": 100}, "multiple of 8"),
        ({"experts": 1}, "experts is 0, or from 2"),
        ({"temperature": 0.5}, "temperature from 1 on"),
    ],
)
def test_settings_that_cannot_work_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check_compact(apply(CompactTrainConfig(), values))


def test_missing_files_are_named(full_depth_model: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"plan\.json"):
        train_compact(settings(full_depth_model, tmp_path / "run", "emoji", plan=str(tmp_path / "plan.json")))
    with pytest.raises(FileNotFoundError, match="give a text file with one a line"):
        train_compact(settings(full_depth_model, tmp_path / "run", tmp_path / "none.txt"))
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(ConfigError, match="has no caption"):
        train_compact(settings(full_depth_model, tmp_path / "run", tmp_path / "empty.txt"))
