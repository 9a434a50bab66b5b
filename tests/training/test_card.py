"""Cards: what is written beside trained weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sun.training.card import card, training_section, write_table_card
from sun.training.config import RunConfig, SunTrainConfig
from sun.training.run import start_run


def finished(tmp_path: Path, **run: Any) -> tuple[Any, SunTrainConfig]:
    config = SunTrainConfig(
        run=RunConfig(output=str(tmp_path / "run"), steps=2, precision="fp32", **run), model=str(tmp_path / "mine")
    )
    layer = nn.Linear(2, 2)
    training = start_run(config, {"layer": layer})
    for _ in training.steps():
        training.update(layer(torch.ones(1, 2)).square().mean())
    return training, config


def test_a_card_has_the_matter_of_model_hubs_first_and_no_holes() -> None:
    text = card("A name", ["One.\n", "", "Two."], license="mit", tags="[lora]")
    assert text == "---\nlicense: mit\ntags: [lora]\n---\n\n# A name\n\nOne.\n\nTwo.\n"
    assert card("A name", ["One."]) == "# A name\n\nOne.\n"


def test_cards_count_the_batches_that_are_accumulated(tmp_path: Path) -> None:
    run, config = finished(tmp_path, batch_size=3, accumulate=2)
    assert "2 steps of batch 1 x 3 x 2," in training_section(run, "sun train")
    write_table_card(run, config, "A name", {}, {}, "Use it.")
    assert "| steps | 2 of batch 1 x 3 x 2 |" in (run.folder / "README.md").read_text(encoding="utf-8")


def test_a_table_card_and_its_settings_say_the_same_and_nothing_of_this_machine_s_folders(tmp_path: Path) -> None:
    run, config = finished(tmp_path, seed=7)
    write_table_card(run, config, "A name", {"rank": 4}, {"base": "mine", "rank": 4}, "Use it.")
    text = (run.folder / "README.md").read_text(encoding="utf-8")
    content = json.loads((run.folder / "training.json").read_text(encoding="utf-8"))
    assert "| rank | 4 |" in text
    assert content["rank"] == 4
    assert "| seed | 7 |" in text
    assert content["settings"]["run"]["seed"] == 7
    assert f"loss {run.progress.losses['loss']:.4f}" in text
    assert content["progress"]["losses"] == run.progress.losses
    assert content["base_model"] == "mine"
    assert str(tmp_path) not in text + json.dumps(content)
