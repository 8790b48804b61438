"""The routes on an app of their own, without vLLM."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from matplotlib.image import imread

from dam_vllm.endpoint import answers
from dam_vllm.endpoint.counts import Live
from dam_vllm.endpoint.routes import Open, routers
from dam_vllm.masks.mask_set import HeadMode
from dam_vllm.masks.rule import token_mask
from dam_vllm.options import DamOptions
from tests.unit.endpoint.test_counts import engine, worker

KEY = "Bearer secret"


@pytest.fixture
def masks(random_masks):
    made = random_masks(
        layers=3, heads=4, kv_heads=2, pcl=40, share=0.05, dense=True, dynamic=True, reuse=True,
        tails=True,
    )  # fmt: skip
    made.header.layer_types[1] = "sliding"
    made.header.model = "/home/somebody/models/tiny"
    made.header.parameters["data"] = "/home/somebody/texts"
    return made


@pytest.fixture
def client(rng, masks):
    """Function that makes a client of a server with or without keys."""

    def make(has_key=None, opened=True):
        app, reports = FastAPI(), {0: engine(worker(rng))}

        async def read():
            return reports

        for router in routers(has_key):
            app.include_router(router)
        options = DamOptions(masks="/srv/private/my.safetensors")
        file = Path(options.masks)
        told = answers.served(masks, file, options, 16, 128, {"vllm": "0.32"})
        app.state.dam = Open(told, masks, Live(read, reports)) if opened else None
        client = TestClient(app)
        client.reports = reports
        return client

    return make


def test_what_is_served_is_told_without_folders(client, masks):
    answer = client().get("/dam")
    told = answer.json()
    assert told["masks"] == told["options"]["masks"] == "my.safetensors"
    assert told["model"] == "tiny"
    assert told["parameters"]["data"] == "texts"
    assert "/home" not in answer.text
    assert "/srv" not in answer.text
    assert (told["page"], told["dense_until"], told["pcl"]) == (16, 128, masks.pcl)
    assert told["versions"]["vllm"] == "0.32"
    assert [layer["type"] for layer in told["layers"]] == masks.header.layer_types
    assert told["layers"][1]["heads"] == []
    for layer in (0, 2):
        for head, each in enumerate(told["layers"][layer]["heads"]):
            mode = HeadMode(int(masks.modes[layer, head]))
            assert each["mode"] == mode.name.lower()
            assert (each["anchor"] is not None) == (mode == HeadMode.REUSE)
            assert (each["budget"] is None) == (mode in (HeadMode.STATIC, HeadMode.DENSE))
            assert each["tail"] == bool(masks.tails[layer, head])


def test_density_is_what_the_engine_tells(client):
    made = client()
    told, (report,) = made.get("/dam/density").json(), made.reports[0]["workers"]
    assert [(each["layer"], each["head"]) for each in told["heads"]] == [
        (0, 0), (0, 1), (2, 0), (2, 1)
    ]  # fmt: skip
    for phase in ("prefill", "decode"):
        read, dense = np.array(report["read"][phase]), np.array(report["dense"][phase])
        assert [each[phase]["read"] for each in told["heads"]] == read.flatten().tolist()
        assert told[phase] == {
            "read": read.sum(), "dense": dense.sum(), "density": read.sum() / dense.sum()
        }  # fmt: skip


def test_mask_of_a_head(client, masks):
    told = client().get("/dam/masks/2/1").json()
    image = np.frombuffer(base64.b64decode(told["image"]), np.uint8)
    image = image.reshape(told["cells"], told["cells"])
    assert told["tokens"] == told["cells"] == 80  # a cell a token
    wanted = token_mask(masks, 2, 0, 80)[2:].any(axis=0)
    np.testing.assert_array_equal(image, 255 * wanted)
    assert told["columns"] == masks.columns[2, 2:].any(axis=0).sum()


def test_image_by_header_or_query(client):
    made, png = client(), {"accept": "image/png"}
    for answer in (
        made.get("/dam/masks/0/0", headers=png),
        made.get("/dam/masks/0/0?format=png"),
    ):
        assert answer.headers["content-type"] == "image/png"
        assert imread(io.BytesIO(answer.content)).shape[:2] == (550, 550)
    asked = made.get("/dam/masks/0/0?format=json", headers=png)
    assert asked.json()["head"] == 0


@pytest.mark.parametrize(
    ("path", "status", "told"),
    [
        ("/dam/masks/3/0", 404, "layer is 3: must be 0 to 2"),
        ("/dam/masks/-1/0", 404, "layer is -1: must be 0 to 2"),
        ("/dam/masks/0/2", 404, "head is 2: must be a KV head, 0 to 1"),
        ("/dam/masks/1/0", 404, "layer 1 has no masks: it is left to vLLM (sliding)"),
        ("/dam/masks/x/0", 422, "valid integer"),
        ("/dam/masks/0/0?format=gif", 422, "'json' or 'png'"),
    ],
)
def test_wrong_questions_are_told_what_is_right(client, path, status, told):
    answer = client().get(path)
    assert answer.status_code == status
    assert told in answer.text


def test_keys_guard_data_and_not_the_page(client):
    made = client(lambda headers: headers.get("authorization") == KEY)
    for path in ("/dam", "/dam/density", "/dam/masks/0/0"):
        assert made.get(path).status_code == 401
        assert made.get(path, headers={"authorization": "Bearer guess"}).status_code == 401
        assert made.get(path, headers={"authorization": KEY}).status_code == 200
    assert "<canvas" in made.get("/dam/view").text


def test_without_the_backend_nothing_is_told(client):
    answer = client(opened=False).get("/dam/density")
    assert answer.status_code == 404
    assert "without --attention-backend dam" in answer.text


def test_answers_are_described(client):
    described = client().get("/openapi.json").json()
    for path, model in (
        ("/dam", "Served"), ("/dam/density", "Density"), ("/dam/masks/{layer}/{head}", "HeadMask")
    ):  # fmt: skip
        content = described["paths"][path]["get"]["responses"]["200"]["content"]
        assert content["application/json"]["schema"]["$ref"].endswith(f"/{model}")
    assert "image/png" in content
    assert described["components"]["securitySchemes"]
