"""A small server that speaks enough of the hub's protocol to fetch a model from, and that can be told to misbehave."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """One repository and its faults. `requests` holds (method, path, Range header) of what was asked."""

    repo: str
    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)  # the next downloads end after so many bytes of the body
    sent: dict[str, bytes] = field(default_factory=dict)  # what is sent instead of the file that is recorded
    ignore_range: bool = False
    gated: bool = False
    status: int = 200
    silent: bool = False
    elsewhere: str | None = None  # where the bytes are, on another host
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)

    def __enter__(self) -> Hub:
        hub = self

        class Handler(_Handler):
            state = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.silence_over = threading.Event()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.silence_over.set()
        self._server.shutdown()
        self._server.server_close()

    def downloads(self) -> list[str | None]:
        """The Range headers of the downloads so far."""
        return [span for method, path, span in self.requests if method == "GET" and "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.state, urlsplit(self.path).path
        hub.requests.append((self.command, path, self.headers["Range"]))
        if hub.silent:
            hub.silence_over.wait(60)
            self.close_connection = True
        elif hub.status != 200:
            self._answer(hub.status, b"{}")
        elif path == f"/api/models/{hub.repo}":
            siblings = [
                {
                    "rfilename": name,
                    "size": len(data),
                    "blobId": "0" * 40,
                    "lfs": {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130},
                }
                for name, data in hub.files.items()
            ]
            self._answer(200, json.dumps({"id": hub.repo, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/{hub.repo}/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/{hub.repo}/resolve/{COMMIT}/")
            if hub.gated:
                self._answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
            elif hub.elsewhere is not None:
                data = hub.files[name]
                linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
                self._answer(302, b"", {"Location": hub.elsewhere, "X-Repo-Commit": COMMIT, **linked})
            else:
                self._file(name)
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        hub = self.state
        data = hub.sent.get(name, hub.files[name])
        etag = f'"{hashlib.sha256(hub.files[name]).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag, "Accept-Ranges": "bytes"}
        start = 0
        if (span := self.headers["Range"]) and not hub.ignore_range:
            start = int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(206 if start else 200, data[start:], headers, cut=self.command == "GET")

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if cut and self.state.cuts:
            body = body[: self.state.cuts.pop(0)]
            self.close_connection = True
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Site:
    """Any web server with files, and its faults. `requests` holds (path, headers) of what was asked."""

    files: dict[str, bytes]
    cuts: list[int] = field(default_factory=list)  # the next answers end after so many bytes of the body
    redirects: dict[str, str] = field(default_factory=dict)
    statuses: list[int] = field(default_factory=list)  # of the next answers
    ignore_range: bool = False
    etag: bool = True
    length: bool = True
    headers: dict[str, str] = field(default_factory=dict)  # besides the others, of every file
    slow: float = 0  # seconds between two pieces
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    n_sent: int = 0  # bytes of bodies

    def __enter__(self) -> Site:
        site = self

        class Handler(_SiteHandler):
            state = site

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _SiteHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Site

    def do_GET(self) -> None:
        site = self.state
        path = urlsplit(self.path).path
        site.requests.append((path, dict(self.headers)))
        status = site.statuses.pop(0) if site.statuses else 200
        if path in site.redirects:
            self._send(302, b"", {"Location": site.redirects[path]})
        elif status != 200 or path not in site.files:
            self._send(status if status != 200 else 404, b"no")
        else:
            self._send_file(site.files[path])

    def _send_file(self, data: bytes) -> None:
        site, start, status = self.state, 0, 200
        etag = f'"{hashlib.sha256(data).hexdigest()[:20]}"'
        headers = dict(site.headers) | ({"ETag": etag} if site.etag else {})
        span = self.headers["Range"]
        if span and not site.ignore_range and self.headers.get("If-Range", etag) == etag:
            start, status = int(span.removeprefix("bytes=").split("-")[0]), 206
            headers.setdefault("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self._send(status, data[start:], headers, cut=True)

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        site = self.state
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if site.length:
            self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        if cut and site.cuts:
            body = body[: site.cuts.pop(0)]
        step = 1 << 16
        for at in range(0, len(body), step):
            try:
                self.wfile.write(body[at : at + step])
            except OSError:  # the client has gone
                return
            site.n_sent += len(body[at : at + step])
            time.sleep(site.slow)

    def log_message(self, *_: object) -> None:
        pass
