"""SUN's routes beside the host's own API: /sun/v1/adapters, /sun/v1/txt2img, /sun/v1/img2img.

They exist when the host's API does (--api) and ask for the same password (--api-auth). The host's own routes work too:
{"alwayson_scripts": {"sun": {"args": [{"adapter": "my.safetensors"}]}}}.
"""

from __future__ import annotations

import base64
import binascii
import io
import secrets
from typing import Any, Literal

from fastapi import Depends, FastAPI, HTTPException
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import call_queue, shared
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, Field

from ..sun.files import SunFileError
from ..sun.inheritance import InheritanceError
from ..sun.ltc import LtcError
from . import folders, generate, store
from .accelerators import OFF, AcceleratorSettings
from .run import SunSettings

MAX_PIXELS = 4096 * 4096


class AdapterItem(BaseModel):
    name: str
    hash: str
    base_model: str
    text_width: int
    layers: int
    positive: bool
    guidance_scale: float | None
    takes_guidance_scale: bool


class LtcFields(BaseModel):
    """LTC-Accel with its defaults."""

    class Config:
        extra = "forbid"

    tau: float = Field(0.1, ge=0.0, le=1.6, description="steps that turn by less, in radians, may be skipped")
    every: int = Field(2, ge=2, le=10, description="one of this many is")
    calibration: Literal["automatic", "measure again"] = "automatic"


class TextRequest(BaseModel):
    """Body of txt2img."""

    class Config:
        extra = "forbid"  # a misspelt field would otherwise silently do nothing

    prompt: str = Field(..., description="what the picture should show")
    negative_prompt: str = Field("", description="what it should not show; costs no extra U-Net call")
    adapter: str | None = Field(None, description="a name of /sun/v1/adapters; the first of them if left out")
    model: str = Field("", description="a checkpoint of the host's list; the loaded one if left out")
    strength: float = Field(1.0, ge=0.0, le=2.0)
    guidance: float = Field(0.0, ge=0.0, le=30.0, description="w of an adapter that takes it; 0: the adapter's own")
    steps: int = Field(4, ge=1, le=50)
    width: int = Field(512, ge=64, le=4096, multiple_of=8)
    height: int = Field(512, ge=64, le=4096, multiple_of=8)
    batch_size: int = Field(1, ge=1, le=16)
    seed: int = Field(-1, ge=-1, le=2**53)
    save_images: bool = False
    ltc: LtcFields | None = Field(None, description="skip steps; the first run with new settings measures in full")
    inherit: str = Field(OFF, max_length=400, description="feature inheritance: off, fine, balanced, fast or a plan")


class ImageRequest(TextRequest):
    """Body of img2img."""

    image: str = Field(..., description="the picture to start from: base64, with or without a data: head")
    mask: str | None = Field(None, description="the same for a mask, white where the picture is painted anew")
    denoise: float = Field(0.75, ge=0.0, le=1.0)
    denoise_mode: Literal["trained", "respaced"] = "trained"


class PictureResponse(BaseModel):
    images: list[str]
    infotexts: list[str]
    seed: int
    unet_calls: int
    seconds: float
    comments: str
    interrupted: bool


def register(_demo: Any, app: FastAPI) -> None:
    """The host's `on_app_started`."""
    if not (getattr(shared.cmd_opts, "api", False) or getattr(shared.cmd_opts, "nowebui", False)):
        return
    guard = [Depends(check_password)] if getattr(shared.cmd_opts, "api_auth", None) else []

    def add(path: str, endpoint: Any, method: str, response: Any) -> None:
        app.add_api_route(path, endpoint, methods=[method], response_model=response, dependencies=guard)

    add("/sun/v1/adapters", list_adapters, "GET", list[AdapterItem])
    add("/sun/v1/txt2img", txt2img, "POST", PictureResponse)
    add("/sun/v1/img2img", img2img, "POST", PictureResponse)


def check_password(credentials: HTTPBasicCredentials = Depends(HTTPBasic())) -> None:
    """The host's --api-auth user:password,user:password. Raises HTTPException 401."""
    given = f"{credentials.username}:{credentials.password}".encode()
    known = [entry.encode() for entry in shared.cmd_opts.api_auth.split(",")]
    if not any(secrets.compare_digest(given, entry) for entry in known):
        raise HTTPException(401, "Incorrect username or password", headers={"WWW-Authenticate": "Basic"})


def list_adapters() -> list[AdapterItem]:
    """Every adapter that can be read; a damaged file is left out."""
    items = []
    for name in folders.names():
        try:
            path = folders.find(name)
            adapter = store.load(path)
        except (OSError, SunFileError):
            continue
        items.append(
            AdapterItem(
                name=name,
                hash=store.short_hash(path),
                base_model=adapter.info.base_model,
                text_width=adapter.text_width,
                layers=len(adapter.layers),
                positive=adapter.positive,
                guidance_scale=adapter.info.guidance_scale,
                takes_guidance_scale=adapter.guided,
            )
        )
    return items


def txt2img(body: TextRequest) -> PictureResponse:
    return respond(request_of(body))


def img2img(body: ImageRequest) -> PictureResponse:
    request = request_of(body, body.denoise_mode)
    request.image, request.denoise = decode(body.image, "image"), body.denoise
    request.mask = decode(body.mask, "mask") if body.mask else None
    return respond(request)


def request_of(body: TextRequest, mode: Literal["trained", "respaced"] = "trained") -> generate.Request:
    """The body as a request. Raises HTTPException 404 for an unknown adapter or model."""
    adapter = body.adapter if body.adapter is not None else folders.names()[0]
    try:
        path = folders.find(adapter)
    except FileNotFoundError:
        # Not the message of the exception: it names folders of the server.
        raise HTTPException(404, f"No SUN adapter named {adapter!r}. /sun/v1/adapters lists them.") from None
    if body.guidance:
        try:
            store.load(path).guidance(body.guidance)
        except SunFileError as error:
            raise HTTPException(409, str(error)) from error
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
    if body.model:
        from modules import sd_models

        if sd_models.get_closet_checkpoint_match(body.model) is None:
            raise HTTPException(404, f"No checkpoint named {body.model!r}. /sdapi/v1/sd-models lists them.")
    return generate.Request(
        accelerators=accelerators_of(body),
        prompt=body.prompt,
        negative=body.negative_prompt,
        settings=SunSettings(
            adapter, body.strength, body.steps, main_negative=True, denoise_mode=mode, guidance=body.guidance
        ),
        model=body.model,
        width=body.width,
        height=body.height,
        batch_size=body.batch_size,
        seed=body.seed,
        save=body.save_images,
    )


def accelerators_of(body: TextRequest) -> AcceleratorSettings:
    """Raises HTTPException 422 for words that are no plan."""
    chosen = body.ltc
    settings = AcceleratorSettings(inherit=body.inherit)
    if chosen is not None:
        settings = AcceleratorSettings(True, chosen.tau, chosen.every, chosen.calibration, body.inherit)
    try:
        if settings.inherits:
            settings.plan()
    except InheritanceError as error:
        raise HTTPException(422, str(error)) from error
    return settings


def decode(text: str, name: str) -> Image.Image:
    """A base64 picture. Raises HTTPException 422 for anything else. Addresses are not fetched."""
    data = text.split(",", 1)[1] if text.startswith("data:") and "," in text else text
    try:
        picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        if picture.width * picture.height > MAX_PIXELS:
            raise HTTPException(
                422, f"{name} is {picture.width} x {picture.height} pixels; at most 4096 x 4096 are read."
            )
        picture.load()
    except (binascii.Error, ValueError, UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
        raise HTTPException(422, f"{name} is not a picture in base64: {error}") from error
    return picture


def respond(request: generate.Request) -> PictureResponse:
    """Paints in the host's queue. Raises HTTPException 409 where something does not go with the model."""
    with call_queue.queue_lock:
        shared.state.begin(job="sun_api")
        try:
            result = generate.paint(request)
        except (SunFileError, LtcError, InheritanceError) as error:
            raise HTTPException(409, str(error)) from error
        finally:
            shared.state.end()
    return PictureResponse(
        images=[encode(image, text) for image, text in zip(result.images, result.infotexts, strict=False)],
        infotexts=result.infotexts,
        seed=result.seed,
        unet_calls=result.calls,
        seconds=result.seconds,
        comments=result.comments,
        interrupted=result.interrupted,
    )


def encode(image: Any, infotext: str) -> str:
    """A PNG in base64 that carries its infotext."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", infotext)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()
