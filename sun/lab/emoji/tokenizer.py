"""The vocabulary of Emoji Diffusion: byte-pair encoding in CLIP's format, learned from its captions."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from .scenes import random_scene
from .sources import Emoji

CLIP_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def build_tokenizer(emojis: list[Emoji], size: int, folder: Path) -> CLIPTokenizer:
    """Train a byte-level BPE vocabulary in CLIP's format on captions of every emoji and save it."""
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    rng = random.Random(0)
    captions = [random_scene(emojis, rng).caption for _ in range(20000)] + [
        n for e in emojis for n in (e.name, *e.aliases)
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False, min_frequency=1
    )
    bpe.train_from_iterator(captions, trainer)
    state = json.loads(bpe.to_str())["model"]
    # Every byte must exist alone and word-final, as in CLIP, so that any text can be spelled.
    base = [*alphabet, *(a + "</w>" for a in alphabet)]
    merged = [left + right for left, right in state["merges"]]
    kept = size - len(base) - 2
    tokens = [*base, *dict.fromkeys(m for m in merged if m not in base)][: len(base) + kept]
    known = set(tokens)
    merges = [(a, b) for a, b in state["merges"] if a in known and b in known and a + b in known]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(f"{a} {b}" for a, b in merges) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=77,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    return tokenizer
