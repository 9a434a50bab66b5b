"""Switching in diffusers: ``attach`` gives a pipeline a second, small U-Net, ``detach`` takes it away again.

Nothing is patched while nothing is sampled. During a call of the pipeline its U-Net is an instance of a subclass of its
own class, which hands the calls of some steps to the small one; whoever else calls that U-Net meanwhile gets itself.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from ..common.notes import note
from ..common.reading import ReadError, read_json
from ..pipelines.layered import put_on, take_off
from ..pipelines.unet import GUIDANCE, NEGATIVE, RUN, UNET_ARGUMENTS, attachment_of, new_run
from .pair import Traits, check_pair, layers_a_stage, residuals_for, what_to_say
from .plan import SMALL_FIRST, Border, Switching, SwitchingError

log = logging.getLogger(__name__)

WITHOUT_SUN = (
    "SUN acts on this pipeline's U-Net and not on the small one, whose steps would have no guidance and no negative "
    "prompt. Call sun.attach(small_unet, adapter) with an adapter that fits it, or sun.detach(pipe)."
)


@dataclass(eq=False)
class Partner:
    """What ``attach`` put on a pipeline."""

    switching: Switching
    small: Any
    """The small U-Net as it is called: it may be compiled."""
    told: set[str] = field(default_factory=set)

    def tell(self, sentence: str) -> None:
        """Once for each pipeline."""
        if sentence not in self.told:
            self.told.add(sentence)
            note(sentence, stacklevel=4)


@dataclass(eq=False)
class SwitchingRun:
    """One call of a pipeline. ``small_calls`` and ``large_calls``: of each U-Net."""

    partner: Partner
    large: Any
    scheduler: Any
    small_calls: int = 0
    large_calls: int = 0
    border: Border | None = None
    levels: tuple[float, ...] = ()
    """The timesteps of the run, falling, each once."""
    _sun: Any = None

    def is_small(self, time: float) -> bool:
        """Whether the small U-Net runs at this timestep. The first call begins the run: image to image leaves out the
        first of the scheduler's timesteps."""
        if self.border is None:
            left = {t for t in map(float, self.scheduler.timesteps) if t <= time} or {time}
            self.levels = tuple(sorted(left, reverse=True))
            self.border = self.partner.switching.border(self.levels)
        return self.border.small(time)

    def switches_in(self, steps: int) -> int | None:
        """Of a run of ``steps`` steps, which has begun, the first one of the second U-Net; None where there is none.

        Solvers of second order have more timesteps than steps.
        """
        first = self.partner.switching.switches_at(len(self.levels))
        return None if first is None else first * steps // len(self.levels)

    def call(self, large: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the U-Net by the pipeline, answered by one of the two."""
        given = dict(zip(UNET_ARGUMENTS, args, strict=False)) | kwargs
        time = given["timestep"]
        if not self.is_small(float(time.flatten()[0]) if isinstance(time, torch.Tensor) else float(time)):
            self.large_calls += 1
            return large(*args, **kwargs)
        self.small_calls += 1
        sample, small = given["sample"], _plain(self.partner.small)
        if small is _plain(self.large):
            return large(*args, **kwargs)
        if small.device != sample.device and small.device.type != "meta":
            small.to(sample.device)
        given = self._with_sun(self._with_control(given))
        if small.dtype == sample.dtype:
            return self.partner.small(**given)
        answer = self.partner.small(**_cast(given, small.dtype, ("timestep",)))
        if isinstance(answer, tuple):
            return tuple(_cast(answer, sample.dtype))
        answer.sample = answer.sample.to(sample.dtype)
        return answer

    def _with_sun(self, given: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's negative for the small U-Net's own adapter; K and V of that one are kept for the run."""
        options = given.get("cross_attention_kwargs") or {}
        if NEGATIVE not in options:
            return given
        if attachment_of(self.partner.small) is None:
            raise SwitchingError(WITHOUT_SUN)
        if self._sun is None:
            self._sun = new_run(self.partner.small)
        theirs, own = options.get(RUN), {**options, RUN: self._sun}
        wanted = getattr(theirs, "guidance", None)
        if wanted is not None and self._sun.steering.adapter.guided:
            own.setdefault(GUIDANCE, wanted)
        return {**given, "cross_attention_kwargs": own}

    def _with_control(self, given: dict[str, Any]) -> dict[str, Any]:
        """ControlNet's residuals that the small U-Net has a place for."""
        added = given.get("added_cond_kwargs") or {}
        small = _plain(self.partner.small)
        if "image_embeds" in added and getattr(small, "encoder_hid_proj", None) is None:
            self.partner.tell("The IP-Adapter acts on the pipeline's U-Net alone: the small one was not given it.")
        down = given.get("down_block_additional_residuals")
        large, own = layers_a_stage(_plain(self.large)), layers_a_stage(small)
        if down is None or large == own:
            return given
        middle = given.get("mid_block_additional_residual")
        if middle is not None and len(own) < len(large):
            middle = middle.new_zeros(())  # of the innermost stage, which the small U-Net lacks
        chosen = tuple(down[i] for i in residuals_for(large, own))
        return {**given, "down_block_additional_residuals": chosen, "mid_block_additional_residual": middle}

    def end(self) -> str:
        """Let go of everything; the line that says what the run did."""
        if self._sun is not None:
            self._sun.end()
        self.scheduler = None
        return (
            f"Switching ({self.partner.switching}): {self.small_calls} calls of the small U-Net and "
            f"{self.large_calls} of the large one"
        )


_current: ContextVar[SwitchingRun | None] = ContextVar("sun_switching", default=None)
"""Of the pipeline that is being called in this thread or task."""
_last: weakref.WeakKeyDictionary[Any, SwitchingRun] = weakref.WeakKeyDictionary()


def attach(pipe: Any, small_unet: Any, share: float = 0.4, order: str = SMALL_FIRST) -> None:
    """Let a second, small U-Net run a share of the steps of a diffusers pipeline, in one run of its scheduler.

    small_unet: a ``UNet2DConditionModel`` of the same latents and texts (an assembled or BK-SDM one for Stable
    Diffusion, SSD-1B's for SDXL), or a pipeline that has one. share: of the steps of each run, 0 to 1. order: "small
    first" or "large first".

    The choice is made by timestep within one run, so multistep solvers keep their history. LoRA, IP-Adapter, SUN and
    feature inheritance act on the U-Net they were put on: attach SUN and inheritance to the small U-Net as well.
    ControlNet, LTC-Accel and guidance act on whichever runs. Pipelines that share a U-Net are attached each by itself.
    Attaching again replaces what was there.

    Raises SwitchingError for U-Nets that cannot go on with each other's latents, TypeError for another target.
    """
    switching = Switching(share, order)
    large = _large(pipe)
    small = small_unet.unet if isinstance(getattr(small_unet, "unet", None), torch.nn.Module) else small_unet
    if not isinstance(_plain(small), UNet2DConditionModel):
        raise TypeError(f"The small U-Net is a UNet2DConditionModel or a pipeline, not a {type(small_unet).__name__}.")
    config = pipe.scheduler.config
    other = small_unet.scheduler.config if small is not small_unet else _schedule_beside(_plain(small))
    check_pair(traits_of(_plain(large), config), traits_of(_plain(small), other))
    if said := what_to_say(_plain(large), _plain(small)):
        note(said)
    if _plain(large).device.type != "meta" and _plain(small) is not _plain(large):
        small.to(_plain(large).device)
    pipe._switching = Partner(switching, small)
    put_on(pipe, WithSwitching)


def detach(pipe: Any) -> None:
    """Take switching off a pipeline; without it, do nothing. The counters of its last run stay, without the U-Nets."""
    take_off(pipe, WithSwitching)
    pipe.__dict__.pop("_switching", None)
    if (run := _last.get(pipe)) is not None and run.scheduler is None:  # it has ended
        run.partner, run.large = Partner(run.partner.switching, None), None


def partner_of(pipe: Any) -> Partner | None:
    """What ``attach`` put on a pipeline."""
    found: Partner | None = pipe.__dict__.get("_switching")
    return found


def last_run(pipe: Any) -> SwitchingRun | None:
    """The counters of the pipeline's run that is under way or was last."""
    return _last.get(pipe)


class WithSwitching:
    """The layer that ``attach`` puts on a pipeline's class: it begins and ends runs."""

    @staticmethod
    @contextmanager
    def around(pipe: Any, _given: Mapping[str, Any]) -> Iterator[None]:
        partner: Partner = pipe._switching
        large = _large(pipe)
        check_pair(traits_of(_plain(large), None), traits_of(_plain(partner.small), None))  # it may be another by now
        if "_sun" in pipe.__dict__ and partner.switching.share > 0 and attachment_of(partner.small) is None:
            raise SwitchingError(WITHOUT_SUN)
        run = _last[pipe] = SwitchingRun(partner, large, pipe.scheduler)
        own: Any = type(large)
        before = _current.set(run)
        if not issubclass(own, _Switched):  # a call within a call has it already
            large.__class__ = _switched(own)
        try:
            yield
        finally:
            large.__class__ = own
            _current.reset(before)
            if getattr(pipe, "_all_hooks", None):  # offloading one model at a time
                _plain(partner.small).to("cpu")
            log.info("%s", run.end())


class _Switched:
    """Marks the classes of :func:`_switched`."""


@functools.cache
def _switched(own: Any) -> Any:
    """A subclass of a U-Net's class whose calls by the pipeline that runs may be answered by its partner."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = _current.get()
        if run is None or run.large is not self:
            return own.__call__(self, *args, **kwargs)
        return run.call(functools.partial(own.__call__, self), args, kwargs)

    body = {"__call__": call, "__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own)(own.__name__, (_Switched, own), body)


def traits_of(unet: Any, scheduler_config: Mapping[str, Any] | None) -> Traits:
    """What must agree of a diffusers U-Net, and of the noise schedule it was trained on, where that is known."""
    config = unet.config
    text = config.get("encoder_hid_dim") or config.get("cross_attention_dim")
    prediction = "" if scheduler_config is None else str(scheduler_config.get("prediction_type") or "epsilon")
    return Traits(
        latents=config.get("in_channels"),
        output=config.get("out_channels"),
        text=text if isinstance(text, int) else None,
        vector=config.get("projection_class_embeddings_input_dim"),
        time_embedding=config.get("time_cond_proj_dim"),
        prediction=prediction,
    )


def _schedule_beside(unet: Any) -> Mapping[str, Any] | None:
    """The scheduler's config in the folder a U-Net was loaded from, if there is one."""
    folder = Path(str(unet.config.get("_name_or_path") or ""))
    for place in (folder, folder.parent):  # the folder may be that of the U-Net itself
        try:
            content = read_json(place / "scheduler" / "scheduler_config.json", infinite=True)
        except (OSError, ReadError):
            continue
        return content if isinstance(content, dict) else None
    return None


def _large(pipe: Any) -> Any:
    if not isinstance(pipe, DiffusionPipeline) or not isinstance(
        _plain(getattr(pipe, "unet", None)), UNet2DConditionModel
    ):
        raise TypeError(
            f"Switching attaches to a diffusers pipeline with a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, "
            f"SDXL), not to a {type(pipe).__name__}."
        )
    return pipe.unet


def _plain(module: Any) -> Any:
    """Without the wrapper of torch.compile."""
    return getattr(module, "_orig_mod", module)


def _cast(value: Any, dtype: torch.dtype, leave: tuple[str, ...] = ()) -> Any:
    """Every floating-point tensor in nested dictionaries, lists and tuples in another dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: part if key in leave else _cast(part, dtype) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(part, dtype) for part in value)
    return value
