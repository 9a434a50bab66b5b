"""Switching in A1111 and Forge: the U-Net of a second checkpoint makes a share of the steps of one sampling.

The small U-Net is built of the loaded model's own layers with the weights of the file, so it runs by the host's code.
Which of the two a call goes to is settled where the sampler asks for a noise level; nothing stays when a sampling ends.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from modules import sd_models, shared

from ..sun.common.errors import SunFileError
from ..sun.common.identity import Stamp, stamp
from ..sun.common.reading import ReadError, check_regular
from ..sun.common.weights import header_of
from ..sun.ltc import fingerprint
from ..sun.prediction import marked_prediction
from ..sun.switching import Border, Switching, SwitchingError, Traits, check_pair, control_for_small, layers_a_stage
from ..sun.switching.slim import Slim, is_unet_name, slim, unet_weights
from . import folders, store
from .hosts import family
from .sampler import function_replaced

log = logging.getLogger(__name__)

LORA_STATE = ("network_current_names", "network_weights_backup", "network_bias_backup")
"""Where A1111 keeps on a layer which LoRAs are in its weights, and these without."""


# ----------------------------------------------------------------------------------------------------------- the files


def names() -> list[str]:
    """What can be chosen: the host's checkpoints that are .safetensors, and U-Nets in SUN's folders."""
    return list(_listed())


def find(name: str) -> Path:
    """The file behind a name of the list. Raises SwitchingError: only listed names are opened."""
    listed = _listed()
    # As the host does, with or without the hash behind the name.
    found = next((path for known, path in listed.items() if name in (known, known.rpartition(" [")[0])), None)
    if found is None:
        raise SwitchingError(
            f"Switching: there is no model named {name!r:.200} among the host's .safetensors checkpoints and in "
            f"{folders.searched()[0]}. Put it there and press the arrows."
        )
    return found


def _listed() -> dict[str, Path]:
    checkpoints = {info.title: Path(info.filename) for info in sd_models.checkpoints_list.values()}
    found = {name: path for name, path in checkpoints.items() if path.suffix.lower() == ".safetensors"}
    for name, path in folders.files().items():
        if path.suffix.lower() == ".safetensors" and _holds_unet(path):
            found.setdefault(name, path)
    return found


def _holds_unet(path: Path) -> bool:
    try:
        return any(name.endswith("input_blocks.0.0.weight") for name in _names_in(stamp(path)))
    except OSError:
        return False


@functools.lru_cache(maxsize=256)
def _names_in(file: Stamp) -> frozenset[str]:
    """Names of the tensors of a file, from its head alone; none of a file that cannot be read."""
    try:
        return frozenset(header_of(file[0]).tensors)
    except SunFileError:
        return frozenset()


def short_hash(name: str) -> str:
    """First ten digits of the file's SHA-256."""
    return store.short_hash(find(name))


def _read(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The U-Net's weights in a file, and what it predicts if the file says so. Raises SwitchingError."""
    from safetensors import SafetensorError, safe_open

    try:
        check_regular(path)
        with safe_open(str(path), "pt") as content:
            keys, header = set(content.keys()), dict(content.metadata() or {})
            tensors = {key: content.get_tensor(key) for key in keys if is_unet_name(key)}
    except (OSError, SafetensorError, ReadError) as error:
        raise SwitchingError(f"Switching: {path.name} cannot be read ({error}). Get the file again.") from error
    kind, _ = marked_prediction(keys, header)
    return unet_weights(tensors), kind


# ------------------------------------------------------------------------------------------------------ the small U-Net

_made: list[tuple[Any, tuple[Any, ...], Slim]] = []
"""The last small U-Net: (weak reference to the large one, which file, the U-Net)."""


def small_of(sd_model: Any, name: str) -> Slim:
    """The small U-Net of a listed file for the loaded model; the last one is kept. Raises SwitchingError."""
    path, host = find(name), family.of(sd_model)
    large = host.unet_of(sd_model)
    which = (*stamp(path), next(large.parameters()).dtype)
    if _made and _made[0][0]() is large and _made[0][1] == which:
        return _made[0][2]
    forget()
    weights, predicts = _read(path)
    first, last = weights.get("input_blocks.0.0.weight"), weights.get("out.2.weight")
    if first is None or last is None or first.ndim != 4 or last.ndim != 4:
        raise SwitchingError(f"Switching: {path.name} holds no U-Net of Stable Diffusion. Choose another file.")
    own = dict(large.named_parameters())
    check_pair(
        Traits(
            own["input_blocks.0.0.weight"].shape[1],
            own["out.2.weight"].shape[0],
            _text_width(own),
            prediction=host.prediction_of(sd_model),
        ),
        Traits(first.shape[1], last.shape[0], _text_width(weights), prediction=predicts),
    )
    with torch.inference_mode(False), torch.no_grad():
        made = slim(large, weights, LORA_STATE)
    made.unet.eval()
    _made[:] = [(weakref.ref(large), which, made)]
    return made


def forget() -> None:
    """Gives the memory of the last small U-Net back."""
    _made.clear()


def _text_width(weights: Any) -> int | None:
    keys = (w for name, w in weights.items() if name.endswith(".attn2.to_k.weight"))
    return next((w.shape[1] for w in keys if w.ndim == 2), None)


# -------------------------------------------------------------------------------------------------------- one sampling


@dataclass(eq=False)
class WebuiSwitching:
    """What switching does in a sampling. ``small_runs``: whether the call that comes is the small U-Net's."""

    switching: Switching
    large: Any
    small: Slim
    border: Border | None = None
    small_runs: bool = False
    small_calls: int = 0
    large_calls: int = 0

    @property
    def unets(self) -> tuple[Any, Any]:
        """The large one and the small one."""
        return self.large, self.small.unet

    def steps_of(self, steps: int) -> tuple[int, int]:
        """How many of a run's steps each makes, the large one first."""
        small = self.switching.small_steps(steps)
        return steps - small, small

    def for_table(self) -> str:
        """For the key of what LTC-Accel measures."""
        return f"switching {fingerprint(self.small.unet)} {self.switching}"


def of(p: Any, switching: Switching, name: str) -> WebuiSwitching:
    """Switching for a processing object. Raises SwitchingError for files that do not fit the loaded model."""
    large = family.of(p.sd_model).unet_of(p.sd_model)
    return WebuiSwitching(switching, large, small_of(p.sd_model, name))


def current(p: Any) -> WebuiSwitching | None:
    """The switching of a processing object; None where it is off."""
    return getattr(p, "sun_switching", None)


@contextmanager
def sampling(p: Any, run: WebuiSwitching) -> Iterator[None]:
    """Lets the small U-Net make its share of the steps of p.sampler. Raises SwitchingError for a sampler whose noise
    levels are not known beforehand."""
    _say_what_is_left_out(p, run)
    run.small_calls = run.large_calls = 0
    with ExitStack() as stack:
        stack.callback(_report, run)
        stack.enter_context(_levels_of(p, run))
        stack.enter_context(family.of(p.sd_model).kept_beside(p, run.small.unet))
        stack.enter_context(_answering(run))
        yield


def _say_what_is_left_out(p: Any, run: WebuiSwitching) -> None:
    large, small = (sum(parameter.numel() for parameter in unet.parameters()) for unet in run.unets)
    if small >= large:
        p.comment(
            "Switching: the second model is as large as the loaded one: nothing becomes faster. Choose a compact one."
        )
    if vars(run.large).get("forward") is not None:
        p.comment(
            "Switching: another extension (ControlNet, say) has put itself into the loaded U-Net. It acts on that one "
            "alone, not in the steps of the small U-Net."
        )
    if family.of(p.sd_model).patches_weights(p.sd_model):
        p.comment("Switching: LoRAs act on the loaded model's U-Net alone, not in the steps of the small one.")


@contextmanager
def _levels_of(p: Any, run: WebuiSwitching) -> Iterator[None]:
    """Learns the run's noise levels from the call of the sampler's function, and each call's from its denoiser."""
    begun: list[bool] = []

    def switching(
        function: Callable[..., torch.Tensor], given: Mapping[str, Any], denoiser: Any, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        # Timesteps are in rising order, the first of them where the run ends.
        levels = given["timesteps"][1:] if given.get("timesteps") is not None else given.get("sigmas")
        if levels is None:
            raise _unknown(p.sampler_name)
        if given.get("timesteps") is None:
            levels = levels[:-1]
        begun.append(True)
        run.border = run.switching.border(map(float, levels))
        return function(_Choosing(denoiser, run), *args, **kwargs)

    try:
        with function_replaced(p, switching, _unknown(p.sampler_name)):
            yield
    finally:
        run.small_runs = False
    if not begun and not (shared.state.interrupted or shared.state.skipped):
        raise _unknown(p.sampler_name)


def _unknown(name: str) -> SwitchingError:
    return SwitchingError(
        f"Switching does not know the noise levels of the sampler {name} beforehand. Choose Euler, DPM++ 2M, DDIM or "
        "another that takes a schedule."
    )


class _Choosing:
    """The host's denoiser, which is told first whose step it is."""

    def __init__(self, denoiser: Any, run: WebuiSwitching) -> None:
        self._denoiser, self._run = denoiser, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("_denoiser", "_run"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._denoiser, name, value)  # hosts and wrappers count steps there

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **extra: Any) -> torch.Tensor:
        assert self._run.border is not None
        self._run.small_runs = self._run.border.small(float(sigma.flatten()[0]))
        answer: torch.Tensor = self._denoiser(x, sigma, **extra)
        return answer


@contextmanager
def _answering(run: WebuiSwitching) -> Iterator[None]:
    """Calls of the large U-Net are answered by the one whose step it is: its class is another while this lasts."""
    large, small = run.unets
    own: Any = type(large)
    owner = threading.get_ident()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self is not large or threading.get_ident() != owner or not run.small_runs:
            run.large_calls += self is large
            return own.__call__(self, *args, **kwargs)
        run.small_calls += 1
        return small(*args, **_fitted(run, kwargs))

    large.__class__ = type(own)(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
    try:
        yield
    finally:
        large.__class__ = own


def _fitted(run: WebuiSwitching, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What Forge hands to the U-Net by block, for the blocks of the small one."""
    if kwargs.get("control"):
        layers = (layers_a_stage(unet) for unet in run.unets)
        kwargs = {**kwargs, "control": control_for_small(kwargs["control"], *layers)}
    options = kwargs.get("transformer_options") or {}
    if options.get("patches_replace"):
        replaced = {kind: run.small.replaced(patches) for kind, patches in options["patches_replace"].items()}
        kwargs = {**kwargs, "transformer_options": {**options, "patches_replace": replaced}}
    return kwargs


def _report(run: WebuiSwitching) -> None:
    log.info(
        "Switching (%s): %d calls of the small U-Net and %d of the large one",
        run.switching,
        run.small_calls,
        run.large_calls,
    )
