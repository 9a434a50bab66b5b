"""What a user touches: accordion, tab, infotext, X/Y/Z axes, settings, loading."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from webui_host import ADAPTER, REPOSITORY, UnetLog, pasted, sun_scripts

from sun.ltc.presets import tooltip

SUN = {"adapter": ADAPTER}


def test_one_always_visible_script_in_each_tab(host: Any) -> None:
    assert [script.is_img2img for script in sun_scripts(host)] == [False, True]
    assert {script.title() for script in sun_scripts(host)} == {"SUN"}


def test_reload_ui_registers_everything_once(host: Any) -> None:
    host.scripts.load_scripts(str(host.repository))
    samplers, schedulers = host.modules("sd_samplers"), host.modules("sd_schedulers")
    assert [sampler.name for sampler in samplers.samplers].count("SUN") == 1
    assert [scheduler.label for scheduler in schedulers.schedulers].count("SUN Trailing") == 1
    assert samplers.samplers[0].name == "DPM++ 2M"  # the host's default is its first
    callbacks = host.modules("script_callbacks").callbacks
    assert {kind: len(those) for kind, those in callbacks.items()} == dict.fromkeys(callbacks, 1)
    assert len(sun_scripts(host)) == 2


def test_no_generic_module_names_are_taken(host: Any) -> None:
    """`webui` is the host's own start file, `sun` and `nodes` may be anybody's."""
    assert sys.modules["sd_webui_sun.webui.extension"]
    assert "webui" not in sys.modules


def test_install_and_preload_need_nothing(host: Any) -> None:
    """Both hosts run install.py at every start, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-S", str(REPOSITORY / "install.py")], capture_output=True, text=True, check=True
    )
    assert result.stdout == result.stderr == ""
    import argparse

    preload = host.modules("script_loading").load_module(str(REPOSITORY / "preload.py"))
    parser = argparse.ArgumentParser()
    preload.preload(parser)
    assert parser.parse_args(["--sun-dir", "x"]).sun_dir == "x"


def test_folders_of_command_line_and_settings_are_searched(host: Any, tmp_path: Any) -> None:
    shared, folders = host.modules("shared"), host.part("folders")
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / f"{name}.safetensors").touch()
        (tmp_path / name / "notes.txt").touch()
    shared.cmd_opts.sun_dir, shared.opts.data["sun_folder"] = str(tmp_path / "a"), str(tmp_path / "b")
    try:
        names = folders.names()
        assert {"deep/a.safetensors", "deep/b.safetensors", ADAPTER} <= set(names)
        assert names[-1] == folders.SHIPPED
        assert "notes.txt" not in " ".join(names)
        for hostile in ("../../etc/passwd", "/etc/passwd", "", None):
            with pytest.raises(FileNotFoundError, match=r"--sun-dir"):
                folders.find(hostile)
    finally:
        shared.cmd_opts.sun_dir, shared.opts.data["sun_folder"] = None, ""


def test_infotext_pasted_back_gives_the_same_picture(family: Any, host: Any) -> None:
    chosen = {**SUN, "strength": 0.8, "steps": 5, "main_negative": False, "negative": 'a "red", dog: no\ncar'}
    first = family.run(chosen, prompt="a cat", seed=3)
    values = pasted(host, first.infotexts[0])
    assert values["negative"] == chosen["negative"]
    again = family.run(values, prompt="a cat", seed=3)
    assert torch.equal(first.images, again.images)
    assert again.infotexts == first.infotexts
    asked = family.run({"adapter": "any-guidance.safetensors", "guidance": 7.3}, prompt="a cat", seed=3)
    assert pasted(host, asked.infotexts[0])["guidance"] == 7.3
    assert values["guidance"] == 0.0


def test_infotext_names_the_file_by_its_hash(family: Any, host: Any) -> None:
    params = host.modules("infotext_utils").parse_generation_parameters(
        family.run(SUN, prompt="a cat", negative_prompt="rain", seed=3).infotexts[0]
    )
    path = host.models_path / "sun" / ADAPTER
    import hashlib

    assert params["SUN adapter hash"] == hashlib.sha256(path.read_bytes()).hexdigest()[:10]
    assert (params["Sampler"], params["Schedule type"], params["CFG scale"]) == ("SUN", "SUN Trailing", "1.0")
    assert "SUN negative prompt" not in params  # the main one stands in its own line


def test_pasting_a_picture_without_sun_switches_it_off(host: Any) -> None:
    values = pasted(host, "a cat\nSteps: 20, Sampler: Euler")
    assert values["enabled"] is False
    assert values["steps"] == 4


def test_the_api_may_name_arguments(family: Any) -> None:
    """`alwayson_scripts` fills the script's first arguments; one object with names is easier to keep."""
    with UnetLog(family.unet) as log:
        family.run({**SUN, "steps": 2}, prompt="a cat", seed=3)
        off = family.run({**SUN, "enabled": False}, prompt="a cat", seed=3, steps=3)
    assert log.timesteps[:2] == [999, 499]
    assert off.p.sun_run is None
    with pytest.raises(ValueError, match="adaptor"):
        family.run({"adaptor": ADAPTER}, prompt="a cat", seed=3, steps=1)


# ------------------------------------------------------------------------------------------------------ X/Y/Z plot


@pytest.fixture
def plot(host: Any) -> Any:
    """The host's X/Y/Z script: loaded by path, found through scripts_data."""

    class AxisOption:
        def __init__(self, label: str, type: Any, apply: Any, choices: Any = None, cost: float = 0.0) -> None:
            self.label, self.type, self.apply, self.choices = label, type, apply, choices

    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[AxisOption("Seed", int, None)])
    script = type("Script", (), {"__module__": "xyz_grid.py"})
    data = host.scripts.ScriptClassData(script, "xyz_grid.py", "", module)
    host.scripts.scripts_data.append(data)
    yield module
    host.scripts.scripts_data.remove(data)


def test_axes_change_the_run_and_are_added_once(family: Any, host: Any, plot: Any) -> None:
    xyz = host.part("xyz")
    xyz.register()
    xyz.register()
    axes = {axis.label: axis for axis in plot.axis_options}
    assert len(axes) == len(plot.axis_options) == 16
    assert ADAPTER in axes["[SUN] adapter"].choices()
    p = SimpleNamespace()
    axes["[SUN] strength"].apply(p, 0.5, [])
    axes["[SUN] negative prompt"].apply(p, "a dog", [])
    by_axis = family.run(SUN, overrides=p.sun_overrides, prompt="a cat", negative_prompt="rain", seed=3)
    by_hand = family.run({**SUN, "strength": 0.5}, prompt="a cat", negative_prompt="a dog", seed=3)
    assert torch.equal(by_axis.images, by_hand.images)


def test_an_axis_does_not_reach_the_next_cell(host: Any) -> None:
    override = host.part("choices").override
    first = SimpleNamespace()
    override(first, strength=0.5)
    second = SimpleNamespace(**vars(first))  # the plot copies the processing object, not what it holds
    override(second, strength=0.7)
    assert first.sun_overrides == {"strength": 0.5}


# -------------------------------------------------------------------------------------------------------------- tab


@pytest.fixture
def tab(host: Any) -> Any:
    """The tab's components by elem_id, created as the host does."""
    gradio = host.stub("gradio")
    del gradio.CREATED[:]
    ((_, title, name),) = host.modules("script_callbacks").call("ui_tabs")[0]
    assert (title, name) == ("SUN", "sun_tab")
    return {component.elem_id: component for component in gradio.CREATED if component.elem_id}


def press(tab: Any, button: str, **values: Any) -> tuple[Any, ...]:
    """Presses a button with the start values, except those given by elem_id without "sun_"."""
    handler = tab[f"sun_{button}"].handlers[0]
    inputs = [values.get((component.elem_id or "")[4:], component.value) for component in handler["inputs"]]
    return handler["fn"]("task(1)", *inputs[1:])


def small(**more: Any) -> dict[str, Any]:
    return {"prompt": "a cat", "negative": "a dog", "seed": 3, "width": 64, "height": 64, "adapter": ADAPTER} | more


def test_tab_paints_what_the_accordion_paints(family: Any, tab: Any) -> None:
    images, infotexts, infotext, report, log = press(tab, "generate", **small())
    assert log == ""
    script = family.run(SUN, prompt="a cat", negative_prompt="a dog", seed=3)
    assert torch.equal(images[0], script.images[0])
    assert json.loads(infotexts) == [infotext]
    assert "Negative prompt: a dog" in infotext
    assert "<td>SUN</td><td>4</td><td>4</td>" in report


def test_compare_shows_both_with_their_calls(family: Any, host: Any, tab: Any) -> None:
    host.modules("script_callbacks").call("ui_settings")
    images, infotexts, _, report, _ = press(tab, "compare", **small(seed=-1))
    assert len(images) == len(json.loads(infotexts)) == 2
    seeds = {host.modules("infotext_utils").parse_generation_parameters(text)["Seed"] for text in json.loads(infotexts)}
    assert len(seeds) == 1
    calls = 25
    assert f"<td>DPM++ 2M, 25 steps, CFG 7</td><td>{calls}</td><td>50</td>" in report
    assert "SUN" not in json.loads(infotexts)[1]


@pytest.mark.parametrize(
    ("adapter", "asked", "scale"),
    [(ADAPTER, 0.0, 7), ("any-guidance.safetensors", 0.0, 4), ("any-guidance.safetensors", 2.5, 2.5)],
)
def test_compare_takes_the_scale_that_sun_stood_in_for(
    host: Any, tab: Any, adapter: str, asked: float, scale: float
) -> None:
    """The setting's 7 where the adapter does not say one."""
    host.modules("script_callbacks").call("ui_settings")
    images, *_ = press(tab, "compare", **small(adapter=adapter, guidance=asked))
    assert [caption for _, caption in images] == ["SUN", f"DPM++ 2M, 25 steps, CFG {scale:g}"]


def test_compare_says_how_many_steps_it_takes(host: Any) -> None:
    opts = host.modules("shared").opts
    gradio = host.stub("gradio")
    for steps in (30, 25):
        opts.data["sun_compare_steps"] = steps
        del gradio.CREATED[:]
        host.part("tab").create_tabs()
        (button,) = [made for made in gradio.CREATED if made.elem_id == "sun_compare"]
        assert button.value == f"Compare with {steps} steps"


def test_everything_of_the_accordion_is_sent_to_the_other_tabs(host: Any) -> None:
    """By "Send to img2img" below a gallery: the host chooses by `name in paste_field_names`."""
    for script in sun_scripts(host):
        sent = [control for control, name in script.infotext_fields if name in script.paste_field_names]
        assert len(sent) == len(host.part("script").CONTROLS)
        assert all(isinstance(name, str) and callable(name) for _, name in script.infotext_fields)
        assert len(set(script.paste_field_names)) == len(sent)
        assert "Prompt" not in script.paste_field_names


def test_errors_of_the_tab_are_shown(family: Any, tab: Any) -> None:
    *_, error = press(tab, "generate", **small(adapter="gone.safetensors"))
    assert "gone.safetensors" in error
    *_, error = press(tab, "generate", **small(mask=SimpleNamespace()))
    assert "mask" in error


def test_tab_starts_the_hosts_progress_bar_and_sends_to_other_tabs(host: Any, tab: Any) -> None:
    script = (REPOSITORY / "javascript/sun.js").read_text(encoding="utf-8")
    for button in ("sun_generate", "sun_compare"):
        assert f"function {tab[button].handlers[0]['js']}(" in script
    for name in ("sun_gallery", "sun_gallery_container"):
        assert f'"{name}"' in script
        assert name in tab
    bindings = host.modules("infotext_utils").bindings[-3:]
    assert [binding.tabname for binding in bindings] == ["txt2img", "img2img", "inpaint"]
    assert tab["sun_interrupt"].handlers[0]["fn"]() is None
    assert host.modules("shared").state.interrupted
    host.modules("shared").state.begin()


def test_tab_can_be_hidden(host: Any) -> None:
    opts = host.modules("shared").opts
    opts.data["sun_show_tab"] = False
    assert host.part("tab").create_tabs() == []
    opts.data["sun_show_tab"] = True


def test_forge_runs_the_tab_on_its_main_thread_and_errors_come_back(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forge's main thread prints an exception and returns None."""
    ran: list[Any] = []

    def run_and_wait_result(work: Any) -> Any:
        ran.append(work)
        try:
            return work()
        except Exception:
            return None

    thread = SimpleNamespace(run_and_wait_result=run_and_wait_result)
    monkeypatch.setitem(sys.modules, "modules_forge", SimpleNamespace(main_thread=thread))
    monkeypatch.setitem(sys.modules, "modules_forge.main_thread", thread)
    on_main_thread = host.part("generate").on_main_thread
    assert on_main_thread(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        on_main_thread(lambda: 1 / 0)
    assert len(ran) == 2


def test_masks_are_no_pictures_of_the_tab(host: Any, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host can be set to return a mask after each picture, and names one infotext a picture."""
    opts = host.modules("shared").opts
    monkeypatch.setattr(opts, "data_labels", {**opts.data_labels, "return_mask": object()})
    generate = host.part("generate")
    p = generate.build(generate.Request("a cat", model="other.safetensors"))
    assert p.override_settings == {"return_mask": False, "sd_model_checkpoint": "other.safetensors"}


# ------------------------------------------------------------------------------------------------------- strings


def test_the_presets_of_ltc_accel_say_what_they_give(host: Any) -> None:
    script = sun_scripts(host)[1]
    controls = host.scripts.scripts_img2img.inputs[script.args_from : script.args_to]
    (preset,) = (control for control in controls if control.label == "LTC-Accel preset")
    assert preset.arguments["info"] == tooltip()


def test_every_label_has_a_chinese_string(host: Any, tab: Any) -> None:
    """The host merges localizations/zh_CN.json of every extension; keys are the English texts."""
    chinese = json.loads((REPOSITORY / "localizations/zh_CN.json").read_text(encoding="utf-8"))
    host.modules("script_callbacks").call("ui_settings")
    script = sun_scripts(host)[1]
    labels = {c.label for c in host.scripts.scripts_img2img.inputs[script.args_from : script.args_to]}
    labels |= {component.label for component in tab.values()}
    labels |= {info.label for key, info in host.modules("shared").opts.data_labels.items() if key.startswith("sun_")}
    # Words of the hosts are left to the hosts' translations: an extension's would win over them everywhere.
    known_to_hosts = {
        "Prompt",
        "Negative prompt",
        "Width",
        "Height",
        "Seed",
        "Batch size",
        "Steps",
        "Model",
        "Parameters",
    }
    known_to_hosts |= {"SUN", "SUN pictures", "Parameters", None}
    assert labels - known_to_hosts <= set(chinese)
