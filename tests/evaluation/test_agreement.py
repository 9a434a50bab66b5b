"""Agreement: are the background, the object, its colours and what the negative names as they were asked for?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image, ImageDraw
from small_models import EMOJIS
from torch import Tensor

from sun.common import worlds
from sun.common.settings import ConfigError
from sun.evaluation import EvaluateConfig, Sampler, evaluate, report
from sun.evaluation.agreement import CONTRADICTING, PARTS, SETS, all_right
from sun.evaluation.tables import markdown
from sun.lab.emoji.agreement import EmojiJudge, EmojiQuestion
from sun.lab.emoji.main_colours import derive_main_colours, main_colours, pixels_to_lab, shown_background, write_table
from sun.lab.emoji.scenes import BACKGROUNDS
from sun.lab.emoji.sources import Emoji, load_metadata
from sun.lab.emoji.vae import to_tensor
from sun.surgery import from_unet

BY_NAME = {emoji.name: emoji for emoji in load_metadata("wide")}
FROG, AVOCADO, GHOST, APPLE = (BY_NAME[name] for name in ("frog face", "avocado", "ghost", "red apple"))
GREEN, DARK = (92, 145, 59), (41, 47, 51)


def paint(background: str | tuple[int, int, int], *discs: tuple[tuple[int, int, int], float]) -> Tensor:
    """[1, 3, 128, 128] in -1..1: discs one on another, each of a colour and a radius (share of the side)."""
    tone = BACKGROUNDS[background] if isinstance(background, str) else background
    picture = Image.new("RGB", (128, 128), tone)
    pen = ImageDraw.Draw(picture)
    for colour, radius in discs:
        pen.ellipse([64 - 128 * radius, 64 - 128 * radius, 64 + 128 * radius, 64 + 128 * radius], fill=colour)
    return to_tensor([picture])


def judged(pixels: Tensor, emoji: Emoji, background: str = "", **more: Any) -> dict[str, float]:
    found = EmojiJudge().judge(pixels, [EmojiQuestion(emoji, background, **more)])
    return {part: float(values[0]) for part, values in found.items()}


def frog(background: str | tuple[int, int, int], skin: tuple[int, int, int] = GREEN) -> Tensor:
    return paint(background, (skin, 0.36), (DARK, 0.08))


def test_a_right_picture_is_right() -> None:
    found = judged(frog("yellow"), FROG, "yellow")
    assert (found["background"], found["colour"]) == (1, 1)
    assert math.isnan(found["negative"])
    assert math.isnan(found["object"]), "no network to name it"


@pytest.mark.parametrize("painted", [name for name in BACKGROUNDS if name != "yellow"])
def test_another_background_is_wrong(painted: str) -> None:
    assert judged(frog(painted), FROG, "yellow")["background"] == 0
    assert judged(frog(painted), FROG, painted)["background"] == 1


def test_a_background_that_is_no_single_colour_is_wrong() -> None:
    pixels = frog("yellow")
    for place, name in enumerate(("red", "blue", "green", "pink")):
        pixels[..., 32 * place : 32 * place + 32, :20] = paint(name)[..., :32, :20]
        pixels[..., 32 * place : 32 * place + 32, -20:] = paint(name)[..., :32, :20]
    pixels[..., :10, :], pixels[..., -10:, :] = paint("red")[..., :10, :], paint("blue")[..., :10, :]
    assert judged(pixels, FROG, "yellow")["background"] == 0


@pytest.mark.parametrize("skin", [(214, 48, 49), (52, 104, 205), (16, 16, 18), (247, 168, 196), (138, 74, 178)])
def test_an_object_in_another_colour_is_wrong(skin: tuple[int, int, int]) -> None:
    assert judged(frog("yellow", skin), FROG, "yellow")["colour"] == 0


@pytest.mark.parametrize("skin", [(70, 115, 45), (120, 170, 85), (80, 150, 40)])
def test_a_paler_or_darker_tone_of_its_colour_is_right(skin: tuple[int, int, int]) -> None:
    assert judged(frog("yellow", skin), FROG, "yellow")["colour"] == 1


def test_an_empty_picture_shows_no_object() -> None:
    assert judged(paint("yellow"), FROG, "yellow")["colour"] == 0


def test_an_avocado_is_its_skin_its_flesh_and_its_stone() -> None:
    skin, flesh, stone = (62, 114, 29), (166, 212, 136), (138, 75, 56)
    whole = paint("white", (skin, 0.4), (flesh, 0.32), (stone, 0.12))
    assert judged(whole, AVOCADO, "white")["colour"] == 1
    painted = paint("white", ((214, 48, 49), 0.4), ((247, 168, 196), 0.32), (stone, 0.12))
    assert judged(painted, AVOCADO, "white")["colour"] == 0


def test_objects_without_a_hue_are_told_by_their_lightness() -> None:
    white = (225, 232, 237)
    assert judged(paint("orange", (white, 0.35), (DARK, 0.06)), GHOST, "orange")["colour"] == 1
    assert judged(paint("orange", (DARK, 0.35), (white, 0.06)), GHOST, "orange")["colour"] == 0
    assert judged(paint("orange", ((52, 104, 205), 0.35)), GHOST, "orange")["colour"] == 0


def test_nothing_is_said_of_colours_that_the_background_has() -> None:
    assert math.isnan(judged(paint("white", (DARK, 0.1)), GHOST, "white")["colour"])


def test_what_the_negative_names_may_not_be_there() -> None:
    assert judged(frog("white"), FROG, unwanted="white")["negative"] == 0
    assert judged(frog("blue"), FROG, unwanted="white")["negative"] == 1
    assert math.isnan(judged(frog("blue"), FROG, unwanted="white")["background"]), "none was named"


class Namer:
    """Names the object that is set, whatever the picture."""

    def __init__(self, *names: str):
        self.names = names

    def image_features(self, pixels: Tensor) -> Tensor:
        return torch.ones(len(pixels), 1)

    def text_features(self, texts: list[str]) -> Tensor:
        order = [next((i for i, name in enumerate(self.names) if text.startswith(f"{name},")), 99) for text in texts]
        return torch.tensor([[-float(place)] for place in order])


def test_a_network_names_objects_and_finds_the_unwanted_one() -> None:
    question = EmojiQuestion(FROG, "yellow", APPLE, "blue")
    for names, right, absent in ((("frog face",), 1, 1), (("red apple", "frog face"), 1, 0), (("red apple",), 0, 0)):
        found = EmojiJudge(Namer(*names, "owl", "pizza", "rocket", "ghost")).judge(frog("yellow"), [question])
        assert (float(found["object"][0]), float(found["negative"][0])) == (right, absent)


def test_an_unwanted_object_alone_is_judged_too() -> None:
    question = EmojiQuestion(FROG, "yellow", APPLE)
    for first, absent in (("frog face", 1), ("red apple", 0)):
        names = (first, "frog face", "red apple", "owl", "pizza", "rocket", "ghost")
        found = EmojiJudge(Namer(*names)).judge(frog("yellow"), [question])
        assert float(found["negative"][0]) == absent
    assert math.isnan(EmojiJudge().judge(frog("yellow"), [question])["negative"][0]), "no network to name it"


def test_questions_are_the_same_for_any_count_and_can_be_judged() -> None:
    judge = EmojiJudge()
    many, few, contradicting = (
        judge.questions(count, 5, kind) for count, kind in ((130, SETS[1]), (9, SETS[1]), (130, CONTRADICTING))
    )
    assert many[:9] == few
    plain = judge.questions(130, 5, SETS[0])
    assert len({q.emoji.code for q in plain[: len(judge.emojis)]}) == len(judge.emojis), "each once before one again"
    assert not any(q.negative for q in plain)
    assert all(q.prompt == f"{q.emoji.name}, {q.background} background" for q in plain)
    assert [q.emoji for q in many] == [q.emoji for q in plain]
    assert [q.prompt for q in contradicting] == [q.prompt for q in plain]
    for asked in many[::2]:
        assert asked.other is not None
        assert asked.negative == asked.other.name, "names no background beside the prompt's"
        assert asked.other.code != asked.emoji.code
    for asked in contradicting:
        assert asked.negative.endswith(f", {asked.unwanted} background")
        assert asked.unwanted != asked.background
    assert all(q.prompt == q.emoji.name and q.negative == "white background" for q in many[1::2])
    for asked in plain:
        tone = pixels_to_lab(paint(asked.background))[0, 0, 0]
        assert main_colours(asked.emoji.code, "twemoji").beside(tone)[1] > 0.5


def test_every_background_is_told_from_the_others() -> None:
    for name in BACKGROUNDS:
        shown, share, _ = shown_background(pixels_to_lab(frog(name, (200, 200, 40)))[0])
        assert (shown, share) == (name, 1.0)


def test_an_unknown_style_is_named() -> None:
    with pytest.raises(ConfigError, match=r"style 'loud' are not known.*twemoji, openmoji"):
        EmojiJudge(style="loud")


def test_main_colours_are_derived_from_artwork(packages: Path, tmp_path: Path) -> None:
    picture = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    pen.rectangle([0, 0, 63, 31], fill=(255, 0, 0, 255))
    pen.rectangle([0, 32, 31, 63], fill=(0, 0, 255, 255))
    assert derive_main_colours(picture) == "ff0000:67 0000ff:33"
    table = write_table(tmp_path / "table.json", ("twemoji",)).read_text()
    assert f'"{EMOJIS[0].code}": {{"twemoji": "ff0000:100"}}' in table


# --- in an evaluation ------------------------------------------------------------------------------------------------


class Hue:
    """A judge for tiny models: a picture is right where its first pixel is bright."""

    print = "hue"

    def __init__(self, network: Any = None, style: str = ""):
        self.seen: list[int] = []

    def questions(self, count: int, seed: int, kind: str) -> Sequence[EmojiQuestion]:
        emoji, other = EMOJIS[:2]
        unwanted = "blue" if kind == CONTRADICTING else ""
        return [EmojiQuestion(emoji, "red", None if kind == "plain" else other, unwanted) for _ in range(count)]

    def judge(self, pixels: Tensor, questions: Sequence[Any]) -> dict[str, Tensor]:
        bright = (pixels[:, 0, 0, 0] > 0).float()
        unknown = [torch.full_like(bright, torch.nan) for _ in range(2)]
        return {"background": bright, "object": unknown[0], "colour": torch.ones_like(bright), "negative": unknown[1]}


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, short_reference: str) -> EvaluateConfig:
    monkeypatch.setattr(worlds, "find", lambda world, what: {"judge": Hue}.get(what) or real(world, what))
    pipe = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    from_unet(pipe.unet, alpha=0.5).save(tmp_path / "adapter.safetensors")
    (tmp_path / "prompts.txt").write_text("polar bear | snake\nred apple | \n")
    return EvaluateConfig(
        model=str(tiny_model), adapter=str(tmp_path / "adapter.safetensors"), methods=("sun-2", "ddim-2"),
        prompts_file=str(tmp_path / "prompts.txt"), prompts=2, measure=("agreement",), agreement_prompts=20,
        agreement_scales=(2.0, 1.0), guidance_scale=3.0, precision="fp32", features="none",
        output=str(tmp_path / "report"),
    )  # fmt: skip


real = worlds.find


def test_agreement_is_in_the_figures_the_tables_and_a_plot(config: EvaluateConfig) -> None:
    found = report(config)
    model = next(iter(found["models"].values()))
    assert model["agreement_pictures"] == 40
    for row in (model["reference"], *model["methods"].values()):
        assert 0 <= row["agreement"] <= 1
        assert set(row["agreement_parts"]) == set(PARTS)
        assert row["agreement_parts"]["object"] is None
        assert row["agreement_parts"]["colour"] == 1
        sets = row["agreement_sets"]
        assert row["agreement"] == pytest.approx((sets["plain"] + sets["with_negatives"]) / 2)
    by_scale = model["agreement_by_guidance"]
    assert list(by_scale["rows"]) == ["1", "2"]
    assert by_scale["rows"][f"{by_scale['best']:g}"]["agreement"] == max(
        row["agreement"] for row in by_scale["rows"].values()
    )
    tables = markdown(found)
    assert "negative. w = 3.\n" in tables
    assert "| w | right in all | without negatives | with negatives | with contradicting negatives" in tables
    assert set(by_scale["rows"]["2"]["agreement_sets"]) == {"plain", "with_negatives", "contradicting"}
    assert "for want of an image-text model: named object" in tables
    plot = next(Path(config.output).glob("*/agreement-vs-guidance.png"))
    assert Image.open(plot).width > 100


@pytest.mark.slow  # three reports; the figures have a quicker test
def test_guidance_scales_are_really_drawn_and_kept(config: EvaluateConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[str, float, int]] = []
    call = Sampler.__call__

    def noted(self: Sampler, method: Any, prompts: list[str], *rest: Any, **more: Any) -> Any:
        drawn.append((str(method), self.w, len(prompts)))
        return call(self, method, prompts, *rest, **more)

    monkeypatch.setattr(Sampler, "__call__", noted)
    config.methods = ("sun-2",)
    first = report(config)
    assert {(name, w) for name, w, _ in drawn} == {
        ("dpmpp-5", 3.0),
        ("sun-2", 3.0),
        ("cond-5", 1.0),
        ("dpmpp-5", 2.0),
    }
    drawn.clear()
    config.agreement_prompts = 24
    report(config)
    counts = {count for _, _, count in drawn}
    assert counts == {8, 12}, "the first 16 pictures are there; only blocks that are larger now are drawn anew"
    config.agreement_prompts = 20
    drawn.clear()
    assert report(config)["models"] == first["models"]
    assert not drawn


def test_without_a_folder_agreement_is_measured_too(config: EvaluateConfig) -> None:
    config.output, config.agreement_scales, config.agreement_prompts = "", (), 2
    assert "agreement" in evaluate(config)["methods"]["sun-2"]
    config.agreement_scales = (0.5,)
    with pytest.raises(ConfigError, match="1 or more"):
        evaluate(config)


def test_a_picture_is_right_where_nothing_judged_is_wrong() -> None:
    nan = torch.nan
    parts = {
        "background": torch.tensor([1.0, 1.0, nan, nan]),
        "object": torch.tensor([1.0, 0.0, nan, nan]),
        "colour": torch.tensor([1.0, 1.0, 1.0, nan]),
        "negative": torch.tensor([nan, 1.0, nan, nan]),
    }
    found = all_right(parts)
    assert found[:3].tolist() == [1, 0, 1]
    assert found[3].isnan()
