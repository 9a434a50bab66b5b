"""Prompts of any length as text states, and what of a prompt is only words."""

from __future__ import annotations

import pytest
import torch

import sun
from sun.pipelines.text import (
    MAX_BLOCKS,
    cut_by_encoder,
    encode_prompts,
    encode_texts,
    read_as_words,
    token_blocks,
)

LONG = " ".join(["a b c d e"] * 20)  # 100 tokens: the tests' tokenizer knows letters alone


def _both(pipe):
    return pipe.tokenizer, pipe.text_encoder


def test_a_short_prompt_is_encoded_as_ever(pipe):
    with torch.no_grad():
        found, other = encode_prompts(*_both(pipe), ["a cat", ""], ["x", "y"])
        assert torch.equal(found, encode_texts(*_both(pipe), ["a cat", ""]))
        assert torch.equal(other, encode_texts(*_both(pipe), ["x", "y"]))


def test_a_long_prompt_is_encoded_in_blocks_of_75_tokens(pipe):
    ids = pipe.tokenizer(LONG, add_special_tokens=False).input_ids
    assert len(ids) == 100
    blocks = token_blocks(pipe.tokenizer, LONG)
    begin, end, pad = pipe.tokenizer.bos_token_id, pipe.tokenizer.eos_token_id, pipe.tokenizer.pad_token_id
    assert blocks == [[begin, *ids[:75], end], [begin, *ids[75:], end, *[pad] * 50]]
    with torch.no_grad():
        found = encode_prompts(*_both(pipe), [LONG])[0]
        expected = torch.cat([pipe.text_encoder(torch.tensor([block]))[0] for block in blocks], dim=1)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("tokens", "blocks"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3)])
def test_the_number_of_blocks(pipe, tokens, blocks):
    assert len(token_blocks(pipe.tokenizer, " ".join("a" * tokens))) == blocks


def test_texts_are_repeated_to_one_length_which_attention_does_not_see(pipe):
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(500)
    with torch.no_grad():
        short, long = encode_prompts(*_both(pipe), ["a cat"], [LONG])
        assert short.shape == long.shape == (1, 154, pipe.unet.config.cross_attention_dim)
        alone = encode_texts(*_both(pipe), ["a cat"])
        assert torch.allclose(pipe.unet(x, t, short).sample, pipe.unet(x, t, alone).sample, atol=1e-5)


def test_a_prompt_beyond_all_measure_is_refused(pipe):
    with pytest.raises(ValueError, match="tokens"):
        encode_prompts(*_both(pipe), ["a " * (75 * MAX_BLOCKS + 1)])


def test_what_a_pipeline_leaves_out_is_told_of_both_prompts(pipe, adapter):
    assert cut_by_encoder(pipe.tokenizer, "a b") == ""
    sun.attach(pipe, adapter)
    options = {"num_inference_steps": 1, "output_type": "latent"}
    with pytest.warns(UserWarning, match="left out") as told:
        pipe(LONG, negative_prompt=LONG.replace("e", "z"), **options)
    said = " ".join(str(w.message) for w in told)
    assert cut_by_encoder(pipe.tokenizer, LONG) in said
    assert "z a b c d z" in said


def test_long_texts_steer_a_pipeline_with_sun(pipe, adapter):
    """The last word of the positive and of the negative prompt, beyond the first block, change the picture."""
    sun.attach(pipe, adapter)

    def run(prompt: str, negative: str) -> torch.Tensor:
        with torch.no_grad():
            positive, negatives = encode_prompts(*_both(pipe), [prompt], [negative])
        return pipe(
            prompt_embeds=positive, negative_prompt_embeds=negatives, num_inference_steps=2, output_type="latent",
            generator=torch.Generator().manual_seed(1),
        ).images  # fmt: skip

    plain = run(LONG, LONG)
    assert (run(f"{LONG} q", LONG) - plain).abs().max() > 1e-4
    assert (run(LONG, f"{LONG} q") - plain).abs().max() > 1e-5


def test_clip_skip_works_with_sun_attached(pipe, adapter):
    """diffusers asks the text encoder for a layer that transformers 5.6 took away."""
    sun.attach(pipe, adapter)
    run = dict(num_inference_steps=1, output_type="latent", negative_prompt="b")  # noqa: C408
    made = [pipe("a", **run, generator=torch.Generator().manual_seed(1), clip_skip=skip).images for skip in (None, 1)]
    assert torch.isfinite(made[1]).all()
    assert not torch.equal(*made)
    names = [name for name, _ in pipe.text_encoder.named_modules()]
    assert len(names) == len(set(names))
    assert "text_model" not in dict(pipe.text_encoder.named_children()) or hasattr(
        type(pipe.text_encoder), "text_model"
    )


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a cat <lora:ink:0.8>", "<lora:ink:0.8>"),
        ("<lyco:ink:1> a", "<lyco:ink:1>"),
        ("<hypernet:x:1>", "<hypernet:x:1>"),
        ("a (red:1.3) cat", "(red:1.3)"),
        ("(masterpiece, best quality:1.2)", "(masterpiece, best quality:1.2)"),
        ("(red:-1)", "(red:-1)"),
        ("(red: .5)", "(red: .5)"),
        ("((red))", "((red))"),
        ("[cat:dog:0.5]", "[cat:dog:0.5]"),
        ("embedding:easynegative", "embedding:easynegative"),
        ("a BREAK b", "BREAK"),
        ("a AND b", "AND"),
        ("{red|blue} cat", "{red|blue}"),
        ("__colours__ cat", "__colours__"),
    ],
)
def test_what_other_programs_act_on_is_told_to_be_words(prompt, part):
    (said,) = read_as_words(prompt)
    assert repr(part) in said


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat (red)",
        "a cat, sitting",
        "time 12:30",
        "a band and a BRAND",
        "smile :)",
        "1.2",
        "ratio 16:9",
        "[a]",
        "{a}",
        "",
    ],
)
def test_plain_words_are_let_be(prompt):
    assert read_as_words(prompt) == []
