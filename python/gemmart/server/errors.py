"""One shape for every refusal: OpenAI's `{"error": {"message", "type", "param", "code"}}`, or that of the protocol to
which the path belongs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemmart.errors import ContextOverflow, GemmartError, InternalError, OutOfMemory
from gemmart.server.replies import Error

log = logging.getLogger("gemmart.server")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "unavailable_error",
    504: "server_error",
}
"""What OpenAI calls a status; every other one is an invalid_request_error."""

NOT_AGAIN = ("internal_error", "numeric_error", "deadline_exceeded")
"""Codes of errors that come back if the same is asked again; clients repeat what fails with their statuses."""


MISSING = "there is no such endpoint"
"""What 404 says of a path."""


class HttpError(GemmartError):
    """A refusal that only HTTP knows."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.http_status = status
        self.http_code = code
        self.param = param
        self.headers = dict(headers or {})


class ClientGone(Exception):
    """Whoever asked has left; nobody reads an answer."""


def loading() -> HttpError:
    return HttpError(503, "model_loading", "the model is still loading", headers={"Retry-After": "1"})


def draining() -> HttpError:
    return HttpError(503, "draining", "the server is shutting down", headers={"Retry-After": "1"})


def too_many_connections() -> HttpError:
    headers = {"Retry-After": "1", "Connection": "close"}
    return HttpError(503, "too_many_connections", "too many connections", headers=headers)


def unsupported(param: str, why: str) -> HttpError:
    return HttpError(400, "unsupported_parameter", f"{param}: {why}", param=param)


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a protocol tells errors, and the id of a request."""

    body: Callable[[GemmartError, str], dict[str, Any]]  # for an error in the request of that id
    error: type  # of that body
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    missing: str = MISSING


def public(error: Exception, missing: str = MISSING) -> GemmartError:
    """What a client is told of any exception."""
    if isinstance(error, GemmartError) and not isinstance(error, InternalError):
        return error
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
        message = {404: missing, 405: "this endpoint does not have this method"}
        return HttpError(error.status_code, code, message.get(error.status_code, error.detail), headers=error.headers)
    if isinstance(error, MemoryError):
        return OutOfMemory("memory ran out")
    return InternalError("an internal error; the server's log has more under this request's x-request-id")


def body(error: GemmartError) -> dict[str, Any]:
    """The JSON that stands for an error, as OpenAI has it."""
    status = error.http_status
    found: dict[str, Any] = {
        "message": str(error),
        "type": TYPES.get(status, "invalid_request_error"),
        "param": getattr(error, "param", None),
        "code": error.http_code,
    }
    if isinstance(error, ContextOverflow):
        found |= {"n_prompt_tokens": error.n_prompt, "n_ctx": error.n_ctx}
    return {"error": found}


OPENAI = Dialect(lambda error, request_id: body(error), Error)


def response(error: GemmartError, body: dict[str, Any]) -> Response:
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if error.http_code in NOT_AGAIN:
        headers["x-should-retry"] = "false"
    if isinstance(error, OutOfMemory):
        headers["Retry-After"] = "1"
    return Response(
        msgspec.json.encode(body), status_code=error.http_status, headers=headers, media_type="application/json"
    )


def answers_errors(app: ASGIApp) -> ASGIApp:
    """`app`, whose exceptions become answers. Once an answer has begun, or if nobody reads it, they go on upwards."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await app(scope, receive, watched)
        except ClientGone:
            raise
        except Exception as error:
            if begun:
                raise
            record = scope["gemmart"]
            told = public(error, record.dialect.missing)
            record.error = told.http_code
            if told.http_status == 500:
                log.error("%s: %s", record.id, error, exc_info=error)
            await response(told, record.dialect.body(told, record.id))(scope, receive, send)

    return wrapped
