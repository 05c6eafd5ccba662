"""The application: what surrounds each endpoint."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemmart import __version__
from gemmart.model import Model
from gemmart.server import limits
from gemmart.server.access import Access, Cors, path_of
from gemmart.server.endpoints import ENDPOINTS, dialect_of
from gemmart.server.errors import (
    ClientGone,
    Dialect,
    HttpError,
    answers_errors,
    draining,
    loading,
    too_many_connections,
    unsupported,
)
from gemmart.server.generation import Generation
from gemmart.server.metrics import Metrics

log = logging.getLogger("gemmart.server")

HTTP_VERSIONS = ("1.0", "1.1", "2", "3")
PATHS: dict[object, str] = {endpoint.handler: endpoint.path for endpoint in ENDPOINTS}


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """Who may ask, and how much."""

    api_keys: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()  # names in Host beside those of this machine; "*": all
    cors_origins: Sequence[str] = ()  # pages that may ask, as "https://example.com"; "*": all
    request_timeout: float = limits.REQUEST_SECONDS  # for one answer
    queue: int = limits.QUEUE  # requests that may wait; more are refused
    model_id: str | None = None  # what answers call the model; None: the name of its file
    aliases: Sequence[str] = ()  # other names of it
    strict_model: bool = False  # refuse names that are not its own
    log_prompts: bool = False
    allow_request_template: bool = False  # chat_template in a request, which is rendered in a sandbox
    share_cache: bool = False  # computed prefixes are shared between keys, whose holders can then tell by the time


@dataclass(slots=True)
class Record:
    """What the log says of a request."""

    dialect: Dialect
    id: str = field(default_factory=lambda: "req_" + secrets.token_hex(12))
    status: int = 0
    error: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0


class App:
    """The ASGI application over one model. It belongs to one event loop."""

    endpoints = ENDPOINTS

    def __init__(self, options: AppOptions, model: Model | None = None, *, local: bool = True) -> None:
        """Without a model, it says that it is loading until attach(). local: only this machine reaches it. Raises
        InvalidRequest for a wrong option."""
        self._options = options
        self._model: Model | None = None
        self.access = Access(
            keys=options.api_keys,
            allowed_hosts=options.allowed_hosts,
            cors_origins=options.cors_origins,
            local=local,
            share_cache=options.share_cache,
            open_paths=[endpoint.path for endpoint in ENDPOINTS if not endpoint.key],
        )
        self.metrics = Metrics(lambda: self._model)
        self.is_draining = False
        self._under_way: set[Generation] = set()
        routes = [Route(endpoint.path, endpoint.handler, methods=[endpoint.method]) for endpoint in ENDPOINTS]
        self._router = Router(routes, redirect_slashes=False)
        self._inner: ASGIApp = answers_errors(self._with_key)
        if options.cors_origins:
            self._inner = Cors(
                self._inner,
                allow_origins=options.cors_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        self._outer = answers_errors(self._from_here)
        if model is not None:
            self.attach(model)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._router(scope, receive, send)
            return
        scope["app"] = self
        record = scope["gemmart"] = Record(dialect_of(path_of(scope)))
        began = time.monotonic()

        async def with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                ids = [(name, record.id.encode()) for name in record.dialect.id_headers]
                message = {**message, "headers": [*message["headers"], *ids]}
            await send(message)

        try:
            await self._outer(scope, receive, with_id)
        except ClientGone:
            record.status, record.error = 499, "cancelled"
        except Exception as error:  # after an answer has begun
            record.error = "internal_error"
            log.error("%s: %s", record.id, error, exc_info=error)
            raise
        finally:
            path = PATHS.get(scope.get("endpoint", 0), "")
            self.metrics.count_request(path, record.status)
            quiet = path == "/health" and record.status == 200  # it is asked every few seconds
            fields = _fields(record, scope, time.monotonic() - began)
            log.log(logging.DEBUG if quiet else logging.INFO, "%s", _line(fields), extra={"fields": fields})

    async def _from_here(self, scope: Scope, receive: Receive, send: Send) -> None:
        """What no other origin may ask, nor at such length."""
        _check_http(scope)
        if len(_target(scope)) > limits.URL_BYTES:
            raise HttpError(414, "uri_too_long", f"the URL has more than {limits.URL_BYTES} bytes")
        headers = scope["headers"]
        if len(headers) > limits.HEADERS or sum(map(len, chain(*headers))) > limits.HEADER_BYTES:
            message = f"the headers are more than {limits.HEADERS} or longer than {limits.HEADER_BYTES} bytes"
            raise HttpError(431, "headers_too_large", message, headers={"Connection": "close"})
        self.access.check_browser(scope)
        is_full = scope.get("state", {}).get("is_full")  # Connection tells it, where that is whose connection this is
        if is_full and not self.access.is_open(scope) and is_full():
            raise too_many_connections()
        await self._inner(scope, receive, send)

    async def _with_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.access.check_key(scope)
        await self._router(scope, receive, send)

    @property
    def model(self) -> Model:
        """Raises HttpError 503 while it loads, and when it is closed."""
        if self._model is None:
            raise loading()
        if self._model.is_closed:
            raise draining()
        return self._model

    def attach(self, model: Model) -> None:
        """The model has been loaded."""
        self.model_id = self._options.model_id or model.info.path.stem
        # The build, the instruction set and the layers on GPUs: beside the seed, what a text depends on.
        gpus = (f"{gpu.device.partition(':')[0]}{gpu.n_layers + gpu.head}" for gpu in model.plan.gpus)
        self.fingerprint = "-".join(["gemmart", __version__, model.isa, *gpus])
        self._attached = int(time.time())
        self.modified: float = self._attached
        with suppress(OSError):  # the file may be gone, and is used all the same
            self.modified = model.info.path.stat().st_mtime
        self._model = model

    def check_name(self, name: str | None, *, strict: bool = False) -> None:
        """Whether the model may be called so; none or an empty name is its own. Raises HttpError 404 where names
        count and this is not one of them; `strict`: they do, and it needs one."""
        names = {self.model.info.name, self.model_id, *self._options.aliases}
        if (strict or (self._options.strict_model and name)) and name not in names:
            message = f"model: {(name or '')[:200]!r} is not served here; there is {self.model_id}"
            raise HttpError(404, "model_not_found", message, param="model")

    def template_of(self, source: str | None) -> str | None:
        """The chat template of a request, if it has one. Raises HttpError where that is not allowed."""
        if source and not self._options.allow_request_template:
            raise unsupported(
                "chat_template", "this server takes no templates from requests; --allow-request-template lets it"
            )
        return source or None

    def describe(self) -> dict[str, Any]:
        """The model as OpenAI lists it."""
        info = self.model.info
        return {
            "id": self.model_id,
            "object": "model",
            "created": self._attached,
            "owned_by": "gemmart",
            "meta": {
                "name": info.name,
                "family": info.family,
                "n_vocab": info.n_vocab,
                "n_ctx": self.model.ctx,
                "n_ctx_train": info.n_ctx_train,
                "n_embd": info.dim,
                "n_params": info.n_parameters,
                "size": info.file_bytes,
                "quantization": info.quantization,
            },
        }

    def log_prompt(self, request: Request, prompt: Any) -> None:
        """Only where it is asked for."""
        if self._options.log_prompts:
            record: Record = request.scope["gemmart"]
            log.info("%s prompt: %s", record.id, msgspec.json.encode(prompt).decode())

    def admit(self) -> Generation:
        """A place for a new generation. Raises HttpError: 503 while loading or ending, 429 where too many wait."""
        if self.is_draining:
            raise draining()
        waiting = self.model.n_requests[1] + sum(generation.is_preparing for generation in self._under_way)
        if waiting >= self._options.queue:
            raise HttpError(
                429,
                "queue_full",
                f"{waiting} requests wait already, and at most {self._options.queue} may",
                headers={"Retry-After": "1"},
            )
        return Generation(self.model, self._options.request_timeout, self._under_way)

    async def drain(self, seconds: float) -> None:
        """Take nothing new; wait for what runs, up to `seconds`, then end it with an error."""
        self.is_draining = True
        end = time.monotonic() + seconds
        while self._under_way and time.monotonic() < end:
            await asyncio.sleep(0.02)
        for generation in self._under_way:
            generation.fail(draining())


def _check_http(scope: Scope) -> None:
    """Raises HttpError 400 for what h11 lets through: versions that there are not, and two lengths of a body, of which
    a proxy before us may have taken the other one."""
    names = {name for name, _ in scope["headers"]}
    why = None
    if scope["http_version"] not in HTTP_VERSIONS:
        why = f"there is no HTTP/{scope['http_version']}"
    elif {b"content-length", b"transfer-encoding"} <= names:
        why = "Content-Length and Transfer-Encoding exclude each other"
    if why:
        raise HttpError(400, "invalid_http", why, headers={"Connection": "close"})


def _target(scope: Scope) -> bytes:
    """Path and query as they were sent, so without control characters."""
    path = scope.get("raw_path") or quote(scope["path"]).encode()
    query = scope["query_string"]
    return bytes(path + b"?" + query if query else path)


def _fields(record: Record, scope: Scope, seconds: float) -> dict[str, Any]:
    """What the log says of a request; as JSON, part of its line."""
    path = _target(scope).partition(b"?")[0].decode("ascii", "backslashreplace")
    return {
        "id": record.id,
        "method": scope["method"],
        "path": path[:200],
        "status": record.status,
        "error": record.error,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "ms": round(1000 * seconds),
    }


def _line(fields: dict[str, Any]) -> str:
    parts = [str(fields[name]) for name in ("id", "method", "path", "status", "error") if fields[name] is not None]
    if fields["prompt_tokens"] is not None:
        parts.append(f"{fields['prompt_tokens']}+{fields['completion_tokens']} tokens")
    return " ".join([*parts, f"{fields['ms']} ms"])
