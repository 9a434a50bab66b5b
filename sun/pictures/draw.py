"""Make pictures from a :class:`~sun.pictures.recipe.Recipe`: load a model, attach SUN, run the fitting pipeline."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import diffusers
import torch
from PIL import Image

from .. import __version__
from ..adapter import SunAdapter
from ..common.counting import CallCounter
from ..common.devices import pick_device, pick_dtype
from ..common.finite import NonFiniteError, require_finite
from ..common.notes import note
from ..common.reading import printable
from ..common.settings import ConfigError
from ..files import SunFileError
from ..inheritance import InheritanceError
from ..inheritance.pipelines import attach as attach_inheritance
from ..inheritance.pipelines import detach as detach_inheritance
from ..ltc import Counts, LtcError, load_table
from ..ltc.pipelines import attach as attach_ltc
from ..ltc.pipelines import detach as detach_ltc
from ..ltc.pipelines import last_run
from ..ltc.presets import PAPER, preset
from ..pipelines.attach import attach, detach
from ..pipelines.kinds import PIPELINES
from ..pipelines.loading import (
    ModelError,
    is_inpainting,
    load_controlnet,
    load_pipeline,
    load_unet,
    why_not_finite,
)
from ..pipelines.lora import apply_lora
from ..pipelines.schedulers import make_scheduler
from ..pipelines.text import encode_prompts, read_as_words
from ..pipelines.weighted import encode_weighted
from ..runtimes.contents import is_exported
from ..schedule import denoise_timesteps, respaced_steps, trailing_timesteps
from ..shipped import EMOJI_CONTROLNET, EMOJI_DIFFUSION, EMOJI_LORA, EMOJI_SUN, SHIPPED, adapter_file, guidance_of
from ..switching import SwitchingError
from ..switching.pipelines import attach as attach_switching
from ..switching.pipelines import detach as detach_switching
from ..user_pictures import PictureError, read_mask, read_picture
from .recipe import INSIDE, MAX_SIDE, Recipe, RecipeError, fingerprints, png_text, split_lora

OnStep = Callable[[int, int], None]
TOGETHER = "drawn_together"
"""Where a PNG says beside how many others its picture was drawn; its last bits can depend on it, and with LTC-Accel's
guard which steps ran."""


@dataclass
class Loaded:
    """A model ready to draw; ``pipe`` carries no adapter between runs."""

    pipe: Any  # a StableDiffusionPipeline; diffusers' classes have no usable types
    adapter: SunAdapter | None = None
    controlnet: Any = None
    small: Any = None
    """The U-Net that makes a share of the steps, if there is one."""
    exported: Any = None
    """The ``ExportedPipeline`` that ``pipe`` is of, with its own adapter and ControlNet."""

    @property
    def size(self) -> int:
        """Pixels of the model's own square pictures, or those an exported model is fixed to (its width)."""
        if self.exported is not None and self.exported.contents.size:
            return int(self.exported.contents.size[0])
        return int(self.pipe.unet.config.sample_size) * int(self.pipe.vae_scale_factor)


@dataclass
class Drawn:
    """What one run made; ``unet_calls`` is U-Net rows a picture (a CFG step counts two), ``small_calls`` those of the
    small U-Net among them, ``seconds`` the whole run."""

    images: list[Image.Image]
    latents: torch.Tensor
    unet_calls: float
    seconds: float
    small_calls: float = 0.0
    skipping: Counts | None = None
    """Of LTC-Accel, if it was there."""
    whole: tuple[bool, ...] = ()
    """Of :func:`draw_rows`: which pictures are of finite numbers; the others show nothing."""


def load(recipe: Recipe) -> Loaded:
    """Load model, adapter, LoRAs and ControlNet of ``recipe``. Raises RecipeError or SunFileError."""
    if is_exported(recipe.model):
        return _load_exported(recipe)
    if INSIDE in (recipe.adapter, recipe.controlnet):
        raise RecipeError(
            f"{printable(recipe.model)} is not an exported model with an adapter inside. Name the adapter."
        )
    device = _device(recipe.device)
    with _as_recipe_error():
        dtype = pick_dtype(recipe.dtype, device)
        pipe = load_pipeline(recipe.model, dtype, recipe.config)
        # Before the LoRAs: a Control-LoRA takes the U-Net's encoder as it is in the file.
        controlnet = _load_controlnet(recipe.controlnet, pipe.unet, dtype).to(device) if recipe.controlnet else None
        for lora in recipe.loras:
            apply_lora(pipe, *split_lora(lora))
        small = load_unet(recipe.switch, dtype).to(device) if recipe.switch else None
    pipe.to(device)
    adapter = None if recipe.adapter == "none" else load_adapter(recipe.adapter)
    return Loaded(pipe, adapter, controlnet, small)


def _load_exported(recipe: Recipe) -> Loaded:
    from ..runtimes.pipeline import load_exported

    with _as_recipe_error():
        exported = load_exported(recipe.model, threads=torch.get_num_threads())
    if recipe.adapter == "none" and exported.contents.with_sun:
        raise RecipeError(
            "the adapter is inside this exported model. Leave --adapter out; --sun-strength 0 silences it."
        )
    if recipe.control and exported.controlnet is None:
        raise RecipeError("this model was exported without a ControlNet. Export it again with --controlnet.")
    return Loaded(exported.pipe, None, exported.controlnet if recipe.control else None, exported=exported)


def _completed_for_export(recipe: Recipe) -> Recipe:
    """``recipe`` for an exported model: its own adapter and ControlNet, on the CPU. Raises RecipeError."""
    given = {
        "--adapter": "" if recipe.adapter in (SHIPPED, INSIDE, "none") else recipe.adapter,
        "--controlnet": "" if recipe.controlnet in (SHIPPED, INSIDE) else recipe.controlnet,
        "--lora": ", ".join(recipe.loras),
        "--config": recipe.config,
        "--switch": recipe.switch,
        "--dtype": "" if recipe.dtype in ("auto", "float32") else recipe.dtype,
        "--device": "" if recipe.device in ("auto", "cpu") else recipe.device,
    }
    for option, value in {"--ltc": recipe.ltc, "--inherit": recipe.inherit}.items():
        if value != "none":
            raise RecipeError(
                f"{option} {value}: {printable(recipe.model)} is an exported model, whose U-Net runs in one piece in "
                "every step. Leave the option out, or draw with the model it was exported from."
            )
    for option, value in given.items():
        if value:
            raise RecipeError(
                f"{option} {printable(value)}: {printable(recipe.model)} is an exported model, in which that is fixed. "
                "Leave the option out, or export the model again with it (`sun export`)."
            )
    adapter, controlnet = "none" if recipe.adapter == "none" else INSIDE, INSIDE if recipe.control else ""
    return replace(recipe, device="cpu", dtype="float32", adapter=adapter, controlnet=controlnet)


def load_adapter(name: str) -> SunAdapter:
    """The adapter file ``name``, or the shipped one for ``emoji``. Raises SunFileError or RecipeError."""
    if name == SHIPPED and not EMOJI_SUN.is_file():
        raise RecipeError("this installation has no shipped adapter. Give --adapter FILE, or install SUN again.")
    return SunAdapter.load(adapter_file(name))


def _load_controlnet(name: str, unet: Any, dtype: torch.dtype) -> Any:
    if name != SHIPPED:
        return load_controlnet(name, unet, dtype)
    if not EMOJI_CONTROLNET.is_file():
        raise RecipeError("this installation has no shipped ControlNet. Give --controlnet a folder, or update SUN.")
    try:
        return load_controlnet(EMOJI_CONTROLNET, unet, dtype)
    except ModelError as error:
        raise RecipeError(f"the shipped ControlNet is for Emoji Diffusion (--model emoji): {error}") from error


@contextmanager
def _as_recipe_error() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        raise RecipeError(str(error)) from error


def complete(recipe: Recipe, loaded: Loaded | None = None) -> Recipe:
    """``recipe`` with every default that depends on files or the model filled in, and checked. Raises RecipeError."""
    if is_exported(recipe.model):
        recipe = _completed_for_export(recipe)
    _check_guidance(recipe)
    if recipe.mask and not recipe.init:
        raise RecipeError("a mask needs the picture it masks. Add --init IMAGE.")
    if bool(recipe.control) != bool(recipe.controlnet):
        raise RecipeError("--controlnet FOLDER (or emoji) and --control IMAGE belong together. Give both.")
    if recipe.init:
        recipe = replace(recipe, strength=(1.0 if recipe.mask else 0.5) if recipe.strength is None else recipe.strength)
        _kept_steps(recipe)
    _check_skipping(recipe)
    if loaded and not (recipe.width and recipe.height):
        width, height = (loaded.exported and loaded.exported.contents.size) or (loaded.size, loaded.size)
        if recipe.init:
            width, height = (max(8, side // 8 * 8) for side in open_image(recipe.init).size)
            if max(width, height) > MAX_SIDE:
                raise RecipeError(
                    f"{printable(recipe.init)} is {width} x {height} pixels, and at most {MAX_SIDE} a side are drawn. "
                    "Give the size to draw with --size."
                )
        recipe = replace(recipe, width=width, height=height)
    if loaded and loaded.exported is not None and not loaded.exported.contents.with_sun:
        recipe = replace(recipe, adapter="none")
    if loaded:
        recipe = replace(recipe, guidance=_guidance(recipe, loaded))
    return replace(recipe, dtype=str(_dtype(recipe)).removeprefix("torch."), device=_device(recipe.device))


def _check_guidance(recipe: Recipe) -> None:
    """Raise RecipeError for a guidance scale that guides nothing."""
    least = 1.0 if recipe.adapter == "none" else 0.0  # without an adapter diffusers guides above 1 alone
    if recipe.guidance is not None and (recipe.guidance <= 0 or recipe.guidance < least):
        raise RecipeError(
            f"the guidance scale {recipe.guidance:g} guides nothing. Give one above 0"
            + ("; without an adapter 1 is no guidance, and more is more." if least else ".")
        )


def _check_skipping(recipe: Recipe) -> None:
    """Raise RecipeError for LTC-Accel that would skip nothing, or LtcError for a damaged table."""
    steps = _steps_run(recipe)
    if recipe.ltc_table and recipe.ltc != PAPER:
        raise RecipeError("--ltc-table FILE belongs to --ltc paper; the other presets need no table. Leave it out.")
    if recipe.ltc == PAPER:
        if not recipe.ltc_table:
            raise RecipeError(
                "--ltc paper needs the table that `sun calibrate` makes for this model, sampler and number of steps: "
                "give it with --ltc-table FILE. The other presets need none."
            )
        made_for = load_table(recipe.ltc_table).key.steps
        if made_for != steps:
            raise RecipeError(
                f"--ltc-table {printable(recipe.ltc_table)} is for {made_for} steps, and {steps} run here. Calibrate "
                "for these, or take another number of steps."
            )
    elif recipe.ltc != "none" and not preset(recipe.ltc).skipped(steps):
        least = next(n for n in range(1, 1000) if preset(recipe.ltc).skipped(n))
        raise RecipeError(
            f"--ltc {recipe.ltc} skips none of {steps} steps. Take at least {least} (15 and more are what it is for), "
            "or leave it out."
        )


def _guidance(recipe: Recipe, loaded: Loaded) -> float | None:
    """The scale this run uses; None with an adapter that has its own fixed in the weights. Raises RecipeError."""
    adapter = loaded.adapter
    if loaded.exported is not None and loaded.exported.contents.with_sun:
        contents = loaded.exported.contents
        if not contents.guided and recipe.guidance is not None:
            raise RecipeError("the guidance scale is fixed in this exported model. Leave --guidance out.")
        return contents.guidance if contents.guided and recipe.guidance is None else recipe.guidance
    if adapter is None:
        own = guidance_of(recipe.model) if loaded.exported is None else loaded.exported.contents.usual_guidance
        return own if recipe.guidance is None else recipe.guidance
    if adapter.guided:
        return adapter.info.guidance_scale if recipe.guidance is None else recipe.guidance
    if recipe.guidance is not None:
        own = adapter.info.guidance_scale
        raise RecipeError(
            f"this adapter's guidance scale is fixed{f' at {own:g}' if own else ''}. Leave --guidance out, use "
            "--sun-strength, or take an adapter that takes the scale."
        )
    return None


def noise(recipe: Recipe, loaded: Loaded) -> torch.Tensor:
    """Start noise [batch, 4, h, w], float32 on the CPU, picture ``i`` from ``seed + i``: the same on every device."""
    return _noise(_rows(recipe), loaded)


def generate(loaded: Loaded, recipe: Recipe, on_step: OnStep | None = None) -> Drawn:
    """Draw the pictures of a complete ``recipe``: the whole batch, or the one at ``recipe.index``.

    The whole batch runs in either case, because a picture's last bits depend on its batch, and with LTC-Accel's guard
    which steps run. ``on_step(done, total)`` is called after each step. Raises RecipeError, SunFileError.
    """
    try:
        drawn = _draw(loaded, _rows(recipe), _encode(loaded, recipe), on_step, strict=True)
    except (NonFiniteError, SwitchingError, LtcError, InheritanceError) as error:
        raise RecipeError(str(error)) from error
    picked = slice(None) if recipe.index is None else slice(recipe.index, recipe.index + 1)
    return replace(drawn, images=drawn.images[picked], latents=drawn.latents[picked])


def draw_rows(loaded: Loaded, rows: Sequence[Recipe], texts: tuple[torch.Tensor, torch.Tensor]) -> Drawn:
    """Draw one picture for each of ``rows``, complete recipes that differ in what :func:`batch_key` leaves out.

    texts: states of the prompts and of the negative prompts, each [len(rows), L, D]. A picture of NaN or infinity is
    no error here: ``whole`` of the result says which are none. Raises RecipeError, SunFileError.
    """
    try:
        return _draw(loaded, rows, texts, None, strict=False)
    except (SwitchingError, LtcError, InheritanceError) as error:
        raise RecipeError(str(error)) from error


def batch_key(recipe: Recipe) -> tuple[Any, ...]:
    """What pictures that are drawn together have in common: all but texts, seed and the pictures they start from."""
    own = {"prompt": "", "negative": "", "seed": 0}
    own |= {name: "given" for name in ("init", "mask", "control") if getattr(recipe, name)}
    return tuple(asdict(replace(recipe, **own)).values())  # type: ignore[arg-type]


def why_not_whole(loaded: Loaded) -> str:
    """What to do about pictures of NaN or infinity."""
    pipe = loaded.pipe
    parts = {"U-Net": pipe.unet, "text encoder": pipe.text_encoder, "autoencoder": pipe.vae}
    return why_not_finite({**parts, "ControlNet": loaded.controlnet})


def png_texts(recipe: Recipe) -> list[dict[str, str]]:
    """The text chunks of each picture ``generate`` returns for ``recipe``."""
    prints = prints_of(recipe)
    indices = range(recipe.batch) if recipe.index is None else [recipe.index]
    return [png_text(recipe, i, environment(recipe.device), prints) for i in indices]


def prints_of(recipe: Recipe) -> dict[str, str]:
    """:func:`~sun.pictures.recipe.fingerprints` of all that ``recipe`` names, the shipped models among it."""
    return fingerprints(named_files(recipe))


def named_files(recipe: Recipe) -> dict[str, str]:
    """All files of ``recipe`` by the field that names them, the shipped models among them, as PNGs list them."""
    return {**_shipped(recipe), **recipe.files()}


def changes_since(recipe: Recipe, content: dict[str, Any]) -> list[str]:
    """What is no longer as when the picture was made, each a sentence. Raises RecipeError for a missing file."""
    named, before = named_files(recipe), content.get("files", {})
    found = [
        f"{printable(named[field])} ({field}) has changed since the picture was made"
        for field, mark in fingerprints(named).items()
        if before.get(field, mark) != mark
    ]
    now, then = environment(_device(recipe.device)), content.get("made_with", {})
    found += [f"{k} was {then[k]} and is {v}" for k, v in now.items() if then.get(k, v) != v]
    if TOGETHER in then:
        found.append(f"it was drawn together with others, {printable(then[TOGETHER])} at a time, and is drawn alone")
    return found


def environment(device: str) -> dict[str, str]:
    """Versions and device that can change the last bits of a picture."""
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    return {"sun": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__, "device": name}


def open_image(path: str) -> Image.Image:
    """An RGB picture, read as training reads it (:func:`sun.user_pictures.read_picture`). Raises RecipeError."""
    try:
        return read_picture(path)
    except PictureError as error:
        raise RecipeError(str(error)) from error


def open_mask(path: str) -> Image.Image:
    """A mask, mode L, white where a picture is repainted. Raises RecipeError."""
    try:
        return read_mask(path)
    except PictureError as error:
        raise RecipeError(str(error)) from error


def _attach_small(pipe: Any, loaded: Loaded, recipe: Recipe) -> None:
    """Let the small U-Net make its share of the steps, with SUN on it where SUN is on the model. Raises RecipeError."""
    if loaded.adapter:
        try:
            attach(loaded.small, loaded.adapter.for_unet(loaded.small), strength=recipe.sun_strength)
        except (SunFileError, ValueError) as error:
            raise RecipeError(
                f"the adapter fits the model, but not the small U-Net of --switch: {error} Use --adapter none, with "
                "more --steps."
            ) from error
    attach_switching(pipe, loaded.small, recipe.share, recipe.switch_order)


def _attach_accelerators(pipe: Any, loaded: Loaded, recipe: Recipe) -> None:
    """Let the run skip steps and inherit features, the small U-Net with it. Raises LtcError, InheritanceError."""
    if recipe.inherit != "none":
        attach_inheritance(pipe, recipe.inherit)
        if loaded.small is not None:
            attach_inheritance(loaded.small, recipe.inherit)
    if recipe.ltc == PAPER:
        attach_ltc(pipe, PAPER, table=load_table(recipe.ltc_table), measure=False)
    elif recipe.ltc != "none":
        attach_ltc(pipe, recipe.ltc)


def _detach_accelerators(pipe: Any, loaded: Loaded, recipe: Recipe) -> None:
    if recipe.ltc != "none":
        detach_ltc(pipe)
    if recipe.inherit != "none":
        for attached in (pipe, loaded.small):
            if attached is not None:
                detach_inheritance(attached)


# --- the pieces of a run -----------------------------------------------------------------------------------------


def _encode(loaded: Loaded, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Text states of prompt and negative prompt, each [batch, L, D]; tells what in them other programs act on."""
    for sentence in dict.fromkeys(read_as_words(recipe.prompt) + read_as_words(recipe.negative)):
        note(sentence)
    groups = [recipe.prompt] * recipe.batch, [recipe.negative] * recipe.batch
    try:
        positive, negative = encoder_of(recipe)(loaded.pipe.tokenizer, loaded.pipe.text_encoder, *groups)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return positive, negative


def encoder_of(recipe: Recipe) -> Callable[..., tuple[torch.Tensor, ...]]:
    """What encodes its prompts: (tokenizer, text encoder, groups of texts) to states of one length."""
    return encode_weighted if recipe.prompt_weights == "compel" else encode_prompts


def _rows(recipe: Recipe) -> list[Recipe]:
    """A recipe for each picture of the batch."""
    return [replace(recipe, seed=recipe.seed + i, batch=1, index=None) for i in range(recipe.batch)]


def _draw(
    loaded: Loaded,
    rows: Sequence[Recipe],
    texts: tuple[torch.Tensor, torch.Tensor],
    on_step: OnStep | None,
    strict: bool,
) -> Drawn:
    recipe = rows[0]
    pipe_class, inputs, total = _mode(loaded, rows)
    pipe = _pipeline(pipe_class, loaded)
    latents: dict[str, torch.Tensor] = {}

    def after_step(_pipe: Any, step: int, _t: Any, state: dict[str, Any]) -> dict[str, Any]:
        latents["last"] = state["latents"]
        if strict:
            _check_finite(state["latents"], f"after step {step + 1} of {total} the latents", loaded)
        if on_step:
            on_step(step + 1, total)
        return {}

    if loaded.adapter:
        attach(pipe, loaded.adapter, strength=recipe.sun_strength)
    try:
        pipe.scheduler = make_scheduler(recipe.scheduler, pipe.scheduler.config)
        if loaded.small is not None:
            _attach_small(pipe, loaded, recipe)
        _attach_accelerators(pipe, loaded, recipe)
        small = nullcontext() if loaded.small is None else CallCounter(_counted(loaded.small, recipe))
        with CallCounter(_counted(pipe.unet, recipe)) as counter, small as of_small, torch.no_grad():
            began = time.perf_counter()
            pixels = pipe(
                prompt_embeds=texts[0],
                negative_prompt_embeds=texts[1],
                **_steering(loaded, recipe, texts[1]),
                generator=[torch.Generator().manual_seed(row.seed) for row in rows],
                callback_on_step_end=after_step,
                callback_on_step_end_tensor_inputs=["latents"],
                output_type="pt",
                **inputs,
            ).images
            if strict:
                _check_finite(pixels, "the decoded pictures", loaded)
            whole = pixels.isfinite().flatten(1).all(1) & latents["last"].isfinite().flatten(1).all(1)
            images = pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(pixels.nan_to_num()))
            seconds = time.perf_counter() - began
            skipping = last_run(pipe)
    finally:
        _detach_accelerators(pipe, loaded, recipe)
        detach_switching(pipe)
        for attached in (pipe, loaded.small) if loaded.adapter else ():
            if attached is not None:
                detach(attached)
    if recipe.mask:
        images = [_keep_unmasked(image, row) for image, row in zip(images, rows, strict=True)]
    small_calls = 0.0 if of_small is None else of_small.rows / len(rows)
    calls = counter.rows / len(rows) + small_calls
    return Drawn(images, latents["last"].float().cpu(), calls, seconds, small_calls, skipping, tuple(whole.tolist()))


def _counted(unet: Any, recipe: Recipe) -> Any:
    """What runs once in each call of a U-Net that is made: a skipped step's call ends before its first convolution."""
    return unet if recipe.ltc == "none" else unet.conv_in


def _steering(loaded: Loaded, recipe: Recipe, negative: torch.Tensor) -> dict[str, Any]:
    """What tells the pipeline how strongly to guide."""
    if loaded.exported is None:
        return {"guidance_scale": 1.0 if recipe.guidance is None else recipe.guidance}
    try:
        loaded.exported.check_size(recipe.width, recipe.height)
        found: dict[str, Any] = loaded.exported.steering(negative, recipe.sun_strength, recipe.guidance)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    return found


def _check_finite(values: torch.Tensor, what: str, loaded: Loaded) -> None:
    if not bool(values.isfinite().all()):
        require_finite(values, what, why_not_whole(loaded))


def _noise(rows: Sequence[Recipe], loaded: Loaded) -> torch.Tensor:
    factor = int(loaded.pipe.vae_scale_factor)
    shape = (loaded.pipe.vae.config.latent_channels, rows[0].height // factor, rows[0].width // factor)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(row.seed)) for row in rows])


def _mode(loaded: Loaded, rows: Sequence[Recipe]) -> tuple[type, dict[str, Any], int]:
    """Pipeline class, its inputs and the number of steps it will run. Raises RecipeError."""
    recipe = rows[0]
    if is_inpainting(loaded.pipe) and not recipe.mask:
        raise RecipeError("this is an inpainting model: it draws into a picture. Add --init IMAGE and --mask IMAGE.")
    size = (recipe.width, recipe.height)
    inputs: dict[str, Any] = {}
    if not recipe.init:
        start = _noise(rows, loaded).to(loaded.pipe.device, loaded.pipe.unet.dtype)
        inputs = {"latents": start, "width": size[0], "height": size[1], "num_inference_steps": recipe.steps}
    else:
        kept, scheduled = _kept_steps(recipe)
        # Half a step more than the wanted share, so that the pipelines' int(steps * strength) cannot round it away.
        share = 1.0 if kept == scheduled else (kept + 0.5) / scheduled
        inputs = {"image": _opened(open_image, [row.init for row in rows], size), "strength": share}
        inputs["num_inference_steps"] = scheduled
    if recipe.mask:
        inputs |= {"mask_image": _opened(open_mask, [row.mask for row in rows], size)}
        inputs |= {"width": size[0], "height": size[1]}
    if loaded.controlnet:
        control = _opened(open_image, [row.control for row in rows], size)
        inputs |= {"control_image" if recipe.init else "image": control}
        inputs |= {"controlnet_conditioning_scale": recipe.control_scale}
    pipe_class = PIPELINES[bool(loaded.controlnet), bool(recipe.init), bool(recipe.mask)]
    return pipe_class, inputs, _steps_run(recipe)


def _kept_steps(recipe: Recipe) -> tuple[int, int]:
    """(steps run, steps of the schedule they are the last ones of) for a run on ``init``. Raises RecipeError."""
    strength = 1.0 if recipe.strength is None else recipe.strength
    try:
        mode: Any = recipe.denoise_mode
        kept = denoise_timesteps(recipe.steps, strength, mode)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if not kept:
        raise RecipeError(
            f"strength {strength:g} of {recipe.steps} steps leaves no step to run. Use at least "
            f"{1 / recipe.steps:g}, more steps, or --denoise-mode respaced."
        )
    scheduled = recipe.steps if recipe.denoise_mode == "trained" else respaced_steps(recipe.steps, strength)
    assert trailing_timesteps(scheduled)[-len(kept) :] == kept
    return len(kept), scheduled


def _steps_run(recipe: Recipe) -> int:
    """Raises RecipeError where ``init`` leaves none."""
    return _kept_steps(recipe)[0] if recipe.init else recipe.steps


def _pipeline(pipe_class: Any, loaded: Loaded) -> Any:
    accepted = inspect.signature(pipe_class.__init__).parameters
    parts = {**loaded.pipe.components, "controlnet": loaded.controlnet}
    pipe = pipe_class(**{k: v for k, v in parts.items() if k in accepted}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _keep_unmasked(image: Image.Image, recipe: Recipe) -> Image.Image:
    """``image`` with the unmasked pixels as they were: the autoencoder alone would change them a little."""
    before, mask = open_image(recipe.init), open_mask(recipe.mask)
    return Image.composite(image, _resized(before, image.size), _resized(mask, image.size))


def _opened(read: Callable[[str], Image.Image], paths: Sequence[str], size: tuple[int, int]) -> list[Image.Image]:
    """The pictures at ``paths`` in ``size``; one that is named several times is read once."""
    found = {path: _resized(read(path), size) for path in dict.fromkeys(paths)}
    return [found[path] for path in paths]


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def _device(name: str) -> str:
    with _as_recipe_error():
        return pick_device(name)


def _dtype(recipe: Recipe) -> torch.dtype:
    with _as_recipe_error():
        return pick_dtype(recipe.dtype, _device(recipe.device))


def _shipped(recipe: Recipe) -> dict[str, str]:
    found = {"model": str(EMOJI_DIFFUSION)} if recipe.model == SHIPPED else {}
    found |= {"controlnet": str(EMOJI_CONTROLNET)} if recipe.controlnet == SHIPPED else {}
    found |= {field: str(EMOJI_LORA) for field, path in recipe.lora_files().items() if path == SHIPPED}
    return found | ({"adapter": str(EMOJI_SUN)} if recipe.adapter == SHIPPED else {})
