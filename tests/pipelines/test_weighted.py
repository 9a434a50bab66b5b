"""Prompts with weights, read by compel: in both prompts, of any length, and without the library a sentence."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from more_pipelines import draw
from tiny import make_adapter

import sun
from sun.pipelines.text import encode_prompts
from sun.pipelines.weighted import encode_weighted
from sun.runtimes.stand_ins import TextEncoderStandIn

LONG = " ".join("a" * 100)


def both(pipe: Any) -> tuple[Any, Any]:
    return pipe.tokenizer, pipe.text_encoder


@torch.no_grad()
def test_texts_without_weights_are_what_they_are_without_the_library(pipe: Any) -> None:
    pytest.importorskip("compel")
    for mine, theirs in zip(encode_weighted(*both(pipe), ["a cat", LONG], [""]),
                            encode_prompts(*both(pipe), ["a cat", LONG], [""]), strict=True):  # fmt: skip
        assert mine.shape == theirs.shape == (len(mine), 154, 16)
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_weights_in_both_prompts_reach_the_picture(pipe: Any) -> None:
    pytest.importorskip("compel")
    sun.attach(pipe, make_adapter(pipe.unet))

    def run(prompt: str, negative: str) -> torch.Tensor:
        with torch.no_grad():
            positive, negatives = encode_weighted(*both(pipe), [prompt], [negative])
        return draw(pipe, None, None, prompt_embeds=positive, negative_prompt_embeds=negatives)

    plain = run("a cat", "a dog")
    assert (run("a (cat)1.5", "a dog") - plain).abs().max() > 1e-3
    assert (run("a cat", "a dog++") - plain).abs().max() > 1e-3
    assert (run(f"{LONG} (cat)1.5", "a dog") - run(f"{LONG} cat", "a dog")).abs().max() > 1e-4


def test_a_missing_library_is_named_with_what_to_install(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compel", None)
    with pytest.raises(ValueError, match=r"not installed.*pip install compel.*extra `weights`"):
        encode_weighted(*both(pipe), ["a (cat)1.5"])


def test_a_prompt_that_cannot_be_read_is_quoted(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compel = pytest.importorskip("compel")

    def fail(*_: Any) -> None:
        raise RuntimeError("brackets")

    monkeypatch.setattr(compel.Compel, "build_conditioning_tensor", fail)
    with pytest.raises(ValueError, match=r"'a \(cat' could not be read with weights \(RuntimeError: brackets\)"):
        encode_weighted(*both(pipe), ["a (cat"])
    with pytest.raises(ValueError, match="tokens; at most"):
        encode_weighted(*both(pipe), [" ".join("a" * 2500)])


@torch.no_grad()
def test_the_text_encoder_of_an_exported_model_will_do(pipe: Any) -> None:
    pytest.importorskip("compel")

    def run(given: Any) -> list[Any]:
        return [pipe.text_encoder(torch.from_numpy(given["input_ids"]))[0].numpy()]

    exported = TextEncoderStandIn(pipe.text_encoder.config, run)
    (found,), (expected,) = (
        encode_weighted(pipe.tokenizer, te, ["a (cat)1.5"]) for te in (exported, pipe.text_encoder)
    )
    torch.testing.assert_close(found, expected)
