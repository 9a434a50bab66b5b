"""K and V of a run's texts: kept only while nothing they depend on changes; in pipelines, for one run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny import TEXT_WIDTH, make_adapter, make_single_stage_unet

import sun
from sun import SunAdapter
from sun.adapter import SunLayer
from sun.attention import sun_attention
from sun.kept import SunRun
from sun.pipelines import new_run


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
    run, adapter, (negative, positive) = SunRun(), small(), texts()
    first = run.texts(adapter, [(1.0, negative)], positive)
    assert run.texts(adapter, [(1.0, negative.clone())], positive.clone()) is first
    assert len(made) == 2
    run.end()
    assert run.kept == 0


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
        lambda a, n, p: (a, [(1.0, n)], p, {"mask": torch.zeros(1, 1, 1, 7)}),
    ],
)
def test_whatever_changes_them_makes_them_new(made, change):
    run, adapter, (negative, positive) = SunRun(), small(), texts()
    run.texts(adapter, [(1.0, negative)], positive)
    other, negatives, positive, options = change(adapter, negative, positive)
    run.strength = options.pop("strength", 1.0)
    new = run.texts(other, negatives, positive, **options)
    assert len(made) == 4
    expected = other.texts(negatives, positive, strength=run.strength)
    for mine, theirs in zip(new.layers, expected.layers, strict=True):
        assert torch.equal(mine.shift, theirs.shift)
        assert all(torch.equal(a.key, b.key) and torch.equal(a.scale, b.scale) for a, b in
                   zip(mine.branches, theirs.branches, strict=True))  # fmt: skip


@torch.no_grad()
def test_weights_that_change_hooks_and_training_make_them_new(made):
    run, adapter, (negative, positive) = SunRun(), small(), texts()

    def projections() -> int:
        before = len(made)
        run.texts(adapter, [(1.0, negative)], positive)
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
    run, adapter, (negative, positive) = SunRun(), small(), texts()
    run.texts(adapter, [(1.0, negative)], positive)
    negative.mul_(2.0)
    run.texts(adapter, [(1.0, negative)], positive)
    assert len(made) == 4


@torch.no_grad()
def test_several_negatives_are_the_average_of_each():
    layer, (first, positive), second = small().sun_layers()[0], texts(), torch.randn(1, 9, 12)
    query, z_p = torch.randn(2, 1, 9, 8)
    both = sun_attention(query, z_p, layer.texts([(0.25, first), (0.75, second)], positive), 2)
    each = [sun_attention(query, z_p, layer.texts([(1.0, text)], positive), 2) for text in (first, second)]
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
    """As if K and V were computed at every step."""

    def compute(run: SunRun, adapter: SunAdapter, *texts: Any, mask: Any, guidance: Any) -> Any:
        return adapter.texts(*texts, strength=run.strength, positive_mask=mask, guidance=guidance)

    monkeypatch.setattr(SunRun, "texts", compute)


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
def test_autocast_has_texts_of_its_own(made):
    run, adapter, (negative, positive) = SunRun(), small(), texts()
    exact = run.texts(adapter, [(1.0, negative)], positive)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = [run.texts(adapter, [(1.0, negative)], positive) for _ in range(2)]
    assert rough[0] is rough[1]
    assert rough[0].layers[0].branches[0].key.dtype == torch.bfloat16
    assert exact.layers[0].branches[0].key.dtype == torch.float32
    assert len(made) == 4


def test_each_backward_pass_has_texts_of_its_own():
    run, adapter, (negative, positive) = SunRun(), small(), texts()
    for _ in range(2):
        made = run.texts(adapter, [(1.0, negative)], positive)
        made.layers[0].branches[0].key.sum().backward()


@pytest.fixture
def graphs() -> Iterator[list[Any]]:
    """Those that torch.compile makes of ``compiled``."""
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(module: Any, graphs: list[Any]) -> Any:
    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return torch.compile(module, backend=backend)


def products(graphs: list[Any]) -> int:
    """Matrix products in the graphs so far, which are forgotten."""
    counted = sum("linear" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    graphs.clear()
    return counted


@torch.no_grad()
@pytest.mark.parametrize("first", ["compiled", pytest.param("attached", marks=pytest.mark.slow)])
def test_the_graph_of_a_compiled_unet_holds_no_projections(graphs, first):
    """Attached to the compiled U-Net, K and V are made before it; in one that was attached before, within its graph."""
    unet = make_single_stage_unet()
    adapter = make_adapter(unet)
    torch.manual_seed(0)
    x, negative, positive = torch.randn(1, 4, 8, 8), *torch.randn(2, 1, 5, TEXT_WIDTH)
    if first == "compiled":
        target = compiled(unet, graphs)
        sun.attach(target, adapter)
    else:
        sun.attach(unet, adapter)
        target = compiled(unet, graphs)
    target(x, torch.tensor(499), positive)
    plain = products(graphs)
    assert plain > 0
    run = new_run(target)
    options = {"sun_negative": negative, "sun_run": run}
    given = target(x, torch.tensor(499), positive, cross_attention_kwargs=options).sample
    assert products(graphs) == plain + (0 if first == "compiled" else 4 * len(adapter.channels))
    for another in (options, {"sun_negative": negative, "sun_run": new_run(target)}):
        assert torch.equal(target(x, torch.tensor(499), positive, cross_attention_kwargs=another).sample, given)
        assert graphs == []  # neither the next step nor another run needs another graph
    expected = unet(x, torch.tensor(499), positive, cross_attention_kwargs={"sun_negative": negative}).sample
    torch.testing.assert_close(given, expected)


@pytest.mark.slow  # two compilations; the one above has the U-Net's
def test_a_pipeline_keeps_projections_out_of_its_compiled_unet(make_short_pipeline, graphs, made):
    """Whoever compiles after attaching gets them made before the graph too."""
    sun_pipe = make_short_pipeline()
    sun.attach(sun_pipe, make_adapter(sun_pipe.unet))
    eager = sample(sun_pipe)
    sun_pipe.unet = compiled(sun_pipe.unet, graphs)
    made.clear()
    torch.testing.assert_close(sample(sun_pipe), eager)
    assert len(made) == 4
    with_sun = products(graphs)
    sun.detach(sun_pipe)
    torch._dynamo.reset()
    sample(sun_pipe, guidance_scale=1.0)
    assert with_sun == products(graphs)


@torch.no_grad()
@pytest.mark.parametrize("on", [False, True])
def test_the_torch_of_older_web_uis_is_asked_its_own_way(monkeypatch, made, on):
    """torch before 2.4 has no get_autocast_dtype, and is_autocast_enabled takes no argument."""
    run, adapter, (negative, positive) = SunRun(), small(), texts()
    expected = adapter.texts([(1.0, negative)], positive)
    monkeypatch.delattr(torch, "get_autocast_dtype")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda: False)
    monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: on)
    kept = run.texts(adapter, [(1.0, negative)], positive)
    assert torch.equal(kept.layers[0].branches[0].key, expected.layers[0].branches[0].key)
    monkeypatch.setattr(torch, "is_autocast_cpu_enabled", lambda: not on)
    assert run.texts(adapter, [(1.0, negative)], positive) is not kept
