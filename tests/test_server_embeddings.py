"""Embeddings over HTTP: those of Model.embed(), in the shapes that OpenAI's and Ollama's clients know."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import ollama
import openai
import pytest

import gemmart
from conftest import Tiny
from gemmart.server import limits
from serving import CHAT, error_of, question, wait_until

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["the word", "hello, that was it", "é"]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def ask(server: httpx.Client, path: str, **body: Any) -> dict[str, Any]:
    response = server.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def n_tokens(model: gemmart.Model, texts: list[str]) -> int:
    return sum(len(model.tokenize(text, bos=True)) for text in texts)


def test_openai_client(model: gemmart.Model, server: httpx.Client) -> None:
    expected = model.embed(TEXTS)
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 unless told otherwise
            found = client.embeddings.create(model="any", input=TEXTS, **options)
            assert [data.index for data in found.data] == [0, 1, 2]
            np.testing.assert_array_equal(np.float32([data.embedding for data in found.data]), expected)
            assert found.model == model.info.path.stem
            assert found.usage.prompt_tokens == found.usage.total_tokens == n_tokens(model, TEXTS)
        one = client.embeddings.create(model="any", input=TEXTS[0], dimensions=96, user="me")
        np.testing.assert_array_equal(np.float32(one.data[0].embedding), expected[0])


def test_forms_of_input(model: gemmart.Model, server: httpx.Client) -> None:
    ids = [model.tokenize(text, bos=True) for text in TEXTS]
    expected = model.embed(TEXTS)
    for given, n in ((TEXTS[0], 1), (TEXTS, 3), (ids[0], 1), (ids, 3), ([TEXTS[0], ids[1]], 2)):
        answer = ask(server, EMBEDDINGS, input=given)
        assert answer.keys() == {"object", "data", "model", "usage"}
        assert answer["object"] == "list"
        for i, data in enumerate(answer["data"]):
            assert (data["object"], data["index"]) == ("embedding", i)
        np.testing.assert_array_equal(np.float32([data["embedding"] for data in answer["data"]]), expected[:n])


def test_base64(model: gemmart.Model, server: httpx.Client) -> None:
    (data,) = ask(server, EMBEDDINGS, input=TEXTS[0], encoding_format="base64")["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(data["embedding"]), "<f4"), model.embed(TEXTS[0])[0])


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "input"),
        ({"input": None}, "invalid_value", "input"),
        ({"input": 1}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [1, "a"]}, "invalid_value", "input"),
        ({"input": ["a", None]}, "invalid_value", "input[1]"),
        ({"input": [[7], []]}, "invalid_value", "input[1]"),
        ({"input": [[7], [512]]}, "invalid_value", "input[1]"),
        ({"input": [512]}, "invalid_value", "input"),
        ({"input": ["a"] * (limits.INPUTS + 1)}, "invalid_value", "input"),
        ({"input": "a", "encoding_format": "int8"}, "invalid_value", "encoding_format"),
        ({"input": "a", "dimensions": 0}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": "96"}, "invalid_value", "dimensions"),
        ({"input": "a", "dimensions": 64}, "unsupported_parameter", "dimensions"),
        ({"input": "a", "model": 1}, "invalid_value", "model"),
    ],
)
def test_wrong_bodies(body: dict[str, Any], code: str, param: str | None, server: httpx.Client) -> None:
    error_of(server.post(EMBEDDINGS, json=body), 400, code, param)


def test_lengths(server: httpx.Client) -> None:
    assert len(ask(server, EMBEDDINGS, input=[[7] * 128, [7]])["data"]) == 2
    for given, param in (([7] * 129, "input"), ([[7], [7] * 129], "input[1]")):
        error = error_of(server.post(EMBEDDINGS, json={"input": given}), 400, "context_length_exceeded", param)
        assert (error["n_prompt_tokens"], error["n_ctx"]) == (129, 128)


def test_as_many_as_there_may_be(model: gemmart.Model, server: httpx.Client) -> None:
    """Others are answered meanwhile, and none is told that the queue is full."""
    texts = [[7 + i % 400, *range(20, 40)] for i in range(limits.INPUTS)]
    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(ask, server, EMBEDDINGS, input=texts, encoding_format="base64")
        n_between = 0
        while not many.done():
            assert server.post(CHAT, json=question(max_tokens=1)).status_code == 200
            assert model.n_requests[1] <= 9
            n_between += not many.done()
        assert n_between
        assert len(many.result()["data"]) == limits.INPUTS


def test_whoever_leaves_ends_it(model: gemmart.Model) -> None:
    texts = [[7 + i % 400] * 100 for i in range(limits.INPUTS)]
    with model.serve(drain=60) as running:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(running.url + EMBEDDINGS, json={"input": texts}, timeout=0.3)
        wait_until(lambda: model.n_requests == (0, 0), 5)
        began = time.monotonic()
    assert time.monotonic() - began < 30  # nothing is left to be waited for


def test_log_and_counters(model: gemmart.Model, server: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    def counted() -> float:
        lines = server.get("/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith("gemmart_prompt_tokens_total")).split()[1])

    before, n = counted(), n_tokens(model, TEXTS)
    with caplog.at_level("INFO", "gemmart.server"):
        ask(server, EMBEDDINGS, input=TEXTS)
        line, deadline = f" POST {EMBEDDINGS} 200 {n}+0 tokens ", time.monotonic() + 10
        while line not in caplog.text and time.monotonic() < deadline:  # it is written behind the answer
            time.sleep(0.01)
    assert line in caplog.text
    assert counted() - before == n
    assert "hello" not in caplog.text


# Ollama


def test_ollama_client(model: gemmart.Model, server: httpx.Client) -> None:
    with ollama.Client(host=str(server.base_url)) as client:
        found = client.embed(model="any", input=TEXTS)
        np.testing.assert_array_equal(np.float32(found.embeddings), model.embed(TEXTS))
        older = client.embeddings(model="any", prompt=TEXTS[1])
        np.testing.assert_array_equal(np.float32(older.embedding), model.embed(TEXTS[1], normalize=False)[0])
        with pytest.raises(ollama.ResponseError, match="dimensions"):
            client.embed(model="any", input=TEXTS, dimensions=64)


def test_ollama_embed(model: gemmart.Model, server: httpx.Client) -> None:
    expected = model.embed(TEXTS)
    for given, n in ((TEXTS, 3), (TEXTS[0], 1)):
        answer = ask(server, "/api/embed", model="any", input=given, keep_alive="5m", options={"temperature": 0})
        np.testing.assert_array_equal(np.float32(answer["embeddings"]), expected[:n])
        assert answer["model"] == f"{model.info.path.stem}:latest"
        assert answer["prompt_eval_count"] == n_tokens(model, TEXTS[:n])
        assert answer["total_duration"] > 0
    for nothing in ({"input": None}, {"input": []}, {"input": ""}):  # asks whether the model is there
        assert ask(server, "/api/embed", model="any", **nothing)["embeddings"] == []


def test_ollama_cuts_what_is_too_long(model: gemmart.Model, server: httpx.Client) -> None:
    long = "word " * 200
    cut = model.tokenize(long, bos=True)[:128]
    for options in ({}, {"truncate": True}):
        answer = ask(server, "/api/embed", model="any", input=["the", long], **options)
        np.testing.assert_array_equal(np.float32(answer["embeddings"][1]), model.embed(cut)[0])
    response = server.post("/api/embed", json={"model": "any", "input": ["the", long], "truncate": False})
    assert response.status_code == 400
    assert "input[1] has" in response.text


def test_ollama_embeddings(model: gemmart.Model, server: httpx.Client) -> None:
    answer = ask(server, "/api/embeddings", model="any", prompt=TEXTS[1])
    np.testing.assert_array_equal(np.float32(answer["embedding"]), model.embed(TEXTS[1], normalize=False)[0])
    assert ask(server, "/api/embeddings", model="any", prompt="")["embedding"] == []


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/embed", {"model": "any", "input": 1}),
        ("/api/embed", {"model": "any", "input": [1]}),
        ("/api/embed", {"model": "any", "input": "a", "dimensions": 64}),
        ("/api/embed", {"model": "any", "input": ["a"] * (limits.INPUTS + 1)}),
        ("/api/embeddings", {"model": "any"}),
        ("/api/embeddings", {"model": "any", "prompt": ["a"]}),
    ],
)
def test_ollama_wrong_bodies(path: str, body: dict[str, Any], server: httpx.Client) -> None:
    assert server.post(path, json=body).status_code == 400
