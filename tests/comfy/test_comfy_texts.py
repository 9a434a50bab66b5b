"""The adapter's K and V are computed once a run, only where that changes nothing; compiling is not disturbed by it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


@pytest.fixture
def projected(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """The K of every layer's first text, each time texts are projected; held weakly."""
    layer_class = host.part("sun.adapter").SunLayer
    seen, original = [], layer_class.texts

    def texts(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        seen.append(weakref.ref(made.branches[0].key))
        return made

    monkeypatch.setattr(layer_class, "texts", texts)
    return seen


@contextmanager
def nothing_kept(host: SimpleNamespace) -> Iterator[None]:
    """As if K and V were computed at every step."""

    def compute(run, adapter, negatives, positive=None, *, key=None, **options):
        return adapter.texts(negatives, positive, strength=run.strength, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(host.part("sun.kept").SunRun, "texts", compute)
        yield


def test_once_a_run(run: SimpleNamespace, projected: list) -> None:
    run.sun(run.apply())
    assert len(projected) == run.layers


def test_regions_have_their_own(host: SimpleNamespace, run: SimpleNamespace, projected: list) -> None:
    area = host.nodes["ConditioningSetArea"]().append(run.encode("red apple"), 64, 64, 0, 0, 1.0)[0]
    positive = host.nodes["ConditioningCombine"]().combine(area, run.positive)[0]
    run.sun(run.apply(), positive, start=run.latent(width=256))
    assert len(projected) == 2 * run.layers


def test_dropped_when_the_run_ends(run: SimpleNamespace, projected: list) -> None:
    run.sun(run.apply())
    gc.collect()
    assert [key for key in projected if key() is not None] == []


@pytest.mark.parametrize("error", [RuntimeError, torch.OutOfMemoryError])
def test_dropped_when_the_run_breaks(run: SimpleNamespace, projected: list, error: type[Exception]) -> None:
    model = run.apply()
    calls = iter(range(100))

    def fail(*_):
        if next(calls) == 2:
            assert any(key() is not None for key in projected)  # else this test would show nothing
            raise error("stop")

    handle = model.model.diffusion_model.middle_block[1].register_forward_pre_hook(fail)
    try:
        with pytest.raises(error, match="stop"):
            run.sun(model)
    finally:
        handle.remove()
    gc.collect()
    assert [key for key in projected if key() is not None] == []


CASES: dict[str, Callable] = {
    "plain": lambda host, run: run.sun(run.apply()),
    "batch": lambda host, run: run.sun(run.apply(), start=run.latent(batch=3)),
    "cfg": lambda host, run: run.ksampler(run.apply(), cfg=2.0),
    "changing negatives": lambda host, run: run.sun(
        run.apply(),
        negative=host.nodes["ConditioningCombine"]().combine(
            host.nodes["ConditioningSetTimestepRange"]().set_range(run.negative, 0.0, 0.5)[0], run.encode("yellow")
        )[0],
    ),
    "changing positives": lambda host, run: run.sun(
        run.apply(),
        host.nodes["ConditioningCombine"]().combine(
            host.nodes["ConditioningSetTimestepRange"]().set_range(run.positive, 0.0, 0.5)[0],
            host.nodes["ConditioningSetTimestepRange"]().set_range(run.encode("red apple"), 0.5, 1.0)[0],
        )[0],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bit_for_bit_as_without(host: SimpleNamespace, run: SimpleNamespace, case: str) -> None:
    kept = CASES[case](host, run)
    with nothing_kept(host):
        assert torch.equal(CASES[case](host, run), kept)


def test_a_node_that_changes_the_text_under_way(host: SimpleNamespace, run: SimpleNamespace) -> None:
    """Same entry of the conditioning, another tensor from one step to the next."""
    model = run.apply().clone()
    steps = iter(range(1000))

    def scaled(apply_model, args):
        c = dict(args["c"])
        c["c_crossattn"] = c["c_crossattn"] * (1.0 + 0.1 * (next(steps) % 4))
        return apply_model(args["input"], args["timestep"], **c)

    model.set_model_unet_function_wrapper(scaled)
    kept = run.sun(model)
    with nothing_kept(host):
        assert torch.equal(run.sun(model), kept)


def test_another_pack_that_changes_the_text_inside(run: SimpleNamespace, emoji: SimpleNamespace) -> None:
    """A wrapper around the U-Net acts after our K and V were chosen: SUN has to see the text the U-Net sees."""
    from comfy.patcher_extension import WrappersMP

    def doubled(executor, x, timesteps, context, *args, **kwargs):
        return executor(x, timesteps, context * 2, *args, **kwargs)

    def doubled_before(apply_model, args):
        c = args["c"] | {"c_crossattn": args["c"]["c_crossattn"] * 2}
        return apply_model(args["input"], args["timestep"], **c)

    inside, before = emoji.model.clone(), run.apply().clone()
    inside.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", doubled)
    before.set_model_unet_function_wrapper(doubled_before)
    assert torch.equal(run.sun(run.apply(inside)), run.sun(before))
    assert not torch.equal(run.sun(before), run.sun(run.apply()))


def test_weights_written_to_under_way_are_noticed(host: SimpleNamespace, run: SimpleNamespace, adapter_file) -> None:
    loaded = host.part("nodes.sun_patch").load_adapter(adapter_file)
    weight = loaded.adapter.layers[0].to_k_neg.weight
    model = run.apply(adapter=loaded)

    def picture() -> torch.Tensor:
        before, calls = weight.detach().clone(), iter(range(100))

        def write(*_):
            if next(calls) == 2:
                with torch.no_grad():
                    weight.mul_(3.0)

        handle = model.model.diffusion_model.out.register_forward_hook(write)
        try:
            return run.sun(model)
        finally:
            handle.remove()
            with torch.no_grad():
                weight.copy_(before)

    kept = picture()
    with nothing_kept(host):
        assert torch.equal(picture(), kept)
    assert not torch.equal(run.sun(model), kept)


def test_hooks_on_projections_see_every_step(host: SimpleNamespace, run: SimpleNamespace, adapter_file) -> None:
    loaded = host.part("nodes.sun_patch").load_adapter(adapter_file)
    seen = []
    loaded.adapter.layers[3].to_v_neg.register_forward_hook(lambda *_: seen.append(1))
    run.sun(run.apply(adapter=loaded))
    assert len(seen) == 4


# ---------------------------------------------------------------------------------------------------------- compiling


def compile_and_record(model) -> SimpleNamespace:
    """A clone compiled as TorchCompileModel does it, with a backend that runs graphs as they are and keeps them."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    graphs = []

    def backend(module, _inputs):
        graphs.append(module)
        return module.forward

    compiled = model.clone()
    set_torch_compile_wrapper(model=compiled, backend=backend)
    return SimpleNamespace(model=compiled, graphs=graphs)


@pytest.fixture
def clean_compiler(host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compiles from nothing, with the attention of accelerators: that of the CPU asks how much memory is free, which
    no compiler can follow."""
    from comfy.ldm.modules import attention

    for module in (attention, host.part("nodes.sun_patch")):
        monkeypatch.setattr(module, "optimized_attention", attention.attention_pytorch)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow  # two compilations; core/test_kept.py has a small one
@pytest.mark.usefixtures("clean_compiler")
def test_a_compiled_unet_is_compiled_once_and_holds_no_projections(
    host: SimpleNamespace, run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """K and V enter the compiled U-Net; computed inside they would be computed at every step."""
    after_steps, compiled = [], compile_and_record(run.apply())
    monkeypatch.setattr(
        host.comfy.utils, "PROGRESS_BAR_HOOK", lambda *_, **__: after_steps.append(len(compiled.graphs))
    )
    result = run.sun(compiled.model)
    assert after_steps[0] >= 1
    assert len(set(after_steps)) == 1, after_steps
    torch.testing.assert_close(result, run.sun(run.apply()), rtol=1e-3, atol=1e-3)
    again = run.sun(compiled.model, negative=run.encode("yellow"), seed=8)
    assert len(compiled.graphs) == after_steps[0]  # nor for the next prompt
    torch.testing.assert_close(again, run.sun(run.apply(), negative=run.encode("yellow"), seed=8), rtol=1e-3, atol=1e-3)

    def products(graphs: list) -> int:
        return sum("linear" in str(node.target) for graph in graphs for node in graph.graph.nodes)

    torch._dynamo.reset()
    plain = compile_and_record(run.apply(strength=0.0))
    run.sun(plain.model, steps=1)
    assert products(compiled.graphs) == products(plain.graphs) > 0
