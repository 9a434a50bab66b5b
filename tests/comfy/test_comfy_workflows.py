"""The example workflows, opened as the page saves them and run by ComfyUI's own executor, in this process."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfy_helpers import make_lora
from comfyui_host import REPOSITORY, load_builtin_extras, schemas
from make_workflows import GRAPHS, LORA_FILE, build
from PIL import Image
from workflows import NOTES, to_prompt, with_defaults

from sun.shipped import EMOJI_LORA

WORKFLOWS = REPOSITORY / "example_workflows"
STOCK = {"SUN with Stable Diffusion 1.5"}  # needs a checkpoint of 475 MB: see test_comfy_server.py
# Workflow: (U-Net calls, sampling runs with SUN, size of the picture saved)
EXPECTED = {
    "SUN text to image": (4, 1, (128, 128)),
    "SUN image to image": (4 + 3, 2, (128, 128)),
    "SUN inpainting with a mask": (4 + 4, 2, (128, 128)),
    "SUN inpainting model": (4 + 4, 2, (128, 128)),
    "SUN with ControlNet": (4 + 4, 2, (128, 128)),
    "SUN with a LoRA": (4, 1, (128, 128)),
    "SUN two regions": (2 * 4, 1, (256, 128)),
    "SUN long prompts": (4, 1, (128, 128)),
    "SUN custom sampler": (4, 1, (128, 128)),
    "SUN upscaling": (4 + 1, 2, (160, 160)),
    "LTC-Accel skips steps": (17, 0, (128, 128)),  # of 25; both passes of guidance in a call
    "Feature inheritance": (25, 0, (128, 128)),
    "Switch U-Nets by step": (25, 0, (128, 128)),
    "SUN with both accelerators": (6, 1, (128, 128)),  # of 8
    "Compact U-Net": (25, 0, (128, 128)),
}


@dataclass
class Ran:
    """What a run of a workflow did. `texts` are the tokens of the text at each U-Net call."""

    pictures: list[Image.Image] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    finite: bool = True
    sun_lines: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def known(host: SimpleNamespace) -> dict[str, Any]:
    """The schemas of all nodes ComfyUI lists."""
    load_builtin_extras("nodes_mask", "nodes_custom_sampler")
    return schemas(host.nodes)


@pytest.fixture(scope="module")
def lora_in_place(host: SimpleNamespace, emoji_folder: Path) -> Iterator[None]:
    """The shipped LoRA, or, in a checkout without it, random weights where a user puts a LoRA."""
    assert EMOJI_LORA.name == LORA_FILE
    if EMOJI_LORA.is_file():
        yield
        return
    folder = host.base / "models" / "loras"
    folder.mkdir(exist_ok=True)
    path = make_lora(emoji_folder, folder).rename(folder / LORA_FILE)
    yield
    path.unlink()


@pytest.fixture
def extras_in_place(
    host: SimpleNamespace,
    control_file: Path,
    inpainting_file: Path,
    compact_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ControlNet, inpainting model and compact U-Net: the shipped ones, or, in a checkout without them, stand-ins."""
    module = host.part("nodes.nodes")
    if not module.EMOJI_CONTROLNET.is_file():
        monkeypatch.setattr(module, "EMOJI_CONTROLNET", control_file)
    if not module.VARIANTS["inpainting"].is_file():
        monkeypatch.setitem(module.VARIANTS, "inpainting", inpainting_file)
    if not (module.VARIANTS["compact"] / "config.json").is_file():
        monkeypatch.setitem(module.VARIANTS, "compact", compact_folder)


def saved(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def prompt_of(name: str, known: dict[str, Any]) -> dict[str, Any]:
    """The workflow's prompt."""
    workflow = saved(name)
    missing = {node["type"] for node in workflow["nodes"]} - set(known) - set(NOTES)
    assert not missing, f"ComfyUI has no {sorted(missing)}"
    return to_prompt(workflow, known)


@pytest.fixture
def execute(
    host: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[[dict[str, Any]], Ran]:
    """Validates and runs a prompt with ComfyUI's executor, as its server does."""
    import execution
    import folder_paths
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    ran = Ran()
    forward = UNetModel.forward

    def count(self: Any, x: Any, timesteps: Any = None, context: Any = None, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, x, timesteps, context, *args, **kwargs)
        ran.texts.append(context.shape[1])
        ran.finite &= bool(out.isfinite().all())
        return out

    monkeypatch.setattr(UNetModel, "forward", count)
    page = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *_, **__: None)

    def run(prompt: dict[str, Any]) -> Ran:
        valid, error, outputs, node_errors = asyncio.run(execution.validate_prompt("test", prompt, None))
        assert valid, (error, node_errors)
        executor = execution.PromptExecutor(
            page, cache_type=execution.CacheType.CLASSIC, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
        )
        with caplog.at_level(logging.INFO):
            executor.execute(prompt, "test", {}, outputs)
        assert executor.success, [message for message in executor.status_messages if message[0] == "execution_error"]
        ran.sun_lines = [r.message for r in caplog.records if r.message.startswith("SUN active")]
        folder = Path(folder_paths.get_output_directory())
        for shown in executor.history_result["outputs"].values():
            files = [file for file in shown.get("images", []) if file["type"] == "output"]
            ran.pictures += [Image.open(folder / file["subfolder"] / file["filename"]).convert("RGB") for file in files]
        return ran

    return run


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_a_workflow_runs(name: str, known: dict[str, Any], execute, extras_in_place, lora_in_place) -> None:
    calls, runs, size = EXPECTED[name]
    ran = execute(prompt_of(name, known))
    if folder := os.environ.get("SUN_PICTURES"):  # for make_thumbnails.py, and to look at
        ran.pictures[-1].save(Path(folder) / f"{name}.png")
    assert len(ran.texts) == calls
    assert ran.finite
    assert len(ran.sun_lines) == runs
    assert all("16 layers" in line for line in ran.sun_lines)
    assert [picture.size for picture in ran.pictures] == [size]
    assert all(np.asarray(picture).std() > 5 for picture in ran.pictures)


def test_every_workflow_is_run_by_a_test_and_made_by_the_script() -> None:
    names = {path.stem for path in WORKFLOWS.glob("*.json")}
    assert names == set(EXPECTED) | STOCK == set(GRAPHS)


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_a_workflow_is_what_the_script_makes_of_the_nodes_schemas(name: str, known: dict[str, Any]) -> None:
    """A node whose inputs were renamed or reordered shows here: run tests/comfy/make_workflows.py."""
    made = build(name, known).workflow()
    old, new = (with_defaults(to_prompt(workflow, known), known) for workflow in (saved(name), made))
    assert old == new
    assert [n["widgets_values"] for n in saved(name)["nodes"] if n["type"] in NOTES] == [
        n["widgets_values"] for n in made["nodes"] if n["type"] in NOTES
    ]


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_a_workflow_is_laid_out_without_overlaps(name: str) -> None:
    workflow = saved(name)
    boxes = [(n["pos"][0], n["pos"][1] - 30, n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1])
             for n in workflow["nodes"]]  # fmt: skip
    groups = [(x, y, x + width, y + height) for x, y, width, height in (g["bounding"] for g in workflow["groups"])]

    def apart(a, b) -> bool:
        return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]

    for some in (boxes, groups):
        assert all(apart(a, b) for i, a in enumerate(some) for b in some[:i])
    for box in boxes:
        inside = [g for g in groups if g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3]]
        assert len(inside) == 1


def wire(workflow: dict[str, Any], link: list[Any]) -> list[tuple[float, float]]:
    """Points along a link as ComfyUI's page draws it: Bezier curves from one reroute to the next."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    reroutes = {reroute["id"]: reroute for reroute in workflow["extra"].get("reroutes", [])}
    number, source, slot, target, place, _ = link
    (x, y), width = nodes[source]["pos"], nodes[source]["size"][0]
    ends = [(x + width, y + 20 * (slot + 0.7))]
    last = next((e["parentId"] for e in workflow["extra"].get("linkExtensions", []) if e["id"] == number), None)
    between: list[tuple[float, float]] = []
    while last is not None:
        assert number in reroutes[last]["linkIds"]
        between.insert(0, tuple(reroutes[last]["pos"]))
        last = reroutes[last].get("parentId")
    ends += between
    (x, y) = nodes[target]["pos"]
    ends.append((x, y + 20 * (place + 0.7)))
    angles = [math.atan2(b[1] - a[1], b[0] - a[0]) for a, b in itertools.pairwise(ends)]
    # At a reroute a wire goes half way between where it comes from and where it goes to; at nodes straight out and in.
    ways = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(angles)), 0.0]
    points = []
    for (a, b), start, end in zip(itertools.pairwise(ends), ways[:-1], ways[1:], strict=True):
        pull = min(0.25 * math.dist(a, b), 80.0 if between else math.inf)
        one = a[0] + pull * math.cos(start), a[1] + pull * math.sin(start)
        two = b[0] - pull * math.cos(end), b[1] - pull * math.sin(end)
        for t in np.linspace(0, 1, 41):
            parts = ((1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3)
            points.append(tuple(sum(w * p[i] for w, p in zip(parts, (a, one, two, b), strict=True)) for i in (0, 1)))
    return points


@pytest.mark.parametrize("name", sorted(GRAPHS))
def test_wires_run_left_to_right_and_behind_no_node(name: str) -> None:
    workflow = saved(name)
    boxes = [(n["id"], n["pos"][0] + 2, n["pos"][1] - 30, n["pos"][0] + n["size"][0] - 2, n["pos"][1] + n["size"][1])
             for n in workflow["nodes"]]  # fmt: skip
    for link in workflow["links"]:
        points = wire(workflow, link)
        assert all(a[0] <= b[0] + 1e-6 for a, b in itertools.pairwise(points)), f"link {link} runs backwards"
        hidden = {
            n for n, left, top, right, bottom in boxes for x, y in points if left < x < right and top < y < bottom
        }
        assert not hidden, f"link {link} runs behind nodes {hidden}"


def test_long_prompts_are_long_on_both_sides(known: dict[str, Any], execute) -> None:
    ran = execute(prompt_of("SUN long prompts", known))
    assert all(tokens > 77 and tokens % 77 == 0 for tokens in ran.texts)
    (line,) = ran.sun_lines
    assert "negative 77 tokens" not in line


def test_the_masked_part_alone_is_painted(known: dict[str, Any], execute, host: SimpleNamespace) -> None:
    prompt = prompt_of("SUN inpainting with a mask", known)
    preview = next(n for n in prompt.values() if n["class_type"] == "PreviewImage")
    preview["class_type"] = "SaveImage"
    preview["inputs"]["filename_prefix"] = "before"
    ran = execute(prompt)
    one, other = (np.asarray(picture, dtype=int) for picture in ran.pictures)
    difference = np.abs(one - other)
    assert difference[:, :48].mean() < 4  # what the autoencoder changes
    assert difference[:, 64:].mean() > 10


def test_inheritance_leaves_out_inner_parts(known: dict[str, Any], execute) -> None:
    """Its picture differs from the plain one a little."""
    prompt = prompt_of("Feature inheritance", known)
    next(n for n in prompt.values() if n["class_type"] == "KSampler")["inputs"]["steps"] = 8
    fast = execute(prompt).pictures[-1]
    loader = next(key for key, n in prompt.items() if n["class_type"] == "SUN_LoadEmojiDiffusion")
    next(n for n in prompt.values() if n["class_type"] == "KSampler")["inputs"]["model"] = [loader, 0]
    plain = execute(prompt).pictures[-1]
    difference = np.abs(np.asarray(fast, dtype=int) - np.asarray(plain, dtype=int)).mean()
    assert 0 < difference < 40


def test_the_custom_sampler_gives_the_samplers_picture(known: dict[str, Any], execute) -> None:
    custom, plain = (prompt_of(name, known) for name in ("SUN custom sampler", "SUN text to image"))
    first = execute(custom).pictures[-1]
    second = execute(plain).pictures[-1]
    assert np.abs(np.asarray(first, dtype=int) - np.asarray(second, dtype=int)).max() <= 1


# ---------------------------------------------------------------------------------------- stock loaders, SD 1.5's width


def sd15_unet(in_channels: int) -> Any:
    """SD 1.5's 320 channels at every level, the narrowest U-Net that ComfyUI takes for SD 1.5; on the meta device."""
    import comfy.ldm.modules.diffusionmodules.openaimodel as ldm

    with torch.device("meta"):
        return ldm.UNetModel(
            image_size=32, in_channels=in_channels, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2],
            channel_mult=[1, 1, 1, 1], num_heads=8, use_spatial_transformer=True, transformer_depth=[1] * 6 + [0] * 2,
            transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3, context_dim=768, legacy=False,
        )  # fmt: skip


def random_weights(module: Any, prefix: str = "") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        prefix + name: (
            torch.ones(value.shape) if value.ndim == 1 and name.endswith("weight") else torch.randn(value.shape) * 0.02
        ).half()
        for name, value in module.state_dict().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("in_channels", [4, 9])
def test_stock_loaders_with_sd15s_width(host: SimpleNamespace, run: SimpleNamespace, in_channels: int) -> None:
    """Load Diffusion Model (4 and 9 channels) and Load ControlNet Model with random weights, and SUN on them."""
    import comfy.cldm.cldm
    from safetensors.torch import save_file

    from sun import SunAdapter

    folder = host.base / "models"
    for name in ("diffusion_models", "controlnet"):
        (folder / name).mkdir(exist_ok=True)
    files = [folder / "diffusion_models" / f"random{in_channels}.safetensors", folder / "sun" / "random.safetensors"]
    save_file(random_weights(sd15_unet(in_channels)), files[0])
    torch.manual_seed(0)
    adapter = SunAdapter([320] * 16, 768, positive=True)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    adapter.save(files[1], layout="official", dtype=torch.float16)
    positive, negative = [[torch.randn(1, 77, 768), {}]], [[torch.randn(1, 154, 768), {}]]
    try:
        model = host.nodes["UNETLoader"]().load_unet(files[0].name, "default")[0]
        loaded = host.nodes["SUN_LoadAdapter"].execute(files[1].name).result[0]
        if in_channels == 9:
            mask = torch.ones(1, 1, 64, 64)
            extra = {"concat_latent_image": torch.randn(1, 4, 8, 8), "concat_mask": mask}
            positive, negative = ([[text, extra] for text, _ in group] for group in (positive, negative))
        else:
            with torch.device("meta"):
                net = comfy.cldm.cldm.ControlNet(
                    image_size=32, in_channels=4, hint_channels=3, model_channels=320, num_res_blocks=[2, 2, 2, 2],
                    channel_mult=[1, 1, 1, 1], num_heads=8, use_spatial_transformer=True,
                    transformer_depth=[1] * 6 + [0] * 2, transformer_depth_middle=1, context_dim=768, legacy=False,
                )  # fmt: skip
            files.append(folder / "controlnet" / "random.safetensors")
            save_file(random_weights(net, "control_model."), files[-1])
            control = host.nodes["ControlNetLoader"]().load_controlnet(files[-1].name)[0]
            hint = torch.rand(1, 64, 64, 3)
            positive, negative = host.nodes["ControlNetApplyAdvanced"]().apply_controlnet(
                positive, negative, control, hint, 1.0, 0.0, 1.0
            )
        patched = host.nodes["SUN_Apply"].execute(model, loaded, 1.0).result[0]
        calls = []
        handle = model.model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
        result = run.sun(patched, positive, negative, start=run.latent(64, 64), steps=2)
        handle.remove()
    finally:
        for path in files:
            path.unlink(missing_ok=True)
    assert model.model.diffusion_model.in_channels == in_channels
    assert len(calls) == 2
    assert result.isfinite().all()
    assert float(result.std()) > 0
