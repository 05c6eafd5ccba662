"""Embeddings: OpenAI's endpoint, and Ollama's two."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from gemmart.errors import InvalidRequest
from gemmart.request import Event
from gemmart.request import Request as EngineRequest
from gemmart.results import Completion
from gemmart.server import body, limits
from gemmart.server.answers import as_json
from gemmart.server.errors import unsupported
from gemmart.server.generation import Prepare, while_connected
from gemmart.server.ollama import check_name, name_of
from gemmart.server.openai import prompts_of
from gemmart.server.schema import EmbeddingsRequest, OllamaEmbeddingsRequest, OllamaEmbedRequest

if TYPE_CHECKING:
    from gemmart.server.app import App


@dataclass(frozen=True, slots=True)
class Embedded:
    vectors: NDArray[np.float32]  # [n, dim]
    n_tokens: int


async def embeddings(request: Request) -> Response:
    """OpenAI's."""
    app: App = request.app
    asked = await body.read(request, EmbeddingsRequest)
    app.check_name(asked.model)
    _check_dimensions(app, asked.dimensions)
    texts = prompts_of(asked.input, "input")
    found = await _embed(request, texts, several=texts != [asked.input])

    def write() -> Response:
        vectors = map(_base64, found.vectors) if asked.encoding_format == "base64" else found.vectors.tolist()
        return as_json(
            {
                "object": "list",
                "data": [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)],
                "model": app.model_id,
                "usage": {"prompt_tokens": found.n_tokens, "total_tokens": found.n_tokens},
            }
        )

    return await asyncio.to_thread(write)  # of 2,048 inputs these are many megabytes


async def ollama_embed(request: Request) -> Response:
    """Ollama's /api/embed. Without a text it only asks whether the model is there."""
    began = time.perf_counter_ns()
    app: App = request.app
    asked = await body.read(request, OllamaEmbedRequest)
    check_name(app, asked.model)
    _check_dimensions(app, asked.dimensions)
    several = isinstance(asked.input, list)
    texts = asked.input if isinstance(asked.input, list) else [asked.input] if asked.input else []
    found = await _embed(request, texts, several=several, truncate=asked.truncate is not False)

    def write() -> Response:
        return as_json(
            {
                "model": name_of(app),
                "embeddings": found.vectors.tolist(),
                "total_duration": time.perf_counter_ns() - began,
                "load_duration": 0,
                "prompt_eval_count": found.n_tokens,
            }
        )

    return await asyncio.to_thread(write)


async def ollama_embeddings(request: Request) -> Response:
    """Ollama's earlier /api/embeddings, of one text, whose vector has the length that it happens to have."""
    app: App = request.app
    asked = await body.read(request, OllamaEmbeddingsRequest)
    check_name(app, asked.model)
    texts = [asked.prompt] if asked.prompt else []
    found = await _embed(request, texts, name="prompt", normalize=False, truncate=True)
    return as_json({"embedding": [number for vector in found.vectors.tolist() for number in vector]})


async def _embed(
    request: Request,
    texts: Sequence[str | list[int]],
    *,
    name: str = "input",
    several: bool = False,
    normalize: bool = True,
    truncate: bool = False,
) -> Embedded:
    """The embeddings of texts, each of which errors call `name`, or `name`[i] where there are `several`. truncate: of
    what is too long the end is left out.
    Raises what Model.prepare_embedding() does, HttpError, ClientGone."""
    app: App = request.app
    if len(texts) > limits.INPUTS:
        raise InvalidRequest(f"{name}: {len(texts)} texts are more than {limits.INPUTS}", name)
    app.log_prompt(request, texts)
    salt = app.access.salt(request.scope)
    found = np.empty((len(texts), app.model.info.dim), np.float32)

    def prepare_from(at: int) -> Prepare:
        def prepare(emit: Callable[[Event], object], choice: int) -> EngineRequest:
            def keep(event: Event) -> None:
                if isinstance(event, np.ndarray):
                    found[at] = event
                else:
                    emit(event)

            return app.model.prepare_embedding(
                texts[at],
                f"{name}[{at}]" if several else name,
                emit=keep,
                normalize=normalize,
                truncate=truncate,
                salt=salt,
            )

        return prepare

    async def collect() -> int:
        await generation.start([prepare_from(at) for at in range(len(texts))], n=1, paced=True)
        n_tokens = 0
        async for event in generation.events():
            if event and isinstance(event[1], Completion):
                n_tokens += event[1].usage.prompt_tokens
        return n_tokens

    generation = app.admit()
    try:
        n_tokens = await while_connected(request.receive, collect())
    finally:
        generation.close()
    request.scope["gemmart"].prompt_tokens = n_tokens
    app.metrics.count_prompt(n_tokens)
    return Embedded(found, n_tokens)


def _check_dimensions(app: App, dimensions: int | None) -> None:
    dim = app.model.info.dim
    if dimensions not in (None, dim):
        raise unsupported("dimensions", f"this model's embeddings have {dim}, and were not trained to be cut")


def _base64(vector: NDArray[np.float32]) -> str:
    """As OpenAI's clients take it: float32, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
