"""HTTP itself: what is none, or means two things, is refused and the connection closed; what is unusual is served."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

import gemmart
from conftest import Tiny

HOST = b"Host: localhost\r\n"
GET = b"GET /health HTTP/1.1\r\n" + HOST
POST = b"POST /tokenize HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
BODY = b'{"content":"a"}'
CHUNKED = b"Transfer-Encoding: chunked\r\n\r\n"
CLOSE = b"Connection: close\r\n\r\n"


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[tuple[str, int]]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, threads=1) as model, model.serve() as running:
        url = urlsplit(running.url)
        yield url.hostname or "", url.port or 0


def answers(server: tuple[str, int], data: bytes, seconds: float = 10) -> tuple[list[int], bytes, bool]:
    """(statuses, what came, whether the server closed) after `data`; an answer on an open connection is waited for for
    `seconds`."""
    found, closed = b"", False
    with socket.create_connection(server, timeout=seconds) as connection:
        connection.sendall(data)
        try:
            while not closed:
                part = connection.recv(1 << 16)
                found, closed = found + part, not part
        except TimeoutError:
            pass
        except ConnectionResetError:
            closed = True
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", found)], found, closed


@pytest.mark.parametrize(
    ("data", "status"),
    [
        # no HTTP
        (b"nonsense\r\n\r\n", 400),
        (bytes(100), 400),
        (b"\r\n\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n", 400),  # a TLS hello
        (b"GET /health\r\n\r\n", 400),
        (b"GET /health HTTP/1.1 x\r\n" + HOST + b"\r\n", 400),
        (b"GET /health HTTP/0.9\r\n\r\n", 400),
        (b"GET /health HTTP/3.0\r\n\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"G\x00T /health HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n" + HOST + b"\r\n", 400),
        # headers
        (b"GET /health HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", 400),
        (GET + b"x y: z\r\n\r\n", 400),
        (GET + b"x : z\r\n\r\n", 400),
        (GET + b": z\r\n\r\n", 400),
        (GET + b"X: a\x00b\r\n\r\n", 400),
        (GET + b"X: a\rb\r\n\r\n", 400),
        (GET + b"X: " + b"x" * (40 << 10) + b"\r\n\r\n", 431),
        (b"GET /" + b"x" * (40 << 10), 431),
        # lengths
        (POST + b"Content-Length: 15\r\nContent-Length: 16\r\n\r\n" + BODY, 400),
        (POST + b"Content-Length: 15, 16\r\n\r\n" + BODY, 400),
        (POST + b"Content-Length: -1\r\n\r\n", 400),
        (POST + b"Content-Length: +15\r\n\r\n" + BODY, 400),
        (POST + b"Content-Length: 0x0f\r\n\r\n" + BODY, 400),
        (POST + b"Content-Length: \r\n\r\n" + BODY, 400),
        (POST + b"Content-Length: 99999999999999999999999\r\n\r\n", 400),
        (POST + b"Content-Length: 15\r\n" + CHUNKED + b"f\r\n" + BODY + b"\r\n0\r\n\r\n", 400),
        (POST + b"Content-Length: 0\r\n" + CHUNKED + b"f\r\n" + BODY + b"\r\n0\r\n\r\n", 400),
        # chunks
        (POST + b"Transfer-Encoding: gzip\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked, gzip\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: xchunked\r\n\r\n", 501),
        (POST + b"Transfer-Encoding: chunked\r\n" + CHUNKED + b"0\r\n\r\n", 501),
        (POST + CHUNKED + b"zz\r\n" + BODY, 400),
        (POST + CHUNKED + b"-1\r\n" + BODY, 400),
        (POST + CHUNKED + b"f" * 30 + b"\r\n" + BODY, 400),
        (POST + CHUNKED + b"f\r\n" + BODY + b"xx0\r\n\r\n", 400),
        (POST + CHUNKED + b"f;" + b"x" * (40 << 10), 431),
    ],
)
def test_refused_and_closed(data: bytes, status: int, server: tuple[str, int]) -> None:
    began = time.monotonic()
    statuses, found, closed = answers(server, data)
    assert closed
    assert time.monotonic() - began < 5
    assert statuses[:1] == [status], found
    assert all(status >= 400 for status in statuses)
    error = json.JSONDecoder().raw_decode(found.partition(b"\r\n\r\n")[2].decode())[0]["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == ("headers_too_large" if status == 431 else "invalid_http")


@pytest.mark.parametrize(
    ("data", "statuses"),
    [
        (b"GET /health HTTP/1.0\r\n\r\n", [200]),
        (b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", [200]),
        (GET + CLOSE, [200]),
        (GET + b"X: 1\r\n folded\r\n" + CLOSE, [200]),
        (GET + b"Upgrade: websocket\r\n" + CLOSE, [200]),
        (GET + b"Content-Length: 5\r\n\r\nhello" + GET + CLOSE, [200, 200]),
        ((GET + b"\r\n") * 3 + GET + CLOSE, [200] * 4),  # pipelined
        (POST + b"Content-Length: 15\r\n\r\n" + BODY + POST + b"Content-Length: 15\r\n" + CLOSE + BODY, [200, 200]),
        (POST + b"Content-Length: 15\r\n\r\n" + BODY + b"garbage\r\n\r\n", [200, 400]),
        (POST + b"Content-Length: 15\r\nContent-Length: 15\r\n" + CLOSE + BODY, [200]),
        (POST + b"Connection: close\r\n" + CHUNKED + b"f;a=b\r\n" + BODY + b"\r\n0\r\nTrailer: x\r\n\r\n", [200]),
        (POST + b"Expect: 100-continue\r\nContent-Length: 15\r\n" + CLOSE + BODY, [100, 200]),
        (POST + CLOSE, [400]),  # no body: no JSON
        (b"GET /%00 HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"GET /%zz HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"GET /%ff HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"GET /health/..%2fprops HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"GET /../../etc/passwd HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"GET //health HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"GET http://evil.org/health HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"CONNECT evil.org:443 HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"OPTIONS * HTTP/1.1\r\n" + HOST + CLOSE, [404]),
        (b"TRACE /health HTTP/1.1\r\n" + HOST + CLOSE, [405]),
    ],
)
def test_answered(data: bytes, statuses: list[int], server: tuple[str, int]) -> None:
    found, content, closed = answers(server, data)
    assert found == statuses, content
    assert closed
    assert b"Traceback" not in content


def test_a_length_that_is_announced_too_large(server: tuple[str, int]) -> None:
    """The refusal comes at once; the connection stays for a while, so that it is not lost."""
    statuses, found, closed = answers(server, POST + b"Content-Length: 100000000000\r\n\r\n", 1)
    assert (statuses, closed) == ([413], False)
    assert b'"code":"request_too_large"' in found
