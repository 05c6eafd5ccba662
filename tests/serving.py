"""A server under test: the program in a process of its own, and what clients read from either kind."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

import program

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
MINUTE = 60.0


def question(text: str = "what is it", **more: Any) -> dict[str, Any]:
    """The body of a chat that asks one thing."""
    return {"messages": [{"role": "user", "content": text}], **more}


def error_of(response: httpx.Response, status: int, code: str, param: str | None = None) -> dict[str, Any]:
    """The error of an answer, after a look at its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert (error["code"], error["param"]) == (code, param), error
    assert error["message"]
    assert "Traceback" not in response.text
    return error


def events(response: httpx.Response) -> list[Any]:
    """The data of an event stream: JSON values, and "[DONE]"."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        assert event.startswith(("data: ", ":")), event
        if event.startswith("data: "):
            text = event.removeprefix("data: ")
            found.append(text if text == "[DONE]" else json.loads(text))
    return found


def wait_until(true: Callable[[], bool], seconds: float = MINUTE) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def send(server: httpx.Client | str, body: dict[str, Any], path: str = CHAT) -> socket.socket:
    """Send a request; nobody reads the answer yet."""
    url = urlsplit(server if isinstance(server, str) else str(server.base_url))
    found = socket.create_connection((url.hostname, url.port), timeout=60)
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    found.sendall(head.encode() + data)
    return found


class Program:
    """`gemmart serve` as it runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self._log = log
        self.url = ""

    @property
    def log(self) -> str:
        return self._log.read_text()

    def wait_for_url(self) -> None:
        """Until it has loaded the model."""
        wait_until(lambda: self.process.poll() is not None or bool(self._found()))
        assert self._found(), self.log
        self.url = self._found()[-1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, and wait; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(MINUTE)

    def _found(self) -> list[str]:
        return re.findall(r"^.+: (https?://\S+:\d+|unix:\S+)$", self.log, re.MULTILINE)


@contextmanager
def serving(model: Path, home: Path, *arguments: str, wait: bool = True, **environ: str) -> Iterator[Program]:
    """The program, on a free port."""
    log = home / f"log-{time.monotonic_ns()}"
    command = [*program.COMMAND, "serve", str(model), "--port", "0", "-t", "1", *arguments]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=program.environment(home, **environ)) as process,
    ):
        try:
            found = Program(process, log)
            if wait:
                found.wait_for_url()
            yield found
        finally:
            process.kill()
