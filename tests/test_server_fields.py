"""Every field of every endpoint with every kind of value: what the document at /openapi.json does not allow is refused
with its place, and what it allows is taken. New endpoints are tested by themselves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import gemmart
from conftest import Tiny
from openapi_document import allows, body_of, deref, operations, refusal, refused_beyond
from serving import MINUTE

KINDS: list[Any] = [None, True, False, 0, -1, 1.5, 10**30, 1e308, "", "1", [], [None], [[]], {}, {"a": 1}]


def nested(schema: dict[str, Any], value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """(path, name, schema) of each field of an object, and of those inside, as far as an example has them."""
    schema = deref(schema)
    for option in schema.get("anyOf", ()):
        if allows(option, value):
            yield from nested(option, value, path)
    if isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            yield path, name, field
            if name in value:
                yield from nested(field, value[name], (*path, name))
    elif isinstance(value, list) and value and "items" in schema:
        yield from nested(schema["items"], value[0], (*path, 0))


def values(schema: dict[str, Any]) -> Iterator[Any]:
    """For a field: of every kind, and about the ends of its range."""
    yield from KINDS
    for option in (schema, *schema.get("anyOf", ())):
        for bound, outside in (("minimum", -1), ("maximum", 1)):
            if bound in option:
                end = option[bound]
                yield from (end, end + outside, end - outside, 2**31, 2**63, 2**64)
        if "maxLength" in option:
            yield from ("x" * option["maxLength"], "x" * (option["maxLength"] + 1))
        if "maxItems" in option:
            item = "x" if option["items"].get("type") == "string" else 1
            yield from ([item] * option["maxItems"], [item] * (option["maxItems"] + 1))


def changed(value: Any, path: tuple[str | int, ...], name: str, new: Any) -> Any:
    """A copy with a field changed; `...`: without it."""
    if path:
        copy = value.copy()
        copy[path[0]] = changed(value[path[0]], path[1:], name, new)
        return copy
    return {key: old for key, old in value.items() if key != name} | ({} if new is ... else {name: new})


FIELDS = [
    pytest.param(path, schema, example, *field, id=f"{path} {'.'.join(map(str, (*field[0], field[1])))}")
    for _, path, operation in operations()
    if (body := body_of(operation))
    for schema, example in [body]
    for field in nested(schema, example)
]


@pytest.fixture(scope="module")
def server(tiny: Tiny) -> Iterator[httpx.Client]:
    path = tiny("gemma2", "Q8_0")
    with (
        gemmart.load(path, ctx=64, parallel=4, threads=1) as model,
        model.serve() as running,
        httpx.Client(base_url=running.url, timeout=MINUTE) as client,
    ):
        yield client


@pytest.mark.parametrize(("path", "schema", "example", "parents", "name", "field"), FIELDS)
def test_field(
    path: str,
    schema: dict[str, Any],
    example: dict[str, Any],
    parents: tuple[str | int, ...],
    name: str,
    field: dict[str, Any],
    server: httpx.Client,
) -> None:
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in (*parents, name)).lstrip(".")
    for value in [..., *values(field)]:
        body = changed(example, parents, name, value)
        response = server.post(path, json=body)
        if allows(schema, body):
            assert response.status_code == 200 or refused_beyond(response), (value, response.text)
        else:
            assert response.status_code == 400, (value, response.text)
            error = refusal(response)
            assert error["message"].startswith(place), (value, error)
            assert error.get("param", place).startswith(place), (value, error)
