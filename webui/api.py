"""SUN's routes beside the host's own API: /sun/v1/adapters, /sun/v1/txt2img, /sun/v1/img2img.

They exist when the host's API does (--api) and ask for the same password (--api-auth). The host's own routes work too:
{"alwayson_scripts": {"sun": {"args": [{"adapter": "my.safetensors"}]}}}.
"""

from __future__ import annotations

import base64
import binascii
import io
import secrets
from collections.abc import Callable
from typing import Any, Literal

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBasic, HTTPBasicCredentials
from modules import call_queue, shared
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException

from ..sun.common.reading import printable
from ..sun.inheritance import InheritanceError
from ..sun.ltc.presets import PAPER
from ..sun.user_pictures import PictureError, read_mask, read_picture
from . import folders, generate, store, switching
from .choices import (
    AUTOMATIC,
    EVERY,
    GUIDANCE,
    MAX_PLAN,
    MAX_SEED,
    MAX_TEXT,
    OF_THE_PAPER,
    OFF,
    SHARE,
    STEPS,
    STRENGTH,
    TAIL,
    TAU,
    WARM_UP,
    AcceleratorSettings,
    SunSettings,
)
from .refusal import refusal

MAX_PICTURE = 128 * 2**20
"""Characters of a picture in base64."""


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

    preset: Literal["fine", "balanced", "fast", "fastest", "paper"] | None = Field(
        None, description="balanced if left out; paper if settings of the paper are given and no preset"
    )
    warm_up: float = Field(
        -1, ge=WARM_UP[0], le=WARM_UP[1], description="share of the steps, at the start, that run; -1: the preset's"
    )
    tail: int = Field(-1, ge=TAIL[0], le=TAIL[1], description="steps at the end that run; -1: the preset's")
    tau: float | None = Field(
        None,
        ge=TAU[0],
        le=TAU[1],
        description="of the paper: steps that turn by less (radians) may be skipped (0.1)",
    )
    every: int | None = Field(None, ge=EVERY[0], le=EVERY[1], description="of the paper: one of this many is (2)")
    calibration: Literal["automatic", "measure again"] | None = Field(None, description="of the paper")


class TextRequest(BaseModel):
    """Body of txt2img."""

    class Config:
        extra = "forbid"  # a misspelt field would otherwise silently do nothing

    prompt: str = Field(..., max_length=MAX_TEXT, description="what the picture should show")
    negative_prompt: str = Field(
        "", max_length=MAX_TEXT, description="what it should not show; costs no extra U-Net call"
    )
    adapter: str | None = Field(
        None, max_length=1000, description="a name of /sun/v1/adapters; the one that fits the model if left out"
    )
    model: str = Field("", max_length=1000, description="a checkpoint of the host's list; the loaded one if left out")
    strength: float = Field(1.0, ge=STRENGTH[0], le=STRENGTH[1])
    guidance: float = Field(
        0.0, ge=GUIDANCE[0], le=GUIDANCE[1], description="w of an adapter that takes it; 0: the adapter's own"
    )
    steps: int = Field(4, ge=STEPS[0], le=STEPS[1])
    width: int = Field(512, ge=64, le=4096, multiple_of=8)
    height: int = Field(512, ge=64, le=4096, multiple_of=8)
    batch_size: int = Field(1, ge=1, le=16)
    seed: int = Field(-1, ge=-1, le=MAX_SEED)
    save_images: bool = False
    ltc: LtcFields | None = Field(None, description="skip steps, from the first picture on; {} is the preset balanced")
    inherit: str = Field(
        OFF, max_length=MAX_PLAN, description="feature inheritance: off, fine, balanced, fast or a plan"
    )
    switch: str = Field(OFF, max_length=1000, description="a listed model whose small U-Net makes a share of the steps")
    share: float = Field(0.4, ge=SHARE[0], le=SHARE[1])
    switch_order: Literal["small first", "large first"] = "small first"


class ImageRequest(TextRequest):
    """Body of img2img."""

    image: str = Field(
        ..., max_length=MAX_PICTURE, description="the picture to start from: base64, with or without a data: head"
    )
    mask: str | None = Field(
        None, max_length=MAX_PICTURE, description="the same for a mask, white where the picture is painted anew"
    )
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


class Route(APIRoute):
    """A route that answers a wrong body with 422 and a sentence for each fault, and any failure with its reason.

    FastAPI's own answer repeats the body, which fails on what JSON cannot hold (NaN, half a character).
    """

    def get_route_handler(self) -> Callable[[Request], Any]:
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                raise HTTPException(422, [fault(one) for one in error.errors()]) from error
            except StarletteHTTPException:
                raise
            except Exception as error:
                raise refusal(error) from error

        return guarded


def fault(error: dict[str, Any]) -> dict[str, Any]:
    """One fault of a body: where it is and what is wrong, without what was sent."""
    place = [part if isinstance(part, int) else printable(str(part))[:100] for part in error.get("loc", ())]
    return {"loc": place, "msg": printable(str(error.get("msg", "")))[:300], "type": str(error.get("type", ""))}


def register(_demo: Any, app: FastAPI) -> None:
    """The host's `on_app_started`."""
    if not (getattr(shared.cmd_opts, "api", False) or getattr(shared.cmd_opts, "nowebui", False)):
        return
    guard = [Depends(check_password)] if getattr(shared.cmd_opts, "api_auth", None) else []

    def add(path: str, endpoint: Any, method: str, response: Any) -> None:
        app.router.add_api_route(
            path, endpoint, methods=[method], response_model=response, dependencies=guard, route_class_override=Route
        )

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
    """Every adapter, by what the head of its file says; other files are left out."""
    found = [(name, path, store.facts(path)) for name in folders.names() if (path := folders.path_of(name))]
    return [
        AdapterItem(
            name=name,
            hash=store.short_hash(path),
            base_model=facts.info.base_model,
            text_width=facts.text_width,
            layers=len(facts.channels),
            positive=facts.positive,
            guidance_scale=facts.info.guidance_scale,
            takes_guidance_scale=facts.guided,
        )
        for name, path, facts in found
        if facts is not None
    ]


def txt2img(body: TextRequest) -> PictureResponse:
    return respond(request_of(body))


def img2img(body: ImageRequest) -> PictureResponse:
    request = request_of(body, body.denoise_mode)
    try:
        request.image = read_picture(decode(body.image, "image"), "image")
        request.mask = read_mask(decode(body.mask, "mask"), "mask") if body.mask else None
    except PictureError as error:
        raise HTTPException(422, printable(str(error))) from error
    request.denoise = body.denoise
    return respond(request)


def request_of(body: TextRequest, mode: Literal["trained", "respaced"] = "trained") -> generate.Request:
    """The body as a request. Raises HTTPException 404 for an unknown adapter or model."""
    adapter = AUTOMATIC if body.adapter is None else body.adapter
    if adapter != AUTOMATIC and folders.path_of(adapter) is None:
        raise HTTPException(404, f"No SUN adapter named {adapter!r:.200}. /sun/v1/adapters lists them.")
    if body.model:
        from modules import sd_models

        if sd_models.get_closet_checkpoint_match(body.model) is None:
            raise HTTPException(404, f"No checkpoint named {body.model!r:.200}. /sdapi/v1/sd-models lists them.")
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
    given: dict[str, Any] = {"inherit": body.inherit}
    if chosen is not None:
        fields = {name: getattr(chosen, name) for name in LtcFields.__annotations__}
        given |= {"ltc": True, **{name: value for name, value in fields.items() if value is not None}}
        if "preset" not in given and any(name in given for name in OF_THE_PAPER):
            given["preset"] = PAPER
    settings = AcceleratorSettings(**given, switch=body.switch, share=body.share, switch_order=body.switch_order)
    if settings.switches and settings.switch not in switching.names():
        raise HTTPException(404, f"No model named {body.switch!r:.200} to switch with. Names are those of the page.")
    try:
        if settings.inherits:
            settings.plan()
    except InheritanceError as error:
        raise HTTPException(422, printable(str(error))) from error
    return settings


def decode(text: str, name: str) -> bytes:
    """What a picture in base64 holds. Raises PictureError for anything else. Addresses are not fetched."""
    data = text.split(",", 1)[1] if text.startswith("data:") and "," in text else text
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise PictureError(f"{name} is not a picture in base64: {error}.") from error


def respond(request: generate.Request) -> PictureResponse:
    """Paints in the host's queue. Raises what the host and SUN raise."""
    try:
        generate.check(request)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    with call_queue.queue_lock:
        shared.state.begin(job="sun_api")
        try:
            result = generate.paint(request)
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


def encode(image: Image.Image, infotext: str) -> str:
    """A PNG in base64 that carries its infotext."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", infotext)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return base64.b64encode(buffer.getvalue()).decode()
