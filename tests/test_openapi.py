"""The document at /openapi.json is sound, and the server answers as it says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import openapi_spec_validator
import pytest

import gemmart
import openapi_document
from conftest import Tiny
from gemmart.server.endpoints import ENDPOINTS
from openapi_document import DOCUMENT, allows, body_of, operations
from serving import CHAT, MINUTE, TEXT, error_of, question

BODIES = [(path, *found) for _, path, operation in operations() if (found := body_of(operation))]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    """Each of its answers is held against the document."""

    def check(response: httpx.Response) -> None:
        response.read()
        openapi_document.check(response)

    with (
        model.serve() as running,
        httpx.Client(base_url=running.url, timeout=MINUTE, event_hooks={"response": [check]}) as client,
    ):
        yield client


@pytest.mark.parametrize("needs_key", [False, True])
def test_sound(needs_key: bool) -> None:
    found = openapi_document.made(needs_key=needs_key)
    openapi_spec_validator.validate(found)
    ids = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(ids)) == len(ids) == len(ENDPOINTS)
    assert bool(found["security"]) == needs_key


def test_a_model(server: httpx.Client, model: gemmart.Model) -> None:
    assert server.get(f"/v1/models/{model.info.path.stem}").status_code == 200


def test_served(server: httpx.Client, model: gemmart.Model) -> None:
    assert server.get("/openapi.json").json() == DOCUMENT
    with model.serve(api_keys=["sk-one"]) as running:
        error_of(httpx.get(running.url + "/openapi.json"), 401, "invalid_api_key")
        found = httpx.get(running.url + "/openapi.json", headers={"X-Api-Key": "sk-one"}).json()
    assert found["security"] == [{"bearer": []}, {"header": []}]
    assert [path for path, item in found["paths"].items() for op in item.values() if "security" in op] == [
        endpoint.path.replace(":path", "") for endpoint in ENDPOINTS if not endpoint.key
    ]


def test_every_body_and_answer_has_a_type() -> None:
    for endpoint in ENDPOINTS:
        assert (endpoint.body is None) == (endpoint.example is None), endpoint.path
        assert endpoint.answer is not None or endpoint.media != "application/json", endpoint.path


@pytest.mark.parametrize(("path", "schema", "example"), BODIES)
def test_examples(path: str, schema: dict[str, Any], example: dict[str, Any], server: httpx.Client) -> None:
    assert allows(schema, example)
    assert server.post(path, json=example).status_code == 200
    for stream in (False, True):
        assert server.post(path, json={**example, "stream": stream}).status_code == 200
    assert server.post(path, json={}).status_code == 400
    assert server.post(path, content="{}").status_code == 415


@pytest.mark.parametrize("path", [path for method, path, _ in operations() if method == "GET"])
def test_what_is_asked_without_a_body(path: str, server: httpx.Client) -> None:
    if "{" in path:
        assert server.get(re.sub("{.*}", "other", path)).status_code == 404
    else:
        assert server.get(path).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, question(logprobs=True, top_logprobs=2, n=2, max_tokens=8, seed=1)),
        (CHAT, question(stream_options={"include_usage": True}, max_tokens=8)),
        (CHAT, question("hello " * 300)),
        (TEXT, {"prompt": ["a", "b"], "logprobs": 2, "max_tokens": 8, "n": 2}),
        (TEXT, {"prompt": "a", "echo": True, "max_tokens": 0}),
        ("/tokenize", {"content": "hello ü", "with_pieces": True}),
    ],
)
def test_answers(path: str, body: dict[str, Any], server: httpx.Client) -> None:
    for stream in (False, True):
        assert server.post(path, json=body | {"stream": stream}).status_code in (200, 400)
