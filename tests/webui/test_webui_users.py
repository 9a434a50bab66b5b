"""What a new user, a power user and a stranger met in the web UIs, and what is right instead."""

from __future__ import annotations

import base64
import gc
import io
import json
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_webui_api import BODY, client
from test_webui_sampling import TRAINED, latent
from test_webui_surfaces import plot, press, small, tab
from webui_host import ADAPTER, REPOSITORY, UnetLog, make_adapter, sun_scripts

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402
from PIL import Image  # noqa: E402

__all__ = ["client", "plot", "tab"]
SUN = {"adapter": ADAPTER}
ON_SCHEDULE = {**SUN, "sampling": "schedule"}


# -------------------------------------------------------------------------------------------- samplers and schedules


@pytest.mark.parametrize(("sampler", "calls"), [("DDIM", TRAINED), ("PLMS", TRAINED), ("Euler", TRAINED)])
def test_schedule_means_the_trained_timesteps_for_every_sampler(
    family: Any, host: Any, sampler: str, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hosts' DDIM and PLMS know no schedules: three calls from t = 751."""
    monkeypatch.setitem(host.modules("shared").opts.data, "always_discard_next_to_last_sigma", True)
    with UnetLog(family.unet) as log:
        result = family.run(ON_SCHEDULE, sampler_name=sampler, prompt="a cat", seed=3)
    assert (result.errors, log.timesteps) == ([], calls)
    assert "Schedule type: SUN Trailing" in result.infotexts[0]


@pytest.mark.parametrize("sampler", ["DDIM", "Euler"])
@pytest.mark.parametrize(
    ("mode", "denoise", "calls"),
    [("trained", 0.5, [499, 249]), ("respaced", 0.5, [499, 374, 249, 124]), ("trained", 1.0, TRAINED)],
)
def test_schedule_holds_in_image_to_image(
    family: Any, sampler: str, mode: str, denoise: float, calls: list[int]
) -> None:
    with UnetLog(family.unet) as log:
        result = family.run(
            {**ON_SCHEDULE, "denoise_mode": mode}, image=latent(), sampler_name=sampler, denoising_strength=denoise,
            prompt="a cat", seed=3,
        )  # fmt: skip
    assert (result.errors, log.timesteps) == ([], calls)


def test_ddim_and_suns_euler_walk_the_same_way(family: Any) -> None:
    """DDIM with eta 0 is Euler in the other parametrisation; it ends at sigma_0 where SUN's sampler ends at 0."""
    images = [
        family.run(chosen, sampler_name="DDIM", image=latent(), denoising_strength=0.75, prompt="a cat", seed=3).images
        for chosen in (ON_SCHEDULE, SUN)
    ]
    assert float((images[0] - images[1]).abs().max() / images[1].abs().max()) < 0.03


def test_a_sampler_that_chooses_its_own_timesteps_is_refused(family: Any) -> None:
    with pytest.raises(ValueError, match="UniPC chooses its timesteps itself"):
        family.run(ON_SCHEDULE, sampler_name="UniPC", prompt="a cat", seed=3)
    kept = family.run({**SUN, "sampling": "keep"}, sampler_name="UniPC", prompt="a cat", seed=3)
    assert "SUN Trailing" not in kept.infotexts[0]
    assert "SUN denoise mode" not in kept.infotexts[0], "the page's schedule counts image to image in its own way"


# ---------------------------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize("off", [False, "false", "False", "no", "off", "0", 0, 0.0, "", None, "null"])
def test_a_no_in_any_spelling_leaves_sun_off(family: Any, off: Any) -> None:
    assert family.run({**SUN, "enabled": off}, prompt="a cat", seed=3, steps=1).p.sun_run is None
    settings = family.run({"ltc": off, "inherit": "off"}, prompt="a cat", seed=3, steps=1).p
    assert settings.sun_accelerators is None
    assert settings.sun_run is None


@pytest.mark.parametrize("on", [True, "true", "YES", "1", 1])
def test_a_yes_in_any_spelling_switches_it_on(family: Any, on: Any) -> None:
    assert family.run({**SUN, "enabled": on}, prompt="a cat", seed=3).p.sun_run is not None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"enabled": "perhaps"}, "true or false"), ({"enabled": 2}, "true or false"),
        ({"enabled": []}, "true or false"),
        ({"main_negative": "x"}, "true or false"), ({"ltc": {}}, "true or false"), ({"steps": 0}, "1 to 50"),
        ({"steps": 1001}, "1 to 50"), ({"steps": 4.5}, "whole"), ({"steps": True}, "whole"), ({"steps": "x"}, "whole"),
        ({"strength": 99}, "0 to 2"), ({"strength": float("nan")}, "0 to 2"), ({"strength": [1]}, "0 to 2"),
        ({"guidance": 1e6}, "0 to 30"), ({"guidance": "inf"}, "0 to 30"), ({"tau": -1, "ltc": True}, "0 to 1.6"),
        ({"every": 1, "ltc": True}, "2 to 10"), ({"negative": 5}, "text"), ({"adapter": ["a"]}, "text"),
        ({"sampling": "euler"}, "one of"), ({"denoise_mode": ""}, "one of"), ({"calibration": "no"}, "one of"),
        ({"negative": "\ud800"}, "surrogate"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_are_refused_in_words(family: Any, wrong: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        family.run({**SUN, **wrong}, prompt="a cat", seed=3)


def test_numbers_may_be_written_as_text(family: Any) -> None:
    given = family.run({**SUN, "steps": "2", "strength": "0.5", "main_negative": "true"}, prompt="a cat", seed=3)
    assert (given.p.sun_run.settings.steps, given.p.sun_run.settings.strength) == (2, 0.5)


# ------------------------------------------------------------------------------------------------------- X/Y/Z plot


def host_axes(plot: Any, host: Any) -> dict[str, Any]:
    """The host's own axes, as its script has them, with SUN's added."""

    def field(name: str) -> Any:
        return lambda p, value, _values: setattr(p, name, value)

    fields = {
        "Steps": "steps", "Sampler": "sampler_name", "CFG Scale": "cfg_scale", "Schedule type": "scheduler",
        "Hires sampler": "hr_sampler_name", "Schedule rho": "rho", "Negative Guidance minimum sigma": "s_min_uncond",
    }  # fmt: skip
    plot.axis_options[:] = [plot.AxisOption(label, str, field(name)) for label, name in fields.items()]
    host.part("xyz").register()
    host.part("xyz").register()
    return {axis.label: axis for axis in plot.axis_options}


def test_the_hosts_axes_act_with_sun_on(family: Any, host: Any, plot: Any) -> None:
    axes = host_axes(plot, host)

    def cell(sun: Any = SUN, **values: Any) -> Any:
        names = {"steps": "Steps", "sampler": "Sampler", "schedule": "Schedule type", "cfg": "CFG Scale"}
        with UnetLog(family.unet) as log:
            run = family.run(
                sun, prompt="a cat", seed=3,
                axes=lambda p: [axes[names[name]].apply(p, value, []) for name, value in values.items()],
            )  # fmt: skip
        return log.timesteps, run

    assert cell(steps=2)[0] == [999, 499]
    assert "Steps: 2" in cell(steps=2)[1].infotexts[0]
    timesteps, heun = cell(sampler="Heun")
    assert (heun.p.sampler_name, timesteps[0], len(timesteps)) == ("Heun", 999, 7)
    assert "SUN sampling: schedule" in heun.infotexts[0]
    simple = cell(schedule="Simple")[1]
    assert (simple.p.sampler_name, simple.p.scheduler) == ("SUN", "Simple")
    plain = cell()[1]
    assert (plain.p.sampler_name, plain.p.scheduler, plain.p.cfg_scale) == ("SUN", "SUN Trailing", 1.0)
    asked = cell({"adapter": "any-guidance.safetensors"}, cfg=7.0)[1]
    by_hand = family.run({"adapter": "any-guidance.safetensors", "guidance": 7.0}, prompt="a cat", seed=3)
    assert torch.equal(asked.images, by_hand.images)
    assert "SUN guidance: 7" in asked.infotexts[0]


@pytest.mark.parametrize(
    ("axis", "value"), [("CFG Scale", 5.0), ("Schedule rho", 3.0), ("Negative Guidance minimum sigma", 1.0)]
)
def test_an_axis_that_would_change_nothing_stops_the_plot(
    family: Any, host: Any, plot: Any, axis: str, value: float
) -> None:
    axes = host_axes(plot, host)

    def confirm(label: str, values: list[Any], sun: Any = SUN, api: bool = False) -> Any:
        """What the plot asks before its first cell. An error in a cell is only logged there, and the cell is black."""
        return family.run(
            sun, prompt="a cat", seed=3, steps=1, api=api,
            axes=lambda p: (setattr(p, "is_api", api), axes[label].confirm(p, values)),
        )  # fmt: skip

    with pytest.raises(ValueError, match=f"axis {axis} changes nothing"):
        confirm(axis, [value])
    with pytest.raises(fastapi.HTTPException, match="changes nothing"):
        confirm(axis, [value], api=True)
    confirm(axis, [value], sun=None)
    for label, values, words in (
        ("Steps", [4, 99], "1 to 50"), ("[SUN] strength", [1.0, 99.0], "0 to 2"),
        ("Sampler", ["Heun", "UniPC"], "UniPC"),
        ("[SUN] denoise mode", ["trained", "tired"], "one of"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            confirm(label, values)
        confirm(label, values[:1])
    with pytest.raises(ValueError, match="SUN is off"):
        confirm("[SUN] strength", [1.0], sun=None)
    confirm("[SUN] LTC-Accel tau", [0.1], sun=None)
    with pytest.raises(ValueError, match=f"axis {axis} changes nothing"):
        family.run(SUN, prompt="a cat", seed=3, axes=lambda p: axes[axis].apply(p, value, []))
    off = family.run(None, prompt="a cat", seed=3, steps=1, axes=lambda p: axes[axis].apply(p, value, []))
    assert off.errors == []
    with pytest.raises(ValueError, match="1 to 50"):
        family.run(SUN, prompt="a cat", seed=3, axes=lambda p: axes["Steps"].apply(p, 99, []))


# -------------------------------------------------------------------------------------------------- send to txt2img


def test_a_picture_of_image_to_image_does_not_switch_hires_fix_on(family: Any, host: Any, tab: Any) -> None:
    """The hosts take a denoising strength beside the sizes of 0 that they add themselves for Hires fix."""
    utils = host.modules("infotext_utils")
    made = family.run(SUN, image=latent(), prompt="a cat", seed=3, denoising_strength=0.5).infotexts[0]
    assert utils.hires_fix(utils.parse_generation_parameters(made)), "what this guards against"
    params = utils.paste(made)
    assert not utils.hires_fix(params)
    assert params["Denoising strength"] == "0.5", "img2img takes it over"
    hires = family.run(SUN, prompt="a cat", seed=3, enable_hr=True, denoising_strength=0.5).infotexts[0]
    hires += ", Denoising strength: 0.5, Hires upscale: 2"
    assert utils.hires_fix(utils.paste(hires))
    other = "a cat\nSteps: 20, Sampler: Euler, Denoising strength: 0.5"
    assert utils.hires_fix(utils.paste(other)), "pictures made without SUN are none of its business"
    # The tab's buttons send pictures made without SUN (Compare), too.
    binding = {binding.tabname: binding for binding in utils.bindings[-3:]}
    assert binding["txt2img"].source_text_component is tab["sun_infotext_txt2img"]
    assert binding["img2img"].source_text_component is tab["sun_infotext"]
    (handler,) = [h for h in tab["sun_infotext"].handlers if h["outputs"] == [tab["sun_infotext_txt2img"]]]
    sent = handler["fn"](other)
    assert not utils.hires_fix(utils.paste(sent))
    assert "Steps: 20" in sent
    assert handler["fn"](hires) == hires


# ------------------------------------------------------------------------------------------------- pictures of users


@pytest.fixture
def started_from(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the host's image to image is given, call by call."""
    seen: list[dict[str, Any]] = []
    kind = host.modules("processing").StableDiffusionProcessingImg2Img
    init = kind.__init__

    def noted(p: Any, **fields: Any) -> None:
        seen.append(fields)
        init(p, **fields)

    monkeypatch.setattr(kind, "__init__", noted)
    return seen


def as_text(image: Image.Image, kind: str = "PNG", **more: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return base64.b64encode(buffer.getvalue()).decode()


def test_pictures_are_read_as_training_reads_them(client: TestClient, started_from: list[dict[str, Any]]) -> None:
    """Turned upright, on white where transparent, 16 bits as 8, a mask in its alpha as a mask."""
    sent = np.full((64, 48, 3), 255, np.uint8)
    sent[:20] = (200, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    on_its_side = Image.fromarray(sent).transpose(Image.Transpose.ROTATE_90)
    see_through = np.zeros((64, 64, 4), np.uint8)
    see_through[16:48, 16:48] = (255, 0, 0, 255)
    sixteen = np.linspace(0, 65535, 64)[None].repeat(64, 0).astype(np.uint16)
    mask = np.full((64, 64, 4), 255, np.uint8)
    mask[..., 3] = 0
    mask[16:48, 16:48, 3] = 255

    def posted(image: str, **more: Any) -> tuple[Any, Any]:
        answer = client.post("/sun/v1/img2img", json={**BODY, "image": image, "denoise": 0.5, **more})
        assert answer.status_code == 200, answer.text
        (picture,) = started_from[-1]["init_images"]
        return picture, started_from[-1]["mask"]

    picture, none = posted(as_text(on_its_side, "JPEG", quality=95, exif=exif))
    assert (picture.size, picture.mode, none) == ((48, 64), "RGB", None)
    assert np.abs(np.asarray(picture).astype(int) - sent).mean() < 8
    picture, _ = posted(as_text(Image.fromarray(see_through)))
    assert np.asarray(picture)[0, 0].tolist() == [255, 255, 255]
    assert np.asarray(picture)[32, 32].tolist() == [255, 0, 0]
    picture, _ = posted(as_text(Image.fromarray(sixteen)))
    assert np.abs(np.asarray(picture)[0, :, 0].astype(int) - np.linspace(0, 255, 64)).max() <= 1
    _, painted = posted(as_text(Image.fromarray(see_through)), mask=as_text(Image.fromarray(mask)))
    assert painted.mode == "L"
    assert np.array_equal(np.asarray(painted), mask[..., 3])


def test_the_tab_reads_pictures_alike_and_takes_a_brush(
    family: Any, host: Any, tab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradio 3 gives the picture and the strokes in one, Forge's canvas strokes on nothing, beside it."""
    see_through = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    see_through.paste((255, 0, 0, 255), (16, 16, 48, 48))
    strokes = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    strokes.paste((255, 255, 255, 153), (0, 0, 8, 64))
    on_black = Image.new("RGB", (64, 64))
    on_black.paste((255, 255, 255), (0, 0, 8, 64))
    asked: list[Any] = []
    generate = host.part("generate")

    def noted(request: Any) -> Any:
        asked.append(request)
        return generate.Result()

    monkeypatch.setattr(generate, "paint", noted)

    def given(**values: Any) -> Any:
        *_, error = press(tab, "generate", **small(**values))
        assert error == ""
        return asked[-1]

    expected = np.zeros((64, 64), np.uint8)
    expected[:, :8] = 255
    sketch = given(image={"image": see_through, "mask": on_black})
    assert np.asarray(sketch.image)[0, 0].tolist() == [255, 255, 255]
    assert np.array_equal(np.asarray(sketch.mask), expected)
    read = host.part("tab").read
    values = [component.value for component in tab["sun_generate"].handlers[0]["inputs"]][1:]
    names = list(__import__("inspect").signature(read).parameters)
    canvas = read(**{**dict(zip(names, values, strict=True)), "prompt": "", "image": see_through, "brush": strokes})
    assert np.array_equal(np.asarray(canvas.mask), expected)
    own = Image.new("L", (64, 64))
    own.paste(255, (56, 0, 64, 64))
    both = given(image={"image": see_through, "mask": on_black}, mask=own)
    expected[:, 56:] = 255
    assert np.array_equal(np.asarray(both.mask), expected)
    untouched = given(image={"image": see_through, "mask": Image.new("RGB", (64, 64))})
    assert untouched.mask is None


# --------------------------------------------------------------------------------------------------------------- API


def test_one_request_cannot_ask_for_everything(client: TestClient) -> None:
    """Each number alone is within its bounds."""
    for more in (
        {"width": 4096, "height": 4096, "batch_size": 16, "steps": 50},
        {"width": 4096, "height": 4096, "steps": 50},
    ):
        answer = client.post("/sun/v1/txt2img", json={**BODY, **more})
        assert (answer.status_code, "too much for one run" in answer.json()["detail"]) == (422, True)
    assert client.post("/sun/v1/txt2img", json={**BODY, "seed": 2**64}).status_code == 422


def test_a_body_that_json_cannot_repeat_is_told_of(client: TestClient) -> None:
    for raw in (
        b'{"prompt": "a", "strength": NaN}',
        b'{"prompt": "a", "guidance": -Infinity}',
        b'{"prompt": "\\ud800"}',
    ):
        answer = client.post("/sun/v1/txt2img", content=raw, headers={"Content-Type": "application/json"})
        assert answer.status_code == 422
        assert answer.json()["detail"]


def test_refusals_name_no_folder_of_the_server(client: TestClient, family: Any, host: Any) -> None:
    (host.models_path / "sun" / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{nothing")
    try:
        for adapter in ("broken.safetensors", host.part("folders").SHIPPED):
            answer = client.post("/sun/v1/txt2img", json={**BODY, "adapter": adapter})
            assert answer.status_code == 409
            for folder in (host.models_path, REPOSITORY, REPOSITORY.parent):
                assert str(folder) not in answer.text
            with pytest.raises(fastapi.HTTPException) as refused:
                family.run({"adapter": adapter}, prompt="a cat", seed=3, api=True)
            assert refused.value.status_code == 409
            assert str(host.models_path) not in refused.value.detail
    finally:
        (host.models_path / "sun" / "broken.safetensors").unlink()


@pytest.mark.parametrize(
    ("given", "status", "words"),
    [({"adapter": "gone.safetensors"}, 409, "models/sun"), ({"steps": 0}, 422, "1 to 50"),
     ({"adapter": "guidance-7.safetensors", "guidance": 5}, 422, "fixed at 7"), ({"adaptor": "x"}, 422, "adaptor")],
)  # fmt: skip
def test_the_hosts_own_api_tells_the_reason(family: Any, given: Any, status: int, words: str) -> None:
    """Its server loses the text of every exception but this kind (anyio 4 groups the others)."""
    with pytest.raises(fastapi.HTTPException) as refused:
        family.run({**SUN, **given} if "adaptor" not in given else given, prompt="a cat", seed=3, api=True)
    assert (refused.value.status_code, words in refused.value.detail) == (status, True)


def test_listing_adapters_reads_no_weights(client: TestClient, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = host.part("store")
    client.get("/sun/v1/adapters")
    monkeypatch.setattr(store, "_load", lambda _key: pytest.fail("an adapter was read whole"))
    store._facts.cache_clear()
    assert len(client.get("/sun/v1/adapters").json()) == 5


# ------------------------------------------------------------------------------------------------ which adapter is it


@pytest.fixture
def foreign(host: Any) -> Iterator[str]:
    """A LoRA that lies first in models/sun."""
    from safetensors.torch import save_file

    path = host.models_path / "sun" / "a-lora.safetensors"
    save_file({"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 4)}, path)
    yield path.name
    path.unlink()


def test_the_adapter_is_chosen_by_what_fits(family: Any, host: Any, foreign: str) -> None:
    folders = host.part("folders")
    assert foreign not in folders.names()
    chosen = family.run({}, prompt="a cat", seed=3)
    assert chosen.p.sun_run.settings.adapter == "any-guidance.safetensors", "the first by name"
    assert "SUN adapter: any-guidance.safetensors" in chosen.infotexts[0]
    for script in sun_scripts(host):
        dropdown = host.scripts.scripts_txt2img.inputs[script.args_from + 1]
        assert (dropdown.value, foreign in dropdown.choices) == ("Automatic", False)
    with pytest.raises(ValueError, match="not a SUN adapter"):
        family.run({"adapter": foreign}, prompt="a cat", seed=3)


def test_without_an_adapter_a_new_user_is_told_where_to_get_one(
    family: Any, host: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = host.part("folders")
    monkeypatch.setattr(host.modules("paths"), "models_path", str(tmp_path))
    with pytest.raises(ValueError, match="No SUN adapter here fits"):
        family.run({}, prompt="a cat", seed=3)
    sd15 = folders.where_to_get_one(768)
    for part in (
        "sun_adapter_sdv15_4step_addpos.safetensors",
        "huggingface.co/Williechai/SpeedUpNet",
        str(tmp_path / "sun"),
    ):
        assert part in sd15
        assert part in folders.first_steps()
    make_adapter(family.unet, tmp_path / "sun" / "mine.safetensors")
    assert folders.first_steps() == ""
    assert family.run({}, prompt="a cat", seed=3).p.sun_run.settings.adapter == "mine.safetensors"


def test_an_unfitting_choice_says_where_a_fitting_one_is(
    family: Any, host: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = host.part("folders").where_to_get_one
    monkeypatch.setattr(host.part("folders"), "where_to_get_one", lambda _width: where(768))
    with pytest.raises(ValueError, match=r"does not fit[\s\S]*huggingface.co/Williechai/SpeedUpNet"):
        family.run({"adapter": host.part("folders").SHIPPED}, prompt="a cat", seed=3)


def test_a_model_that_predicts_v_is_told_of(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host samples it; the adapter was trained on models that predict the noise."""
    usual = family.run(SUN, prompt="a cat", seed=3)
    assert "predict" not in str(usual.comments)

    def predicts(kind: str) -> None:
        if family.name == "a1111":
            monkeypatch.setattr(family.model, "parameterization", {"v_prediction": "v"}.get(kind, kind), raising=False)
        else:
            inner = family.model.forge_objects.unet.model
            monkeypatch.setattr(inner, "predictor", SimpleNamespace(prediction_type=kind), raising=False)

    predicts("v_prediction")
    assert "trained on models that predict the noise" in str(family.run(SUN, prompt="a cat", seed=3).comments)
    predicts("edm")
    with pytest.raises(ValueError, match="SUN cannot sample"):
        family.run(SUN, prompt="a cat", seed=3)


# ------------------------------------------------------------------------------------------------------------- memory


def test_the_devices_copy_goes_when_sun_is_off(family: Any, host: Any) -> None:
    family.run(SUN, prompt="a cat", seed=3)
    store = host.part("store")
    copy = weakref.ref(store._copy[2])
    assert copy() is not None
    family.run(None, prompt="a cat", seed=3, steps=1)
    gc.collect()
    assert copy() is None


# --------------------------------------------------------------------------------------------------------------- page


def test_the_progress_bar_has_a_place_of_its_own(host: Any, tab: Any) -> None:
    """The host puts it into the parent of the element it is given, which must not hold the prompt."""
    assert tab["sun_gallery"].parent is tab["sun_gallery_container"]
    around = tab["sun_gallery_container"].parent
    assert around is tab["sun_results"]
    assert tab["sun_prompt"].parent is not around
    assert tab["sun_results"] is not tab["sun_prompt"].parent.parent


def test_what_is_not_used_cannot_be_written_into(host: Any) -> None:
    script = sun_scripts(host)[0]
    made = dict(
        zip(
            host.part("choices").CONTROLS,
            host.scripts.scripts_txt2img.inputs[script.args_from : script.args_to],
            strict=True,
        )
    )
    assert made["negative"].arguments["interactive"] is False
    (handler,) = made["main_negative"].handlers
    assert handler["outputs"] == [made["negative"]]
    assert [handler["fn"](main)["interactive"] for main in (True, False)] == [False, True]
    for name, words in (("sampling", "timesteps"), ("denoise_mode", "steps"), ("calibration", "measure")):
        assert [value for _, value in made[name].choices] == made[name].values
        assert any(words in label for label, _ in made[name].choices)


def test_compared_pictures_say_what_made_them(family: Any, host: Any, tab: Any) -> None:
    host.modules("script_callbacks").call("ui_settings")
    images, *_ = press(tab, "compare", **small())
    assert [caption for _, caption in images] == ["SUN", "DPM++ 2M, 25 steps, CFG 7"]
    (single, *_), *_ = press(tab, "generate", **small())
    assert not isinstance(single, tuple)


def test_prompts_have_the_hosts_token_counter(host: Any, tab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (REPOSITORY / "javascript/sun.js").read_text(encoding="utf-8")
    for box in ("sun_prompt", "sun_negative"):
        assert f'"{box}"' in script
        assert {f"{box}_token_counter", f"{box}_token_button"} <= set(tab)
        (handler,) = tab[f"{box}_token_button"].handlers
        assert (handler["inputs"], handler["outputs"]) == ([tab[box]], [tab[f"{box}_token_counter"]])
    import sys

    ui = SimpleNamespace(update_token_counter=lambda text, steps, styles: f"<span>{len(text)}/75</span>")
    monkeypatch.setitem(sys.modules, "modules.ui", ui)
    assert handler["fn"]("four") == "<span>4/75</span>"
    monkeypatch.setitem(sys.modules, "modules.ui", SimpleNamespace())
    assert handler["fn"]("four") == ""


def test_every_text_of_the_page_has_a_chinese_one(host: Any, tab: Any) -> None:
    chinese = json.loads((REPOSITORY / "localizations/zh_CN.json").read_text(encoding="utf-8"))
    script = sun_scripts(host)[1]
    shown = [*host.scripts.scripts_img2img.inputs[script.args_from : script.args_to], *tab.values()]
    texts = {component.arguments.get("info") for component in shown} - {None}
    texts |= {label for c in shown for choice in c.choices or [] if isinstance(choice, tuple) for label in choice[:1]}
    texts |= {host.part("controls").TAKES_OVER}
    assert texts <= set(chinese)
    assert len(texts) > 10
