"""torch.compile on a pipeline with SUN: one whole graph, none anew from step to step, prompt to prompt, or for another
strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from tiny import make_adapter, make_short_unet

import sun


@pytest.fixture
def compiler() -> Iterator[Any]:
    """torch.compile's counters, of this test alone."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    yield counters
    torch._dynamo.reset()


@torch.no_grad()
@pytest.mark.parametrize("compiled_first", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_compiled_pipeline_is_compiled_once(
    make_pipeline: Callable[..., Any], compiler: Any, compiled_first: bool
) -> None:
    """fullgraph: a graph break inside the U-Net would raise."""
    graphs: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def draw(prompt: str, negative: str, steps: int = 4) -> torch.Tensor:
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        options = {"num_inference_steps": steps, "latents": latents, "output_type": "latent"}
        return pipe(prompt, negative_prompt=negative, **options).images

    unet = make_short_unet()
    adapter = make_adapter(unet)
    pipe = make_pipeline(unet=unet)
    sun.attach(pipe, adapter)
    eager = draw("a cat", "blurry")
    if compiled_first:
        sun.detach(pipe)
    pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)
    if compiled_first:
        sun.attach(pipe, adapter)
    torch.testing.assert_close(draw("a cat", "blurry"), eager)
    assert len(graphs) == 1  # four steps
    other = draw("a dog", "", steps=3)
    sun.attach(pipe, adapter, strength=0.5)
    weaker = draw("a cat", "blurry")
    assert len(graphs) == 1
    assert sum(compiler["graph_break"].values()) == 0
    assert not torch.equal(other, eager)
    assert not torch.equal(weaker, eager)
