"""The script of txt2img and img2img, and the run behind it (accordions, tab, X/Y/Z plot and API alike)."""

from __future__ import annotations

import logging
import time
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from modules import scripts, shared

from ..sun.files import SunFileError
from ..sun.prediction import check_prediction
from . import choices, controls, experts, folders, infotext, negative, sampler, store, switching, xyz
from .accelerators import AcceleratorRun
from .choices import CONTROLS, SunSettings, overridden, read_arguments
from .controls import TITLE
from .hosts import family
from .refusal import refusal
from .run import WebuiRun, active, base_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

log = logging.getLogger(__name__)


@dataclass
class Counter:
    """U-Net calls of a run: forwards of the module, rows in them, and seconds spent sampling."""

    calls: int = 0
    rows: int = 0
    seconds: float = 0.0


class SunScript(scripts.Script):
    """The host makes one for txt2img and one for img2img."""

    sun_script = True

    def title(self) -> str:
        return TITLE

    def show(self, is_img2img: bool) -> Any:
        return scripts.AlwaysVisible

    def ui(self, is_img2img: bool) -> list[Any]:
        made = controls.create(self.elem_id)
        self.infotext_fields = [(c, infotext.field(name)) for c, name in zip(made, CONTROLS, strict=True)]
        self.paste_field_names = [str(name) for _, name in self.infotext_fields]
        return made

    def before_process(self, p: Any, *args: Any) -> None:
        p.sun_run = p.sun_accelerators = p.sun_switching = None
        try:
            enabled, settings, accelerators = read_arguments(args)
            settings, accelerators = overridden(p, settings), overridden(p, accelerators)
        except (TypeError, ValueError) as error:
            p.sun_run = WebuiRun(settings=SunSettings(""), error=error)
            return
        if enabled:
            p.sun_run = WebuiRun(settings=settings)
            with kept_error(p.sun_run):
                prepare(p, p.sun_run)
        else:
            store.forget_copy()  # 40 to 150 MB of the device that nobody uses now
        if accelerators.on:
            p.sun_accelerators = AcceleratorRun(accelerators)
            with kept_error(p.sun_accelerators):
                p.extra_generation_params.update(infotext.write_accelerators(accelerators))

    def process(self, p: Any, *args: Any) -> None:
        """The checkpoint is the right one from here on: the host loads the one a request names after before_process."""
        if run := run_of(p):
            with kept_error(run):
                take_adapter(p, run)
        if file := experts.file_of(p):
            p.extra_generation_params[experts.WRITTEN] = file.name
        else:
            experts.forget()

    def process_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if run := run_of(p):
            with kept_error(run):
                run.schedules = negative.encode(p, run.settings)

    def process_before_every_sampling(self, p: Any, *args: Any, **kwargs: Any) -> None:
        run, accelerators, counter = run_of(p), accelerators_of(p), getattr(p, "sun_counter", None)
        if run and getattr(p, "is_hr_pass", False):
            with kept_error(run):
                run.schedules = negative.encode(p, run.settings, hires=True)
        if run or accelerators or counter or experts.file_of(p):
            guard_sampling(p, run, accelerators, counter)

    def postprocess_batch(self, p: Any, *args: Any, **kwargs: Any) -> None:
        if shared.state.interrupted or shared.state.skipped:
            return
        if (run := run_of(p)) and not run.guarded:
            say_it_was_left_out(p, "SUN", run, infotext.WRITTEN)
        if (accelerators := accelerators_of(p)) and not accelerators.guarded:
            say_it_was_left_out(p, accelerators.names, accelerators, infotext.WRITTEN_BY_ACCELERATORS)


def run_of(p: Any) -> WebuiRun | None:
    """The SUN of a processing object; None where SUN is off."""
    return getattr(p, "sun_run", None)


def accelerators_of(p: Any) -> AcceleratorRun | None:
    """The accelerators of a processing object; None where all are off."""
    return getattr(p, "sun_accelerators", None)


@contextmanager
def kept_error(run: WebuiRun | AcceleratorRun) -> Iterator[None]:
    """Keeps an exception for `guard_sampling`: the host would log it and paint a picture without it."""
    try:
        yield
    except Exception as error:
        run.error = run.error or error


def prepare(p: Any, run: WebuiRun) -> None:
    """Sets what SUN needs on the processing object, except what an axis of the host's X/Y/Z plot has set.

    Raises ValueError for settings that cannot be, and for an axis that does nothing with SUN.
    """
    settings, axes = run.settings, xyz.axes_of(p)
    if "Steps" in axes:
        settings = replace(settings, steps=choices.read("steps", p.steps))
    if not settings.main_negative and settings.negative and p.styles:
        text = shared.prompt_styles.apply_negative_styles_to_prompt(settings.negative, p.styles)
        settings = replace(settings, negative=text)
    own_sampler = settings.sampling == "sun" and "Sampler" not in axes
    own_schedule = settings.sampling != "keep" and "Schedule type" not in axes
    if settings.sampling != "keep":
        settings = replace(settings, sampling="keep" if not own_schedule else "sun" if own_sampler else "schedule")
    run.settings = settings
    xyz.check(axes, own_schedule)
    p.steps = settings.steps
    if own_schedule:
        p.scheduler = sampler.SCHEDULE_LABEL
        if sampler.host_schedules() is not None:  # Forge Classic would read it back as one of its settings
            p.extra_generation_params["Schedule type"] = sampler.SCHEDULE_LABEL
    if own_sampler:
        p.sampler_name = sampler.SAMPLER
    if getattr(p, "enable_hr", False):
        p.hr_scheduler = None if own_schedule else p.hr_scheduler
        p.hr_sampler_name = None if own_sampler and "Hires sampler" not in axes else p.hr_sampler_name


def take_adapter(p: Any, run: WebuiRun) -> None:
    """Loads the adapter, sets the guidance and writes the infotext. Raises SunFileError, FileNotFoundError, and
    ValueError for a guidance scale that the adapter does not take."""
    settings, unet = run.settings, family.of(p.sd_model).unet_of(p.sd_model)
    if settings.adapter == choices.AUTOMATIC:
        settings = replace(settings, adapter=folders.that_fits(unet))
    path = folders.find(settings.adapter)
    run.adapter = store.load(path)
    say_what_it_predicts(p)
    if xyz.CFG in xyz.axes_of(p):
        settings = replace(settings, guidance=xyz.guidance(p.cfg_scale, run.adapter.guided))
    run.settings = settings
    run.strength, run.guidance = settings.strength, settings.guidance or None
    run.adapter.guidance(run.guidance)  # says so now if the adapter cannot
    if note := run.adapter.guidance_note(settings.guidance):
        p.comment(f"SUN: {note}")
    p.cfg_scale = 1.0
    if hasattr(p, "hr_cfg"):
        p.hr_cfg = 1.0
    p.extra_generation_params.update(infotext.write(settings, path))


def say_what_it_predicts(p: Any) -> None:
    """Tells of a model that predicts something else than the noise. Raises PredictionError for what SUN cannot do."""
    alphas = getattr(p.sd_model, "alphas_cumprod", None)
    last = 1.0 if alphas is None else float(alphas[-1])
    if note := check_prediction(family.of(p.sd_model).prediction_of(p.sd_model), last):
        p.comment(f"SUN: {note}")


def say_it_was_left_out(p: Any, name: str, run: WebuiRun | AcceleratorRun, written: Iterable[str]) -> None:
    """For hosts before A1111 1.10 and scripts with a sampling of their own, where nothing of ours is called.

    What was `written` into the infotext goes.
    """
    reason = run.error or "this host, or a script with a sampling of its own, never told SUN that it samples."
    text = f"{name} took no part in this picture: {reason}"
    log.error(text)
    p.comment(text)
    for key in written:
        p.extra_generation_params.pop(key, None)


def guard_sampling(p: Any, run: WebuiRun | None, accelerators: AcceleratorRun | None, counter: Counter | None) -> None:
    """Wraps the run of this processing object's sampler, so that what we do to the host lasts only while it samples.

    What is hung on the model and the sampler leaves with the `with` block, after an error or an interruption too.
    """
    own = p.sampler
    for state in (run, accelerators):
        if state is not None:
            state.guarded = True
    launch = getattr(own, "sun_launch", None) or own.launch_sampling  # a sampler may run several batches
    own.sun_launch = launch
    if run is not None and run.settings.sampling != "keep":
        with kept_error(run):
            sampler.keep_to_trained(own, p)

    def guarded(steps: int, func: Any) -> Any:
        try:
            for state in (run, accelerators):
                if state is not None and state.error is not None:
                    raise state.error
            with ExitStack() as stack:
                for entered in around(p, run, accelerators, counter, steps):
                    stack.enter_context(entered)
                result = launch(steps, func)
            if run is not None:
                check_sampled(run)
        except Exception as error:
            if not getattr(p, "is_api", False):
                raise
            raise refusal(error) from error  # the host's API would answer without the reason
        return result

    own.launch_sampling = guarded


def around(
    p: Any, run: WebuiRun | None, accelerators: AcceleratorRun | None, counter: Counter | None, steps: int
) -> list[AbstractContextManager[None]]:
    """What is to be around one sampling of `steps` steps; any order of entering will do."""
    beside = experts.file_of(p)
    return [
        *([counting(p, counter)] if counter is not None else []),
        *([experts.sampling(p, beside)] if beside else []),
        *([sun_sampling(p, run)] if run is not None else []),
        *(accelerators.sampling(p, steps) if accelerators is not None else []),
    ]


def check_sampled(run: WebuiRun) -> None:
    """Raises what happened where the host swallows exceptions, or RuntimeError if SUN was never reached."""
    if run.error is not None:
        raise run.error
    if not run.layer_calls and not (shared.state.interrupted or shared.state.skipped):
        raise RuntimeError(
            "SUN: the model ran without ever reaching SUN's layers. Something replaces its U-Net (TensorRT, say); "
            "switch that off."
        )


@contextmanager
def sun_sampling(p: Any, run: WebuiRun) -> Iterator[None]:
    """SUN on the model while one sampling runs. Raises SunFileError if the adapter does not fit the model."""
    host = family.of(p.sd_model)
    assert run.adapter is not None
    base = base_of(host.unet_of(p.sd_model), "the loaded model")
    try:
        run.adapter.check_base(base.channels, base.text_width, "the loaded model")
    except SunFileError as error:
        raise SunFileError(f"{error} {folders.where_to_get_one(base.text_width)}") from error
    run.layers = base.layers
    if run.settings.strength == 0.0:
        log.info("SUN: strength is 0, so the plain model samples without guidance.")
    run.layer_calls = 0
    log.info(
        "SUN active: %d layers, adapter %s, strength %g, %s",
        len(run.layers),
        run.settings.adapter,
        run.settings.strength,
        p.sampler_name,
    )
    try:
        with active(run), host.sampling(run, p):
            yield
    finally:
        run.end()
        if getattr(shared.cmd_opts, "lowvram", False) or getattr(shared.cmd_opts, "medvram", False):
            store.forget_copy()


@contextmanager
def counting(p: Any, counter: Counter) -> Iterator[None]:
    """Counts the calls of the U-Net, or of both where there are two, while the block runs."""

    def count(_module: Any, args: tuple[Any, ...]) -> None:
        counter.calls += 1
        counter.rows += args[0].shape[0]

    both = switching.current(p)
    unets = [family.of(p.sd_model).unet_of(p.sd_model)] if both is None else both.unets
    handles = [unet.register_forward_pre_hook(count) for unet in unets]
    begin = time.perf_counter()
    try:
        yield
    finally:
        counter.seconds += time.perf_counter() - begin
        for handle in handles:
            handle.remove()
