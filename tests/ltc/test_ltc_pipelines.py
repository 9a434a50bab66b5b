"""LTC-Accel on diffusers pipelines: what runs, what it costs, and that it leaves nothing behind."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
)
from larger_models import sd3, sdxl, text_to_video
from peft import LoraConfig
from tiny import TEXT_WIDTH, make_adapter

import sun
import sun.ltc
from sun.common.notes import SunWarning
from sun.ltc.calibration import run_calibration
from sun.ltc.pipelines import _skipping, _stepper

FIXED = sun.ltc.LtcSettings(tau=0)


@pytest.fixture(scope="session")
def make_pipeline(make_short_pipeline: Callable[..., Any]) -> Callable[..., Any]:
    return make_short_pipeline


@pytest.fixture
def pipe(make_pipeline: Callable[..., Any]) -> Any:
    made = make_pipeline()
    made.scheduler = DPMSolverMultistepScheduler.from_config(made.scheduler.config, timestep_spacing="trailing")
    return made


def draw(
    pipe: Any, steps: int = 12, seed: int = 5, prompt: Any = "a b", negatives: Any = "c", **options: Any
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt, negative_prompt=negatives, num_inference_steps=steps, generator=generator, output_type="latent",
                **options).images  # fmt: skip


def test_the_first_picture_takes_13_of_20_calls(pipe: Any, count_calls: Callable[..., Any], caplog: Any) -> None:
    plain, own_class = draw(pipe, 20), type(pipe)
    sun.ltc.attach(pipe)
    assert sun.ltc.last_run(pipe) is None
    calls = count_calls(pipe.unet.conv_out)  # hooks of the U-Net itself count skipped calls too
    caplog.set_level("INFO")
    fast = draw(pipe, 20)
    assert calls.rows == [2] * 13
    assert sun.ltc.last_run(pipe) == sun.ltc.Counts(13, 20)
    assert str(sun.ltc.last_run(pipe)) == "13 of 20 calls, 35 % saved"
    assert "13 of 20 calls, 35 % saved" in caplog.text
    assert 0 < (fast - plain).norm() < 0.05 * plain.norm()
    assert torch.equal(draw(pipe, 20), fast)  # nothing is left of the run before
    assert "forward" not in vars(pipe.unet)
    assert "step" not in vars(pipe.scheduler)
    sun.ltc.detach(pipe)
    assert type(pipe) is own_class
    assert torch.equal(draw(pipe, 20), plain)


def test_presets_and_their_settings_by_name(pipe: Any) -> None:
    for preset, settings in sun.ltc.PRESETS.items():
        sun.ltc.attach(pipe, preset)
        draw(pipe, 15)
        assert sun.ltc.last_run(pipe).calls == settings.calls(15)
    sun.ltc.attach(pipe, "fast", last=5, guard=0)
    draw(pipe, 12)
    assert sun.ltc.last_run(pipe) == sun.ltc.Counts(9, 12)
    sun.ltc.attach(pipe, "paper", tau=0)
    draw(pipe)
    assert sun.ltc.last_run(pipe) == sun.ltc.Counts(12, 12, why="it measured itself at full cost")
    draw(pipe)
    assert sun.ltc.last_run(pipe) == sun.ltc.Counts(9, 12)
    for wrong in ({"preset": "quick"}, {"tau": 0.1}, {"folder": "tables"}, {"settings": FIXED, "tau": 0.1}):
        with pytest.raises(sun.ltc.LtcError, match=r"presets|no setting|measures nothing|either settings or tau"):
            sun.ltc.attach(pipe, **wrong)


def table_of(settings: sun.ltc.LtcSettings) -> sun.ltc.LtcTable:
    key = sun.ltc.LtcKey("m", "euler", tuple(float(20 - i) for i in range(21)), 7.5)
    return sun.ltc.LtcTable(key, settings, {9: (1.0,)}, (0.05,) * 19)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            {"settings": sun.ltc.LtcSettings(tau=0.2), "table": table_of(FIXED)},
            "measured with .*Leave the settings out",
        ),
        ({"settings": sun.ltc.SkipSettings(), "table": table_of(FIXED)}, "leave the table or the settings out"),
        ({"table": table_of(FIXED), "tau": 0.0}, "either a table or tau"),
        ({"settings": sun.ltc.SkipSettings(), "folder": "tables"}, "by SkipSettings measures nothing.*the folder out"),
        ({"settings": sun.ltc.SkipSettings(), "measure": False}, "measures nothing: leave measure=False out"),
        ({"measure": False}, "preset balanced measures nothing: leave measure=False out"),
        ({"preset": "fast", "settings": sun.ltc.SkipSettings()}, "either the preset fast or settings"),
        ({"preset": "balanced", "settings": FIXED}, "either the preset balanced or settings"),
        ({"preset": "paper", "settings": sun.ltc.SkipSettings()}, "either the preset paper or settings"),
        ({"preset": "fast", "table": table_of(FIXED)}, "either the preset fast or a table"),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(pipe: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(sun.ltc.LtcError, match=words):
        sun.ltc.attach(pipe, **given)
    assert sun.ltc.last_run(pipe) is None


def test_arguments_that_agree_are_taken(pipe: Any) -> None:
    table = table_of(FIXED)
    for given in ({"preset": "paper", "table": table, "measure": False}, {"settings": FIXED, "table": table}):
        sun.ltc.attach(pipe, **given)
        assert pipe._ltc.settings == FIXED
    sun.ltc.attach(pipe, "paper", settings=FIXED)
    assert pipe._ltc.settings == FIXED


def test_a_picture_of_a_batch_is_that_of_its_own(pipe: Any) -> None:
    """Coefficients are fitted for every picture alone."""
    sun.ltc.attach(pipe, guard=0)
    noise = torch.randn(2, 4, 8, 8, generator=torch.manual_seed(2))
    both = draw(pipe, prompt=["a b", "c d"], negatives=["c", "c"], latents=noise)
    one = draw(pipe, prompt="c d", latents=noise[1:])
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-3)


def test_another_text_in_the_middle_is_a_real_step(pipe: Any, count_calls: Callable[..., Any]) -> None:
    """A prompt that a callback changes, and so a ControlNet or an adapter that begins to act."""

    def change(_pipe: Any, step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"prompt_embeds": values["prompt_embeds"] * 2} if step == 4 else values

    sun.ltc.attach(pipe, guard=0)
    calls = count_calls(pipe.unet.conv_out)
    options = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    draw(pipe, callback_on_step_end=lambda *args: args[3], **options)
    assert len_of(calls) == 8
    draw(pipe, callback_on_step_end=change, **options)
    assert len_of(calls) == 8 + 9  # step 5 was to be skipped


def test_what_was_seen_before_a_change_is_not_carried_on(pipe: Any, count_calls: Callable[..., Any]) -> None:
    """Where a text changes in a step that runs, and where guidance ends, which diffusers' docs do in a callback."""

    def at(step: int, changed: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        def callback(_pipe: Any, i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
            return changed(values) if i == step else values

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}

    def without_guidance(values: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": values["prompt_embeds"].chunk(2)[-1]}

    sun.ltc.attach(pipe, guard=0)
    calls = count_calls(pipe.unet.conv_out)
    draw(pipe, **at(5, lambda values: {"prompt_embeds": values["prompt_embeds"] * 2}))
    assert len_of(calls) == 9  # of 3, 5, 7 and 9; 6 runs anyway, and of the new text nothing else is known in 7
    for step in (4, 5):  # before a step that was to be skipped, and before one that was not
        draw(pipe, **at(step, without_guidance))
        assert calls.rows[-6:] == [2] + [1] * 5
        assert sun.ltc.last_run(pipe) == sun.ltc.Counts(9, 12)
    assert len_of(calls) == 9 + 9 + 9


def test_a_change_of_what_is_nested_in_arguments_is_seen(count_calls: Callable[..., Any]) -> None:
    """SDXL's pooled text and sizes come in a dictionary, pictures of adapters in a list in one."""
    pipe, options = sdxl()
    pipe.set_progress_bar_config(disable=True)
    asked = {**options, "num_inference_steps": 12, "output_type": "latent"}

    def change(_pipe: Any, i: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {"add_text_embeds": values["add_text_embeds"] * 2} if i == 4 else values

    sun.ltc.attach(pipe, guard=0)
    calls = count_calls(pipe.unet.conv_out)
    pipe(**asked, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["add_text_embeds"])
    assert len_of(calls) == 9


def test_guidance_in_two_calls_a_step_skips_both() -> None:
    """As pipelines of video models ask: for the prompt, then for the negative one, each as it asked before."""
    stepper: Any = SimpleNamespace(
        skips_next=False, done=0, answered=False, must_run=lambda *_: setattr(stepper, "skips_next", False)
    )
    ran: list[float] = []
    x, texts = torch.zeros(1, 4), [torch.full((1, 3), float(i)) for i in range(3)]

    def forward(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        ran.append(float(text[0, 0]))
        return text

    skipping = _skipping(forward, stepper)
    before = _stepper.set(stepper)
    try:
        for skips in (False, True, False, True):
            stepper.skips_next = skips
            assert [skipping(x, text=text) is text for text in texts[:2]] == [True, True]
            stepper.done += 1
        assert ran == [0, 1, 0, 1]
        stepper.skips_next = True
        skipping(x, text=texts[2])  # another prompt makes it a real step, for all of its calls
        skipping(x, text=texts[1])
        assert ran[4:] == [2, 1]
        stepper.done, stepper.skips_next = stepper.done + 1, True
        assert skipping(x, text=texts[1]) is texts[1]  # answered without a call: the step stays a skipped one
        assert skipping(x, text=texts[0]) is texts[0]
        assert (ran[6:], stepper.skips_next) == ([0], True)
    finally:
        _stepper.reset(before)


def test_too_few_steps_say_so(pipe: Any, caplog: Any) -> None:
    sun.ltc.attach(pipe)
    draw(pipe, 4)
    assert sun.ltc.last_run(pipe).calls == 4
    assert "4 of 4 calls, 0 % saved (4 steps are too few" in caplog.text


def test_the_first_run_of_the_paper_is_the_usual_picture_and_the_next_is_fast(
    pipe: Any, count_calls: Callable[..., Any]
) -> None:
    plain = draw(pipe)
    own_class = type(pipe)
    sun.ltc.attach(pipe, settings=FIXED)
    calls = count_calls(pipe.unet.conv_out)  # hooks of the U-Net itself count skipped calls too
    assert torch.equal(draw(pipe), plain)
    assert len_of(calls) == 12
    fast = draw(pipe)
    assert len_of(calls) == 12 + 9  # 5, 7 and 9 are skipped
    assert 0 < (fast - plain).abs().max() < plain.abs().max()
    assert "forward" not in vars(pipe.unet)
    assert "step" not in vars(pipe.scheduler)
    assert type(pipe).__name__ == own_class.__name__
    draw(pipe, 10)  # another number of steps measures itself
    assert len_of(calls) == 21 + 10
    sun.ltc.detach(pipe)
    assert type(pipe) is own_class
    assert torch.equal(draw(pipe), plain)


def len_of(log: Any) -> int:
    return len(log.rows)


@pytest.fixture
def count_calls() -> Any:
    """Counts calls of any module."""
    handles = []

    class Log:
        def __init__(self, module: Any) -> None:
            self.rows: list[int] = []
            handles.append(module.register_forward_pre_hook(lambda _m, args: self.rows.append(len(args[0]))))

    yield Log
    for handle in handles:
        handle.remove()


def test_tables_are_kept_in_a_folder_and_found_by_another_pipeline(
    pipe: Any, count_calls: Callable[..., Any], tmp_path: Path
) -> None:
    sun.ltc.attach(pipe, settings=FIXED, folder=tmp_path)
    draw(pipe)
    assert len(list(tmp_path.glob("dpmpp_2m-12-*.json"))) == 1
    sun.ltc.attach(pipe, settings=FIXED, folder=tmp_path)
    calls = count_calls(pipe.unet.conv_out)
    draw(pipe)
    assert len_of(calls) == 9
    draw(pipe, guidance_scale=3.0)
    assert len_of(calls) == 9 + 12  # another w is another table


def test_calibration_on_prompts(pipe: Any, count_calls: Callable[..., Any]) -> None:
    sun.ltc.attach(pipe, settings=FIXED)
    table = sun.ltc.calibrate(
        pipe, ["a", "b", "c"], ["d", "", "e"], batch=2, find_bias=True, num_inference_steps=12, guidance_scale=7.5
    )
    assert table.error_aware
    assert table.pictures == 3
    assert tuple(table.coefficients) == (5, 7, 9)
    assert 0.9 < table.bias < 1.1
    calls = count_calls(pipe.unet.conv_out)
    draw(pipe)
    assert len_of(calls) == 9
    sun.ltc.attach(pipe, settings=sun.ltc.LtcSettings(tau=1e-9))
    with pytest.raises(sun.ltc.LtcError, match="Raise tau"):
        sun.ltc.calibrate(pipe, ["a"], num_inference_steps=12)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompts": []}, "none. Give at least one"),
        ({"prompts": [], "negatives": ["c"]}, "none. Give at least one"),
        ({"prompts": ["a", "b"], "negatives": ["c"]}, "2 prompts and 1 negative prompts do not fit"),
        ({"prompts": ["a"], "negatives": ["c", "d"]}, "1 prompts and 2 negative prompts do not fit"),
        ({"prompts": "a castle"}, "not on a text"),
        ({"prompts": ["a"], "batch": 0}, "batches of 1 picture or more"),
    ],
)
def test_calibration_checks_its_lists(pipe: Any, given: dict[str, Any], words: str) -> None:
    sun.ltc.attach(pipe, "paper", tau=0)
    with pytest.raises(sun.ltc.LtcError, match=words):
        sun.ltc.calibrate(pipe, **given)
    with pytest.raises(sun.ltc.LtcError, match="nothing was sampled"):
        run_calibration(lambda opener: [], FIXED)


@pytest.mark.parametrize("sun_first", [True, False])
def test_with_sun_in_either_order(pipe: Any, count_calls: Callable[..., Any], sun_first: bool) -> None:
    own_class, adapter = type(pipe), make_adapter(pipe.unet)
    for who in ("sun", "ltc") if sun_first else ("ltc", "sun"):
        if who == "sun":
            sun.attach(pipe, adapter)
        else:
            sun.ltc.attach(pipe, settings=FIXED)
    calls = count_calls(pipe.unet.conv_out)
    plain = draw(pipe, 8)
    fast = draw(pipe, 8)
    assert calls.rows == [1] * (8 + 6)
    assert not torch.equal(plain, fast)
    sun.detach(pipe)  # LTC-Accel stays
    draw(pipe), draw(pipe)
    assert len_of(calls) == 14 + 12 + 9
    sun.ltc.detach(pipe)
    assert type(pipe) is own_class


def test_another_call_of_the_unet_in_a_skipped_step_is_answered_for_itself(pipe: Any) -> None:
    torch.manual_seed(0)
    x, text = torch.randn(3, 4, 8, 8), torch.randn(3, 77, TEXT_WIDTH)
    with torch.no_grad():
        expected = pipe.unet(x, 500, text).sample
    seen = []

    def look(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(pipe.unet(x, 500, text).sample)
        return values

    sun.ltc.attach(pipe, settings=FIXED)
    plain = draw(pipe)
    fast = draw(pipe)
    assert torch.equal(draw(pipe, callback_on_step_end=look), fast)
    assert not torch.equal(fast, plain)
    assert len(seen) == 12
    assert all(torch.equal(answer, expected) for answer in seen)


def test_an_interrupted_run_leaves_nothing(pipe: Any) -> None:
    sun.ltc.attach(pipe, settings=FIXED)

    def stop(_pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        if step == 6:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        draw(pipe, callback_on_step_end=stop)
    assert "forward" not in vars(pipe.unet)
    assert "step" not in vars(pipe.scheduler)
    assert sun.ltc.last_table(pipe) is None


def test_a_scheduler_that_adds_noise_is_refused_by_the_paper_s_setting_now_and_later(pipe: Any) -> None:
    noisy = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    sun.ltc.attach(pipe, "paper")
    pipe.scheduler, plain = noisy, pipe.scheduler
    with pytest.raises(sun.ltc.LtcError, match="fresh noise"):
        draw(pipe)
    with pytest.raises(sun.ltc.LtcError, match="fresh noise"):
        sun.ltc.attach(pipe, "paper")
    pipe.scheduler = plain
    draw(pipe, 4)


def test_a_guidance_scale_by_position_files_its_own_table(pipe: Any, tmp_path: Path) -> None:
    names = list(inspect.signature(pipe.__call__).parameters)
    sun.ltc.attach(pipe, settings=FIXED, folder=tmp_path)
    options = {"prompt": "a b", "num_inference_steps": 12, "guidance_scale": 3.0}
    defaults = [p.default for p in inspect.signature(pipe.__call__).parameters.values()]
    last = names.index("guidance_scale") + 1
    pipe(*[options.get(name, default) for name, default in zip(names[:last], defaults, strict=False)])
    assert sun.ltc.last_table(pipe).key.w == 3.0
    draw(pipe)
    assert sun.ltc.last_table(pipe).key.w == 7.5
    assert len(list(tmp_path.glob("*.json"))) == 2


def trailing(pipe: Any) -> Any:
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    return pipe


def with_lora(pipe: Any, seed: int = 3) -> None:
    torch.manual_seed(seed)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))


def with_fused_lora(pipe: Any) -> None:
    with_lora(pipe)
    pipe.unet.fuse_lora()
    pipe.unet.unload_lora()


def with_sun(pipe: Any, seed: int = 7, strength: float = 1.0) -> None:
    sun.attach(pipe, make_adapter(pipe.unet, seed=seed), strength)
    trailing(pipe)


RUNS: dict[str, tuple[Callable[[Any], Any], dict[str, Any]]] = {
    "guidance": (lambda pipe: None, {"guidance_scale": 4.0}),
    "no guidance": (lambda pipe: None, {"guidance_scale": 1.0}),
    "lora": (with_lora, {"guidance_scale": 4.0}),
    "weaker lora": (with_lora, {"guidance_scale": 4.0, "cross_attention_kwargs": {"scale": 0.5}}),
    "other lora": (lambda pipe: with_lora(pipe, 4), {"guidance_scale": 4.0}),
    "fused lora": (with_fused_lora, {"guidance_scale": 4.0}),
    "sun": (with_sun, {}),
    "weaker sun": (lambda pipe: with_sun(pipe, strength=0.5), {}),
    "other adapter": (lambda pipe: with_sun(pipe, 8), {}),
    "sun and lora": (lambda pipe: (with_lora(pipe), with_sun(pipe)), {}),
}


def test_runs_with_guidance_sun_and_loras_never_take_each_others_tables(make_pipeline: Any, tmp_path: Path) -> None:
    """All on the same noise levels; each finds its own table again, from another pipeline too."""
    keys = []
    for again in (False, True):
        for name, (prepare, options) in RUNS.items():
            pipe = trailing(make_pipeline())
            prepare(pipe)
            sun.ltc.attach(pipe, settings=FIXED, folder=tmp_path)
            before = len(list(tmp_path.glob("*.json")))
            draw(pipe, 6, **options)
            assert len(list(tmp_path.glob("*.json"))) == before + (not again), name
            keys.append(sun.ltc.last_table(pipe).key)
    assert len({key.schedule for key in keys}) == 1
    assert len({key.file_name(FIXED) for key in keys}) == len(RUNS)


def test_a_guidance_scale_that_sun_ignores_needs_no_table_of_its_own(pipe: Any, tmp_path: Path) -> None:
    with_sun(pipe)
    sun.ltc.attach(pipe, settings=FIXED, folder=tmp_path)
    draw(pipe, 6)
    with pytest.warns(SunWarning, match="guidance_scale is ignored"):
        draw(pipe, 6, guidance_scale=3.0)
    assert len(list(tmp_path.glob("*.json"))) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["guidance", "sun", "lora"])
def test_a_table_serves_every_number_format(make_pipeline: Any, tmp_path: Path, dtype: Any, name: str) -> None:
    prepare, options = RUNS[name]
    for wanted in (torch.float32, dtype):
        pipe = trailing(make_pipeline())
        prepare(pipe)
        pipe.to(wanted)
        sun.ltc.attach(pipe, settings=FIXED, folder=tmp_path)
        draw(pipe, 6, **options)
    assert len(list(tmp_path.glob("*.json"))) == 1


def test_a_given_table_that_does_not_serve_says_why(pipe: Any) -> None:
    sun.ltc.attach(pipe, settings=FIXED)
    table = sun.ltc.calibrate(pipe, ["a", "b"], num_inference_steps=12, guidance_scale=7.5)
    sun.ltc.attach(pipe, table=table)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SunWarning)
        draw(pipe)
    with pytest.warns(SunWarning, match=r"another number of steps and another noise levels"):
        draw(pipe, 10)
    with pytest.warns(SunWarning, match=r"another guidance scale, so"):
        draw(pipe, guidance_scale=3.0)
    with_sun(pipe)
    with pytest.warns(SunWarning, match=r"another guidance scale and another SUN adapter or LoRA, so"):
        draw(pipe)


# ---------------------------------------------------------------------------------------------------- other pipelines


@pytest.mark.parametrize("make", [sdxl, sd3, text_to_video])
def test_other_models_skip_steps(make: Callable[[], Any], count_calls: Callable[..., Any]) -> None:
    pipe, texts = make()
    pipe.set_progress_bar_config(disable=True)
    model = getattr(pipe, "unet", None) or pipe.transformer
    last = getattr(model, "conv_out", None) or model.proj_out

    def sample() -> torch.Tensor:
        return pipe(**texts, num_inference_steps=12, output_type="latent", generator=torch.manual_seed(1))[0]

    plain = sample()
    sun.ltc.attach(pipe, settings=FIXED)
    calls = count_calls(last)
    assert torch.equal(sample(), plain)
    fast = sample()
    assert len_of(calls) == 12 + 9
    assert 0 < (fast - plain).abs().max() < plain.abs().max()


def test_what_is_no_pipeline_is_refused(unet: Any) -> None:
    with pytest.raises(TypeError, match="diffusers pipeline"):
        sun.ltc.attach(unet)


def test_the_fingerprint_knows_a_model_again_but_not_its_number_format(unet: Any) -> None:
    from tiny import make_unet

    assert sun.ltc.fingerprint(unet) == sun.ltc.fingerprint(make_unet())
    assert sun.ltc.fingerprint(unet) == sun.ltc.fingerprint(make_unet().half())
    assert sun.ltc.fingerprint(unet) == sun.ltc.fingerprint(make_unet().bfloat16())
    assert sun.ltc.fingerprint(unet) != sun.ltc.fingerprint(make_unet(seed=1))


# ------------------------------------------------------------------------------- presets beside what else a model has


def test_a_compiled_unet_draws_and_skips_as_the_eager_one_does(make_pipeline: Callable[..., Any]) -> None:
    """The whole U-Net is one graph, run once in each step that is not skipped."""
    from diffusers import UNet2DConditionModel

    ran: list[int] = []

    def backend(graph: Any, _inputs: Any) -> Any:
        def run(*inputs: Any) -> Any:
            ran.append(1)
            return graph.forward(*inputs)

        return run

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8, block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",), mid_block_type=None, layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH, attention_head_dim=2, norm_num_groups=4,
    ).eval()  # fmt: skip
    pipe = trailing(make_pipeline(unet=unet))
    sun.ltc.attach(pipe, guard=0)
    eager, counts = draw(pipe, 8), sun.ltc.last_run(pipe)
    torch._dynamo.reset()
    pipe.unet = torch.compile(unet, backend=backend, fullgraph=True)
    compiled_forward = pipe.unet.forward
    try:
        torch.testing.assert_close(draw(pipe, 8), eager)
        assert (len(ran), sun.ltc.last_run(pipe)) == (6, counts)
        assert counts.calls == 6
        assert pipe.unet.forward is compiled_forward
        sun.ltc.detach(pipe)
        draw(pipe, 2)
        assert len(ran) == 6 + 2
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("beside", ["lora", "controlnet"])
def test_loras_and_controlnets_skip_as_counted_and_are_restored(
    make_pipeline: Callable[..., Any], count_calls: Callable[..., Any], beside: str
) -> None:
    """A skipped step calls the ControlNet as little as the U-Net."""
    from diffusers import StableDiffusionControlNetPipeline

    options: dict[str, Any] = {}
    if beside == "controlnet":
        pipe = trailing(make_pipeline(StableDiffusionControlNetPipeline))
        options = {"image": torch.rand(1, 3, 64, 64, generator=torch.manual_seed(4))}
        bare = draw(pipe, controlnet_conditioning_scale=0.0, **options)
    else:
        pipe = trailing(make_pipeline())
        bare = draw(pipe)
        with_lora(pipe)
    plain, own_class = draw(pipe, **options), type(pipe)
    assert not torch.equal(plain, bare)
    modules = [pipe.unet, *([pipe.controlnet] if beside == "controlnet" else [])]
    sun.ltc.attach(pipe, "balanced")
    logs = [count_calls(module.conv_in) for module in modules]
    fast, counts = draw(pipe, **options), sun.ltc.last_run(pipe)
    assert counts.steps == 12
    assert counts.calls == 8 + counts.guarded
    assert counts.calls < 12
    assert [log.rows for log in logs] == [[2] * counts.calls] * len(modules)
    assert 0 < (fast - plain).norm() < 0.1 * plain.norm()
    sun.ltc.detach(pipe)
    assert type(pipe) is own_class
    assert not any("forward" in vars(module) for module in modules)
    assert torch.equal(draw(pipe, **options), plain)
