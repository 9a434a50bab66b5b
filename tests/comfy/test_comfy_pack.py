"""The pack as ComfyUI loads it: names, tooltips, help pages, adapter files; and the door outside ComfyUI."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy_helpers import make_adapter, relative
from comfyui_host import REPOSITORY

TITLES = {
    "SUN_LoadAdapter": "Load SUN Adapter",
    "SUN_Apply": "Apply SUN to Model",
    "SUN_Sampler": "SUN 4-step Sampler",
    "SUN_Scheduler": "SUN Scheduler",
    "SUN_Guider": "SUN Guider",
    "SUN_ControlNetReadsBoth": "ControlNet Reads Both Prompts",
    "SUN_AdapterInfo": "SUN Adapter Info",
    "SUN_LoadEmojiDiffusion": "Load Emoji Diffusion",
    "SUN_LoadEmojiControlNet": "Load Emoji ControlNet",
    "SUN_ApplyLtcAccel": "Apply LTC-Accel",
    "SUN_ApplyFeatureInheritance": "Apply Feature Inheritance",
    "SUN_SwitchUNets": "Switch U-Nets by Step",
    "SUN_ApplyExperts": "Apply Experts to Compact U-Net",
}


def test_nodes_have_the_names_users_know(host: SimpleNamespace) -> None:
    assert {node: host.titles.get(node) for node in host.nodes if node.startswith("SUN_")} == TITLES


@pytest.mark.parametrize("node", TITLES)
def test_every_input_and_output_explains_itself(host: SimpleNamespace, node: str) -> None:
    schema = host.nodes[node].GET_SCHEMA()
    assert schema.category == "SUN"
    assert schema.description
    for part in [*schema.inputs, *schema.outputs]:
        assert part.tooltip, f"{node}.{part.id} has no tooltip"


@pytest.mark.parametrize("node", TITLES)
def test_every_node_has_a_help_page(node: str) -> None:
    page = (REPOSITORY / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {TITLES[node]}\n")


def test_web_directory_is_announced(host: SimpleNamespace) -> None:
    import nodes

    assert Path(host.pack.WEB_DIRECTORY) == Path("web")
    assert REPOSITORY / "web" in [Path(folder) for folder in nodes.EXTENSION_WEB_DIRS.values()]


# --------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def load(host: SimpleNamespace):
    return host.nodes["SUN_LoadAdapter"]


@pytest.fixture
def models_sun(host: SimpleNamespace) -> Path:
    """models/sun, emptied after the test."""
    folder = host.base / "models" / "sun"
    yield folder
    for path in folder.iterdir():
        path.unlink()


def choices(load) -> list[str]:
    return load.GET_SCHEMA().inputs[0].options


def test_the_shipped_adapter_is_always_listed(load) -> None:
    assert choices(load) == ["emoji-sun (shipped with SUN)"]


def test_models_sun_and_extra_paths_are_listed(host, load, emoji_folder, models_sun: Path, tmp_path: Path) -> None:
    import folder_paths

    make_adapter(emoji_folder, models_sun / "mine.safetensors", positive=False)
    (models_sun / "notes.txt").write_text("not an adapter")
    make_adapter(emoji_folder, tmp_path / "elsewhere.safetensors")
    folder_paths.add_model_folder_path("sun", str(tmp_path))  # what extra_model_paths.yaml does
    try:
        assert choices(load) == ["emoji-sun (shipped with SUN)", "elsewhere.safetensors", "mine.safetensors"]
        mine, elsewhere = (load.execute(f"{name}.safetensors").result[0] for name in ("mine", "elsewhere"))
        assert (mine.adapter.positive, elsewhere.adapter.positive) == (False, True)
    finally:
        folder_paths.folder_names_and_paths["sun"][0].remove(str(tmp_path))


def test_paths_registered_before_the_pack_survive(host: SimpleNamespace) -> None:
    import folder_paths

    paths, extensions = folder_paths.folder_names_and_paths["sun"]
    try:
        folder_paths.folder_names_and_paths["sun"] = (["/shared/sun"], set())
        host.part("nodes.folders").register()
        assert folder_paths.get_folder_paths("sun") == ["/shared/sun", str(host.base / "models" / "sun")]
        assert ".safetensors" in folder_paths.folder_names_and_paths["sun"][1]
    finally:
        folder_paths.folder_names_and_paths["sun"] = (paths, extensions)


@pytest.mark.parametrize("name", ["gone.safetensors", "../../secret.safetensors", "/etc/passwd"])
def test_unknown_names_are_refused_with_the_paths_searched(host, load, name: str) -> None:
    message = load.validate_inputs(name)
    assert f"No SUN adapter named {name!r}" in message
    assert str(host.base / "models" / "sun") in message
    with pytest.raises(FileNotFoundError, match="No SUN adapter named"):
        load.execute(name)


def test_a_changed_file_is_loaded_again(load, emoji_folder, models_sun: Path) -> None:
    path = models_sun / "mine.safetensors"
    make_adapter(emoji_folder, path)
    before = load.fingerprint_inputs("mine.safetensors")
    assert load.fingerprint_inputs("mine.safetensors") == before
    make_adapter(emoji_folder, path, positive=False)
    assert load.fingerprint_inputs("mine.safetensors") != before


def test_a_broken_file_says_so(host, load, models_sun: Path) -> None:
    (models_sun / "broken.safetensors").write_bytes(b"not a safetensors file")
    with pytest.raises(host.part("sun.files").SunFileError, match=r"broken\.safetensors"):
        load.execute("broken.safetensors")


def test_both_layouts_and_negative_only(host, load, run, emoji_folder, models_sun: Path) -> None:
    """The authors' layout gives the same picture; a negative-only adapter (the paper's) works too."""
    from sun import SunAdapter

    make_adapter(emoji_folder, models_sun / "ours.safetensors")
    SunAdapter.load(models_sun / "ours.safetensors").save(models_sun / "official.safetensors", layout="official")
    make_adapter(emoji_folder, models_sun / "paper.safetensors", positive=False)
    pictures = [
        run.sun(run.apply(adapter=load.execute(f"{name}.safetensors").result[0]))
        for name in ("ours", "official", "paper")
    ]
    assert torch.equal(pictures[0], pictures[1])
    assert pictures[2].isfinite().all()
    assert not torch.equal(pictures[0], pictures[2])


def test_the_guidance_scale_of_an_adapter_that_takes_it(host, load, run, emoji_folder, models_sun: Path) -> None:
    from sun import SunAdapter

    make_adapter(emoji_folder, models_sun / "any.safetensors", guided=True)
    from sun.surgery import bake

    bake(SunAdapter.load(models_sun / "any.safetensors"), 7.0).save(models_sun / "seven.safetensors")
    adapters = {name: load.execute(f"{name}.safetensors").result[0] for name in ("any", "seven")}
    own, seven = run.sun(run.apply(adapter=adapters["any"])), run.sun(run.apply(adapter=adapters["seven"]))
    assert torch.equal(run.sun(run.apply(adapter=adapters["any"], guidance=4.0)), own)
    asked = run.sun(run.apply(adapter=adapters["any"], guidance=7.0))
    assert relative(asked, seven) < relative(own, seven) / 10  # the baked scales were rounded to 16 bits
    assert "w = 4 by default, takes others" in host.nodes["SUN_AdapterInfo"].execute(adapters["any"]).result[0]
    with pytest.raises(ValueError, match="guidance scale is fixed at 7"):
        run.apply(adapter=adapters["seven"], guidance=3.0)


# ------------------------------------------------------------------------------------------------------ outside ComfyUI


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_door_opens_anywhere() -> None:
    """pytest, A1111 and Forge import the root __init__.py: it must do nothing there."""
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", {str(REPOSITORY / "__init__.py")!r},
                                              submodule_search_locations=[{str(REPOSITORY)!r}])
module = importlib.util.module_from_spec(spec); sys.modules["pack"] = module; spec.loader.exec_module(module)
print([hasattr(module, name) for name in ("comfy_entrypoint", "WEB_DIRECTORY", "NODE_CLASS_MAPPINGS")],
      "torch" in sys.modules)
"""
    assert python(code).strip() == "[False, False, False] False"


def test_install_script_does_nothing() -> None:
    done = subprocess.run([sys.executable, str(REPOSITORY / "install.py")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_core_loads_in_comfyui_without_diffusers(host: SimpleNamespace) -> None:
    """ComfyUI has neither diffusers nor accelerate: no module of the pack may import them there."""
    wanted = re.compile(r"^\s*(?:from|import)\s+(diffusers|accelerate|peft|typer|rich)\b", re.MULTILINE)
    loaded = [m for name, m in list(sys.modules.items()) if name.startswith(host.pack.__name__ + ".")]
    files = [Path(module.__file__) for module in loaded if getattr(module, "__file__", None)]
    assert len(files) > 8
    assert not [path for path in files if wanted.search(path.read_text(encoding="utf-8"))]


# ------------------------------------------------------------------------------------------- what newer ComfyUIs know


def test_aliases_and_advanced_inputs_where_the_host_has_them(host: SimpleNamespace, monkeypatch) -> None:
    """0.3.75 knows neither; newer ones find nodes by other words and fold rare inputs away."""
    import dataclasses

    nodes = host.part("nodes.nodes")
    io = nodes.io

    @dataclasses.dataclass
    class NewSchema(io.Schema):
        search_aliases: list[str] = dataclasses.field(default_factory=list)

    def newer(kind):
        class Input(kind):
            def __init__(self, *args, advanced=None, **kwargs):
                super().__init__(*args, **kwargs)
                self.advanced = advanced

        return Input

    if "search_aliases" not in {field.name for field in dataclasses.fields(io.Schema)}:
        monkeypatch.setattr(io, "Schema", NewSchema)
        for name in ("Float", "Int", "Combo", "String"):
            monkeypatch.setattr(getattr(io, name), "Input", newer(getattr(io, name).Input))
    ours = {name: node.define_schema() for name, node in host.nodes.items() if name.startswith("SUN_")}

    def found(word: str) -> set[str]:
        return {n for n, s in ours.items() if any(word.lower() in alias.lower() for alias in s.search_aliases)}

    for word in ("speedup", "SpeedUpNet", "negative prompt", "LCM", "turbo", "few step", "accelerate"):
        assert {"SUN_Apply", "SUN_Sampler"} <= found(word), word
    assert "SUN_ApplyFeatureInheritance" in found("deepcache")
    assert "SUN_SwitchUNets" in found("T-Stitch") & found("faster")
    assert {"SUN_ApplyFeatureInheritance", "SUN_ApplyLtcAccel"} <= found("cache") & found("accelerate")
    assert all(schema.search_aliases for schema in ours.values())
    folded = {(n, i.id) for n, s in ours.items() for i in s.inputs if getattr(i, "advanced", None)}
    assert folded == {
        *(("SUN_Sampler", name) for name in ("denoise_mode", "final_step", "start_percent", "end_percent")),
        *(("SUN_Apply", name) for name in ("start_percent", "end_percent", "guidance")),
        *(("SUN_ApplyLtcAccel", name) for name in ("tau", "every", "calibration")),
        ("SUN_Scheduler", "denoise_mode"), ("SUN_ApplyFeatureInheritance", "plan"),
    }  # fmt: skip
