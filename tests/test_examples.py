"""The examples run."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import gemmart
from conftest import Tiny
from program import environment
from serving import CHAT, MINUTE, error_of, events, question, wait_until
from tiny import write_tiny

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
LONG = {"max_tokens": 60_000, "ignore_eos": True}
"""An answer that does not end within a test."""


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", "gemma2", "Q8_0", n_ctx=65536)


@pytest.fixture(scope="module")
def mounted(long_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of asgi.py."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "asgi:app", "--port", str(port)]
    home = tmp_path_factory.mktemp("home")
    with subprocess.Popen(command, env=environment(home, MODEL=str(long_file)), stderr=subprocess.PIPE) as process:
        try:
            url = f"http://127.0.0.1:{port}"

            def answers() -> bool:
                assert process.poll() is None
                try:
                    return httpx.get(url + "/llm/health").status_code == 200
                except httpx.TransportError:
                    return False

            wait_until(answers)
            yield url
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=MINUTE)
            assert b"Traceback" not in log, log.decode()
            assert process.returncode in (0, -signal.SIGTERM)
        finally:
            process.kill()


def test_a_mounted_server(mounted: str, long_file: Path) -> None:
    body = question(max_tokens=20, seed=4)
    with gemmart.load(long_file, threads=1) as model:
        text = model.chat(body["messages"], max_tokens=20, seed=4).text
    with (
        httpx.Client(base_url=mounted, timeout=60) as client,
        openai.OpenAI(base_url=mounted + "/llm/v1", api_key="none", max_retries=0) as there,
    ):
        assert client.post("/llm" + CHAT, json=body).json()["choices"][0]["message"]["content"] == text
        *chunks, done = events(client.post("/llm" + CHAT, json=body | {"stream": True}))
        assert done == "[DONE]"
        assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == text
        stream = there.chat.completions.create(model="any", stream=True, **body)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == text
        error_of(client.post("/llm" + CHAT, json={"messages": []}), 400, "invalid_value", "messages")
        error_of(client.get("/llm/nothing"), 404, "not_found")
        assert client.get(CHAT).status_code == 404
        assert client.post("/title", content="hello").status_code == 200


def test_leaving_a_mounted_server(mounted: str) -> None:
    def running() -> int:
        return httpx.get(mounted + "/llm/props").json()["running"]

    with httpx.stream("POST", mounted + "/llm" + CHAT, json=question(**LONG, stream=True)) as response:
        parts = response.iter_raw()
        assert next(parts).startswith(b"data: ")
        assert running() == 1
    wait_until(lambda: running() == 0)


def test_async_chat(tiny: Tiny, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / "async_chat.py", tiny("gemma2", "Q8_0")],
        env=environment(tmp_path),
        capture_output=True,
        timeout=MINUTE,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.count(b"?\n") == 3


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_the_service_file(tmp_path: Path) -> None:
    unit = tmp_path / "gemmart.service"
    unit.write_text((EXAMPLES / unit.name).read_text().replace("/opt/gemmart/bin/gemmart", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
