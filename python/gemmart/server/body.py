"""The body of a request: read within limits of size and time, parsed within limits of depth, checked against a type."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from gemmart.errors import InvalidRequest
from gemmart.server import limits
from gemmart.server.errors import ClientGone, HttpError
from gemmart.server.schema import refuse_unsupported

log = logging.getLogger("gemmart.server")
T = TypeVar("T", bound=msgspec.Struct)

LARGE = 64 << 10
"""Bytes of a body from which on it is parsed beside the event loop."""
PATH = re.compile(r" - at `(?:key in )?\$\.?(.*)`$", re.DOTALL)
"""How msgspec ends a message: with the place."""
MISSING = re.compile(r"Object missing required field `(\w+)`")


def _number(text: str) -> float | int:
    """JSON has one kind of number, so that 1.0 is as good as 1."""
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:40]} is out of range")
    return int(value) if value.is_integer() and abs(value) < 2**64 else value


DECODER = msgspec.json.Decoder(float_hook=_number)


async def read(request: Request, kind: type[T]) -> T:
    """The request's JSON as a `kind`. Raises HttpError, InvalidRequest, ClientGone."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise HttpError(415, "unsupported_media_type", "the body must be JSON: Content-Type: application/json")
    data = await read_bytes(request)
    request_id = request.scope["gemmart"].id
    if len(data) > LARGE:
        return await asyncio.to_thread(parse, data, kind, request_id)
    return parse(data, kind, request_id)


def parse(data: bytes, kind: type[T], request_id: str) -> T:
    """A `kind` from a JSON text; fields that it does not have are ignored, and logged at debug. Raises HttpError for
    what is no JSON, too deep or asks for what there is not, InvalidRequest with the place for a value of another type.
    """
    try:
        value = DECODER.decode(data)
    except RecursionError:
        raise _too_deep() from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise HttpError(400, "invalid_json", f"the body is no JSON: {error}") from None
    _check_depth(value)
    if isinstance(value, dict):
        refuse_unsupported(value, kind.__struct_encode_fields__)
    try:
        found = msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        place = PATH.search(message)
        where, what = (place[1], message[: place.start()]) if place else ("", message)
        if missing := MISSING.match(what):
            where, what = f"{where}.{missing[1]}".lstrip("."), "is missing"
        raise InvalidRequest(f"{where}: {what}" if where else what, where or None) from None
    if log.isEnabledFor(logging.DEBUG) and (ignored := value.keys() - kind.__struct_encode_fields__):
        log.debug("%s: fields ignored: %s", request_id, str(sorted(ignored))[:500])
    return found


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limits.JSON_DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    if level:
        raise _too_deep()


def _too_deep() -> HttpError:
    return HttpError(400, "invalid_json", f"the body is nested deeper than {limits.JSON_DEPTH} levels")


async def read_bytes(request: Request) -> bytes:
    """The body as it comes. Raises HttpError where it is too long or too slow, ClientGone."""
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limits.BODY_BYTES:
        raise _too_large()
    data = bytearray()
    began = time.monotonic()
    more = True
    while more:
        patience = limits.BODY_SECONDS + len(data) / limits.BODY_BYTES_PER_SECOND
        try:
            async with asyncio.timeout(began + patience - time.monotonic()):
                message = await request.receive()
        except TimeoutError:
            raise HttpError(
                408, "request_timeout", "the body comes too slowly", headers={"Connection": "close"}
            ) from None
        if message["type"] == "http.disconnect":
            raise ClientGone
        data += message.get("body", b"")
        if len(data) > limits.BODY_BYTES:
            raise _too_large()
        more = message.get("more_body", False)
    return bytes(data)


def _too_large() -> HttpError:
    return HttpError(413, "request_too_large", f"the body has more than {limits.BODY_BYTES} bytes")
