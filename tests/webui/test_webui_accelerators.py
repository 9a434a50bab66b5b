"""LTC-Accel and feature inheritance in both families, with SUN on and off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from webui_host import ADAPTER, UnetLog, hooks_on, load_model, make_unet, pasted, relative

SUN = {"adapter": ADAPTER}
LTC = {"ltc": True, "tau": 0.0}
PICTURE = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "steps": 8, "sampler_name": "Euler"}
CALLS = {"DPM++ 2M": 1, "Euler": 1, "Heun": 2, "DPM2": 2, "DDIM": 1}


@pytest.fixture(autouse=True)
def tables(host: Any) -> Iterator[Path]:
    """The folder of tables, empty before each test."""
    folder = host.part("ltc").tables_folder()
    for path in folder.glob("*"):
        path.unlink()
    yield folder
    assert not list(folder.glob("*.part"))


@pytest.fixture
def seen(host: Any, monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Latents in the sigma parametrisation at each of the sampler's calls, skipped ones too."""
    kept: list[torch.Tensor] = []
    kind = host.part("ltc").SamplerRun
    direction = kind.direction
    monkeypatch.setattr(kind, "direction", lambda self, x: kept.append(x.clone()) or direction(self, x))
    return kept


def calls(family: Any, sun: Any = None, **more: Any) -> tuple[list[int], torch.Tensor]:
    """Rows of each U-Net call, and the picture."""
    with UnetLog(family.unet) as log:
        result = family.run(sun, **{**PICTURE, **more})
    assert result.errors == []
    assert_restored(family, result)
    return log.rows, result.images


def assert_restored(family: Any, result: Any) -> None:
    """The fixture `family` looks for hooks besides."""
    assert not [module for module in family.unet.modules() if "forward" in vars(module)]
    assert not hasattr(result.p.sampler.func, "__wrapped__")


# ---------------------------------------------------------------------------------------------------------- LTC-Accel


@pytest.fixture
def calm(family: Any) -> Iterator[None]:
    """The random model, turned into one whose answers change as calmly as a trained one's."""
    last = family.unet.out[-1]
    before = {name: value.clone() for name, value in last.state_dict().items()}
    with torch.no_grad():
        last.weight.mul_(0.002)
        last.bias.copy_(torch.tensor([1.0, -1.0, 0.5, 0.8]))
    yield
    last.load_state_dict(before)


SAMPLERS = ("DPM++ 2M", "Euler", "Euler a", "Heun", "DPM2", "DDIM", "PLMS", "UniPC")


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_picture_takes_13_of_20_calls_with_any_sampler(
    family: Any, tables: Path, calm: None, name: str
) -> None:
    fields = {"sampler_name": name, "steps": 20}
    rows, plain = calls(family, **fields)
    with UnetLog(family.unet) as log:
        result = family.run({"ltc": True}, **{**PICTURE, **fields})
    twice = 2 if name in ("Heun", "DPM2") else 1
    steps = 19 if name in ("DDIM", "PLMS") else 20  # LDM's own samplers take one step less than they are asked for
    assert (len(rows) + twice - 1, set(log.rows)) == (steps * twice, {2})  # positive and negative
    assert len(rows) - len(log.rows) == twice * (7 if steps == 20 else 6)
    saved = f"{len(log.rows)} of {len(rows)} calls, {round(100 - 100 * len(log.rows) / len(rows))} % saved"
    assert f'LTC-Accel calls: "{saved}"' in result.infotexts[0]
    assert "LTC-Accel: balanced, LTC-Accel warm-up: 0.25, LTC-Accel tail: 2" in result.infotexts[0]
    assert result.comments == ""
    assert 0 < relative(result.images, plain) < 0.2
    assert not list(tables.glob("*"))  # nothing is measured
    assert_restored(family, result)


def test_presets_warm_up_and_tail(family: Any, calm: None) -> None:
    fields = {"sampler_name": "DPM++ 2M", "steps": 20}
    counts = [len(calls(family, {"ltc": True, "preset": name}, **fields)[0]) for name in ("fine", "balanced", "fast")]
    assert counts == [15, 13, 12]
    assert len(calls(family, {"ltc": True, "warm_up": 0.5, "tail": 4}, **fields)[0]) == 17
    with pytest.raises(ValueError, match="no warm-up and no tail"):
        family.run({"ltc": True, "preset": "paper", "tail": 4}, **{**PICTURE, **fields})


def test_prompt_editing_is_a_real_step_and_what_was_said_before_it_is_forgotten(family: Any, calm: None) -> None:
    fields = {"sampler_name": "Euler", "steps": 20}
    with UnetLog(family.unet) as log:
        family.run({"ltc": True}, **{**PICTURE, **fields, "prompt": "a [cat:dog:8]"})
    assert len(log.rows) > 13
    assert len(calls(family, {"ltc": True}, **fields)[0]) == 13


ALTERNATES = "Negative Guidance minimum sigma leaves out the negative prompt in some steps"


@pytest.mark.parametrize("name", ["Euler", "DDIM"])
def test_where_the_negative_is_left_out_in_turns_nothing_more_is_skipped(family: Any, calm: None, name: str) -> None:
    """Of an odd step nothing follows for an even one; skipping every second one would leave guidance out of both."""
    least = 300.0 if (name, family.name) == ("DDIM", "a1111") else 2.5  # A1111 compares it with a timestep
    fields = {**PICTURE, "sampler_name": name, "steps": 20, "s_min_uncond": least}
    with UnetLog(family.unet) as log:
        plain = family.run(None, **fields)
    in_turns = log.rows[log.rows.index(1) - 1 :]
    with UnetLog(family.unet) as log:
        result = family.run({"ltc": True}, **fields)
    assert {1, 2} == set(in_turns)
    assert log.rows[-len(in_turns) :] == in_turns  # all of them run, and as the host has them
    assert 13 < len(log.rows) < 19
    assert ALTERNATES in result.infotexts[0].split("LTC-Accel calls: ")[1].split('"')[1]
    assert ALTERNATES in result.comments
    assert relative(result.images, plain.images) < 0.2


def test_a_table_of_the_paper_is_for_the_negative_in_all_steps_or_in_turns(family: Any, tables: Path) -> None:
    for again in (False, True):
        rows, _ = calls(family, LTC)
        with UnetLog(family.unet) as log:
            result = family.run(LTC, **{**PICTURE, "s_min_uncond": 4.0})
        assert len(list(tables.glob("*.json"))) == 2
        if again:
            assert len(rows) < len(log.rows)
            assert ALTERNATES in result.comments


def test_a_negative_that_is_left_out_without_effect_on_what_is_skipped_is_not_spoken_of(
    family: Any, calm: None
) -> None:
    fields = {"sampler_name": "Euler", "steps": 20}
    for more in ({"s_min_uncond": 0.05}, {"s_min_uncond": 2.5, "cfg_scale": 1.0}):  # in the tail; at scale 1
        with UnetLog(family.unet) as log:
            result = family.run({"ltc": True}, **{**PICTURE, **fields, **more})
        assert (len(log.rows), result.comments) == (13, "")


def test_a_negative_that_is_left_out_for_good_is_one_step_that_runs(family: Any, host: Any, calm: None) -> None:
    """From one noise level on, or up to a share of the steps: what was seen on the other side of it is forgotten."""
    fields = {"sampler_name": "Euler", "steps": 20}
    opts = host.modules("shared").opts.data
    opts["s_min_uncond_all"] = True
    for more, early in (({"s_min_uncond": 2.5}, 0.0), ({}, 0.42)):
        opts["skip_early_cond"] = early
        with UnetLog(family.unet) as plain:
            family.run(None, **{**PICTURE, **fields, **more})
        with UnetLog(family.unet) as log:
            result = family.run({"ltc": True}, **{**PICTURE, **fields, **more})
        assert 13 < len(log.rows) < 17
        firsts = [one.timesteps[one.rows.index(1 if more else 2)] for one in (plain, log)]
        assert firsts[0] == firsts[1]
        assert result.comments == ""


def test_a_controlnet_that_begins_or_ends_to_act_is_a_step_that_runs(
    family: Any, host: Any, calm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A1111's extension goes by the share of the steps, Forge's by the noise level."""
    model, panel = family.model, host.modules("scripts").Script()
    panel.args_from = panel.args_to = 0
    monkeypatch.setattr(host.scripts.scripts_txt2img, "alwayson_scripts", [
        *host.scripts.scripts_txt2img.alwayson_scripts, panel,
    ])  # fmt: skip
    if family.name == "forge":
        sigmas = model.sigmas
        levels = SimpleNamespace(percent_to_sigma=lambda share: float(sigmas[round(999 * (1 - share))]))
        monkeypatch.setattr(model.forge_objects_after_applying_lora.unet.model, "predictor", levels, raising=False)
    counts = []
    for start, end in ((0.0, 1.0), (0.0, 0.49), (0.33, 1.0)):
        if family.name == "forge":
            unit = SimpleNamespace(start_percent=start, end_percent=end)
            panel.current_params = {0: SimpleNamespace(model=unit)}
        else:
            params = SimpleNamespace(start_guidance_percent=start, stop_guidance_percent=end)
            panel.latest_network = SimpleNamespace(control_params=[params])
        counts.append(len(calls(family, {"ltc": True}, sampler_name="Euler", steps=20)[0]))
    assert counts[0] == 13
    assert all(count > 13 for count in counts[1:])


def test_a_sampler_that_chooses_its_levels_itself_runs_in_full_and_says_so(family: Any) -> None:
    """DPM fast and DPM adaptive are told the first and the last level alone."""
    fields = {**PICTURE, "steps": 12, "sampler_name": "DPM fast"}
    result = family.run({"ltc": True}, **fields)
    assert result.errors == []
    assert "12 of 12 calls, 0 % saved (DPM fast chooses its noise levels itself)" in result.comments
    assert torch.equal(result.images, family.run(None, **fields).images)
    with pytest.raises(ValueError, match="does not know the sampler DPM fast"):
        family.run({"ltc": True, "preset": "paper"}, **fields)


def test_where_nothing_was_skipped_the_page_says_why(family: Any) -> None:
    result = family.run({"ltc": True}, **{**PICTURE, "steps": 4})
    assert "4 of 4 calls, 0 % saved (4 steps are too few to skip one of)" in result.comments


def test_an_interrupted_picture_does_not_say_what_the_one_before_it_saved(family: Any, host: Any, calm: None) -> None:
    """Of a batch of runs that share one processing object; and the run after it is whole again."""
    result = family.run({"ltc": True}, **{**PICTURE, "steps": 20})
    kept = result.p.extra_generation_params
    assert kept["LTC-Accel calls"] == "13 of 20 calls, 35 % saved"
    ltc, sampler = host.part("ltc"), result.p.sampler
    settings = host.part("choices").AcceleratorSettings(ltc=True).ltc_settings()
    with pytest.raises(RuntimeError, match="stop"), ltc.sampling(result.p, settings, "automatic"):
        raise RuntimeError("stop")
    assert "LTC-Accel calls" not in kept
    assert not hasattr(sampler.func, "__wrapped__")


def test_a_batch_whose_pictures_decided_together_which_steps_ran_is_in_the_infotext(family: Any, calm: None) -> None:
    """A step runs for all where one of them turned, so a picture alone would have another course."""
    fields = {**PICTURE, "steps": 20, "batch_size": 2}
    assert "LTC-Accel batch" not in family.run({"ltc": True}, **fields).infotexts[0]  # none of them turned
    sudden = family.unet.register_forward_hook(lambda _m, args, y: y + 0.5 * (int(args[1][0]) < 500) * (args[0] > 0))
    try:
        both = family.run({"ltc": True}, **fields, n_iter=2)
        alone = family.run({"ltc": True}, **PICTURE | {"steps": 20})
    finally:
        sudden.remove()
    assert [text.split("LTC-Accel batch: ")[1].split(",")[0] for text in both.infotexts] == [
        *["2 from seed 3"] * 2, *["2 from seed 5"] * 2,
    ]  # fmt: skip
    assert "LTC-Accel batch" not in alone.infotexts[0]


def test_infotext_of_a_preset_pasted_back_gives_the_same_picture(family: Any, host: Any, calm: None) -> None:
    chosen = {"ltc": True, "preset": "fast", "warm_up": 0.3, "tail": 3}
    first = family.run(chosen, **{**PICTURE, "steps": 20})
    values = pasted(host, first.infotexts[0])
    assert {name: values[name] for name in chosen} == chosen
    again = family.run(values, **{**PICTURE, "steps": 20})
    assert torch.equal(first.images, again.images)
    assert again.infotexts == first.infotexts


def test_pictures_from_before_there_were_presets_are_the_paper_s(host: Any) -> None:
    values = pasted(host, "a cat\nSteps: 20, Sampler: Euler, LTC-Accel tau: 0.1, LTC-Accel every: 2")
    assert (values["ltc"], values["preset"], values["tau"]) == (True, "paper", 0.1)
    read = host.part("choices").read_arguments
    assert read(({"ltc": True, "tau": 0.1},))[2].preset == "paper"
    assert read(({"ltc": True},))[2].preset == "balanced"


@pytest.mark.parametrize("name", CALLS)
def test_the_first_run_is_plain_and_the_next_skips_both_passes(
    family: Any, host: Any, tables: Path, seen: list[torch.Tensor], name: str
) -> None:
    rows, plain = calls(family, sampler_name=name)
    assert set(rows) == {2}  # positive and negative
    measuring, first = calls(family, LTC, sampler_name=name)
    assert (measuring, torch.equal(first, plain)) == (rows, True)
    (path,) = tables.glob("*.json")
    table = host.stub("sd_webui_sun.sun.ltc").load_table(path)
    assert table.coefficients
    del seen[:]
    fast, picture = calls(family, LTC, sampler_name=name)
    assert len(fast) == len(rows) - CALLS[name] * len(table.coefficients)
    assert set(fast) == {2}
    starts = seen[:: CALLS[name]]
    for i, (c,) in table.coefficients.items():
        torch.testing.assert_close(starts[i + 1], starts[i] + c * (starts[i] - starts[i - 1]), rtol=1e-4, atol=1e-4)
    assert 0 < relative(picture, plain) < 0.5


def test_what_other_hosts_measured_is_found(family: Any, host: Any, tables: Path) -> None:
    """The key says model, solver, schedule and guidance, and nothing of the host."""
    calls(family, LTC)
    (mine,) = tables.glob("*.json")
    other = "forge" if family.name == "a1111" else "a1111"
    load_model(other, family.unet, host.stub("models").any_text(16))
    with UnetLog(family.unet) as log:
        host.process(LTC, **PICTURE)
    assert len(log.rows) < 8
    assert list(tables.glob("*.json")) == [mine]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler_name": "Euler a"}, "Euler a: it adds fresh noise"),
        ({"sampler_name": "PLMS"}, "does not know the sampler PLMS"),
        ({"sampler_name": "Heun", "s_churn": 0.5}, "Heun with s_churn"),
        ({"sampler_name": "DDIM", "eta": 0.5}, "DDIM with eta"),
    ],
)
def test_other_samplers_get_a_sentence_before_the_first_call(family: Any, fields: Any, words: str) -> None:
    with UnetLog(family.unet) as log, pytest.raises(ValueError, match=f"{words}.*Use Euler, DDIM"):
        family.run(LTC, **{**PICTURE, **fields})
    assert log.rows == []


def test_a_sampler_of_another_kind_gets_a_sentence(host: Any, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has no function of its own, or does not call it."""
    kind = host.modules("sd_samplers_kdiffusion").KDiffusionSampler
    monkeypatch.setattr(kind, "_launch", lambda self, p, steps, x, *_: self.launch_sampling(steps, lambda: x))
    with pytest.raises(ValueError, match="does not know the sampler Euler"):
        family.run(LTC, **PICTURE)


def test_measuring_again_pays_in_full_and_a_table_serves_again(family: Any, tables: Path) -> None:
    for _ in range(2):
        assert len(calls(family, {**LTC, "calibration": "measure again"})[0]) == 8
    assert len(calls(family, LTC)[0]) == 6
    for settings in ({**LTC, "every": 3}, {"ltc": True, "tau": 0.05}):
        assert len(calls(family, settings)[0]) == 8
    assert len(calls(family, LTC, cfg_scale=5.0)[0]) == 8
    assert len(list(tables.glob("*.json"))) == 4


def test_the_page_says_what_was_measured(family: Any) -> None:
    """The hosts show comments below the picture; their logs hide what is no warning."""
    assert "call the model in 6 of them" in family.run(LTC, **PICTURE).comments
    assert family.run(LTC, **PICTURE).comments == ""
    assert "turn by" in family.run({"ltc": True, "tau": 1e-6}, **PICTURE).comments


def test_the_page_says_that_a_picture_of_nan_was_not_measured(
    family: Any, tables: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family.unet.out[-1].bias, "data", torch.full((4,), torch.nan))
    assert "keeps nothing: a picture of it holds NaN" in family.run(LTC, **PICTURE).comments
    assert not list(tables.glob("*.json"))


def test_the_page_names_settings_of_the_paper_beside_another_preset(family: Any) -> None:
    mixed = {"ltc": True, "preset": "balanced", "tau": 0.3, "every": 4}
    assert "LTC-Accel: tau, every: for the preset paper alone" in family.run(mixed, **PICTURE).comments
    assert "paper" not in family.run({"ltc": True, "preset": "balanced"}, **PICTURE).comments


def test_prompt_editing_keeps_its_steps(family: Any) -> None:
    """Skipped steps count, as the hosts count calls of their denoiser."""
    for _ in range(2):
        result = family.run(LTC, **{**PICTURE, "sampler_name": "Heun"})
        assert result.p.sampler.model_wrap_cfg.step == 15


def test_an_interrupt_before_a_skipped_step_ends_there(
    host: Any, family: Any, tables: Path, seen: list[torch.Tensor]
) -> None:
    state = host.modules("shared").state
    count: list[int] = []

    def stop(*_: Any) -> None:
        count.append(1)
        if len(count) == 3:  # step 2; step 3 is skipped
            state.interrupt()

    for _ in range(2):  # measuring, the host's own denoiser ends it; then the skipped step does
        handle = family.unet.register_forward_pre_hook(stop)
        del count[:], seen[:]
        result = family.run(LTC, **PICTURE)
        handle.remove()
        assert_restored(family, result)
        assert (len(count), len(seen)) == (3, 4)
        state.begin()
        calls(family, LTC)
    assert len(list(tables.glob("*.json"))) == 1


def test_a_failing_run_leaves_nothing_and_keeps_nothing(family: Any, tables: Path) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    deep = family.unet.middle_block[0].in_layers
    handle = deep.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        family.run({**SUN, **LTC, "inherit": "balanced"}, **PICTURE)
    handle.remove()
    assert hooks_on(family.unet) == 0
    assert not [module for module in family.unet.modules() if "forward" in vars(module)]
    assert not list(tables.glob("*"))


def test_several_batches_measure_once_and_do_not_stack(family: Any) -> None:
    """A1111's sampler object of img2img serves every batch."""
    image = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    rows, _ = calls(family, LTC, image=image, n_iter=3, denoising_strength=1.0)
    assert len(rows) == 8 + 6 + 6


def test_hires_fix_measures_each_pass_on_its_own(family: Any, tables: Path) -> None:
    fields = {"enable_hr": True, "denoising_strength": 0.99, "hr_second_pass_steps": 6}
    rows, plain = calls(family, **fields)
    measuring, first = calls(family, LTC, **fields)
    assert (measuring, torch.equal(first, plain)) == (rows, True)
    assert len(list(tables.glob("*.json"))) == 2
    assert len(calls(family, LTC, **fields)[0]) == len(rows) - 3


def test_inpainting_keeps_the_kept_part(family: Any) -> None:
    image = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    for _ in range(2):
        _, picture = calls(family, LTC, image=image, mask=mask, denoising_strength=1.0)
        assert torch.allclose(picture[..., :4], image[..., :4], atol=1e-5)


# ------------------------------------------------------------------------------------------------ feature inheritance


@pytest.mark.parametrize(
    ("plan", "full"),
    [("fine", 4), ("balanced", 4), ("fast", 3), ("stages=1 mode=dense-early", 4), ("outer=2 keys=0,5", 2)],
)
def test_the_inner_parts_run_in_key_steps_only(family: Any, plan: str, full: int) -> None:
    count: list[int] = []
    handle = family.unet.middle_block[0].in_layers.register_forward_hook(lambda *_: count.append(1))
    rows, picture = calls(family, {"inherit": plan})
    handle.remove()
    assert (len(rows), len(count)) == (8, full)
    assert relative(picture, calls(family)[1]) > 1e-4


def test_all_key_steps_are_the_plain_run(family: Any) -> None:
    plan = "stages=1 keys=0,1,2,3,4,5,6,7"
    assert torch.equal(calls(family, {"inherit": plan})[1], calls(family)[1])


def test_both_families_inherit_the_same(host: Any) -> None:
    unet, encode, pictures = make_unet(host), host.stub("models").any_text(16), []
    for family in ("a1111", "forge"):
        load_model(family, unet, encode)
        pictures.append(host.process({"inherit": "balanced"}, **PICTURE).images)
    assert relative(*pictures) < 1e-4


def test_images_of_a_batch_equal_single_ones(family: Any, host: Any) -> None:
    """The parts of a batch are told apart where the host asks for them one after the other, too."""
    single = calls(family, {"inherit": "balanced"})[1]
    assert relative(calls(family, {"inherit": "balanced"}, batch_size=2)[1][:1], single) < 1e-4
    host.modules("shared").opts.data["batch_cond_uncond"] = False
    assert relative(calls(family, {"inherit": "balanced"}, batch_size=2)[1][:1], single) < 1e-4


@pytest.mark.parametrize("family", ["forge"], indirect=True)
def test_forge_control_residuals_go_to_the_parts_that_run(family: Any) -> None:
    """Added in place to a part left out they would not fit: the stand-in fails there, Forge drops them."""
    shapes: list[tuple[str, torch.Size]] = []
    unet = family.unet
    handles = [block[0].register_forward_hook(lambda _m, _a, y: shapes.append(y.shape)) for block in unet.input_blocks]
    handles.append(unet.middle_block[2].register_forward_hook(lambda _m, _a, y: shapes.append(y.shape)))
    calls(family, steps=1)
    for handle in handles:
        handle.remove()
    *outer, middle = shapes

    def residuals(strength: float) -> Any:
        def control(x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
            made = [torch.full((len(x), *shape[1:]), strength) for shape in outer]
            return {"output": made, "middle": [torch.full((len(x), *middle[1:]), strength)]}

        return control

    pictures = []
    for strength in (0.0, 0.5):
        family.model.forge_objects_after_applying_lora.unet.controlnet_linked_list = residuals(strength)
        pictures.append(calls(family, {"inherit": "balanced"})[1])
    assert relative(*pictures) > 1e-4


def test_a_plan_that_cannot_be_stops_the_run_with_what_there_is(family: Any) -> None:
    for plan, words in (("stages=9", "stages = 9"), ("quick", "fine, balanced, fast"), ("layers=up.9.9", "up.0.0")):
        with UnetLog(family.unet) as log, pytest.raises(ValueError, match=words):
            family.run({"inherit": plan}, **PICTURE)
        assert log.rows == []


def test_a_unet_that_is_replaced_is_not_silently_ignored(family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family.model, "apply_model", lambda x, *_args: x * 0.5)
    if family.name == "forge":
        family.model.forge_objects_after_applying_lora.unet.model.apply_model = lambda x, *_args: x * 0.5
    with pytest.raises(ValueError, match="without ever reaching the parts"):
        family.run({"inherit": "balanced"}, **PICTURE)


def test_a_model_without_this_unet_is_sent_to_ltc_accel(family: Any) -> None:
    other = torch.nn.Linear(2, 2)
    if family.name == "a1111":
        family.model.model.diffusion_model = other
    else:
        family.model.forge_objects_after_applying_lora.unet.model.diffusion_model = other
    with pytest.raises(ValueError, match="LTC-Accel works on any model"):
        family.run({"inherit": "balanced"}, **PICTURE)


# --------------------------------------------------------------------------------------------------------- together


def test_with_sun_in_any_order(family: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = {**SUN, **LTC, "steps": 8, "inherit": "balanced"}
    script = host.part("script")
    around, pictures = script.around, []
    rows, with_sun = calls(family, {**SUN, "steps": 8})
    calls(family, everything)  # measures
    for order in (list, reversed):
        monkeypatch.setattr(script, "around", lambda *args, order=order: order(around(*args)))
        fewer, picture = calls(family, everything)
        pictures.append(picture)
        assert (len(rows), len(fewer), set(rows) | set(fewer)) == (8, 6, {1})
    assert torch.equal(*pictures)
    assert relative(pictures[0], with_sun) > 1e-4


def test_afterwards_and_switched_off_pictures_are_as_before(family: Any) -> None:
    _, plain = calls(family)
    for _ in range(2):
        calls(family, {**LTC, "inherit": "fast"})
    off = family.run({"enabled": False, "ltc": False, "tau": 0.0, "inherit": "off"}, **PICTURE)
    assert torch.equal(off.images, plain)
    assert off.p.sun_accelerators is None
    assert "LTC" not in off.infotexts[0]
    assert "inheritance" not in off.infotexts[0]


def test_infotext_pasted_back_gives_the_same_picture(family: Any, host: Any) -> None:
    """The picture of a run that measured is the plain one, and comes back by measuring."""
    chosen = {**LTC, "every": 3, "inherit": "layers=up.1.0,up.1.1 every=3"}
    for calibration in ("measure again", "automatic"):
        first = family.run(chosen, **PICTURE)
        values = pasted(host, first.infotexts[0])
        assert {name: values[name] for name in chosen} == chosen
        assert (values["calibration"], values["enabled"]) == (calibration, False)
        again = family.run(values, **PICTURE)
        assert torch.equal(first.images, again.images)
        assert again.infotexts == first.infotexts


def test_pasting_a_picture_without_them_switches_them_off(host: Any) -> None:
    values = pasted(host, "a cat\nSteps: 20, Sampler: Euler")
    assert (values["ltc"], values["inherit"], values["tau"]) == (False, "off", 0.1)


def test_axes_switch_them_on(family: Any, host: Any) -> None:
    override = host.part("xyz")._apply(ltc=True, preset="paper")("tau")
    calls(family, LTC)
    p = type("P", (), {})()
    override(p, 0.0, [])
    host.part("xyz")._apply()("inherit")(p, "fast", [])
    by_axis = family.run(None, overrides=p.sun_overrides, **PICTURE)
    assert torch.equal(by_axis.images, calls(family, {**LTC, "inherit": "fast"})[1])


def test_arguments_by_position_as_saved_before_the_accelerators(family: Any, host: Any) -> None:
    """An API caller's list of SUN's eight arguments still means the same."""
    controls = host.part("choices")
    assert controls.CONTROLS[:8] == controls.SUN_CONTROLS
    enabled, settings, accelerators = controls.read_arguments((True, ADAPTER, 0.5, 4, True, "", "trained", "sun"))
    assert (enabled, settings.adapter, settings.strength, accelerators.on) == (True, ADAPTER, 0.5, False)


def test_tables_of_runs_with_sun_and_with_loras_are_kept_apart(family: Any, tables: Path) -> None:
    """All at the same sampler, schedule and guidance; each finds its own again."""
    plain_at_1 = {"cfg_scale": 1.0, "scheduler": "SUN Trailing", "sampler_name": "Euler", "steps": 8}
    kept = {**SUN, **LTC, "steps": 8, "sampling": "schedule"}
    runs: list[tuple[Any, dict[str, Any]]] = [
        (LTC, plain_at_1),
        (kept, {"sampler_name": "Euler"}),
        ({**kept, "strength": 0.5}, {"sampler_name": "Euler"}),
        ({**kept, "adapter": "negative-only.safetensors"}, {"sampler_name": "Euler"}),
    ]
    for again in (False, True):
        for settings, fields in runs:
            before = len(list(tables.glob("*.json")))
            calls(family, settings, **fields)
            assert len(list(tables.glob("*.json"))) == before + (not again)
    assert len(list(tables.glob("*.json"))) == len(runs)


def test_the_networks_of_a_prompt_are_part_of_a_table_s_key(host: Any) -> None:
    of = host.part("ltc").loras_of

    def p(**networks: list[list[str]]) -> Any:
        return SimpleNamespace(extra_network_data={
            kind: [SimpleNamespace(items=items) for items in ones] for kind, ones in networks.items()
        })  # fmt: skip

    assert of(p()) == of(SimpleNamespace()) == ""
    one, weaker = of(p(lora=[["style", "0.8"]])), of(p(lora=[["style", "0.4"]]))
    assert len({one, weaker, of(p(lora=[["style", "0.8"], ["other", "1"]])), of(p(hypernet=[["style", "0.8"]]))}) == 4
    assert one == of(p(lora=[["style", "0.8"]]))
