"""Two replicas on a local Ray, asked over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import gemmart
from serving import CHAT, events, question, wait_until
from tiny import write_tiny

pytest.importorskip("ray", reason="needs Ray: pip install 'gemmart[ray]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own

LONG = {"max_tokens": 60_000, "ignore_eos": True}
"""An answer that does not end within a test."""


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", "gemma2", "Q8_0", n_ctx=65536)


@pytest.fixture(scope="module")
def url(long_file: Path) -> Iterator[str]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    import ray
    from ray import serve

    import gemmart.ray

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = gemmart.ray.app(str(long_file), threads=1, replicas=2, requests=2, drain=1, lookup=False)
        serve.run(app, name="gemmart", route_prefix="/llm")
        yield f"http://127.0.0.1:{port}/llm"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


def from_each_replica(path: str) -> list[str]:
    """What each of them answers."""
    from ray import serve

    scope = {"type": "http", "http_version": "1.1", "method": "GET", "path": path, "query_string": b"", "headers": []}
    handle = serve.get_deployment_handle("Replica", "gemmart").options(stream=True)
    found = []
    for key in range(64):  # one of them is as likely as the other
        messages = handle.options(session_id=str(key)).answer.remote(scope, b"")
        found.append(b"".join(message.get("body", b"") for message in messages).decode())
    return found


def running() -> int:
    return max(json.loads(props)["running"] + json.loads(props)["waiting"] for props in from_each_replica("/props"))


def test_answers_are_those_of_the_model(client: httpx.Client, url: str, long_file: Path) -> None:
    body = question(max_tokens=30, seed=5)
    with gemmart.load(long_file, threads=1) as model:
        text = model.chat(body["messages"], max_tokens=30, seed=5).text
    assert client.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == text
    *chunks, done = events(client.post(CHAT, json=body | {"stream": True}))
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as there:
        assert there.chat.completions.create(model="any", **body).choices[0].message.content == text
    assert client.get("/health").json() == {"status": "ok"}


def test_whoever_leaves_frees_the_place(client: httpx.Client) -> None:
    with client.stream("POST", CHAT, json=question(**LONG, stream=True)) as response:
        parts = response.iter_raw()
        assert next(parts).startswith(b"data: ")  # long before its end
        assert running() > 0
    wait_until(lambda: running() == 0)
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=question(**LONG), timeout=1)
    wait_until(lambda: running() == 0)


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    """The server's error under Ray's request id."""
    assert response.status_code == status, response.text
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (code, param)
    assert len(response.headers.get_list("x-request-id")) == 1


def test_errors_are_the_servers(client: httpx.Client) -> None:
    refused(client.post(CHAT, json={"messages": []}), 400, "invalid_value", "messages")
    refused(client.post(CHAT, content=b"{", headers={"Content-Type": "application/json"}), 400, "invalid_json")
    refused(client.get("/nothing"), 404, "not_found")
    big_message = client.post("/v1/messages", content=b" " * (9 << 20), headers={"Content-Type": "application/json"})
    assert (big_message.status_code, big_message.json()["type"]) == (413, "error")  # in its protocol's words
    refused(client.get("/health", headers={"Host": "evil.example"}), 403, "forbidden_host")
    big = b'{"messages": "' + b"x" * (9 << 20) + b'"}'
    refused(client.post(CHAT, content=big, headers={"Content-Type": "application/json"}), 413, "request_too_large")


def test_the_same_system_prompt_meets_its_prefix(client: httpx.Client) -> None:
    """Chats with it go where it has been read; different ones go to both replicas."""

    def cached(system: dict[str, Any], text: str) -> int:
        body = {"messages": [system, {"role": "user", "content": text}], "max_tokens": 1}
        usage = client.post(CHAT, json=body).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    for i in range(12):
        system = {"role": "system", "content": f"{i} is the word " * 40}
        assert [cached(system, text) for text in ("one", "two", "three")][1:] >= [160, 160]
    counts = {
        line.rpartition(" ")[2]
        for metrics in from_each_replica("/metrics")
        for line in metrics.splitlines()
        if line.startswith("gemmart_requests_total") and CHAT in line and '"200"' in line
    }
    assert len(counts) == 2
    assert all(float(count) >= 3 for count in counts)


def test_what_meets() -> None:
    from starlette.requests import Request

    from gemmart.ray import prefix_key

    def key(asked: object, api_key: str = "a") -> str:
        headers = [(b"authorization", f"Bearer {api_key}".encode())]
        data = asked if isinstance(asked, bytes) else json.dumps(asked).encode()
        return prefix_key(Request({"type": "http", "headers": headers}), data)

    kind, hello, bye = (
        {"role": role, "content": text} for role, text in (("system", "be kind"), ("user", "hello"), ("user", "bye"))
    )
    one = key({"messages": [kind, hello]})
    assert one == key({"messages": [kind, bye], "max_tokens": 3}) == key({"messages": [kind, hello, hello, bye]})
    others = [
        key({"messages": [kind, hello]}, api_key="b"),
        key({"messages": [{**kind, "content": "be rude"}, hello]}),
        key({"messages": [kind, kind, hello]}),
        key({"messages": [hello]}),
        key({"messages": [bye]}),
        key({"messages": [hello], "system": "be kind"}),
        key({"input": "hello", "instructions": "be kind"}),
    ]
    assert len({one, *others}) == 8
    assert key({"messages": [hello]}) == key({"messages": [hello, kind, bye]})
    for nothing in ({}, [], {"messages": 3}, {"prompt": "hello"}, b"", b"{", b"\xff", b"[" * 100_000):
        assert key(nothing) == ""


def test_more_than_can_wait_are_refused(url: str) -> None:
    """Two replicas take four requests each, and as many wait as at a single server."""

    async def ask(client: httpx.AsyncClient) -> httpx.Response | None:
        try:
            return await client.post(url + CHAT, json=question(**LONG), timeout=20)
        except httpx.TimeoutException:
            return None

    async def work() -> list[httpx.Response | None]:
        async with httpx.AsyncClient(limits=httpx.Limits(max_connections=None)) as client:
            tasks = [asyncio.create_task(ask(client)) for _ in range(100)]
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED, timeout=60)
            await asyncio.sleep(1)
            answers = [task.result() for task in tasks if task.done()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return answers

    answers = asyncio.run(work())
    assert answers
    for response in answers:
        assert response is not None
        refused(response, 429, "queue_full")
        assert response.headers["retry-after"] == "1"
    wait_until(lambda: running() == 0)


def test_wrong_options() -> None:
    import gemmart.ray

    for replicas in (0, (2, 1), (0, 3)):
        with pytest.raises(gemmart.InvalidRequest, match="replicas"):
            gemmart.ray.app(threads=1, replicas=replicas)
