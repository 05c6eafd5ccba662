"""Who may ask the server: names in Host, pages in Origin, keys, types of bodies."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

import gemmart
from conftest import Tiny
from gemmart.server.endpoints import ENDPOINTS
from program import run
from serving import CHAT, TEXT, error_of, question, serving

KEY, OTHER = "sk-first", "sk-second"
ROUTES = [
    *((endpoint.method, re.sub(r"\{.*?\}", "x", endpoint.path)) for endpoint in ENDPOINTS if endpoint.key),
    ("GET", "/nowhere"), ("GET", "/health/../props"), ("GET", "/health/"), ("GET", "//health"),
    ("GET", "/%68ealth%2f..%2fprops"), ("GET", "/props?/health"), ("GET", "/HEALTH"), ("GET", "/health%00"),
    ("OPTIONS", "/props"), ("HEAD", "/props"), ("DELETE", "/health/x"), ("GET", "/page"), ("GET", "//"),
    ("GET", "/props/page/main.js"),
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemmart.Model) -> Iterator[str]:
    with model.serve() as running:
        yield running.url


@pytest.fixture(scope="module")
def open_url(model: gemmart.Model) -> Iterator[str]:
    """A server that other machines can reach."""
    with model.serve("0.0.0.0", allowed_hosts=["chat.example.com"]) as running:
        yield running.url


def get(url: str, path: str = "/health", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    """With the path and the headers exactly as they are given."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    response.body = response.read()  # type: ignore[attr-defined]
    connection.close()
    return response


@pytest.mark.parametrize(
    ("host", "allowed", "allowed_beyond"),
    [
        ("localhost", True, True),
        ("localhost:8080", True, True),
        ("LocalHost", True, True),
        ("localhost.", True, True),
        ("chat.localhost", True, True),
        ("127.0.0.1", True, True),
        ("127.0.0.1:1", True, True),
        ("127.8.9.1", True, True),
        ("[::1]:8080", True, True),
        ("[::ffff:127.0.0.1]", True, True),
        ("192.168.1.7:8080", False, True),
        ("0.0.0.0", False, True),
        ("[2001:db8::1]", False, True),
        (socket.gethostname(), False, True),
        ("chat.example.com", False, True),
        ("CHAT.example.com:443", False, True),
        ("example.com", False, False),
        ("evil.chat.example.com", False, False),
        ("chat.example.com.evil.org", False, False),
        ("localhost.evil.org", False, False),
        ("evillocalhost", False, False),
        ("127.0.0.1.evil.org", False, False),
        ("127.0.0.1.nip.io", False, False),
        ("127.1", False, False),
        ("2130706433", False, False),
        ("0x7f.1", False, False),
        ("[::1", True, True),
        ("", False, False),
        ("localhost@evil.org", False, False),
        ("evil.org#localhost", False, False),
        ("[evil.org]", False, False),
    ],
)
def test_hosts(host: str, allowed: bool, allowed_beyond: bool, url: str, open_url: str) -> None:
    for where, expected in ((url, allowed), (open_url, allowed_beyond)):
        response = get(where, Host=host)
        assert response.status == (200 if expected else 403), (host, where)
        if not expected:
            assert json.loads(response.body)["error"]["code"] == "forbidden_host"


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        ("http://localhost:8080", True),
        ("https://localhost:8080", True),
        ("https://app.example.com", True),
        ("https://app.example.com:443", True),
        ("http://app.example.com", False),
        ("https://app.example.com:444", False),
        ("https://evil.example.com", False),
        ("https://app.example.com.evil.org", False),
        ("http://localhost", False),
        ("http://localhost:8081", False),
        ("http://127.0.0.1:8080", False),
        ("null", False),
        ("", False),
        ("*", False),
        ("file://", False),
        ("http://", False),
        ("localhost:8080", False),
        ("chrome-extension://abcdef", False),
        ("http://evil.org@localhost:8080", True),
        ("http://localhost:8080@evil.org", False),
        ("http://localhost:99999", False),
        ("http://localhost:x", False),
        ("http://[::1]:8080", False),
        ("https://app.example.com/", True),
        ("https://app.example.com:443:443", False),
        ("https://APP.example.com", True),
        ("https://sub.app.example.com", False),
        ("https://app.example.com\\@evil.org", False),
        ("https://app.example.com@evil.org", False),
        ("//app.example.com", False),
        ("data:text/html,x", False),
    ],
)
def test_origins(origin: str, allowed: bool, model: gemmart.Model) -> None:
    with model.serve(cors_origins=["https://app.example.com"]) as running:
        response = get(running.url, Host="localhost:8080", Origin=origin)
        assert response.status == (200 if allowed else 403)
        assert response.headers.get("access-control-allow-credentials") is None
        if not allowed:
            assert json.loads(response.body)["error"]["code"] == "forbidden_origin"
            assert response.headers.get("access-control-allow-origin") is None


def test_cors(model: gemmart.Model) -> None:
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "authorization,content-type,x-stainless-os"
    with model.serve(cors_origins=["https://app.example.com"], api_keys=[KEY]) as running:
        answer = httpx.options(running.url + CHAT, headers=asked)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example.com"
        assert "x-stainless-os" in answer.headers["access-control-allow-headers"]
        refused = httpx.options(running.url + CHAT, headers=asked | {"Access-Control-Request-Method": "DELETE"})
        assert "method" in error_of(refused, 403, "forbidden_origin")["message"]
        refused = httpx.get(running.url + "/props", headers={"Origin": "https://app.example.com"})
        error_of(refused, 401, "invalid_api_key")
        assert refused.headers["access-control-allow-origin"] == "https://app.example.com"
    with model.serve(cors_origins=["*"]) as running:
        answer = httpx.get(running.url + "/props", headers={"Origin": "https://any.org"})
        assert answer.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in answer.headers
    with model.serve() as running:
        error_of(httpx.options(running.url + CHAT, headers=asked), 403, "forbidden_origin")
        assert "access-control-allow-origin" not in httpx.get(running.url + "/props").headers


@pytest.mark.parametrize("wrong", ["example.com", "ftp://x", "", "https://"])
def test_wrong_origins_are_told(wrong: str, model: gemmart.Model) -> None:
    with pytest.raises(gemmart.InvalidRequest, match="origin"):
        model.asgi(cors_origins=[wrong])


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/jsonx",
        "",
    ],
)
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize", "/apply-template"])
def test_bodies_must_be_json(content_type: str | None, path: str, url: str) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    body = json.dumps(question()).encode()
    error_of(httpx.post(url + path, content=body, headers=headers), 415, "unsupported_media_type")


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_is_json(content_type: str, url: str) -> None:
    body = json.dumps(question(max_tokens=0)).encode()
    assert httpx.post(url + CHAT, content=body, headers={"content-type": content_type}).status_code == 200


@pytest.fixture(scope="module")
def locked(model: gemmart.Model) -> Iterator[str]:
    with model.serve(api_keys=[KEY, OTHER]) as running:
        yield running.url


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": f"Bearer {KEY} x"},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}{OTHER}"},
        {"X_Api_Key": "wrong"},
        {"X_Api_Key": ""},
        {"X_Api_Key": "\xff"},
        {"Cookie": f"key={KEY}"},
    ],
)
def test_no_key(method: str, path: str, headers: dict[str, str], locked: str) -> None:
    response = get(locked, path, method, Host="localhost", **headers)
    assert response.status == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert method == "HEAD" or b"an API key is needed" in response.body
    assert KEY.encode() not in response.body


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_a_large_key_is_no_key(method: str, path: str, locked: str) -> None:
    response = get(locked, path, method, Host="localhost", X_Api_Key="x" * (20 << 10))
    assert response.status == 401
    with contextlib.suppress(OSError):  # it may close before all is sent
        assert get(locked, path, method, Host="localhost", X_Api_Key="x" * (1 << 20)).status == 431


def test_keys(locked: str) -> None:
    assert httpx.get(locked + "/health").status_code == 200
    for headers in (
        {"Authorization": f"Bearer {KEY}"},
        {"Authorization": f"bearer  {OTHER}"},
        {"X-Api-Key": KEY},
    ):
        answer = httpx.get(locked + "/props", headers=headers)
        assert answer.status_code == 200
        assert KEY not in answer.text
        assert httpx.post(locked + CHAT, json=question(max_tokens=0), headers=headers).status_code == 200
        error_of(httpx.get(locked + "/nowhere", headers=headers), 404, "not_found")


def test_prefixes_are_shared_within_a_key(locked: str) -> None:
    def cached(key: str) -> int:
        headers = {"X-Api-Key": key}
        answer = httpx.post(locked + CHAT, json=question("word " * 15, max_tokens=1), headers=headers)
        found: dict[str, Any] = answer.json()["usage"]["prompt_tokens_details"]
        return found["cached_tokens"]

    assert [cached(key) for key in (KEY, KEY, OTHER, OTHER)] == [0, 32, 0, 32]


def test_prefixes_are_shared_by_all_where_that_is_asked_for(model: gemmart.Model) -> None:
    with model.serve(api_keys=[KEY, OTHER], share_cache=True) as running:

        def cached(key: str) -> int:
            body = question("what word " * 15, max_tokens=1)
            answer = httpx.post(running.url + CHAT, json=body, headers={"X-Api-Key": key})
            found: dict[str, Any] = answer.json()["usage"]["prompt_tokens_details"]
            return found["cached_tokens"]

        assert [cached(key) for key in (KEY, OTHER)] == [0, 32]


@pytest.mark.parametrize("key", ["", " x", "x\n", "é", "a\x00"])
def test_keys_that_no_header_carries(key: str, model: gemmart.Model) -> None:
    with pytest.raises(gemmart.InvalidRequest, match="API key"):
        model.asgi(api_keys=[key])


def test_exposure_is_told(model: gemmart.Model, caplog: pytest.LogCaptureFixture) -> None:
    for host, options, loud in (
        ("127.0.0.1", {}, False),
        ("localhost", {}, False),
        ("0.0.0.0", {}, True),
        ("0.0.0.0", {"api_keys": [KEY]}, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "gemmart.server"), model.serve(host, **options):
            assert ("ANYBODY" in caplog.text) == loud
    with pytest.raises(gemmart.InvalidRequest, match="API key"):
        model.serve("0.0.0.0", require_key=True)


def test_default_is_this_machine_alone(model: gemmart.Model) -> None:
    with model.serve() as running:
        assert running.url.startswith("http://127.0.0.1:")


def test_keys_of_the_program(tiny: Tiny, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"{KEY}\n\n{OTHER}\n")
    path = tiny("gemma2", "Q8_0")
    with serving(path, tmp_path, "--host", "0.0.0.0", "--api-key-file", str(file), GEMMART_API_KEY="third") as running:
        for key, status in ((KEY, 200), (OTHER, 200), ("third", 200), ("fourth", 401)):
            assert httpx.get(running.url + "/props", headers={"X-Api-Key": key}).status_code == status
        assert "ANYBODY" not in running.log
        for secret in (KEY, OTHER, "third"):
            assert secret not in running.log
    with serving(path, tmp_path, "--host", "0.0.0.0", "-c", "128") as running:
        assert "ANYBODY who reaches 0.0.0.0 may use this server" in running.log
    with serving(path, tmp_path, "--api-key", KEY) as running:
        assert "--api-key: everybody on this machine can see arguments" in running.log


@pytest.mark.parametrize(
    ("arguments", "environ", "said"),
    [
        (["--host", "0.0.0.0"], {"GEMMART_REQUIRE_KEY": "1"}, "needs an API key"),
        (["--api-key-file", "/nowhere"], {}, "--api-key-file"),
        (["--api-key-file", "/dev/null"], {}, "holds no key"),
        (["--cors-origin", "example.com"], {}, "origin"),
        (["--ssl-certfile", "/nowhere"], {}, "ssl_certfile"),
    ],
)
def test_refused_at_the_start(
    arguments: list[str], environ: dict[str, str], said: str, tiny: Tiny, tmp_path: Path
) -> None:
    done = run("serve", tiny("gemma2", "Q8_0"), "--port", "0", *arguments, home=tmp_path, **environ)
    assert done.returncode == 2
    assert said in done.stderr.decode().splitlines()[-1]
