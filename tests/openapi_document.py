"""The document at /openapi.json as tests use it: what an endpoint takes and answers, and whether an answer is as it
says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from typing import Any

import httpx
from jsonschema import Draft202012Validator

from gemmart.server.endpoints import ENDPOINTS
from gemmart.server.openapi import document

BEYOND = re.compile(
    "maximum context length|maximum$"
    "|outside 0 to|is no token id"  # token ids that this model does not have
    "|is to be continued|messages is empty|takes no templates"
    "|needs logprobs|together with logprobs"
    "|needs include|was started with a context|goes with neither"
    "|were not trained to be cut"  # this model's embeddings
    "|more than 64 answers"  # prompts times n
    "|has one format|in a format ends|together with tools"
    "|there is no tool|is no tool to call|two have the name"
    "|no call before has the id"
    "|(json_schema|function|allowed_tools|tool_choice.name): is missing"  # which some types need
)
"""Why a request may be refused though each of its fields is as the document says."""


def made(*, needs_key: bool) -> dict[str, Any]:
    """The document as a client reads it."""
    return json.loads(json.dumps(document(ENDPOINTS, needs_key=needs_key)))


DOCUMENT = made(needs_key=False)


def deref(schema: dict[str, Any]) -> dict[str, Any]:
    """A part of the document, or what it refers to."""
    while "$ref" in schema:
        found: Any = DOCUMENT
        for name in schema["$ref"].removeprefix("#/").split("/"):
            found = found[name]
        schema = found
    return schema


def validator(schema: dict[str, Any]) -> Draft202012Validator:
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def allows(schema: dict[str, Any], value: Any) -> bool:
    return validator(schema).is_valid(value)


@cache
def operations() -> list[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of each."""
    return [(method.upper(), path, op) for path, item in DOCUMENT["paths"].items() for method, op in item.items()]


def refusal(response: httpx.Response) -> dict[str, Any]:
    """What an error says, in any protocol: at least its message."""
    error = response.json()["error"]
    return error if isinstance(error, dict) else {"message": error}


def refused_beyond(response: httpx.Response) -> bool:
    """Whether a request was refused for what no schema tells."""
    error = refusal(response)
    if response.status_code == 404:
        return "is not served here" in error["message"]
    if response.status_code != 400:
        return False
    return error.get("code") in ("template_error", "invalid_schema") or bool(BEYOND.search(error["message"]))


def body_of(operation: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The schema of an operation's body, and an example."""
    if "requestBody" not in operation:
        return None
    content = operation["requestBody"]["content"]["application/json"]
    return content["schema"], content["example"]


def check(response: httpx.Response) -> None:
    """That the document has this answer to its request, as it is. Paths that it does not have are refused."""
    path = response.request.url.path
    asked = [
        operation
        for method, template, operation in operations()
        if method == response.request.method and re.fullmatch(re.sub(r"{\w+}", ".+", template), path)
    ]
    if not asked:
        assert response.status_code in (404, 405), path
        return
    operation = asked[0]
    declared = operation["responses"].get(str(response.status_code))
    assert declared, f"{path} answers {response.status_code}, which the document does not have"
    declared = deref(declared)
    for name in declared["headers"]:
        required = name == "x-request-id"
        assert not required or name in response.headers, name
    media = response.headers["content-type"].partition(";")[0]
    if "*/*" in declared["content"]:
        return
    assert media in declared["content"], media
    content = declared["content"][media]
    if media == "application/json":
        validator(content["schema"]).validate(response.json())
    elif media == "application/x-ndjson":
        for line in response.text.splitlines():
            validator(content["schema"]).validate(json.loads(line))
    elif media == "text/event-stream":
        for event in events(response):
            validator(content["schema"]).validate(event)
            schema = content["schema"]["properties"]["data"]
            for option in schema.get("anyOf", [schema]):
                if "contentSchema" in option and event["data"] != "[DONE]":
                    validator(option["contentSchema"]).validate(json.loads(event["data"]))


def events(response: httpx.Response) -> Iterator[dict[str, str]]:
    """The fields of each event of a stream."""
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        if not event.startswith(":"):
            yield dict(line.split(": ", 1) for line in event.split("\n"))
