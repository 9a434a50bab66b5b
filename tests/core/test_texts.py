"""K and V of a run's texts: kept only while nothing they depend on changes; in pipelines, for one run."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from tiny import TEXT_WIDTH, make_adapter, make_unet

import sun
import sun.pipelines.attach as attach_module
from sun import SunAdapter
from sun.adapter import SunLayer
from sun.conditioning import RunTexts
from sun.pipelines.attach import texts_for


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """The K of each layer each time texts are projected, held weakly."""
    seen: list[weakref.ref] = []
    original = SunLayer.texts

    def texts(self: SunLayer, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        seen.append(weakref.ref(result.branches[0].key))
        return result

    monkeypatch.setattr(SunLayer, "texts", texts)
    return seen


def small() -> SunAdapter:
    torch.manual_seed(0)
    adapter = SunAdapter([8, 16], 12, positive=True)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter.eval()


def texts(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(1, 5, 12), torch.randn(1, 7, 12)


@torch.no_grad()
def test_equal_texts_are_projected_once(made):
    run, adapter, (negative, positive) = RunTexts(), small(), texts()
    first = run(adapter, [(1.0, negative)], positive)
    assert run(adapter, [(1.0, negative.clone())], positive.clone()) is first
    assert len(made) == 2
    run.clear()
    assert len(run) == 0


@torch.no_grad()
@pytest.mark.parametrize(
    "change",
    [
        lambda a, n, p: (a, [(1.0, n * 1.001)], p, {}),
        lambda a, n, p: (a, [(1.0, n)], p * 1.001, {}),
        lambda a, n, p: (a, [(1.0, n.expand(2, -1, -1))], p.expand(2, -1, -1), {}),
        lambda a, n, p: (a, [(0.5, n), (0.5, n)], p, {}),
        lambda a, n, p: (a, [(1.0, n)], p, {"strength": 0.5}),
        lambda a, n, p: (small(), [(1.0, n)], p, {}),
        lambda a, n, p: (a.double(), [(1.0, n.double())], p.double(), {}),
        lambda a, n, p: (a, [(1.0, n)], p, {"key": "another region"}),
    ],
)
def test_whatever_changes_them_makes_them_new(made, change):
    run, adapter, (negative, positive) = RunTexts(), small(), texts()
    run(adapter, [(1.0, negative)], positive)
    other, negatives, positive, options = change(adapter, negative, positive)
    new = run(other, negatives, positive, **options)
    assert len(made) == 4
    options.pop("key", None)
    expected = other.texts(negatives, positive, **options)
    for mine, theirs in zip(new.layers, expected.layers, strict=True):
        assert torch.equal(mine.shift, theirs.shift)
        assert all(torch.equal(a.key, b.key) and torch.equal(a.scale, b.scale) for a, b in
                   zip(mine.branches, theirs.branches, strict=True))  # fmt: skip


@torch.no_grad()
def test_weights_that_change_hooks_and_training_make_them_new(made):
    run, adapter, (negative, positive) = RunTexts(), small(), texts()

    def projections() -> int:
        before = len(made)
        run(adapter, [(1.0, negative)], positive)
        return (len(made) - before) // 2

    assert [projections(), projections()] == [1, 0]
    adapter.sun_layers()[1].alpha_pos.mul_(2.0)
    assert [projections(), projections()] == [1, 0]
    adapter.sun_layers()[0].to_v_neg.weight = torch.nn.Parameter(torch.zeros(8, 12))
    assert [projections(), projections()] == [1, 0]
    handle = adapter.sun_layers()[0].to_k_pos.register_forward_hook(lambda *_: None)
    assert [projections(), projections()] == [1, 1]
    handle.remove()
    assert projections() == 0
    adapter.train()
    assert [projections(), projections()] == [1, 1]


@torch.no_grad()
def test_a_text_written_to_in_place_makes_them_new(made):
    run, adapter, (negative, positive) = RunTexts(), small(), texts()
    run(adapter, [(1.0, negative)], positive)
    negative.mul_(2.0)
    run(adapter, [(1.0, negative)], positive)
    assert len(made) == 4


@torch.no_grad()
def test_several_negatives_are_the_average_of_each():
    layer, (first, positive), second = small().sun_layers()[0], texts(), torch.randn(1, 9, 12)
    query, z_p = torch.randn(2, 1, 9, 8)
    both = layer(query, z_p, heads=2, texts=layer.texts([(0.25, first), (0.75, second)], positive))
    each = [layer(query, z_p, text, positive, heads=2) for text in (first, second)]
    torch.testing.assert_close(both, 0.25 * each[0] + 0.75 * each[1])


def sample(pipe: Any, **kwargs: Any) -> torch.Tensor:
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 4, "latents": latents, "output_type": "latent"} | kwargs
    return pipe("a cat", negative_prompt="a dog", **options).images


@pytest.fixture
def sun_pipe(pipe: Any) -> Any:
    sun.attach(pipe, make_adapter(pipe.unet))
    return pipe


def without_keeping(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attach_module, "texts_for", lambda *_, **__: None)


def test_a_pipeline_projects_once_a_run_and_forgets(sun_pipe, made, monkeypatch):
    kept = sample(sun_pipe)
    assert len(made) == 16
    gc.collect()
    assert [key for key in made if key() is not None] == []
    without_keeping(monkeypatch)
    assert torch.equal(sample(sun_pipe), kept)
    assert len(made) == 16 + 64


def test_a_broken_pipeline_run_forgets(sun_pipe, made):
    def stop(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 1:
            assert any(key() is not None for key in made)
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        sample(sun_pipe, callback_on_step_end=stop)
    gc.collect()
    assert [key for key in made if key() is not None] == []


def test_a_callback_that_changes_the_prompt_is_obeyed(sun_pipe, monkeypatch):
    def change(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"] * 1.5} if step == 1 else {}

    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    kept = sample(sun_pipe, **options)
    assert not torch.equal(kept, sample(sun_pipe))
    without_keeping(monkeypatch)
    assert torch.equal(sample(sun_pipe, **options), kept)


def test_an_adapter_in_training_is_projected_at_every_step(pipe, made):
    sun.attach(pipe, make_adapter(pipe.unet).train())
    sample(pipe)
    assert len(made) == 64


@torch.no_grad()
def test_a_compiled_unet_takes_them_and_projects_nothing():
    """The graph of a call with given texts has as many matrix products as the plain U-Net's."""
    torch._dynamo.reset()
    unet = make_unet()
    sun.attach(unet, make_adapter(unet))
    torch.manual_seed(0)
    x, negative, positive = torch.randn(1, 4, 8, 8), *torch.randn(2, 1, 5, TEXT_WIDTH)
    graphs: list[Any] = []

    def backend(module: Any, _inputs: Any) -> Any:
        graphs.append(module)
        return module.forward

    compiled = torch.compile(unet, backend=backend)

    def products(**options: Any) -> tuple[torch.Tensor, int, int]:
        graphs.clear()
        out = compiled(x, torch.tensor(499), positive, **options).sample
        counted = sum("linear" in str(node.target) for graph in graphs for node in graph.graph.nodes)
        return out, counted, len(graphs)

    options = {"sun_negative": negative, "sun_texts": texts_for(unet, negative, positive)}
    _, plain, _ = products()
    given, with_texts, _ = products(cross_attention_kwargs=options)
    fresh, without_texts, _ = products(cross_attention_kwargs={"sun_negative": negative})
    assert plain > 0
    assert with_texts == plain
    assert without_texts == plain + 64
    assert torch.equal(given, fresh)
    again = products(cross_attention_kwargs={**options, "sun_texts": texts_for(unet, negative, positive)})
    assert again[2] == 0  # another run's texts need no other graph
    torch._dynamo.reset()
