"""The endpoints, one table for the router, the counters and the document at /openapi.json.

To add one: write its handler, the type of its body (a msgspec Struct, as in schema.py) and of its answer (as in
replies.py), and name them here. The rest follows: the route, its name in /metrics, its description, and tests that send
its example, with and without `stream`, and each field of it with wrong values.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from gemmart.server import (
    anthropic,
    embeddings,
    ollama,
    ollama_models,
    ollama_schema,
    openai,
    openapi,
    page,
    replies,
    responses,
    schema,
    status,
    tokens,
)
from gemmart.server.anthropic_schema import (
    CountTokensRequest,
    Message,
    MessageEvent,
    MessagesRequest,
    TokenCount,
)
from gemmart.server.errors import OPENAI, Dialect
from gemmart.server.generation import EVENTS
from gemmart.server.responses_schema import ResponseEvent, ResponsesRequest, WholeResponse

GENERATION = (404, 429, 504)
"""Statuses of what names a model, waits its turn and takes its time."""


@dataclass(frozen=True, slots=True, eq=False)
class Endpoint:
    method: str
    path: str  # with {name} or {name:path} for what varies
    handler: Callable[[Request], Awaitable[Response]]
    summary: str
    _: KW_ONLY
    body: type | None = None  # what it is sent as JSON
    example: Mapping[str, Any] | None = None  # of that
    answer: Any = None  # what it answers as JSON; None: something else, of `media`
    media: str = openapi.JSON
    event: Any = None  # what each event, or line, of a stream holds, where it can answer with one
    end: str | None = None  # the data of an event after the last of these
    stream_media: str = EVENTS
    errors: tuple[int, ...] = ()  # statuses of its own, beyond those of every endpoint and of every body
    key: bool = True  # it needs one, where there are any

    @property
    def error(self) -> type:
        """What it answers as JSON when it refuses."""
        return dialect_of(self.path).error


CHAT = ({"role": "user", "content": "Hello!"},)

ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        openai.chat_completions,
        "Answer a chat",
        body=schema.ChatRequest,
        example={"messages": CHAT, "max_tokens": 16},
        answer=replies.ChatCompletion,
        event=replies.ChatChunk,
        end="[DONE]",
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        openai.completions,
        "Go on with a text",
        body=schema.CompletionRequest,
        example={"prompt": "Hello", "max_tokens": 16},
        answer=replies.TextCompletion,
        event=replies.TextChunk,
        end="[DONE]",
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/v1/messages",
        anthropic.messages,
        "Answer a chat, as Anthropic does",
        body=MessagesRequest,
        example={"messages": CHAT, "max_tokens": 16},
        answer=Message,
        event=MessageEvent,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/v1/messages/count_tokens",
        anthropic.count_tokens,
        "Count the tokens of a chat, as Anthropic does",
        body=CountTokensRequest,
        example={"messages": CHAT},
        answer=TokenCount,
        errors=(404,),
    ),
    Endpoint(
        "POST",
        "/v1/responses",
        responses.responses,
        "Answer a chat in items",
        body=ResponsesRequest,
        example={"input": "Hello!", "max_output_tokens": 16},
        answer=WholeResponse,
        event=ResponseEvent,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/api/chat",
        ollama.chat,
        "Answer a chat, as Ollama does",
        body=ollama_schema.OllamaChatRequest,
        example={"model": "any", "messages": CHAT, "options": {"num_predict": 16}, "stream": False},
        answer=ollama_schema.OllamaChat,
        event=ollama_schema.OllamaChat,
        stream_media=ollama.LINES,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/api/generate",
        ollama.generate,
        "Answer a prompt, as Ollama does",
        body=ollama_schema.OllamaGenerateRequest,
        example={"model": "any", "prompt": "Hello!", "options": {"num_predict": 16}, "stream": False},
        answer=ollama_schema.OllamaText,
        event=ollama_schema.OllamaText,
        stream_media=ollama.LINES,
        errors=GENERATION,
    ),
    Endpoint("GET", "/api/tags", ollama_models.tags, "List the model, as Ollama does", answer=ollama_schema.OllamaTags),
    Endpoint("GET", "/api/ps", ollama_models.ps, "List what runs, as Ollama does", answer=ollama_schema.OllamaRunning),
    Endpoint(
        "POST",
        "/api/show",
        ollama_models.show,
        "Describe the model, as Ollama does",
        body=ollama_schema.OllamaShowRequest,
        example={"model": ""},
        answer=ollama_schema.OllamaShown,
        errors=(404,),
    ),
    Endpoint(
        "GET",
        "/api/version",
        ollama_models.version,
        "Tell the version, as Ollama does",
        answer=ollama_schema.OllamaVersion,
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        embeddings.embeddings,
        "Turn texts into vectors",
        body=schema.EmbeddingsRequest,
        example={"input": "Hello!"},
        answer=replies.EmbeddingList,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/api/embed",
        embeddings.ollama_embed,
        "Turn texts into vectors, as Ollama does",
        body=schema.OllamaEmbedRequest,
        example={"model": "any", "input": "Hello!"},
        answer=replies.OllamaEmbeddings,
        errors=GENERATION,
    ),
    Endpoint(
        "POST",
        "/api/embeddings",
        embeddings.ollama_embeddings,
        "Turn a text into a vector, as Ollama did",
        body=schema.OllamaEmbeddingsRequest,
        example={"model": "any", "prompt": "Hello!"},
        answer=replies.OllamaEmbedding,
        errors=GENERATION,
    ),
    Endpoint("GET", "/v1/models", openai.models, "List the model", answer=replies.ModelList),
    Endpoint("GET", "/v1/models/{id:path}", openai.model, "Describe the model", answer=replies.Model, errors=(404,)),
    Endpoint(
        "POST",
        "/tokenize",
        tokens.tokenize,
        "Turn a text into tokens",
        body=schema.TokenizeRequest,
        example={"content": "Hello!"},
        answer=replies.Tokenized,
    ),
    Endpoint(
        "POST",
        "/detokenize",
        tokens.detokenize,
        "Turn tokens into their text",
        body=schema.DetokenizeRequest,
        example={"tokens": [1, 2]},
        answer=replies.Detokenized,
    ),
    Endpoint(
        "POST",
        "/apply-template",
        tokens.apply_template,
        "Show a chat as the model sees it",
        body=schema.TemplateRequest,
        example={"messages": CHAT},
        answer=replies.AppliedTemplate,
    ),
    Endpoint("GET", "/health", status.health, "Tell whether it can answer", answer=replies.Health, key=False),
    Endpoint("GET", "/props", status.props, "Tell the settings", answer=replies.Props),
    Endpoint("GET", "/slots", status.slots, "List what is computed now", answer=list[replies.Slot]),
    Endpoint("GET", "/metrics", status.metrics, "Tell the counters, for Prometheus", media="text/plain"),
    Endpoint("GET", "/openapi.json", openapi.openapi, "Describe all this", answer=dict[str, Any]),
    Endpoint("GET", "/", page.index, "The web page", media="text/html", key=False),
    Endpoint("GET", "/page/{name:path}", page.file, "A file of the web page", media="*/*", errors=(404,), key=False),
)

DIALECTS: tuple[tuple[str, Dialect], ...] = (
    ("/v1/responses", responses.DIALECT),
    ("/v1/messages", anthropic.DIALECT),
    ("/api/", ollama.DIALECT),
)
"""How errors read on the paths that begin so, whether they exist or not; on all others as OpenAI has them."""


def dialect_of(path: str) -> Dialect:
    return next((dialect for prefix, dialect in DIALECTS if path.startswith(prefix)), OPENAI)
