"""Requests as large as they may be, and by one less and one more: what is more is refused, with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

import gemmart
from conftest import Tiny
from gemmart import sampling, stops
from gemmart.server import limits
from serving import CHAT, MINUTE, TEXT, error_of, question

CTX = 128
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0", n_vocab=2048), ctx=CTX, parallel=2, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


def deep(n: int) -> Any:
    value: Any = 1
    for _ in range(n - 1):
        value = [value]
    return value


def chat(**fields: Any) -> tuple[str, dict[str, Any]]:
    return CHAT, question(max_tokens=1) | fields


def text(**fields: Any) -> tuple[str, dict[str, Any]]:
    return TEXT, {"prompt": "hi", "max_tokens": 1} | fields


LIMITS: dict[str, tuple[int, Callable[[int], tuple[str, dict[str, Any]]], str, str | None]] = {
    # limit, a request of that size, code and param of one that is larger
    "messages": (
        limits.MESSAGES,
        lambda n: chat(messages=[{"role": "user", "content": ""}] * n),
        "invalid_value",
        "messages",
    ),
    "parts": (
        limits.PARTS,
        lambda n: chat(messages=[{"role": "user", "content": [{"type": "text", "text": ""}] * n}]),
        "invalid_value",
        "messages[0].content",
    ),
    "depth": (limits.JSON_DEPTH, lambda n: chat(unknown=deep(n)), "invalid_json", None),
    "n": (limits.CHOICES, lambda n: chat(n=n), "invalid_value", "n"),
    "prompts": (limits.PROMPTS, lambda n: text(prompt=["a"] * n, max_tokens=0), "invalid_value", "prompt"),
    "choices": (limits.PROMPTS, lambda n: text(prompt=["a"] * (n // 2 + n % 2), n=2), "invalid_value", "prompt"),
    "inputs": (limits.INPUTS, lambda n: ("/v1/embeddings", {"input": [[7]] * n}), "invalid_value", "input"),
    "stops": (stops.MAX_STOPS, lambda n: chat(stop=["a"] * n), "invalid_value", "stop"),
    "stop bytes": (stops.MAX_STOP_BYTES, lambda n: chat(stop=["a", "é" + "a" * (n - 2)]), "invalid_value", "stop[1]"),
    "biases": (
        sampling.MAX_BIASES,
        lambda n: chat(logit_bias={str(i): 0 for i in range(n)}),
        "invalid_value",
        "logit_bias",
    ),
    "top_logprobs": (
        limits.TOP_LOGPROBS,
        lambda n: chat(logprobs=True, top_logprobs=n),
        "invalid_value",
        "top_logprobs",
    ),
    "logprobs": (limits.COMPLETION_LOGPROBS, lambda n: text(logprobs=n), "invalid_value", "logprobs"),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str, server: httpx.Client) -> None:
    limit, request, code, param = LIMITS[name]
    for n in (limit - 1, limit):
        path, body = request(n)
        response = server.post(path, json=body)
        assert response.status_code == 200, response.text
    path, body = request(limit + 1)
    error_of(server.post(path, json=body), 400, code, param)


def test_context(server: httpx.Client, model: gemmart.Model) -> None:
    ids = model.tokenize("word " * CTX, bos=True)
    for n in (CTX - 1, CTX, CTX + 1, 10 * CTX):
        prompt = (ids * 10)[:n]
        response = server.post(TEXT, json={"prompt": prompt})
        if n < CTX:
            assert response.json()["usage"]["total_tokens"] == CTX
            assert response.json()["choices"][0]["finish_reason"] in ("length", "stop")
        else:
            error = error_of(response, 400, "context_length_exceeded")
            assert (error["n_prompt_tokens"], error["n_ctx"]) == (n, CTX)
            assert f"maximum context length is {CTX} tokens" in error["message"]
            assert error["type"] == "invalid_request_error"


def test_length_of_an_answer(server: httpx.Client) -> None:
    n_prompt = server.post(CHAT, json=question(max_tokens=0)).json()["usage"]["prompt_tokens"]
    room = CTX - n_prompt
    for name in ("max_tokens", "max_completion_tokens"):
        for n in (0, 1, room - 1, room, room + 1, 10**18, 2**63 - 1):
            answer = server.post(CHAT, json=question(ignore_eos=True, **{name: n})).json()
            assert answer["usage"]["completion_tokens"] == min(n, room)
            assert answer["choices"][0]["finish_reason"] == "length"
        for n in (-1, 2**63, -(10**18)):
            error_of(server.post(CHAT, json=question(**{name: n})), 400, "invalid_value", name)


def test_bodies(server: httpx.Client) -> None:
    body = json.dumps(question(max_tokens=0)).encode()
    for size, fits in ((limits.BODY_BYTES - 1, True), (limits.BODY_BYTES, True), (limits.BODY_BYTES + 1, False)):
        padded = body[:-1] + b" " * (size - len(body)) + b"}"
        for content in (padded, iter([padded[: 1 << 20], padded[1 << 20 :]])):  # with its length, and in chunks
            response = server.post(CHAT, content=content, headers=JSON)
            if fits:
                assert response.status_code == 200
            else:
                error_of(response, 413, "request_too_large")


def test_urls(server: httpx.Client) -> None:
    for n, fits in ((limits.URL_BYTES - 1, True), (limits.URL_BYTES, True), (limits.URL_BYTES + 1, False)):
        response = server.get("/health?" + "x" * (n - len("/health?")))
        if fits:
            assert response.status_code == 200
        else:
            error_of(response, 414, "uri_too_long")


def test_headers(server: httpx.Client) -> None:
    own = len(server.build_request("GET", "/health").headers)
    for n, fits in ((limits.HEADERS - 1, True), (limits.HEADERS, True), (limits.HEADERS + 1, False)):
        response = server.get("/health", headers=[(f"x-{i}", "1") for i in range(n - own)])
        if fits:
            assert response.status_code == 200
        else:
            error_of(response, 431, "headers_too_large")
    assert server.get("/health", headers={"x": "x" * (limits.HEADER_BYTES - 1000)}).status_code == 200
    error_of(server.get("/health", headers={"x": "x" * limits.HEADER_BYTES}), 431, "headers_too_large")
