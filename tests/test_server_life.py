"""The life of a server: clients that leave, more of them than it can serve, its beginning and its end."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

import gemmart
from gemmart.server import address, limits
from gemmart.server.app import AppOptions
from gemmart.server.running import ListenOptions, RunningServer
from program import environment, run
from serving import CHAT, TEXT, error_of, events, question, send, serving, wait_until
from tiny import write_tiny

LONG = {"max_tokens": 60_000, "ignore_eos": True}
"""An answer that does not end within a test."""


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", "gemma2", "Q8_0", n_ctx=65536)


@pytest.fixture(scope="module")
def model(long_file: Path) -> Iterator[gemmart.Model]:
    with gemmart.load(long_file, parallel=1, threads=1, lookup=False) as model:
        yield model


@pytest.fixture
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve(drain=0, queue=3) as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client
    wait_until(lambda: model.n_requests == (0, 0))


@contextmanager
def busy(model: gemmart.Model, server: httpx.Client) -> Iterator[socket.socket]:
    """An answer that keeps the model to itself."""
    with send(server, question(**LONG)) as first:
        wait_until(lambda: model.n_requests == (1, 0))
        yield first


def n_descriptors() -> int:
    return psutil.Process().num_fds()


# Clients that leave


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_it_writes(stream: bool, model: gemmart.Model, server: httpx.Client) -> None:
    with send(server, question(**LONG, stream=stream)) as client:
        wait_until(lambda: model.n_requests == (1, 0))
        if stream:
            assert client.recv(1000)
    wait_until(lambda: model.n_requests == (0, 0), 5)
    assert server.post(CHAT, json=question(max_tokens=1)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_it_reads(stream: bool, model: gemmart.Model, server: httpx.Client) -> None:
    prompt = [7 + i % 400 for i in range(60_000)]
    with send(server, {"prompt": prompt, "stream": stream}, TEXT):
        wait_until(lambda: model.n_requests == (1, 0))
    wait_until(lambda: model.n_requests == (0, 0), 5)


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_while_waiting(stream: bool, model: gemmart.Model, server: httpx.Client) -> None:
    with busy(model, server):
        with send(server, question(**LONG, stream=stream)):
            wait_until(lambda: model.n_requests == (1, 1))
        wait_until(lambda: model.n_requests == (1, 0), 5)


def test_who_leaves_with_many_choices(model: gemmart.Model, server: httpx.Client) -> None:
    body = question(max_tokens=2000, ignore_eos=True, n=8)
    with send(server, body):
        wait_until(lambda: sum(model.n_requests) == 8)
    wait_until(lambda: model.n_requests == (0, 0), 5)


def test_who_leaves_in_the_middle_of_a_body(server: httpx.Client) -> None:
    url = urlsplit(str(server.base_url))
    for _ in range(20):
        with socket.create_connection((url.hostname, url.port)) as client:
            client.sendall(
                b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
            )
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize("n_sent", [0, 1, 20, 59])
def test_who_leaves_before_the_request_is_whole(n_sent: int, model: gemmart.Model, server: httpx.Client) -> None:
    """Head or body: nothing is computed, and no connection is kept."""
    url = urlsplit(str(server.base_url))
    data = b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9"
    assert server.get("/health").status_code == 200  # whose connection stays
    before = n_descriptors()
    for _ in range(50):
        with socket.create_connection((url.hostname, url.port)) as client:
            client.sendall(data[:n_sent])
    assert server.get("/health").status_code == 200
    wait_until(lambda: n_descriptors() <= before, 5)
    assert model.n_requests == (0, 0)


def test_many_who_leave(model: gemmart.Model, server: httpx.Client) -> None:
    """In every state, at once; sequences, pages and descriptors are free again."""
    assert server.get("/health").status_code == 200  # whose connection stays
    before = n_descriptors()
    long_prompt = {"prompt": [7 + i % 400 for i in range(60_000)]}
    for round in range(8):
        clients = [send(server, question(**LONG, stream=round % 2 == 0)) for _ in range(2)]
        clients.append(send(server, long_prompt | {"stream": round % 2 == 1}, TEXT))
        wait_until(lambda: sum(model.n_requests) == 3)
        for client in clients[:: 1 if round % 3 else -1]:
            client.close()
        wait_until(lambda: model.n_requests == (0, 0), 5)
    wait_until(lambda: n_descriptors() <= before, 5)
    assert model.kv_pages.held == 0
    assert server.post(CHAT, json=question(max_tokens=1)).status_code == 200


def test_leaving_is_logged_as_such(
    model: gemmart.Model, server: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "gemmart.server"):
        with busy(model, server):
            pass
        wait_until(lambda: "499 cancelled" in caplog.text)


# Too many


def test_queue(model: gemmart.Model, server: httpx.Client) -> None:
    with busy(model, server):
        waiting = [send(server, question(**LONG)) for _ in range(3)]
        wait_until(lambda: model.n_requests == (1, 3))
        for stream in (False, True):
            response = server.post(CHAT, json=question(stream=stream))
            assert error_of(response, 429, "queue_full")["type"] == "rate_limit_error"
            assert response.headers["retry-after"] == "1"
        for client in waiting:
            client.close()
        wait_until(lambda: model.n_requests == (1, 0))
        assert server.get("/health").status_code == 200
    wait_until(lambda: model.n_requests == (0, 0))
    assert server.post(CHAT, json=question(max_tokens=1)).status_code == 200


def test_deadline(model: gemmart.Model) -> None:
    with model.serve(request_timeout=0.5) as running, httpx.Client(base_url=running.url, timeout=60) as server:
        response = server.post(CHAT, json=question(**LONG))
        assert error_of(response, 504, "deadline_exceeded")["type"] == "server_error"
        assert response.headers["x-should-retry"] == "false"
        *_, last = events(server.post(CHAT, json=question(**LONG, stream=True)))
        assert last["error"]["code"] == "deadline_exceeded"
        wait_until(lambda: model.n_requests == (0, 0))


def test_pings_while_it_reads(model: gemmart.Model, server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "PING_SECONDS", 0.05)
    with busy(model, server), server.stream("POST", CHAT, json=question(stream=True)) as response:
        lines = response.iter_lines()
        assert "assistant" in next(lines)
        found = [next(lines) for _ in range(5)]
    assert found.count(": ping") == 2


# Slow ones


def test_a_head_that_does_not_come(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.3)
    url = urlsplit(str(server.base_url))
    for complete, begun in (b"", b""), (b"", b"GET /hea"), (b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET"):
        with socket.create_connection((url.hostname, url.port), timeout=10) as client:
            client.sendall(complete)
            if complete:
                assert client.recv(1000)
            client.sendall(begun)
            while client.recv(1000):
                pass


def test_a_body_that_does_not_come(server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.3)
    url = urlsplit(str(server.base_url))
    with socket.create_connection((url.hostname, url.port), timeout=10) as client:
        client.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        found = b""
        while part := client.recv(1000):
            found += part
    assert found.startswith(b"HTTP/1.1 408 ")
    assert b'"code":"request_timeout"' in found


def test_a_reader_that_stops(model: gemmart.Model, server: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "STALL_SECONDS", 0.3)
    url = urlsplit(str(server.base_url))
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.connect((url.hostname, url.port))
    data = json.dumps(question(**LONG, stream=True, logprobs=True, top_logprobs=20)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    with client:
        client.sendall(head.encode() + data)
        wait_until(lambda: model.n_requests == (1, 0))
        wait_until(lambda: model.n_requests == (0, 0), 30)


# The beginning


def test_it_listens_while_it_loads(model: gemmart.Model) -> None:
    with RunningServer(ListenOptions(), AppOptions()) as running, httpx.Client(base_url=running.url) as server:
        for response in (server.get("/health"), server.get("/v1/models"), server.post(CHAT, json=question())):
            assert error_of(response, 503, "model_loading")["type"] == "unavailable_error"
            assert response.headers["retry-after"] == "1"
        running.attach(model)
        assert server.get("/health").status_code == 200
        assert server.post(CHAT, json=question(max_tokens=1)).status_code == 200


def test_sockets_are_known_as_tcp() -> None:
    """Or asyncio leaves Nagle's algorithm on, and each answer's body waits 40 ms for an acknowledgement."""
    sockets = address.bind("localhost", 0)
    assert {found.proto for found in sockets} == {socket.IPPROTO_TCP}
    assert len({found.getsockname()[1] for found in sockets}) == 1
    for found in sockets:
        found.close()


def test_a_taken_port(model: gemmart.Model, long_file: Path, tmp_path: Path) -> None:
    with model.serve() as running:
        port = urlsplit(running.url).port
        assert port
        done = run("serve", long_file, "--port", str(port), home=tmp_path)
        assert done.returncode == 2
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr.decode()
        with model.serve(port=port, or_any_port=True) as other:
            assert urlsplit(other.url).port != port
            assert httpx.get(other.url + "/health").status_code == 200
    with model.serve(port=port) as running:  # it is free again at once
        assert urlsplit(running.url).port == port


@pytest.mark.parametrize(
    "host", ["no.such.host.invalid", "256.1.1.1", "203.0.113.7", "unix:/nowhere/socket", "unix:" + "x" * 200]
)
def test_nowhere_to_listen(host: str, model: gemmart.Model) -> None:
    with pytest.raises(gemmart.InvalidRequest, match=r"host|port") as raised:
        model.serve(host)
    assert host in str(raised.value)


def test_ipv6(model: gemmart.Model) -> None:
    with model.serve("::1") as running:
        assert running.url.startswith("http://[::1]:")
        assert httpx.get(running.url + "/health").status_code == 200


def test_unix_socket(model: gemmart.Model, tmp_path: Path) -> None:
    path = tmp_path / "socket"
    for _ in range(2):
        with model.serve(f"unix:{path}") as running:
            assert running.url == f"unix:{path}"
            assert path.stat().st_mode & 0o777 == 0o600
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as client:
                assert client.post(CHAT, json=question(max_tokens=1)).status_code == 200
            with pytest.raises(gemmart.InvalidRequest, match="in use"):
                model.serve(f"unix:{path}")
        assert not path.exists()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with model.serve(f"unix:{path}"):
        pass
    path.write_text("precious")
    with pytest.raises(gemmart.InvalidRequest, match="in use"):
        model.serve(f"unix:{path}")
    assert path.read_text() == "precious"


# The end


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


def stream_in_background(pool: ThreadPoolExecutor, url: str, body: dict[str, Any]) -> Callable[[], httpx.Response]:
    """Begin a stream; returns what waits for the whole of it."""
    begun = threading.Event()

    def read() -> httpx.Response:
        content = b""
        with httpx.stream("POST", url + CHAT, json=body | {"stream": True}, timeout=60) as response:
            for part in response.iter_raw():
                content += part
                begun.set()
        return httpx.Response(200, headers=response.headers, content=content)

    found = pool.submit(read)
    assert begun.wait(60)
    return lambda: found.result(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_end_when_nothing_runs(number: int, long_file: Path, home: Path) -> None:
    with serving(long_file, home) as running, httpx.Client(base_url=running.url) as kept:
        kept.get("/health")  # its connection stays open
        began = time.monotonic()
        assert running.end(number) == 0
        assert time.monotonic() - began < 10
        assert "Traceback" not in running.log


def test_running_answers_are_finished(long_file: Path, home: Path) -> None:
    with serving(long_file, home, "--drain", "60") as running, ThreadPoolExecutor(2) as pool:
        finish = stream_in_background(pool, running.url, question(max_tokens=3000, ignore_eos=True, seed=1))
        running.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(running.url + "/health").status_code == 503)
        for response in (httpx.get(running.url + "/health"), httpx.post(running.url + CHAT, json=question())):
            error_of(response, 503, "draining")
        *chunks, last = events(finish())
        assert last == "[DONE]"
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert running.process.wait(60) == 0


def test_answers_that_take_too_long_are_told(long_file: Path, home: Path) -> None:
    with serving(long_file, home, "--drain", "0.3") as running, ThreadPoolExecutor(2) as pool:
        finish = stream_in_background(pool, running.url, question(**LONG))
        began = time.monotonic()
        assert running.end() == 0
        assert time.monotonic() - began < 10
        *chunks, last = events(finish())
        assert chunks
        assert last["error"]["code"] == "draining"


def test_the_end_while_requests_wait(long_file: Path, home: Path) -> None:
    """One is answered, one is read, two wait: each is told."""
    with serving(long_file, home, "--drain", "0.3", "-np", "1") as running, ThreadPoolExecutor(4) as pool:
        bodies = [question(**LONG), question(**LONG), question(**LONG, stream=True)]
        waiting = [pool.submit(httpx.post, running.url + CHAT, json=body, timeout=60) for body in bodies]
        long_prompt = {"prompt": [7 + i % 400 for i in range(60_000)]}
        waiting.append(pool.submit(httpx.post, running.url + TEXT, json=long_prompt, timeout=60))
        wait_until(lambda: httpx.get(running.url + "/props").json()["running"] == 1)
        wait_until(lambda: httpx.get(running.url + "/props").json()["waiting"] == 3)
        began = time.monotonic()
        assert running.end() == 0
        assert time.monotonic() - began < 10
        for response in (waiting[0].result(60), waiting[1].result(60), waiting[3].result(60)):
            error_of(response, 503, "draining")
        assert events(waiting[2].result(60))[-1]["error"]["code"] == "draining"
        assert "Traceback" not in running.log


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def test_without_stdout_and_stderr(long_file: Path, home: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = f'exec "{sys.executable}" -m gemmart serve "{long_file}" --port {port} -t 1 >&- 2>&-'
    with subprocess.Popen(["sh", "-c", command], env=environment(home)) as process:

        def is_ready() -> bool:
            try:
                return httpx.get(url + "/health").status_code == 200
            except httpx.ConnectError:
                return False

        try:
            wait_until(is_ready)
            assert httpx.post(url + CHAT, json=question(max_tokens=1), timeout=60).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()


def test_killed_and_started_again(long_file: Path, home: Path) -> None:
    """While it loads, answers or does nothing: the same port, and the same socket, are free at once."""
    for place in (["--port", str(free_port())], ["--host", f"unix:{home / 'killed'}"]):
        for state in ("loading", "answering", "idle"):
            with serving(long_file, home, *place, wait=state != "loading") as running:
                if state == "answering" and place[0] == "--port":
                    with send(running.url, question(**LONG, stream=True)) as client:
                        assert client.recv(100)
                        running.process.kill()
                time.sleep(0.5 if state == "loading" else 0)
                running.process.kill()
                assert running.process.wait(10) == -signal.SIGKILL
        with serving(long_file, home, *place) as running:
            assert running.end() == 0


def test_a_second_signal_ends_at_once(long_file: Path, home: Path) -> None:
    path = home / "socket"
    for number in (signal.SIGTERM, signal.SIGINT):
        with serving(long_file, home, "--host", f"unix:{path}") as running, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
            data = json.dumps(question(**LONG)).encode()
            client.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(data)}\r\n\r\n".encode()
                + data
            )
            time.sleep(0.5)
            running.process.send_signal(number)
            time.sleep(0.5)
            assert running.process.poll() is None
            assert running.end(number) == 130
            assert not path.exists()


SLOW_LOAD = """
import sys, time
from gemmart.server.app import AppOptions
from gemmart.server.running import ListenOptions, serve_forever

def load():
    print("loading", flush=True)
    time.sleep(60)

sys.exit(serve_forever(load, ListenOptions(), AppOptions(), lambda url, model: None))
"""


def test_the_end_while_it_loads(home: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW_LOAD], stdout=subprocess.PIPE, env=environment(home)) as process:
        assert process.stdout
        assert process.stdout.readline() == b"loading\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0


def test_a_model_that_does_not_load(home: Path) -> None:
    done = run("serve", home / "nothing.gguf", "--port", "0", home=home)
    assert done.returncode == 3
    assert "nothing.gguf" in done.stderr.decode()


def test_closing_twice(model: gemmart.Model) -> None:
    running = model.serve()
    running.close()
    running.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(running.url + "/health")
    model.generate("it still works", max_tokens=1)


def test_a_model_that_is_closed_first(long_file: Path) -> None:
    with gemmart.load(long_file, threads=1) as model:
        running = model.serve(drain=0)
        client = send(running.url, question(**LONG))
        wait_until(lambda: model.n_requests == (1, 0))
    with client:
        assert client.recv(100).startswith(b"HTTP/1.1 503 ")
    with httpx.Client(base_url=running.url) as server:
        for response in (
            server.post(CHAT, json=question()),
            server.post("/v1/embeddings", json={"input": "it"}),
            server.post("/tokenize", json={"content": "it"}),
            server.get("/health"),
            server.get("/slots"),
        ):
            error_of(response, 503, "draining")
        assert server.get("/metrics").status_code == 200
    running.close()


def test_log(long_file: Path, home: Path) -> None:
    secret = "my secret question"
    with serving(long_file, home) as running:
        response = httpx.post(running.url + CHAT, json=question(secret, max_tokens=2, ignore_eos=True))
        httpx.get(running.url + "/a%0Ab%1b%5b2J")
        httpx.get(running.url + "/health")
        n = response.json()["usage"]["prompt_tokens"]
        line = f"{response.headers['x-request-id']} POST {CHAT} 200 {n}+2 tokens "
        wait_until(lambda: "/a%0Ab%1b%5b2J" in running.log)
        assert line in running.log
        assert secret not in running.log
        assert "/health" not in running.log
    with serving(long_file, home, "--log-prompts") as running:
        httpx.post(running.url + CHAT, json=question(secret, max_tokens=1))
        assert secret in running.log
    with serving(long_file, home, "-q", wait=False) as running:
        time.sleep(2)
        assert running.log == ""


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_tls(model: gemmart.Model, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    with model.serve(ssl_certfile=str(cert), ssl_keyfile=str(key)) as running:
        assert running.url.startswith("https://")
        trusted = ssl.create_default_context(cafile=str(cert))
        assert httpx.get(running.url + "/health", verify=trusted).status_code == 200


def test_root_path(model: gemmart.Model) -> None:
    with model.serve(root_path="/llm", api_keys=["k"]) as running:
        assert httpx.get(running.url + "/health").status_code == 200
        error_of(httpx.get(running.url + "/props"), 401, "invalid_api_key")
        assert httpx.get(running.url + "/props", headers={"X-Api-Key": "k"}).status_code == 200
