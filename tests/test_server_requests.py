"""Requests that are wrong, too large or ask for what is not there: each is refused with its reason, none is a fault of
the server's."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import gemmart
from conftest import Tiny
from gemmart.server import limits
from serving import CHAT, TEXT, error_of, question

CTX = 128
BIG = [2**31, 2**63, 2**64, 10**30]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=CTX, parallel=2, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


@pytest.fixture(autouse=True)
def unharmed(server: httpx.Client) -> Iterator[None]:
    """After each test the server still answers."""
    yield
    assert server.post(CHAT, json=question(max_tokens=1)).status_code == 200


def send(server: httpx.Client, body: bytes, path: str = CHAT) -> httpx.Response:
    return server.post(path, content=body, headers={"content-type": "application/json"})


# JSON


def test_broken_at_every_byte(server: httpx.Client) -> None:
    whole = json.dumps(question("é\n", max_tokens=1, stop=["a"], seed=1, logit_bias={"1": 0.5}), ensure_ascii=False)
    data = whole.encode()
    for n in range(len(data)):
        for broken in (b"", b"\0" + data[n:], b"\xff" + data[n:], b"\x1f" + data[n:]):  # it ends; what is no text
            error_of(send(server, data[:n] + broken), 400, "invalid_json")
    for more in (b"x", b"{}", b"\0", b",", b"]", b"}", b"\xef\xbb\xbf", data):
        error_of(send(server, data + more), 400, "invalid_json")


@pytest.mark.parametrize(
    "body",
    [
        b"\xef\xbb\xbf{}",
        b"\x00",
        b"{}x",
        b"{}{}",
        b'{"messages": NaN}',
        b'{"temperature": 1e999}',
        b'{"temperature": Infinity}',
        b'{"temperature": 01}',
        b"{'messages': []}",
        b'{"messages": [],}',
        b'{"model": "\xff"}',
        b'{"model": "\xc3"}',
        b'{"model": "\\ud800"}',
        b'{"model": "\\udc00\\ud800"}',
        b'{"model": "\\x41"}',
        b'{"model": "a\nb"}',
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"x": ' + b"[" * 65 + b"]" * 65 + b"}",
    ],
)
def test_no_json(body: bytes, server: httpx.Client) -> None:
    error_of(send(server, body), 400, "invalid_json")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"text"', b"1", b"true"])
def test_no_object(body: bytes, server: httpx.Client) -> None:
    error_of(send(server, body), 400, "invalid_value")


# Fields

NUMBER, INTEGER, TEXTUAL, FLAG = "number", "integer", "text", "flag"
FIELDS: list[tuple[str, str, str, list[Any], list[Any]]] = [
    # path, field, type, values that are allowed, values that are not
    (CHAT, "temperature", NUMBER, [0, 0.0, 2, 1.5, 1e-300], [-0.1, 2.1, 1e308, *BIG]),
    (CHAT, "top_p", NUMBER, [0, 0.5, 1], [-0.1, 1.1, 5, 1e308]),
    (CHAT, "min_p", NUMBER, [0, 1], [-0.1, 1.1]),
    (CHAT, "typical_p", NUMBER, [0.1, 1], [-0.1, 1.1]),
    (CHAT, "top_k", INTEGER, [0, 1, 40, 2**31 - 1], [-1, *BIG]),
    (CHAT, "repeat_penalty", NUMBER, [0.1, 1, 10], [0, 0.09, 10.1]),
    (CHAT, "repeat_last_n", INTEGER, [-1, 0, 64], [-2, *BIG]),
    (CHAT, "presence_penalty", NUMBER, [-2, 0, 2], [-2.1, 2.1]),
    (CHAT, "frequency_penalty", NUMBER, [-2, 0, 2], [-2.1, 2.1]),
    (CHAT, "seed", INTEGER, [0, 2**31, 2**64 - 1], [-1, 2**64, 10**30]),
    (CHAT, "max_tokens", INTEGER, [0, 1, 10**18], [-1, 10**30]),
    (CHAT, "max_completion_tokens", INTEGER, [0, 1, 10**18], [-1, 10**30]),
    (CHAT, "n", INTEGER, [1, 8], [0, -1, 9, *BIG]),
    (CHAT, "model", TEXTUAL, ["x", ""], []),
    (CHAT, "stream", FLAG, [False], []),
    (CHAT, "logprobs", FLAG, [True, False], []),
    (CHAT, "ignore_eos", FLAG, [True, False], []),
    (CHAT, "continue_final_message", FLAG, [False], []),
    (TEXT, "logprobs", INTEGER, [0, 5], [-1, 6, *BIG]),
    (TEXT, "echo", FLAG, [True, False], []),
    (TEXT, "parse_special", FLAG, [True, False], []),
    (TEXT, "n", INTEGER, [1, 8], [0, 9]),
]
OF_TYPE: dict[str, Any] = {
    "flag": True,
    "integer": 1,
    "number": 1.5,
    "text": "1",
    "list": [1],
    "object": {"a": 1},
}
FITS = {NUMBER: {"integer", "number"}, INTEGER: {"integer"}, TEXTUAL: {"text"}, FLAG: {"flag"}}


def smallest(path: str, **fields: Any) -> dict[str, Any]:
    return (question(**fields) if path == CHAT else {"prompt": "hi", **fields}) | (
        {} if {"max_tokens", "max_completion_tokens"} & fields.keys() else {"max_tokens": 1}
    )


@pytest.mark.parametrize(("path", "name", "kind", "allowed", "refused"), FIELDS, ids=lambda x: str(x)[:20])
def test_fields(path: str, name: str, kind: str, allowed: list[Any], refused: list[Any], server: httpx.Client) -> None:
    for value in [*allowed, None]:
        response = server.post(path, json=smallest(path, **{name: value}))
        assert response.status_code == 200, (value, response.text)
    wrong = [value for type, value in OF_TYPE.items() if type not in FITS[kind]]
    for value in [*wrong, *refused]:
        error = error_of(server.post(path, json=smallest(path, **{name: value})), 400, "invalid_value", name)
        assert name in error["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": {}}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [1]}, "messages[0]"),
        ({"messages": [{}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "User", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages[0].name"),
        ({"stop": 1}, "stop"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop[0]"),
        ({"logit_bias": []}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias.a"),
        ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"1": "1"}}, "logit_bias[...]"),
        ({"logit_bias": {"512": 1}}, "logit_bias.512"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"stream_options": 1}, "stream_options"),
        ({"stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"top_logprobs": 1}, "top_logprobs"),
    ],
)
def test_wrong_places(fields: dict[str, Any], param: str, server: httpx.Client) -> None:
    for stream in (False, True):
        error_of(server.post(CHAT, json=question(stream=stream) | fields), 400, "invalid_value", param)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt[0]"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [512]}, "prompt"),
        ({"prompt": [[1], [512]]}, "prompt"),
        ({"prompt": ["a"] * 65}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 8}, "prompt"),
    ],
)
def test_wrong_prompts(fields: dict[str, Any], param: str, server: httpx.Client) -> None:
    error_of(server.post(TEXT, json=fields), 400, "invalid_value", param)


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (TEXT, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (TEXT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"functions": [{"name": "f"}]}, "functions"),
        (CHAT, {"function_call": "auto"}, "function_call"),
        (CHAT, {"chat_template": "{{ x }}"}, "chat_template"),
        (CHAT, {"audio": {"voice": "x"}}, "audio"),
        (CHAT, {"modalities": ["text", "audio"]}, "modalities"),
        (CHAT, {"web_search_options": {"a": 1}}, "web_search_options"),
        (TEXT, {"suffix": "end"}, "suffix"),
        (TEXT, {"best_of": 2}, "best_of"),
    ],
)
def test_not_offered(path: str, fields: dict[str, Any], param: str, server: httpx.Client) -> None:
    error_of(server.post(path, json=smallest(path, **fields)), 400, "unsupported_parameter", param)


TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}<end_of_turn>"


def test_a_template_of_the_request(model: gemmart.Model, server: httpx.Client) -> None:
    asked = question("hello <end_of_turn>", max_tokens=4, temperature=0, chat_template=TEMPLATE)
    for path in (CHAT, "/apply-template"):
        error_of(server.post(path, json=asked), 400, "unsupported_parameter", "chat_template")
        assert server.post(path, json={**asked, "chat_template": ""}).status_code == 200
    with model.serve(allow_request_template=True) as running, httpx.Client(base_url=running.url) as client:
        rendered = client.post("/apply-template", json=asked).json()
        assert rendered["prompt"] == "user: hello <end_of_turn>\n<end_of_turn>"
        end = model.tokenize("<end_of_turn>", special=True)
        text = model.tokenize("user: hello <end_of_turn>\n")
        assert rendered["tokens"] == model.tokenize("", bos=True) + text + end
        answer = client.post(CHAT, json=asked).json()
        assert answer["usage"]["prompt_tokens"] == len(rendered["tokens"])
        options = {"sampling": gemmart.Sampling(temperature=0), "max_tokens": 4}
        assert answer["choices"][0]["message"]["content"] == model.generate(rendered["tokens"], **options).text
        for bad in ("{{ messages.__class__ }}", "{% for x in range(99999999) %}{% endfor %}", "{{ 'a' * 10 ** 9 }}"):
            error_of(client.post(CHAT, json={**asked, "chat_template": bad}), 400, "template_error")
        assert client.post(CHAT, json=asked).json()["choices"] == answer["choices"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"},
        {"tools": None, "tool_choice": "none", "functions": [], "modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"unknown": {"deep": [1]}, "parallel_tool_calls": True},
    ],
)
def test_ignored(fields: dict[str, Any], server: httpx.Client) -> None:
    assert server.post(CHAT, json=smallest(CHAT, **fields)).status_code == 200


def test_ignored_names_are_logged(server: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "gemmart.server"):
        id = server.post(CHAT, json=smallest(CHAT, user="secret", un_known=1)).headers["x-request-id"]
    assert f"{id}: fields ignored: ['un_known', 'user']" in caplog.messages
    assert "secret" not in caplog.text


def test_roles_that_the_template_refuses(tiny: Tiny) -> None:
    messages = [{"role": "system", "content": "be kind"}, *question()["messages"]]
    with gemmart.load(tiny("gemma2"), ctx=64, threads=1, strict_roles=True) as model, model.serve() as running:
        error_of(httpx.post(running.url + CHAT, json={"messages": messages}), 400, "template_error")


# HTTP


def raw(server: httpx.Client, data: bytes, seconds: float = 10.0) -> bytes:
    """What comes back until the server closes, or `seconds` have passed."""
    parts = urlsplit(str(server.base_url))
    found = b""
    with socket.create_connection((parts.hostname, parts.port), timeout=seconds) as connection:
        connection.sendall(data)
        try:
            while part := connection.recv(1 << 16):
                found += part
        except (TimeoutError, ConnectionResetError):
            pass
    return found


def test_a_body_that_is_announced_too_large_is_not_read(server: httpx.Client) -> None:
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    began = time.monotonic()
    answer = raw(server, head % (CHAT.encode(), 10**11))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert time.monotonic() - began < limits.LINGER_SECONDS + 5


def test_a_body_goes_on_after_its_refusal(server: httpx.Client) -> None:
    """The rest is read and dropped for a while, so that the refusal is not lost; then the connection serves on."""
    parts = urlsplit(str(server.base_url))
    size = 4 << 20
    head = (
        b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n" % size
    )
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(head + b"x")
        refusal = b""
        while not refusal.endswith(b"}}"):
            refusal += connection.recv(1 << 16)
        assert refusal.startswith(b"HTTP/1.1 415 ")
        connection.sendall(b"x" * (size - 1))
        time.sleep(limits.LINGER_SECONDS + 0.5)
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_body_without_an_end_is_not_taken(server: httpx.Client) -> None:
    parts = urlsplit(str(server.base_url))
    head = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n"
    with socket.create_connection((parts.hostname, parts.port), timeout=10) as connection:
        connection.sendall(head % 10**11)

        def go_on() -> None:
            for _ in range(1000):
                connection.sendall(b"x" * 1000)
                time.sleep(0.01)

        with pytest.raises(OSError, match=r"reset|[Bb]roken"):
            go_on()


def test_unknown_paths_and_methods(server: httpx.Client) -> None:
    for path in (
        "/v1",
        "/v1/",
        "/v1/chat",
        "/v1/chat/completions/",
        "/%00",
        "/..%2f",
        "/health/",
    ):
        error_of(server.get(path), 404, "not_found")
    for method, path, allow in (("GET", CHAT, "POST"), ("PUT", "/tokenize", "POST"), ("POST", "/health", "GET")):
        response = server.request(method, path)
        error = error_of(response, 405, "method_not_allowed")
        assert error["type"] == "invalid_request_error"
        assert allow in response.headers["allow"]
    assert error_of(server.get("/nowhere"), 404, "not_found")["type"] == "not_found_error"
