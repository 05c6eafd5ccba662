"""What the server benchmarks share: a client that takes as little of the processor as it can, and servers that run.

httpx would take more of the two cores of a small machine than the event loop that it measures."""

from __future__ import annotations

import asyncio
import json
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

LOAD_SECONDS = 120.0


@dataclass(slots=True)
class Answer:
    """first_s: from the request to the first event, or to the whole answer. body: of an answer that is no stream, or
    the last event but [DONE]. finished: False for whoever left early."""

    status: int
    text: str
    body: dict[str, Any]
    first_s: float
    finished: bool = True


async def post(port: int, path: str, body: dict[str, Any], *, leave_after: int | None = None) -> Answer:
    """Ask. leave_after: close the connection after so many events, or lines of an answer that is no stream."""
    encoded = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {len(encoded)}",
        "Connection: close",
    )
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write("\r\n".join([*head, "", ""]).encode() + encoded)
        if leave_after == 0:
            await writer.drain()
            return Answer(0, "", {}, 0.0, finished=False)
        status = int((await reader.readline()).split()[1])
        while (line := await reader.readline()).strip():
            stream = line.lower().startswith(b"content-type: text/event-stream")
            if stream:
                break
        if not stream:
            content = await reader.read()
            found = json.loads(content[content.index(b"{") : content.rindex(b"}") + 1])
            return Answer(status, _text(found), found, time.perf_counter() - began)
        return await _events(reader, status, began, leave_after)
    finally:
        writer.close()


async def _events(reader: asyncio.StreamReader, status: int, began: float, leave_after: int | None) -> Answer:
    texts: list[str] = []
    found: dict[str, Any] = {}
    first = 0.0
    n = 0
    while line := await reader.readline():
        if line.startswith(b"data: [DONE]"):
            return Answer(status, "".join(texts), found, first - began)
        if line.startswith(b"data: "):
            first = first or time.perf_counter()
            found = json.loads(line[6:])
            texts.append(_text(found))
            n += 1
            if n == leave_after:
                break
    return Answer(status, "".join(texts), found, first - began, finished=False)


def _text(found: dict[str, Any]) -> str:
    """The text of an answer, or of a chunk of one."""
    texts = []
    for choice in found.get("choices", ()):
        message = choice.get("delta") or choice.get("message") or {}
        texts.append(choice.get("text") or message.get("content") or "")
    return "".join(texts)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def server(command: list[str], port: int) -> Iterator[subprocess.Popen[bytes]]:
    """It runs, and has loaded its model."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            end = time.monotonic() + LOAD_SECONDS
            while not _healthy(port):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"it did not start: {shlex.join(command)}")
                time.sleep(0.1)
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def get(port: int, path: str) -> tuple[int, bytes]:
    with socket.create_connection(("127.0.0.1", port), 5) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        found = b""
        while part := connection.recv(1 << 16):
            found += part
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def _healthy(port: int) -> bool:
    try:
        return get(port, "/health")[0] == 200
    except (OSError, IndexError):
        return False
