"""Mutated requests: whatever is sent to SUN's routes, no 500, no folder of the server, and the next request works."""

from __future__ import annotations

import base64
import io
import json
import random
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from test_webui_api import BODY, client, picture
from webui_host import ADAPTER

fastapi = pytest.importorskip("fastapi")
from fastapi.testclient import TestClient  # noqa: E402
from PIL import Image  # noqa: E402

__all__ = ["client"]
SMALL = {**BODY, "steps": 1}
STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 2**63, 2**64, 1e308, -1e308, 1e-320, 0.5, float("nan"),
    float("inf"), float("-inf"), "", " ", "0", "1", "4", "true", "false", "null", "nan", "Infinity", "1e400", "\x00",
    "\x1b[2J", "\ud800", "a\ud83d", "\u202e", "é", "🐈" * 50, "../../etc/passwd", "/etc/passwd", "C:\\Windows\\win.ini",
    "Automatic", "a" * 30_000, [], [1], {}, {"tau": float("nan")}, {"every": 10**30}, {"tau": 0.1, "x": 1}, [[[]]],
    "(((((((", "[a:b:", "stages=9", "stages=1 every=0", "fast", "balanced", "trained", "<lora:x:1>", "AND",
    "a AND b :-3",
)  # fmt: skip
FIELDS = (*BODY, "model", "strength", "guidance", "steps", "batch_size", "save_images", "ltc", "inherit")
IMAGE_FIELDS = (*FIELDS, "image", "mask", "denoise", "denoise_mode")
RAW = (
    b"", b"null", b"[]", b"{", b'{"prompt"', b'"text"', b"nan", b'{"prompt": NaN}', b"\xff\xfe", b"{}" * 9,
    b'{"prompt": "a", "width": 1e999}', b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "a", "seed": -' + b"9" * 30 + b"}", b'{"prompt": "\\ud800"}', b'{"\\ud800": 1, "prompt": "a"}',
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b"[" * 100_000, b'{"prompt": "a", "prompt": 3}',
    b'{"prompt": "\xc3\x28"}', b'\xef\xbb\xbf{"prompt": "a"}', b"a=b&c=d", b'{"prompt": "a"}\x00',
)  # fmt: skip


def as_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def saved(image: Image.Image, kind: str = "PNG", **more: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **more)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def odd_pictures(rng: random.Random) -> list[str]:
    """Damaged, hostile and merely unusual pictures in base64."""
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (24, 24, 3), np.uint8))
    whole = {kind: saved(noise, kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP")}
    head = b"\x89PNG\r\n\x1a\n"
    huge = head + chunk(b"IHDR", struct.pack(">IIBBBBB", 80_000, 80_000, 8, 2, 0, 0, 0))
    bomb = head + chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"nothing") + head
    found = [b"", b"\x00", head, huge, bomb, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage", b"GIF89a"]
    found += [b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"P6 9999999 9999999 255\n", b"BM" + b"\xff" * 60]
    for data in whole.values():
        found += [data, data[: len(data) // 2], data[: rng.randrange(1, len(data))]]
        for _ in range(6):
            changed = bytearray(data)
            for _ in range(rng.randrange(1, 12)):
                changed[rng.randrange(len(changed))] = rng.randrange(256)
            found.append(bytes(changed))
    for mode in ("1", "L", "LA", "P", "RGBA", "CMYK", "I", "I;16", "F"):
        kind = "TIFF" if mode in ("CMYK", "F", "I") else "PNG"
        found.append(saved(noise.convert("L").convert(mode) if mode == "I;16" else noise.convert(mode), kind))
    found.append(saved(Image.new("RGBA", (24, 24), (0, 0, 0, 0))))
    return [as_base64(data) for data in found] + ["===", "data:,", "data:image/png;base64,", "a b c", "é"]


def requests(seed: int) -> list[tuple[str, bytes]]:
    """(route, body) of every mutation, the same for the same seed."""
    rng = random.Random(seed)
    found = [(route, raw) for raw in RAW for route in ("txt2img", "img2img")]
    for route, fields in (("txt2img", FIELDS), ("img2img", IMAGE_FIELDS)):
        base = SMALL if route == "txt2img" else {**SMALL, "image": picture(), "denoise": 1.0}
        changes = [{field: value} for field in fields for value in STRANGE]
        changes += [
            {field: rng.choice(STRANGE) for field in rng.sample(fields, rng.randrange(2, 5))} for _ in range(40)
        ]
        found += [(route, json.dumps({**base, **change}).encode()) for change in rng.sample(changes, 220)]
        found += [(route, json.dumps({k: v for k, v in base.items() if k != field}).encode()) for field in base]
    for data in odd_pictures(rng):
        field = rng.choice(("image", "mask"))
        body = {**SMALL, "image": picture(), "denoise": 1.0, field: data}
        found.append(("img2img", json.dumps(body).encode()))
    return found


@pytest.mark.parametrize("family", ["a1111"], indirect=True)
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_no_mutated_request_is_an_error_of_the_server(client: TestClient, host: Any, every: int) -> None:
    sent = requests(7)[::every]
    counts: dict[int, int] = {}
    for route, body in sent:
        answer = client.post(f"/sun/v1/{route}", content=body, headers={"Content-Type": "application/json"})
        counts[answer.status_code] = counts.get(answer.status_code, 0) + 1
        assert answer.status_code in (200, 400, 404, 409, 422), (route, body[:300], answer.text[:500])
        assert str(host.models_path) not in answer.text
        assert str(host.repository) not in answer.text
        assert answer.json() is not None
    assert len(sent) > 500 / every
    assert counts[200] > 50 / every, "too few were valid to say anything"
    assert counts[422] > 200 / every
    assert client.post("/sun/v1/txt2img", json={**BODY, "adapter": ADAPTER}).status_code == 200


@pytest.mark.parametrize("family", ["a1111"], indirect=True)
def test_no_mutated_argument_of_the_script_gets_through(family: Any, host: Any) -> None:
    """Through the host's own API: a refusal in words, SUN off, or a picture. Never another kind of failure."""
    names = host.part("choices").CONTROLS
    rng = random.Random(11)
    refused: list[Any] = []
    for _ in range(250):
        chosen = {name: rng.choice(STRANGE) for name in rng.sample(names, rng.randrange(1, 4))}
        try:
            family.run({"adapter": ADAPTER, "steps": 1, **chosen}, prompt="a cat", seed=3, steps=1, api=True)
        except fastapi.HTTPException as error:
            refused.append(error)
    assert {error.status_code for error in refused} == {409, 422}
    assert 100 < len(refused) < 250
    for error in refused:
        assert str(host.models_path) not in error.detail
        assert error.detail.encode()
