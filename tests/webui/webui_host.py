"""Starts the stand-in host with this repository as an extension, and runs pictures in it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
STUBS = REPOSITORY / "tests/stubs/webui"
TOP_LEVEL = ("modules", "gradio", "backend", "ldm_patched", "ldm_unet", "models", "sd_webui_sun", "modules_forge")
STAGES, WIDTH = (8, 16, 24, 24), 16
"""A tiny random model: widths of its stages, and of its text states."""
ADAPTER = "tiny.safetensors"
"""The adapter made for it, in models/sun."""


@contextmanager
def stand_in_host(models_path: Path, without: Sequence[str] = ()) -> Iterator[SimpleNamespace]:
    """The host with the extension loaded by its own loader: .modules(name), .part(name of webui/), .process(...).

    without: modules that this host does not have.
    """

    def clear() -> dict[str, Any]:
        names = [name for name in sys.modules if name.split(".")[0] in TOP_LEVEL]
        return {name: sys.modules.pop(name) for name in names}

    before = clear()
    sys.path.insert(0, str(STUBS))
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]
    try:
        paths = importlib.import_module("modules.paths")
        paths.models_path = str(models_path)
        scripts = importlib.import_module("modules.scripts")
        scripts.load_scripts(str(REPOSITORY))
        assert not importlib.import_module("modules.errors").reports, "the extension did not load"
        yield SimpleNamespace(
            modules=lambda name: importlib.import_module(f"modules.{name}"),
            part=lambda name: importlib.import_module(f"sd_webui_sun.webui.{name}"),
            stub=importlib.import_module,
            load_model=load_model,
            process=process,
            blocks=None,
        )
    finally:
        sys.path.remove(str(STUBS))
        clear()
        sys.modules.update(before)


def load_model(family: str, unet: Any, encode: Any) -> Any:
    """Makes `unet` the host's loaded model, in this family's wrapping."""
    shared, models = importlib.import_module("modules.shared"), importlib.import_module("models")
    shared.family = family
    shared.sd_model = (models.A1111Model if family == "a1111" else models.ForgeModel)(unet, encode)
    shared.state.begin()
    return shared.sd_model


def process(
    sun: dict[str, Any] | None = None,
    image: Any = None,
    overrides: Any = None,
    axes: Any = None,
    api: bool = False,
    **fields: Any,
) -> SimpleNamespace:
    """One run by the host's processing. sun: arguments of SUN's script by name, None for off.

    image: start latent, for image to image. axes: called with the processing object, as an X/Y/Z plot does. api: as the
    host's own API does it. Returns .images [B, 4, H, W], .infotexts, .p, .errors (reported, not
    raised) of the run.
    """
    processing, scripts = importlib.import_module("modules.processing"), importlib.import_module("modules.scripts")
    errors = importlib.import_module("modules.errors")
    kind = processing.StableDiffusionProcessingTxt2Img if image is None else processing.StableDiffusionProcessingImg2Img
    p = kind(**({"init_latent": image} if image is not None else {}), **fields)
    runner = scripts.scripts_txt2img if image is None else scripts.scripts_img2img
    values = [getattr(control, "value", None) for control in runner.inputs]
    script = next(s for s in runner.alwayson_scripts if getattr(s, "sun_script", False))
    if sun is not None:
        values[script.args_from] = sun
    p.scripts, p.script_args = runner, tuple(values)
    if overrides:
        p.sun_overrides = overrides
    if axes is not None:
        axes(p)
    p.is_api = api
    del errors.reports[:]
    processed = processing.process_images(p)
    return SimpleNamespace(
        images=torch.stack(processed.images) if processed.images else torch.empty(0),
        infotexts=processed.infotexts, p=p, errors=list(errors.reports), comments=processed.comments,
    )  # fmt: skip


def sun_scripts(host: Any) -> list[Any]:
    runners = (host.scripts.scripts_txt2img, host.scripts.scripts_img2img)
    return [script for runner in runners for script in runner.alwayson_scripts if getattr(script, "sun_script", False)]


def pasted(host: Any, infotext: str, is_img2img: bool = False) -> dict[str, Any]:
    """The accordion's values after the host pasted an infotext; fields that answer None keep theirs."""
    script = sun_scripts(host)[is_img2img]
    params = host.modules("infotext_utils").paste(infotext)
    values = [control.value for control in host.scripts.scripts_txt2img.inputs[script.args_from : script.args_to]]
    for i, (_, read) in enumerate(script.infotext_fields):
        answer = read(params)
        values[i] = values[i] if answer is None else answer
    return dict(zip(host.part("script").CONTROLS, values, strict=True))


class UnetLog:
    """Records rows, timesteps and texts of each U-Net call while entered."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.rows, self.timesteps = unet, [], []

    def __enter__(self) -> UnetLog:
        self.handle = self.unet.register_forward_pre_hook(self._record)
        return self

    def _record(self, _module: Any, args: tuple[Any, ...]) -> None:
        self.rows.append(args[0].shape[0])
        self.timesteps.append(int(args[1][0]))

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()


def hooks_on(unet: Any) -> int:
    """Hooks hanging on any module of the U-Net."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in unet.modules())


def make_unet(host: SimpleNamespace, channels: int = 4) -> Any:
    """As many stages as `host.blocks` has numbers of residual blocks; all of them, with two, where it has none."""
    torch.manual_seed(0)
    stages = STAGES[: len(host.blocks or STAGES)]
    unet = host.stub("ldm_unet").UNet(stages, WIDTH, heads=2, groups=4, channels=channels, blocks=host.blocks)
    return unet.eval().requires_grad_(False)


def make_sdxl(host: SimpleNamespace, depths: tuple[int, ...] = (0, 2, 3), middle: int = 3, seed: int = 0) -> Any:
    """A U-Net of SDXL's structure: three stages, deep transformers, a vector besides the texts."""
    torch.manual_seed(seed)
    unet = host.stub("ldm_unet").UNet(STAGES[:3], WIDTH, heads=2, groups=4, depths=depths, middle=middle, vector=8)
    return unet.eval().requires_grad_(False)


def make_adapter(unet: Any, path: Path, positive: bool = True, guided: bool = False) -> Any:
    from sun import SunAdapter, layers_of_ldm
    from sun.files import SunInfo

    layers = layers_of_ldm(unet)
    adapter = SunAdapter(
        [layer.channels for layer in layers], WIDTH, positive, names=[la.name for la in layers], guided=guided,
        info=SunInfo(guidance_scale=4.0) if guided else None,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapter.save(path)
    return adapter


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())
