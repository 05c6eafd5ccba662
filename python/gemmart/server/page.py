"""The web page at `/`: files that lie beside this one in `page/`, as they are."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from gemmart.server.errors import HttpError

FOLDER = Path(__file__).with_name("page")

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    "": "text/plain; charset=utf-8",  # a licence
}
HEADERS = {
    # The page's own files alone: nothing from elsewhere, no inline script or style, no HTML that is not sanitised.
    "Content-Security-Policy": "; ".join(
        (
            "default-src 'none'",
            "script-src 'self'",
            "style-src 'self'",
            "img-src 'self' data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            "require-trusted-types-for 'script'",
            "trusted-types dompurify",
        )
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again with its ETag
}


class File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


@cache
def _files() -> dict[str, File]:
    """What is served, by its path in the folder."""
    found = {}
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.suffix in TYPES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.relative_to(FOLDER).as_posix()] = File(content, TYPES[path.suffix], etag)
    return found


async def index(request: Request) -> Response:
    return _answer(request, "index.html")


async def file(request: Request) -> Response:
    return _answer(request, request.path_params["name"])


def _answer(request: Request, name: str) -> Response:
    found = _files().get(name)
    if found is None:
        raise HttpError(404, "not_found", "the page has no such file")
    headers = HEADERS | {"ETag": found.etag}
    known = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
    if found.etag in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return Response(found.content, headers=headers, media_type=found.media_type)


def packages() -> list[dict[str, str]]:
    """The packages whose files the page carries unchanged: name, version, license."""
    found: list[dict[str, str]] = json.loads((FOLDER / "vendor" / "packages.json").read_bytes())
    return found
