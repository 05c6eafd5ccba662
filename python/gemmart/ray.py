"""Several machines: a model as a Ray Serve application, replicas of one HTTP server behind one address.

Ray Serve starts the replicas, watches them, adds some as requests queue up, and chooses one for each request with its
consistent-hash router. Here is what it cannot know: the key by which it chooses, so that chats with the same system
prompt meet where that is computed already."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from itertools import takewhile
from typing import Any

import msgspec
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from gemmart.errors import GemmartError, InvalidRequest
from gemmart.loading import load
from gemmart.server import body, errors, limits
from gemmart.server.access import path_of
from gemmart.server.app import App, AppOptions
from gemmart.server.endpoints import dialect_of

log = logging.getLogger("gemmart.server")

INGRESS_REQUESTS = 64
"""How many one process passes on before there come to be more such processes."""
ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
SCOPE = {
    *("type", "asgi", "http_version", "method", "scheme", "path", "raw_path", "root_path", "query_string"),
    *("headers", "client", "server"),
}
"""What of a request goes to the replica; the rest belongs to a process."""


def app(
    ref: str | None = None,
    *,
    threads: int,
    replicas: int | tuple[int, int] = 1,
    requests: int = 8,
    drain: float = limits.DRAIN_SECONDS,
    server: Mapping[str, Any] | None = None,
    **options: Any,
) -> serve.Application:
    """The application, for serve.run(). ref: the model, which each machine finds as load() does. threads: of each
    replica, and the CPUs that Ray keeps for it. replicas: how many; or the fewest and the most. requests: how many a
    replica is meant to have at a time: where there are more, Ray adds replicas, and twice as many are the most that one
    is given. drain: seconds that answers under way have when a replica ends. server: options of Model.asgi(), such as
    `allowed_hosts` where other machines ask. The others are those of load().

    Raises InvalidRequest."""
    fewest, most = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 1 <= fewest <= most:
        raise InvalidRequest(f"replicas: {replicas!r}, expected 1 or more, or the fewest and the most", "replicas")
    replica = serve.deployment(
        Replica,
        autoscaling_config={"min_replicas": fewest, "max_replicas": most, "target_ongoing_requests": requests},
        max_ongoing_requests=2 * requests,
        max_queued_requests=limits.QUEUE,
        request_router_config={
            "request_router_class": ROUTER,
            "request_router_kwargs": {"num_fallback_replicas": most},
        },
        ray_actor_options={"num_cpus": threads},
        graceful_shutdown_timeout_s=drain,
    )
    ingress = serve.deployment(
        Ingress,
        autoscaling_config={"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": INGRESS_REQUESTS},
        max_ongoing_requests=100 * INGRESS_REQUESTS,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(replica.bind(ref, {**options, "threads": threads}, AppOptions(**(server or {}))))


class Replica:
    """A model and the ASGI application over it."""

    def __init__(self, ref: str | None, options: dict[str, Any], server: AppOptions) -> None:
        self._model = load(ref, **options)
        self._app = App(server, self._model)

    async def answer(self, scope: Scope, data: bytes) -> AsyncIterator[Message]:
        """What the application sends for a request with the body `data`. To cancel this is to leave."""
        received: asyncio.Queue[Message] = asyncio.Queue()
        received.put_nowait({"type": "http.request", "body": data, "more_body": False})
        sent: asyncio.Queue[Message | None] = asyncio.Queue()
        answering = asyncio.create_task(self._app(scope, received.get, sent.put))
        answering.add_done_callback(lambda _: sent.put_nowait(None))
        try:
            while (message := await sent.get()) is not None:
                yield message
        finally:
            received.put_nowait({"type": "http.disconnect"})
            await answering


class Ingress:
    """What Ray's HTTP proxies ask: it chooses the key, and passes on what the replica sends."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._replicas = replicas

    async def __call__(self, request: Request) -> Response:
        try:
            data = await body.read_bytes(request)
            scope = {name: value for name, value in request.scope.items() if name in SCOPE}
            replicas = self._replicas.options(session_id=prefix_key(request, data), stream=True)
            messages = replicas.answer.remote(scope, data)
            return _Relayed(await anext(messages), messages)
        except errors.ClientGone:
            return Response(status_code=499)
        except Exception as error:
            told = _public(error)
            dialect = dialect_of(path_of(request.scope))
            return errors.response(told, dialect.body(told, request.headers.get("x-request-id", "")))


class _Relayed(Response):
    """An answer that a replica sends."""

    def __init__(self, first: Message, rest: AsyncIterator[Message]) -> None:
        super().__init__()
        self._first = first
        self._rest = rest

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Ray's proxy has a request id of its own.
        headers = [header for header in self._first["headers"] if header[0] != b"x-request-id"]
        await send({**self._first, "headers": headers})
        async for message in self._rest:
            await send(message)


def prefix_key(request: Request, data: bytes) -> str:
    """What requests have in common that begin with the same system prompt, or where there is none with the same first
    message, and have the same API key; "" for any other request, which no replica suits better."""
    try:
        asked = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return ""  # the replica says what is wrong
    if not isinstance(asked, dict):
        return ""
    messages = asked.get("messages")
    messages = messages if isinstance(messages, list) else []
    system = [asked.get("system"), asked.get("instructions"), *takewhile(_is_system, messages)]
    start = system if any(system) else messages[:1]
    if not start:
        return ""
    keys = [request.headers.get(name) for name in ("authorization", "x-api-key")]
    return hashlib.sha256(msgspec.json.encode([keys, start])).hexdigest()


def _is_system(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") in ("system", "developer")


def _public(error: Exception) -> GemmartError:
    if isinstance(error, BackPressureError):
        return errors.HttpError(429, "queue_full", "too many requests wait already", headers={"Retry-After": "1"})
    if not isinstance(error, GemmartError):
        log.error("%s", error, exc_info=error)
    if isinstance(error, RayError | RayServeException):
        return errors.HttpError(503, "unavailable", "no replica can answer; the server's log says why")
    return errors.public(error)
