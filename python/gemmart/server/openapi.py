"""The OpenAPI document, made from the table of endpoints and the types in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gemmart import __version__
from gemmart.server.generation import EVENTS

if TYPE_CHECKING:
    from gemmart.server.app import App
    from gemmart.server.endpoints import Endpoint

JSON = "application/json"
EVERYWHERE = (401, 403, 414, 431, 500, 503)
WITH_BODY = (400, 408, 413, 415)
KEYS = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
}
HEADERS = {
    "x-request-id": {"description": "What the log calls the request.", "schema": {"type": "string"}},
    "retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer"}},
    "x-should-retry": {"description": "false: it would fail again.", "schema": {"type": "string"}},
    "www-authenticate": {"schema": {"type": "string"}},
}
HEADERS_OF = {401: ("www-authenticate",), 429: ("retry-after",), 500: ("x-should-retry",), 503: ("retry-after",)}


async def openapi(request: Request) -> Response:
    app: App = request.app
    return Response(_encoded(app.endpoints, app.access.needs_key), media_type=JSON)


@cache
def _encoded(endpoints: tuple[Endpoint, ...], needs_key: bool) -> bytes:
    return msgspec.json.encode(document(endpoints, needs_key=needs_key))


def document(endpoints: Sequence[Endpoint], *, needs_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1."""
    types = [kind for end in endpoints for kind in (end.body, end.answer, end.event, end.error) if kind is not None]
    types = list(dict.fromkeys(types))
    schemas, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    schema_of = dict(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = re.sub(r":\w+}", "}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, path, schema_of)
    refusals = {
        _refusal(endpoint, status): _response(
            HTTPStatus(status).phrase, {JSON: {"schema": schema_of[endpoint.error]}}, HEADERS_OF.get(status, ())
        )
        for endpoint in endpoints
        for status in _statuses(endpoint)
    }
    return {
        "openapi": "3.1.1",
        "info": {
            "title": "gemmart",
            "version": __version__,
            "description": "Fields of a body that are not described here are ignored.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {"schemas": components, "responses": refusals, "headers": HEADERS, "securitySchemes": KEYS},
        "security": [{name: []} for name in KEYS] if needs_key else [],
    }


def _operation(endpoint: Endpoint, path: str, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    group = endpoint.handler.__module__.rpartition(".")[2]
    operation: dict[str, Any] = {
        "operationId": f"{group}_{endpoint.handler.__name__}",
        "summary": endpoint.summary,
        "tags": [group],
        "responses": {"200": _response("OK", _content(endpoint, schema_of))},
    }
    if parameters := re.findall(r"{(\w+)}", path):
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in parameters
        ]
    if endpoint.body is not None:
        content = {JSON: {"schema": schema_of[endpoint.body], "example": endpoint.example}}
        operation["requestBody"] = {"required": True, "content": content}
    if not endpoint.key:
        operation["security"] = []
    for status in _statuses(endpoint):
        operation["responses"][str(status)] = {"$ref": f"#/components/responses/{_refusal(endpoint, status)}"}
    return operation


def _statuses(endpoint: Endpoint) -> list[int]:
    """With which an endpoint may refuse."""
    found = {*EVERYWHERE, *endpoint.errors}
    if endpoint.body is not None:
        found.update(WITH_BODY)
    if not endpoint.key:
        found.remove(401)
    return sorted(found)


def _refusal(endpoint: Endpoint, status: int) -> str:
    """The component that describes it."""
    return f"{endpoint.error.__name__}{status}"


def _content(endpoint: Endpoint, schema_of: Mapping[Any, Any]) -> dict[str, Any]:
    """What an endpoint answers, by media type."""
    schema = {"type": "string"} if endpoint.answer is None else schema_of[endpoint.answer]
    content: dict[str, Any] = {endpoint.media: {"schema": schema}}
    if endpoint.event is not None:
        value = {"anyOf": [schema_of[endpoint.event], schema_of[endpoint.error]]}
        each = (
            _event(value, endpoint.end) if endpoint.stream_media == EVENTS else {**value, "description": "Each line."}
        )
        content[endpoint.stream_media] = {"schema": each}
    return content


def _event(value: Any, end: str | None) -> dict[str, Any]:
    """Each server-sent event, whose data is the JSON of a value, or `end`."""
    data: dict[str, Any] = {"contentMediaType": JSON, "contentSchema": value}
    if end is not None:
        data = {"anyOf": [data, {"const": end}]}
    return {
        "description": "Each event.",
        "type": "object",
        "properties": {"event": {"type": "string"}, "data": {"type": "string", **data}},
        "required": ["data"],
    }


def _response(description: str, content: Mapping[str, Any], headers: Sequence[str] = ()) -> dict[str, Any]:
    names = ("x-request-id", *headers)
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": content,
    }
