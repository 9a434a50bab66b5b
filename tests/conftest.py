"""Fixtures every test may use: tiny Stable Diffusion pipelines (see tiny.py) and a log of a module's calls."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.pop("COLUMNS", None)  # given to test processes; rich would keep that width for good

import pytest
import torch
from tiny import TEXT_WIDTH, CallLog, make_adapter, make_short_unet, make_unet


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-texts", action="store_true", help="write locales/en/nodeDefs.json from the nodes")
    parser.addoption("--screenshots", metavar="DIR", help="the browser tests write screenshots to this folder")


_modules_at_last_freeze = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What imports made stays; else the collector looks through all of it again every few tests."""
    global _modules_at_last_freeze
    if len(sys.modules) > _modules_at_last_freeze + 200:
        gc.freeze()
        _modules_at_last_freeze = len(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP tokenizer that knows single letters."""
    folder = tmp_path_factory.mktemp("tokenizer")
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    words = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def make_pipeline(tokenizer_folder: Path) -> Callable[..., Any]:
    """``make_pipeline(cls=StableDiffusionPipeline, unet=None)`` -> a new pipeline, with a ControlNet if needed."""

    def make(cls: Any = None, unet: Any = None, seed: int = 0) -> Any:
        from diffusers import AutoencoderTiny, ControlNetModel, PNDMScheduler, StableDiffusionPipeline
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        cls = cls or StableDiffusionPipeline
        unet = unet if unet is not None else make_unet(seed)
        torch.manual_seed(seed + 1)
        tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder)
        text_config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        parts: dict[str, Any] = {
            "vae": AutoencoderTiny(
                encoder_block_out_channels=(8, 8, 8, 8),
                decoder_block_out_channels=(8, 8, 8, 8),
                num_encoder_blocks=(1, 1, 1, 1),
                num_decoder_blocks=(1, 1, 1, 1),
            ).eval(),
            "text_encoder": CLIPTextModel(text_config).eval(),
            "tokenizer": tokenizer,
            "unet": unet,
            # Stable Diffusion 1.5's own scheduler file
            "scheduler": PNDMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                skip_prk_steps=True,
                set_alpha_to_one=False,
                steps_offset=1,
            ),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        if "ControlNet" in cls.__name__:
            controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 4, 4)).eval()
            with torch.no_grad():
                for parameter in controlnet.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))  # its last layers start at zero
            parts["controlnet"] = controlnet
        pipe = cls(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


@pytest.fixture(scope="session")
def make_short_pipeline(make_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    """The same, with a U-Net of two stages with a layer each unless another is given.

    Modules whose tests need no more of a U-Net name it ``make_pipeline``.
    """

    def make(cls: Any = None, unet: Any = None, seed: int = 0) -> Any:
        return make_pipeline(cls, make_short_unet(seed) if unet is None else unet, seed)

    return make


@pytest.fixture
def count_calls() -> Iterator[Callable[[Any], CallLog]]:
    """``count_calls(module)`` -> a ``CallLog`` that is taken off after the test."""
    logs: list[CallLog] = []

    def count(module: Any) -> CallLog:
        logs.append(CallLog(module))
        return logs[-1]

    yield count
    for log in logs:
        log.handle.remove()


@pytest.fixture
def unet() -> Any:
    return make_unet()


@pytest.fixture
def pipe(make_pipeline: Callable[..., Any]) -> Any:
    return make_pipeline()


@pytest.fixture
def adapter(unet: Any) -> Any:
    return make_adapter(unet)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    return Path(__file__).parent / "data"
