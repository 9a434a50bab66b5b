"""ComfyUI's model management moves the adapter; base weights of any dtype; several adapters; memory stays flat.

`SUN_MEMORY_RUNS=200 pytest -s tests/comfy/test_comfy_memory.py -k flat` prints the curve of 200 runs.
"""

from __future__ import annotations

import gc
import os
import weakref
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from comfy_helpers import make_adapter, relative


@pytest.fixture(scope="module")
def models(short: SimpleNamespace) -> SimpleNamespace:
    return short


@pytest.fixture
def fresh(host: SimpleNamespace, adapter_file: Path):
    """The adapter, loaded for this test alone."""
    return host.part("nodes.sun_patch").load_adapter(adapter_file)


def loaded_bytes(adapter) -> int:
    return adapter.patcher.model.model_loaded_weight_memory


def test_the_adapter_is_loaded_and_evicted_by_comfyui(host: SimpleNamespace, run: SimpleNamespace, fresh) -> None:
    from comfy import model_management

    def is_listed() -> bool:
        loaded = [entry.model for entry in model_management.current_loaded_models]
        return any(patcher is not None and patcher.model is fresh.adapter for patcher in loaded)

    model = run.apply(adapter=fresh)
    assert loaded_bytes(fresh) == 0  # nothing is loaded before it is needed
    expected = run.sun(model)
    size = sum(p.nbytes for p in fresh.adapter.parameters())
    assert loaded_bytes(fresh) == pytest.approx(size, rel=0.05)
    assert is_listed()
    model_management.unload_all_models()
    assert loaded_bytes(fresh) == 0
    assert not is_listed()
    assert torch.equal(run.sun(model), expected)


def test_nothing_of_an_adapter_stays_once_no_graph_has_it(
    host: SimpleNamespace, run: SimpleNamespace, adapter_file: Path
) -> None:
    """Neither its weights, on the device they were moved to, nor an entry in the host's list of loaded models."""
    from comfy import model_management

    loaded = host.part("nodes.sun_patch").load_adapter(adapter_file)
    weights = weakref.ref(loaded.adapter)
    model = run.apply(adapter=loaded)
    run.sun(model)
    del loaded, model
    gc.collect()
    model_management.cleanup_models()
    assert weights() is None
    assert all(entry.model is not None for entry in model_management.current_loaded_models)


def test_an_adapter_loaded_in_part(host: SimpleNamespace, run: SimpleNamespace, fresh, monkeypatch) -> None:
    """--lowvram: what does not fit stays where it was and is cast at use."""
    from comfy import model_management

    model = run.apply(adapter=fresh)
    expected = run.sun(model)
    model_management.unload_all_models()
    original, parts = model_management.load_models_gpu, []

    def with_little_memory(models, *args, **kwargs):
        original([m for m in models if m.model is not fresh.adapter], *args, **kwargs)
        for patcher in models:
            if patcher.model is fresh.adapter:
                patcher.load(
                    patcher.load_device, lowvram_model_memory=sum(p.nbytes for p in fresh.adapter.parameters()) // 2
                )
                parts.append(patcher.model.model_lowvram)

    monkeypatch.setattr(model_management, "load_models_gpu", with_little_memory)
    assert torch.equal(run.sun(model), expected)
    assert parts == [True]


def test_fp8_base_weights(host: SimpleNamespace, run: SimpleNamespace, emoji_folder: Path, monkeypatch) -> None:
    from comfy import model_management

    with monkeypatch.context() as patched:
        patched.setattr(model_management, "unet_dtype", lambda **_: torch.float8_e4m3fn)
        patched.setattr(model_management, "unet_manual_cast", lambda *_, **__: torch.float32)
        base = host.part("nodes.emoji_model").load_unet(emoji_folder)
    assert base.model.diffusion_model.input_blocks[1][1].proj_in.weight.dtype == torch.float8_e4m3fn
    model = run.apply(base)
    with run.count(model) as counts:
        result = run.sun(model)
    assert (counts.unet, counts.sun) == (4, 4 * run.layers)
    expected, plain = run.sun(run.apply()), run.ksampler(base)
    alike = torch.nn.functional.cosine_similarity(result.flatten(), expected.flatten(), dim=0)
    assert alike > 0.8
    assert relative(result, plain) > 1e-2


def test_two_adapters_on_models_of_one_file(
    host: SimpleNamespace, run: SimpleNamespace, emoji_folder: Path, tmp_path
) -> None:
    """Both share the base weights, or have their own: in turn, each makes its own picture."""
    make_adapter(emoji_folder, tmp_path / "other.safetensors", seed=5)
    other = host.part("nodes.sun_patch").load_adapter(tmp_path / "other.safetensors")
    again = host.part("nodes.emoji_model").load_unet(emoji_folder)
    first, second, third = run.apply(), run.apply(adapter=other), run.apply(again, adapter=other)
    pictures = [run.sun(model) for model in (first, second, third)]
    assert not torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[1], pictures[2])
    for _ in range(2):
        assert [torch.equal(run.sun(m), p) for m, p in zip((first, second, third), pictures, strict=True)] == [True] * 3


def live_tensors() -> tuple[int, int]:
    """(how many, bytes behind them) of all tensors Python can reach."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter) and o.device.type == "cpu"]
    storages = [t.untyped_storage() for t in tensors]
    return len(tensors), sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def test_memory_is_flat(
    host: SimpleNamespace, run: SimpleNamespace, emoji: SimpleNamespace, emoji_folder, tmp_path
) -> None:
    """Prompts, sizes, batches and adapters change from run to run; nothing of a run stays."""
    runs = int(os.environ.get("SUN_MEMORY_RUNS", "12"))
    every = max(2, runs // 20)
    load = host.part("nodes.sun_patch").load_adapter
    for i in range(3):
        make_adapter(emoji_folder, tmp_path / f"{i}.safetensors", positive=i != 1, seed=i)
    sizes, words = ((64, 64), (128, 64), (64, 128), (96, 96)), ("apple", "bear", "car", "blue", "tree")
    curve: list[tuple[int, int, int, int]] = []
    process = psutil.Process()
    for i in range(runs + 1):
        if i % every == 0:
            curve.append((i, *live_tensors(), process.memory_info().rss))
        model = run.apply(adapter=load(tmp_path / f"{i % 3}.safetensors"), strength=0.5 + 0.1 * (i % 5))
        width, height = sizes[i % 4]
        start = {"samples": torch.zeros(1 + i % 2, 4, height // 8, width // 8)}
        positive, negative = (run.encode(f"{words[(i + k) % 5]}, " * (1 + 40 * (i % 7 == k))) for k in (0, 1))
        run.sun(model, positive, negative, start=start, seed=i, steps=1 + i % 4)
        del model, start, positive, negative
    print("\n run  tensors   their MiB   process MiB")
    for number, count, size, resident in curve:
        print(f"{number:4d} {count:8d} {size / 2**20:11.2f} {resident / 2**20:13.1f}")
    settled = curve[len(curve) // 3 :]
    largest = sum(p.stat().st_size for p in tmp_path.glob("*.safetensors"))
    assert max(size for _, _, size, _ in settled) - min(size for _, _, size, _ in settled) <= largest
    assert settled[-1][1] - settled[0][1] <= 200
