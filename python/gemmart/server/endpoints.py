"""The endpoints, one table for the router, the counters and the document at /openapi.json.

To add one: write its handler, the type of its body (a msgspec Struct; schema.py) and of its answer (replies.py), and
name them here. The rest follows: the route, its name in /metrics, its description, tests of every field of the body.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gemmart.server import anthropic, openai, schema, status, tokens
from gemmart.server.anthropic_schema import CountTokensRequest, MessagesRequest
from gemmart.server.errors import OPENAI, Dialect
from gemmart.server.generation import EVENTS

JSON = "application/json"
GENERATION = (404, 429, 504)
"""Statuses of what names a model, waits its turn and takes its time."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str  # with {name} or {name:path} for what varies
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    _: KW_ONLY
    body: type | None = None  # what it is sent as JSON
    answer: Any = None  # what it answers as JSON; None: something else, of `media`
    media: str = JSON
    event: Any = None  # what each event of a stream holds, where it can answer with one
    stream_media: str = EVENTS
    errors: tuple[int, ...] = ()  # statuses of its own, beyond those of every endpoint and of every body
    key: bool = True  # it needs one, where there are any


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        openai.chat_completions,
        "Answer a chat",
        body=schema.ChatRequest,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        openai.completions,
        "Go on with a text",
        body=schema.CompletionRequest,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/v1/messages",
        anthropic.messages,
        "Answer a chat, as Anthropic does",
        body=MessagesRequest,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_tokens,
        "Count the tokens of a chat, as Anthropic does",
        body=CountTokensRequest,
        errors=(404,),
    ),
    Endpoint("GET", "/v1/models", openai.models, "List the model"),
    Endpoint("GET", "/v1/models/{id:path}", openai.model, "Describe the model", errors=(404,)),
    Endpoint("POST", "/tokenize", tokens.tokenize, "Turn a text into tokens", body=schema.TokenizeRequest),
    Endpoint("POST", "/detokenize", tokens.detokenize, "Turn tokens into their text", body=schema.DetokenizeRequest),
    Endpoint(
        "POST",
        "/apply-template",
        tokens.apply_template,
        "Show a chat as the model sees it",
        body=schema.TemplateRequest,
    ),
    Endpoint("GET", "/health", status.health, "Tell whether it can answer", key=False),
    Endpoint("GET", "/props", status.props, "Tell the settings"),
    Endpoint("GET", "/metrics", status.metrics, "Tell the counters, for Prometheus", media="text/plain"),
)

DIALECTS: tuple[tuple[str, Dialect], ...] = (("/v1/messages", anthropic.DIALECT),)
"""How errors read on the paths that begin so, whether they exist or not; on all others as OpenAI has them."""


def dialect_of(path: str) -> Dialect:
    return next((dialect for prefix, dialect in DIALECTS if path.startswith(prefix)), OPENAI)
