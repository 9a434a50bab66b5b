"""The routes /sun/v1/*: bodies are validated, errors have honest codes."""

from __future__ import annotations

import base64
import io
from typing import Any

import pytest
import torch
from webui_host import ADAPTER

fastapi = pytest.importorskip("fastapi")
pytest.importorskip("httpx")
from fastapi.testclient import TestClient  # noqa: E402
from PIL import Image  # noqa: E402

BODY = {"prompt": "a cat", "negative_prompt": "a dog", "seed": 3, "width": 64, "height": 64, "adapter": ADAPTER}


@pytest.fixture
def client(family: Any, host: Any, monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """The host's app with the routes; latents become grey pictures, as the stand-in has no VAE."""
    app = fastapi.FastAPI()
    host.modules("script_callbacks").call("app_started", None, app)
    encode = host.part("api").encode
    grey = Image.new("RGB", (64, 64), "grey")
    monkeypatch.setattr(host.part("api"), "encode", lambda _latent, text: encode(grey, text))
    processing = host.modules("processing")
    init = processing.StableDiffusionProcessingImg2Img.init

    def with_latent(p: Any) -> None:
        p.init_latent = torch.zeros(p.batch_size, 4, p.height // 8, p.width // 8)
        p.mask = None
        init(p)

    monkeypatch.setattr(processing.StableDiffusionProcessingImg2Img, "init", with_latent)
    return TestClient(app, raise_server_exceptions=False)


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def test_adapters_are_listed_with_what_they_are(client: TestClient) -> None:
    items = {item["name"]: item for item in client.get("/sun/v1/adapters").json()}
    assert items[ADAPTER]["layers"] == 4
    assert items[ADAPTER]["text_width"] == 16
    assert items[ADAPTER]["positive"] is True


def test_txt2img_paints_in_four_calls_and_carries_its_infotext(client: TestClient, host: Any) -> None:
    answer = client.post("/sun/v1/txt2img", json={**BODY, "batch_size": 2})
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert (len(content["images"]), content["unet_calls"], content["seed"]) == (2, 4, 3)
    png = Image.open(io.BytesIO(base64.b64decode(content["images"][0])))
    assert png.info["parameters"] == content["infotexts"][0]
    assert "SUN adapter: " + ADAPTER in content["infotexts"][0]
    assert host.modules("shared").state.job == ""


def test_img2img_runs_the_trained_part(client: TestClient) -> None:
    answer = client.post("/sun/v1/img2img", json={**BODY, "image": picture(), "denoise": 0.5})
    assert answer.status_code == 200, answer.text
    assert answer.json()["unet_calls"] == 2
    answer = client.post("/sun/v1/img2img", json={**BODY, "image": "data:image/png;base64," + picture()})
    assert answer.status_code == 200, answer.text


def test_accelerators_are_optional_fields(client: TestClient, host: Any) -> None:
    for path in host.part("ltc").tables_folder().glob("*"):
        path.unlink()
    body = {**BODY, "steps": 8, "ltc": {"tau": 0.0}, "inherit": "stages=1 every=3"}
    counted = []
    for _ in range(2):
        answer = client.post("/sun/v1/txt2img", json=body)
        assert answer.status_code == 200, answer.text
        counted.append(answer.json()["unet_calls"])
    assert counted == [8, 6]
    assert "LTC-Accel tau: 0" in answer.json()["infotexts"][0]
    assert "Feature inheritance: stages=1 every=3" in answer.json()["infotexts"][0]
    answer = client.post("/sun/v1/txt2img", json={**BODY, "inherit": "stages=9"})
    assert answer.status_code == 409, "a plan, but not of this model"
    assert "2 stages" in answer.json()["detail"]


def test_guidance_is_for_adapters_that_take_it(client: TestClient, host: Any) -> None:
    listed = {item["name"]: item for item in client.get("/sun/v1/adapters").json()}
    takes = {name for name, item in listed.items() if item["takes_guidance_scale"]}
    assert takes == {"any-guidance.safetensors", host.part("folders").SHIPPED}
    assert listed["guidance-7.safetensors"]["guidance_scale"] == 7.0
    asked = {**BODY, "adapter": "any-guidance.safetensors", "guidance": 6.0}
    answer = client.post("/sun/v1/txt2img", json=asked)
    assert answer.status_code == 200
    assert "SUN guidance: 6" in answer.json()["infotexts"][0]
    answer = client.post("/sun/v1/txt2img", json={**asked, "adapter": "guidance-7.safetensors"})
    assert (answer.status_code, "fixed at 7" in answer.json()["detail"]) == (422, True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance": -1}, {"guidance": 31},
        {"steps": 0}, {"steps": 51}, {"strength": 3}, {"width": 60}, {"height": 10000}, {"batch_size": 0},
        {"seed": "x"}, {"negativ_prompt": "a dog"}, {"prompt": None}, {"ltc": {"tau": -1}},
        {"ltc": {"evry": 2}}, {"inherit": "quick"},
    ],
)  # fmt: skip
def test_bodies_out_of_range_or_misspelt_are_422(client: TestClient, wrong: dict[str, Any]) -> None:
    assert client.post("/sun/v1/txt2img", json={**BODY, **wrong}).status_code == 422


@pytest.mark.parametrize("image", ["", "no picture", "aGVsbG8=", "http://127.0.0.1/picture.png", "/etc/passwd"])
def test_what_is_no_picture_is_422(client: TestClient, image: str) -> None:
    assert client.post("/sun/v1/img2img", json={**BODY, "image": image}).status_code == 422


def test_unknown_names_are_404_and_tell_no_folder(client: TestClient, host: Any) -> None:
    answer = client.post("/sun/v1/txt2img", json={**BODY, "adapter": "../../etc/passwd"})
    assert answer.status_code == 404
    assert str(host.models_path) not in answer.text
    assert client.post("/sun/v1/txt2img", json={**BODY, "model": "gone"}).status_code == 404


def test_an_adapter_that_does_not_fit_is_409_and_the_next_run_works(client: TestClient, host: Any) -> None:
    answer = client.post("/sun/v1/txt2img", json={**BODY, "adapter": host.part("folders").SHIPPED})
    assert answer.status_code == 409
    assert "does not fit" in answer.json()["detail"]
    assert client.post("/sun/v1/txt2img", json=BODY).status_code == 200


def test_routes_follow_the_hosts_switches(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No route without --api; with --api-auth the same passwords."""
    options = host.modules("shared").cmd_opts

    def answers(**auth: Any) -> int:
        app = fastapi.FastAPI()
        host.modules("script_callbacks").call("app_started", None, app)
        return TestClient(app).get("/sun/v1/adapters", **auth).status_code

    monkeypatch.setattr(options, "api", False)
    assert answers() == 404
    monkeypatch.setattr(options, "api", True)
    monkeypatch.setattr(options, "api_auth", "me:secret,you:other")
    assert answers() == 401
    assert answers(auth=("me", "other")) == 401
    assert answers(auth=("you", "other")) == 200
