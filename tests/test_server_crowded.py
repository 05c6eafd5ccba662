"""More connections than there are places, slow ones, few descriptors: whoever behaves is served, and /health answers."""

from __future__ import annotations

import json
import resource
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

import gemmart
from conftest import Tiny
from gemmart.server import limits
from serving import CHAT, error_of, question, serving, wait_until
from tiny import write_tiny

LONG = question(max_tokens=60_000, ignore_eos=True)
HEAD = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gemmart.Model]:
    path = write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", "gemma2", "Q8_0", n_ctx=65536)
    with gemmart.load(path, threads=1, lookup=False) as model:
        yield model


@pytest.fixture
def url(model: gemmart.Model) -> Iterator[str]:
    with model.serve(drain=0) as running:
        yield running.url
    wait_until(lambda: model.n_requests == (0, 0))


@pytest.fixture
def clients() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def connect(clients: ExitStack, url: str, data: bytes = b"") -> socket.socket:
    parts = urlsplit(url)
    found = clients.enter_context(socket.create_connection((parts.hostname, parts.port), timeout=20))
    found.sendall(data)
    return found


def ask_long(clients: ExitStack, url: str) -> socket.socket:
    """An answer that does not end."""
    body = json.dumps(LONG).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return connect(clients, url, head.encode() + body)


def is_closed(client: socket.socket) -> bool:
    client.setblocking(False)
    try:
        return client.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def test_a_place_is_kept_for_health(
    model: gemmart.Model, url: str, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 3)
    running = [ask_long(clients, url) for _ in range(3)]
    wait_until(lambda: sum(model.n_requests) == 3)
    for _ in range(2 * limits.KEPT_CONNECTIONS):
        with httpx.Client(base_url=url, timeout=20) as other:
            for _ in range(2):
                assert other.get("/health").status_code == 200
            for refused in (other.post(CHAT, json=question()), other.get("/props"), other.get("/nowhere")):
                error_of(refused, 503, "too_many_connections")
                assert refused.headers["retry-after"] == "1"
                assert refused.headers["connection"] == "close"
    running.pop().close()
    wait_until(lambda: sum(model.n_requests) == 2)
    assert httpx.get(url + "/props").status_code == 200
    assert not any(map(is_closed, running))


def test_kept_places_are_taken_from_who_waits(
    model: gemmart.Model, url: str, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 2)
    running = [ask_long(clients, url) for _ in range(2)]
    wait_until(lambda: sum(model.n_requests) == 2)
    silent = [connect(clients, url) for _ in range(3 * limits.KEPT_CONNECTIONS)]
    assert httpx.get(url + "/health").status_code == 200
    wait_until(lambda: sum(map(is_closed, silent)) >= 2 * limits.KEPT_CONNECTIONS)
    assert not is_closed(silent[-1])
    assert not any(map(is_closed, running))


@pytest.mark.parametrize("begun", [b"", HEAD, HEAD + b"\r\n{"], ids=["nothing", "half a head", "half a body"])
def test_what_does_not_come_makes_place(
    begun: bytes, model: gemmart.Model, url: str, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever waits longest goes first; nobody for whom something is computed does."""
    monkeypatch.setattr(limits, "CONNECTIONS", 4)
    running = ask_long(clients, url)
    wait_until(lambda: sum(model.n_requests) == 1)
    slow = [connect(clients, url, begun) for _ in range(40)]
    for _ in range(5):
        assert httpx.post(url + "/tokenize", json={"content": "it"}).status_code == 200
    wait_until(lambda: is_closed(slow[0]))
    assert not is_closed(running)
    assert not is_closed(slow[-1])


def test_an_answer_that_is_done_waits_again(
    model: gemmart.Model, url: str, clients: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "CONNECTIONS", 1)
    monkeypatch.setattr(limits, "KEPT_CONNECTIONS", 1)
    kept = [clients.enter_context(httpx.Client(base_url=url)) for _ in range(2)]
    for _ in range(3):
        for client in kept:
            assert client.post("/tokenize", json={"content": "it"}).status_code == 200
    new = connect(clients, url, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert new.recv(20).startswith(b"HTTP/1.1 200 ")


def test_a_thousand_that_say_nothing(url: str, clients: ExitStack) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 4096:
        pytest.skip("the process may not have so many descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, hard))
    try:
        for i in range(1024):
            connect(clients, url, (b"", HEAD, HEAD + b"\r\n{")[i % 3])
        for _ in range(10):
            assert httpx.get(url + "/health").status_code == 200
        assert httpx.post(url + CHAT, json=question(max_tokens=1), timeout=60).status_code == 200
    finally:
        clients.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.skipif(sys.platform != "linux", reason="changes a limit of another process")
def test_few_descriptors(tiny: Tiny, tmp_path: Path, clients: ExitStack) -> None:
    """Two hundred clients, and 64 descriptors for the server."""
    with serving(tiny("gemma2", "Q8_0"), tmp_path, "-c", "128") as running:
        resource.prlimit(running.process.pid, resource.RLIMIT_NOFILE, (64, 64))
        waiting = [connect(clients, running.url, HEAD) for _ in range(200)]
        began = time.monotonic()
        for _ in range(20):
            assert httpx.get(running.url + "/health", timeout=20).status_code == 200
            assert httpx.post(running.url + CHAT, json=question(max_tokens=1), timeout=60).status_code == 200
        assert time.monotonic() - began < 60
        open_files = len(list(Path(f"/proc/{running.process.pid}/fd").iterdir()))
        assert open_files < 64
        assert not is_closed(waiting[-1])
        clients.close()
        assert httpx.post(running.url + CHAT, json=question(max_tokens=1), timeout=60).status_code == 200
        assert "Too many open files" not in running.log


def test_places_follow_the_descriptors() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for may_have, places in ((64, 16), (49, 1), (20, 1), (300, 252), (304, 256), (1024, 256)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (may_have, hard))
            assert limits.connections() == places
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
