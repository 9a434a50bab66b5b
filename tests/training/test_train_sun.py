"""SUN training end to end on a tiny model: what trains, what is written, and what happens when it is interrupted."""

from __future__ import annotations

import json
import math
import tarfile
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

import sun
from sun.pipelines.attach import attach
from sun.training.config import RunConfig, SunTrainConfig
from sun.training.data.captioned import list_folder
from sun.training.student import Student, make_adapter
from sun.training.sun import train_sun


def config(model: Path, data: Path, output: Path, **run: object) -> SunTrainConfig:
    settings = {"steps": 3, "batch_size": 2, "ema_decay": 0.5, "precision": "fp32", **run}
    return SunTrainConfig(
        run=RunConfig(output=str(output), **settings), model=str(model), data=str(data), substeps=2,
        replace_probability=0.5, max_negative_phrases=5, guidance_scale=3.0,
        resolution=64,
    )  # fmt: skip


@pytest.mark.parametrize("positive", [True, False])
def test_gradients_reach_the_adapter_alone(full_depth_model: Path, positive: bool) -> None:
    unet = UNet2DConditionModel.from_pretrained(full_depth_model / "unet").requires_grad_(False)
    adapter = make_adapter(SunTrainConfig(positive_branch=positive), unet)
    attach(unet, adapter)
    student = Student(unet, adapter)
    text = torch.randn(2, 2, 77, 32)
    student(torch.randn(2, 4, 4, 4), torch.tensor([999, 249]), text[0], text[1]).square().mean().backward()
    assert all(p.grad is None for p in unet.parameters())
    trained = dict(student.named_parameters())
    assert len(trained) == 16 * (8 if positive else 4)
    # A key projection moves the output only through the softmax, so its gradient may be small, never absent.
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


def test_an_adapter_that_takes_the_scale_starts_in_proportion_to_what_guidance_adds(full_depth_model: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(full_depth_model / "unet")
    made = make_adapter(SunTrainConfig(guidance_scale=2.0, guidance_range=(1.0, 4.0)), unet)
    layer = made.sun_layers()[0]
    for scale in (1.5, 2.0, 3.0):
        found = layer.factor("alpha_neg", made.guidance(scale)).mean() / layer.alpha_neg.mean()
        assert found.item() == pytest.approx(scale - 1, rel=0.1)


def test_a_run_changes_only_the_adapter_and_writes_a_loadable_file(
    tiny_model: Path, pictures: Path, tmp_path: Path
) -> None:
    before = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    settings = config(tiny_model, pictures, tmp_path / "run")
    path = train_sun(settings)
    adapter = sun.SunAdapter.load(path)
    assert adapter.info.guidance_scale == 3.0
    assert adapter.info.stage_length == 0.25
    assert adapter.info.training["substeps"] == 2
    assert adapter.info.training["step"] == 3
    assert str(tmp_path) not in path.read_bytes()[:20000].decode("latin-1")
    assert adapter.info.training["data"] == pictures.name
    start = make_adapter(settings, before)
    moved = [
        (a.float() - b).abs().max()
        for a, b in zip(adapter.state_dict().values(), start.state_dict().values(), strict=True)
    ]
    assert max(moved) > 1e-4
    assert list((tmp_path / "run" / "samples").glob("*.png"))


def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sun.training import run as run_module

    settings = config(tiny_model, pictures, tmp_path / "run", checkpoint_minutes=0.0)
    update, calls = run_module.TrainingRun.update, []

    def interrupted(self: run_module.TrainingRun, *args: torch.Tensor, **named: torch.Tensor) -> None:
        calls.append(self.progress.step)
        if len(calls) == 3:
            raise KeyboardInterrupt
        update(self, *args, **named)

    monkeypatch.setattr(run_module.TrainingRun, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_sun(settings)
    assert calls == [0, 1, 2]
    train_sun(settings)
    assert calls == [0, 1, 2, 2]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 3
    train_sun(settings)  # finished: nothing is trained, and what is known of the run stays known
    assert calls == [0, 1, 2, 2]
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3
    assert last["losses"] == rows[-1]["losses"] != {}


def test_a_loss_that_is_not_finite_stops_the_run_with_advice(
    tiny_model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sun.training.targets.row_errors", lambda predicted, *_: predicted.flatten(1).mean(1) * math.nan
    )
    with pytest.raises(FloatingPointError, match="learning rate"):
        train_sun(config(tiny_model, pictures, tmp_path / "run"))


def test_webdataset_shards(tiny_model: Path, pictures: Path, tmp_path: Path) -> None:
    shard = tmp_path / "shard-000.tar"
    with tarfile.open(shard, "w") as tar:
        for file in sorted(pictures.iterdir()):
            tar.add(file, arcname=file.name)
    assert train_sun(config(tiny_model, shard, tmp_path / "run", steps=1)).exists()


def test_a_folder_without_captions_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl"):
        list_folder(tmp_path)


def test_a_folder_with_a_metadata_file(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "an owl"}\n')
    assert list_folder(tmp_path) == [(tmp_path / "a.png", "an owl")]


def test_a_model_that_is_no_diffusers_folder_says_so(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model_index\.json"):
        train_sun(config(tmp_path, pictures, tmp_path / "run"))
