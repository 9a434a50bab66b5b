"""``sun export``, ``sun.load_exported``: a runtime's numbers are torch's, no folder is half or wrong in silence."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exports import Exported, attached, check_four_steps, check_smaller_weights, difference, latents_of
from PIL import Image
from typer.testing import CliRunner, Result

import sun
from sun.cli import app
from sun.pipelines.loading import load_pipeline
from sun.runtimes import engines
from sun.runtimes.contents import CONTENTS, Contents, ExportError, is_exported, write_contents
from sun.runtimes.export import ExportSettings, export
from sun.runtimes.stand_ins import residual_shapes
from sun.shipped import EMOJI_SUN, USUAL_GUIDANCE

for package in ("openvino", "nncf", "onnx", "onnxruntime"):
    pytest.importorskip(package, reason='the tests of exports need the extra: pip install -e ".[export]"')

RUNTIMES = ["openvino", "onnx"]


@pytest.mark.slow  # test_openvino.py has the other runtime's
def test_four_steps_are_torch_s_at_any_size_and_batch(exported: Exported, files: Path) -> None:
    check_four_steps(exported, files, "onnx")


def test_smaller_weights_say_what_they_cost(exported: Exported, files: Path) -> None:
    """Those in int8 are tested on the command line below."""
    check_smaller_weights(exported, files, "onnx", "fp16")


def test_a_pipeline_takes_what_people_know(exported: Exported) -> None:
    pipe = sun.load_exported(exported("onnx", "adapter.safetensors", weights="fp16")[0], threads=1)
    seen = []

    def after(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append((step, tuple(values["latents"].shape)))
        return {}

    one = pipe("a cat", generator=torch.Generator().manual_seed(1), callback_on_step_end=after).images
    assert isinstance(one[0], Image.Image)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    two = pipe("a cat", "blurry", num_images_per_prompt=2, generator=torch.Generator().manual_seed(1))
    assert len(two.images) == 2
    long = pipe("a cat on a hill, " * 20, output_type="pt", generator=torch.Generator().manual_seed(1)).images
    assert long.shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="exported without a ControlNet"):
        pipe("a cat", control_image=one[0])
    with pytest.raises(ValueError, match="2 prompts and 3 negative prompts"):
        pipe(["a", "b"], ["x", "y", "z"])


def test_pictures_masks_and_controlnets_act_as_in_torch(exported: Exported, files: Path) -> None:
    import diffusers

    from sun.pipelines.loading import load_controlnet

    folder, _ = exported("onnx", "guided.safetensors", controlnet=str(files / "controlnet"))
    ours, base = sun.load_exported(folder, threads=1), load_pipeline(files / "model")
    picture = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    controlnet = load_controlnet(files / "controlnet", base.unet, torch.float32)
    cases = {
        "StableDiffusionImg2ImgPipeline": ({"image": picture, "strength": 0.5},) * 2,
        "StableDiffusionInpaintPipeline": ({"image": picture, "mask_image": mask, "strength": 1.0},) * 2,
        "StableDiffusionControlNetPipeline": ({"control_image": picture}, {"image": picture}),
    }
    for name, (mine, theirs) in cases.items():
        extra = {"controlnet": controlnet} if "ControlNet" in name else {}
        pipe = getattr(diffusers, name)(**base.components, **extra, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        sun.attach(pipe, files / "guided.safetensors")
        common = {"prompt": "a cat", "negative_prompt": "blurry", "num_inference_steps": 4, "output_type": "pt"}
        found, wanted = (
            p(**common, **inputs, generator=torch.Generator().manual_seed(2)).images
            for p, inputs in ((ours, mine), (pipe, theirs))
        )
        sun.detach(pipe)
        assert difference(found, wanted) <= 1e-4, name
        assert difference(found, ours("a cat", output_type="pt", latents=torch.zeros(1, 4, 8, 8)).images) > 1e-3, name


def test_loras_are_part_of_the_weights(exported: Exported, files: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = {f"{name}.lora_down.weight": torch.randn(2, 8), f"{name}.lora_up.weight": torch.randn(8, 2)}
    save_file(pair, tmp_path / "lora.safetensors")
    settings = {"loras": ((str(tmp_path / "lora.safetensors"), 0.8),), "size": (64, 80)}
    folder, contents = exported("onnx", **settings)
    assert contents.agreement["latents"] <= 1e-4  # of the model with the LoRA, as the check is
    plain, size = attached(files), (64, 80)
    changed = sun.load_exported(folder, threads=1)
    assert difference(latents_of(changed, size=size), latents_of(plain, size=size)) > 1e-3
    with pytest.raises(ValueError, match="exported for pictures of 64x80"):
        latents_of(changed, size=(64, 64))


def test_without_an_adapter_the_model_itself_is_exported_and_guided(exported: Exported, files: Path) -> None:
    folder, contents = exported("onnx", "none")
    assert contents.inputs["unet"] == ["sample", "timestep", "positive"]
    ours, theirs = sun.load_exported(folder, threads=1), load_pipeline(files / "model")
    theirs.scheduler = ours.scheduler
    both = [latents_of(pipe, guidance_scale=5.0) for pipe in (ours, theirs)]
    assert difference(*both) <= 1e-4
    older = replace(contents, guidance=None)  # exported when nothing was said of it
    assert [c.usual_guidance for c in (contents, older)] == [7.5, USUAL_GUIDANCE]


def test_what_a_controlnet_adds_is_asked_for_in_the_right_shapes(files: Path) -> None:
    from tiny import make_unet

    widths = (8, 16, 24, 24)
    expected = [(8, 1)] * 3 + [(8, 2)] + [(16, 2)] * 2 + [(16, 4)] + [(24, 4)] * 2 + [(24, 8)] + [(24, 8)] * 2
    assert residual_shapes({"block_out_channels": widths, "layers_per_block": 2}) == [*expected, (24, 8)]
    assert len(residual_shapes(make_unet().config)) == 13


# --- folders ------------------------------------------------------------------------------------------------------


def _edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / CONTENTS).read_text())
    (folder / CONTENTS).write_text(json.dumps({**content, **changes}))


def _swap(folder: Path) -> None:
    file = folder / "unet" / "model.onnx.data"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing file": (lambda f: (f / "vae_decoder" / "model.onnx").unlink(), "vae_decoder/model.onnx is missing"),
    "half a file": (lambda f: (f / "unet" / "model.onnx").write_bytes(b"x" * 100), "has 100 bytes instead of"),
    "one bit": (_swap, "unet/model.onnx.data is damaged"),
    "another version": (lambda f: _edit(f, format="sun-export-9"), "format 'sun-export-9'"),
    "a file elsewhere": (lambda f: _edit(f, files={"../unet/model.x": {}}), "names no files of"),
    "an unknown runtime": (lambda f: _edit(f, runtime="tensorrt"), "the runtime 'tensorrt' is none of openvino, onnx"),
    "no JSON": (lambda f: (f / CONTENTS).write_text("{"), "is not valid JSON"),
    "a list": (lambda f: (f / CONTENTS).write_text("[]"), "has the format"),
    "numbers for names": (lambda f: _edit(f, files=3), "is damaged"),
    "no folder at all": (lambda f: (f / CONTENTS).unlink(), "is not an exported model"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_folder_is_refused_in_a_sentence(copy_of_export: Path, kind: str) -> None:
    damage, sentence = DAMAGES[kind]
    damage(copy_of_export)
    with pytest.raises(ExportError, match=sentence):
        sun.load_exported(copy_of_export)


def test_files_outside_the_folder_are_refused(copy_of_export: Path) -> None:
    files = json.loads((copy_of_export / CONTENTS).read_text())["files"]
    _edit(copy_of_export, files={**files, "../../secret": {"bytes": 1, "sha256": ""}})
    with pytest.raises(ExportError, match="not in the folder"):
        sun.load_exported(copy_of_export)


def test_a_graph_the_runtime_cannot_read_is_named(copy_of_export: Path) -> None:
    (copy_of_export / "text_encoder" / "model.onnx").write_bytes(b"no graph")
    content = json.loads((copy_of_export / CONTENTS).read_text())
    write_contents(copy_of_export, Contents(**{k: v for k, v in content.items() if k not in ("format", "files")}))
    with pytest.raises(ExportError, match=r"text_encoder could not be loaded by onnx"):
        sun.load_exported(copy_of_export)


def test_a_runtime_that_is_not_installed_is_named_with_its_install(
    copy_of_export: Path, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    hidden = ("onnxruntime", "nncf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in hidden else find(name, *a))
    with pytest.raises(ExportError, match=r"onnxruntime is not installed.*speedupnet-sun\[export\]"):
        sun.load_exported(copy_of_export)
    settings = ExportSettings(str(files / "model"), "none", "openvino", tmp_path / "x", "int8")
    with pytest.raises(ExportError, match="nncf is not installed"):
        export(settings)
    assert not (tmp_path / "x").exists()


def test_a_stopped_export_leaves_nothing_and_an_older_one_as_it_was(
    copy_of_export: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = []

    def stop(runtime: str, source: Path, folder: Path, weights: str) -> None:
        parts.append(folder.name)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"half")
        if len(parts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(engines, "write", stop)
    left = copy_of_export.parent / ".copy-abc.part"  # of one that was killed
    left.mkdir()
    before = (copy_of_export / CONTENTS).read_bytes()
    adapter = str(files / "adapter.safetensors")
    with pytest.raises(KeyboardInterrupt):
        export(ExportSettings(str(files / "model"), adapter, "onnx", copy_of_export))
    assert parts == ["text_encoder", "unet"]
    assert [path.name for path in copy_of_export.parent.iterdir()] == ["copy"]
    assert (copy_of_export / CONTENTS).read_bytes() == before


def test_only_an_exported_model_is_replaced(files: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ExportError, match="something else than an exported model"):
        export(ExportSettings(str(files / "model"), "none", "onnx", tmp_path / "mine"))
    with pytest.raises(ExportError, match="is a file"):
        export(ExportSettings(str(files / "model"), "none", "onnx", tmp_path / "mine" / "letter.txt"))
    with pytest.raises(ExportError, match="multiples of 8"):
        export(ExportSettings(str(files / "model"), "none", "onnx", tmp_path / "x", size=(60, 64)))
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# --- the command line ---------------------------------------------------------------------------------------------


def command(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == code, f"{result.output}\n{result.exception!r}"
    return result


def test_export_and_generate_on_the_command_line(files: Path, tmp_path: Path) -> None:
    out, picture, again = tmp_path / "small", tmp_path / "x.png", tmp_path / "y.png"
    adapter = files / "adapter.safetensors"
    result = command(
        "export", files / "model", "--adapter", adapter, "--to", "onnx", "--weights", "int8", "--out", out,
        "--json", tmp_path / "x.json",
    )  # fmt: skip
    assert "PSNR" in result.output
    assert json.loads((tmp_path / "x.json").read_text())["psnr"] > 20
    assert is_exported(out)
    result = command("generate", "a cat", "--negative", "dog", "--seed", 3, "--model", out, "--out", picture)
    assert "4 U-Net calls" in result.output
    command("generate", "--from", picture, "--out", again)
    assert picture.read_bytes() == again.read_bytes()
    command("generate", "a cat", "--negative", "dog", "--seed", 3, "--sun-strength", 0, "--model", out, "--out", again)
    assert list(Image.open(picture).tobytes()) != list(Image.open(again).tobytes())
    refused = {"--lora": "ink.safetensors", "--dtype": "float16", "--guidance": 3, "--adapter": adapter}
    for option, value in refused.items():
        said = command("generate", "a cat", "--model", out, option, value, "--out", again, code=2).output
        assert "exported model" in said, option


def test_an_exported_model_draws_the_rows_of_a_file_as_single_commands_do(
    exported: Callable[..., tuple[Path, Contents]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = exported("onnx", weights="fp16")[0]
    Path("x.csv").write_text("prompt,negative,seed\na cat,a dog,3\na fish,,4\n")
    command("generate", "--prompts", "x.csv", "--model", model, "--steps", 2, "--out", "out")
    command("generate", "a cat", "--negative", "a dog", "--seed", 3, "--model", model, "--steps", 2, "--out", "x.png")
    assert Path("out/000/000/000000000.png").read_bytes() == Path("x.png").read_bytes()
    assert Path("out/000/000/000000001.png").exists()


@pytest.mark.slow  # Emoji Diffusion itself: its U-Net has sixteen layers to write
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_shipped_model_draws_what_it_draws_in_torch(runtime: str, tmp_path: Path) -> None:
    contents = export(ExportSettings("emoji", "emoji", runtime, tmp_path / "emoji"))
    assert contents.agreement["latents"] <= 1e-4
    ours, theirs = sun.load_exported(tmp_path / "emoji", threads=1), load_pipeline("emoji")
    sun.attach(theirs, EMOJI_SUN)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    texts = {"prompt": "large polar bear, yellow background", "negative_prompt": "gray"}
    found, wanted = (latents_of(pipe, **texts, latents=noise, size=(128, 128)) for pipe in (ours, theirs))
    assert difference(found, wanted) <= 1e-4
