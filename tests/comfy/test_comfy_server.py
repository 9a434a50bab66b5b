"""ComfyUI as a program: the example workflows, as the page saves them, run by its server."""

from __future__ import annotations

import copy
import json
import shutil
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfyui_host import REPOSITORY
from comfyui_server import Server, copy_pack
from PIL import Image
from workflows import to_prompt

from sun.shipped import EMOJI_SUN

WORKFLOWS = REPOSITORY / "example_workflows"
PICTURE_TOLERANCE = 2  # of 255: ComfyUI cuts fractions of a grey level off, `sun generate` rounds them


@pytest.fixture(scope="module")
def server(comfyui_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    base = tmp_path_factory.mktemp("comfyui")
    shared = base / "shared" / "adapters"
    for folder in ("custom_nodes", "input", "output", "temp", "user", "models/checkpoints", "models/sun", shared):
        (base / folder).mkdir(parents=True)
    copy_pack(base / "custom_nodes" / "SUN")
    shutil.copy(EMOJI_SUN, shared / "elsewhere.safetensors")
    (base / "extra_model_paths.yaml").write_text(
        f"other_place:\n    base_path: {shared.parent}\n    sun: {shared.name}\n"
    )
    server = Server(comfyui_folder, base)
    try:
        server.wait_until_ready()
        yield server
    finally:
        server.stop()


def workflow(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def node_of(prompt: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(node["inputs"] for node in prompt.values() if node["class_type"] == kind)


def test_the_shipped_workflow_makes_the_picture_sun_generate_makes(server: Server, host: Any, emoji: Any) -> None:
    """Nothing is handed over: from one seed both draw the same noise on the CPU and visit the same sigmas."""
    from sun.pictures.draw import complete, generate, load, noise
    from sun.pictures.recipe import Recipe
    from sun.pipelines.schedulers import make_scheduler

    prompt = to_prompt(workflow("SUN text to image"), server.get("/object_info"))
    (picture,) = server.run(prompt)
    sampler, latent = node_of(prompt, "SUN_Sampler"), node_of(prompt, "EmptyLatentImage")
    recipe = Recipe(
        prompt=prompt[sampler["positive"][0]]["inputs"]["text"],
        negative=prompt[sampler["negative"][0]]["inputs"]["text"],
        seed=sampler["seed"], steps=sampler["steps"], width=latent["width"], height=latent["height"], device="cpu",
    )  # fmt: skip
    loaded = load(recipe)
    recipe = complete(recipe, loaded)

    start = noise(recipe, loaded)
    assert torch.equal(start, host.comfy.sample.prepare_noise(torch.zeros_like(start), recipe.seed))
    scheduler = make_scheduler(recipe.scheduler, loaded.pipe.scheduler.config)
    scheduler.set_timesteps(recipe.steps)
    signal = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], scheduler.final_alpha_cumprod[None]])
    sigmas = host.part("nodes.sampling").trained_sigmas(emoji.model, recipe.steps)
    torch.testing.assert_close((1 / signal - 1).sqrt(), sigmas, rtol=1e-5, atol=0)

    (expected,) = generate(loaded, recipe).images
    difference = np.abs(np.asarray(picture.convert("RGB"), dtype=int) - np.asarray(expected, dtype=int))
    print(f"ComfyUI against `sun generate`: at most {difference.max()}, on average {difference.mean():.3f} of 255")
    assert picture.size == expected.size == (128, 128)
    assert difference.max() <= PICTURE_TOLERANCE
    assert "SUN active: 16 layers, negative 77 tokens" in server.log.read_text()


def test_nothing_of_the_pack_failed_to_load(server: Server) -> None:
    info = server.get("/object_info")
    assert {name for name in info if name.startswith("SUN_")} == {
        "SUN_LoadAdapter", "SUN_Apply", "SUN_Sampler", "SUN_Scheduler", "SUN_Guider", "SUN_AdapterInfo",
        "SUN_LoadEmojiDiffusion", "SUN_LoadEmojiControlNet", "SUN_ApplyLtcAccel", "SUN_ApplyFeatureInheritance",
        "SUN_SwitchUNets", "SUN_ControlNetReadsBoth", "SUN_ApplyExperts",
    }  # fmt: skip
    assert "IMPORT FAILED" not in "\n".join(
        line for line in server.log.read_text().splitlines() if "custom_nodes/SUN" in line
    )


def test_example_workflows_are_in_the_template_browser(server: Server) -> None:
    assert sorted(server.get("/workflow_templates")["SUN"]) == sorted(path.stem for path in WORKFLOWS.glob("*.json"))
    for path in WORKFLOWS.glob("*.json"):
        assert Image.open(path.with_suffix(".jpg")).size == (512, 512)


def test_an_adapter_of_extra_model_paths_is_listed(server: Server) -> None:
    info = server.get("/object_info/SUN_LoadAdapter")["SUN_LoadAdapter"]
    _, options = info["input"]["required"]["adapter_name"]
    assert "elsewhere.safetensors" in options["options"]


def test_help_pages_are_served(server: Server) -> None:
    with urllib.request.urlopen(f"{server.url}/extensions/SUN/docs/SUN_Apply.md", timeout=30) as answer:
        assert answer.read().decode().startswith("# Apply SUN to Model")


def test_a_missing_adapter_is_explained_before_anything_runs(server: Server) -> None:
    prompt = to_prompt(workflow("SUN text to image"), server.get("/object_info"))
    node_of(prompt, "SUN_LoadAdapter")["adapter_name"] = "gone.safetensors"
    with pytest.raises(AssertionError, match=r"(?s)No SUN adapter named 'gone.safetensors'.*models/sun"):
        server.run(prompt)


def test_a_queued_prompt_is_right_after_an_interrupted_one(server: Server) -> None:
    prompt = to_prompt(workflow("SUN text to image"), server.get("/object_info"))
    node_of(prompt, "SUN_Sampler")["seed"] += 100  # what ran before comes from ComfyUI's cache, without a picture
    (expected,) = server.run(prompt)
    long = copy.deepcopy(prompt)
    node_of(long, "SUN_Sampler").update(steps=50, seed=1)
    node_of(long, "EmptyLatentImage").update(width=512, height=512)
    runs = server.log.read_text().count("SUN active")
    first, second = server.queue(long), server.queue(prompt)
    server._wait(lambda: server.log.read_text().count("SUN active") > runs, 120, "begin")
    server.post("/interrupt", {})
    stopped = server.result(first)["status"]
    assert "execution_interrupted" in [kind for kind, _ in stopped["messages"]]
    (picture,) = server.pictures(server.result(second))
    assert np.array_equal(np.asarray(picture), np.asarray(expected))


def test_what_happened_reaches_the_page(server: Server) -> None:
    prompt = to_prompt(workflow("SUN text to image"), server.get("/object_info"))
    node_of(prompt, "SUN_Sampler")["seed"] += 1  # else the result comes from ComfyUI's cache
    outputs = server.result(server.queue(prompt))["outputs"]
    lines = [output["text"] for output in outputs.values() if "text" in output]
    assert len(lines) == 1
    assert lines[0][0].startswith("4 U-Net calls, ")


def random_sd15(path: Path) -> None:
    """A checkpoint ComfyUI takes for SD 1.5: 16 attention layers, 320 channels at every level, TAESD as VAE; 475 MB."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}

    def add(prefix: str, module: torch.nn.Module) -> None:
        for name, value in module.state_dict().items():
            if value.is_meta:
                norm = value.ndim == 1 and name.endswith("weight")
                value = torch.ones(value.shape) if norm else torch.randn(value.shape) * 0.02
            tensors[prefix + name] = value.half().contiguous()

    import comfy.ldm.modules.diffusionmodules.openaimodel as ldm
    import comfy.sd1_clip
    import comfy.taesd.taesd

    with torch.device("meta"):
        unet = ldm.UNetModel(
            image_size=32, in_channels=4, out_channels=4, model_channels=320, num_res_blocks=[2, 2, 2, 2],
            channel_mult=[1, 1, 1, 1], num_heads=8, use_spatial_transformer=True, transformer_depth=[1] * 6 + [0] * 2,
            transformer_depth_middle=1, transformer_depth_output=[1] * 9 + [0] * 3, context_dim=768, legacy=False,
        )  # fmt: skip
        clip = comfy.sd1_clip.SDClipModel().transformer
        vae = comfy.taesd.taesd.TAESD()
    add("model.diffusion_model.", unet)
    add("cond_stage_model.transformer.", clip)
    add("first_stage_model.", vae)
    tensors["first_stage_model.vae_scale"], tensors["first_stage_model.vae_shift"] = (
        torch.tensor(1.0),
        torch.tensor(0.0),
    )
    save_file(tensors, path)


@pytest.mark.slow  # weights of 4 GB
def test_the_sd15_workflow_runs_on_stock_loaders(server: Server, host: Any) -> None:
    """Random weights: CheckpointLoaderSimple, the authors' file layout, 16 layers at text width 768."""
    from sun import SunAdapter

    prompt = to_prompt(workflow("SUN with Stable Diffusion 1.5"), server.get("/object_info"))
    checkpoint = server.base / "models/checkpoints" / node_of(prompt, "CheckpointLoaderSimple")["ckpt_name"]
    adapter = server.base / "models/sun" / node_of(prompt, "SUN_LoadAdapter")["adapter_name"]
    random_sd15(checkpoint)
    torch.manual_seed(0)
    official = SunAdapter([320] * 16, 768, positive=True)
    for parameter in official.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    official.save(adapter, layout="official", dtype=torch.float16)
    size = node_of(prompt, "EmptyLatentImage")
    assert (size["width"], size["height"]) == (512, 512)
    size.update(width=128, height=128)  # the wiring does not depend on it, the minutes do
    try:
        (picture,) = server.run(prompt)
    finally:
        checkpoint.unlink()
    assert picture.size == (128, 128)
    assert f"adapter {adapter.name}" in server.log.read_text()
