"""What answers say: names and types of their fields, for the document at /openapi.json. Answers are written as dicts;
the tests hold every one against its type, which allows no other name."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct


class Reply(Struct, kw_only=True, forbid_unknown_fields=True):
    """Fields without a default are always there."""


# Errors


class Refusal(Reply):
    message: str
    type: str
    param: str | None
    code: str
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class Error(Reply):
    """Every error has this shape, also as the last event of a stream."""

    error: Refusal


# Chats and completions


class CachedTokens(Reply):
    cached_tokens: int


class Usage(Reply):
    """In tokens; `cached_tokens` of the prompt were not computed again."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    seed: int


class Timings(Reply):
    """How fast it came: counts (`_n`), milliseconds, tokens per second."""

    cache_n: int
    prompt_n: int
    prompt_ms: float
    prompt_per_second: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float
    draft_n: int
    draft_n_accepted: int


FinishReason = Literal["stop", "length"]
ChatFinishReason = Literal["stop", "length", "tool_calls"]


class Logprob(Reply):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprob(Logprob):
    top_logprobs: list[Logprob]


class ChatLogprobs(Reply):
    content: list[TokenLogprob]
    refusal: None


class FunctionCall(Reply):
    name: str
    arguments: str


class ToolCall(Reply):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Reply):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(Reply):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason


class Head(Reply):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(Head):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings


class FunctionDelta(Reply):
    arguments: str
    name: str | None = None


class ToolCallDelta(Reply):
    """`id`, `type` and the name come with the first piece of a call."""

    index: int
    function: FunctionDelta
    id: str | None = None
    type: Literal["function"] | None = None


class Delta(Reply):
    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(Reply):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatChunk(Head):
    """`usage` only if `stream_options.include_usage` asked for it."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


class TextLogprobs(Reply):
    """null for the first token of a prompt that is echoed."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TextChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextCompletion(Head):
    object: Literal["text_completion"]
    choices: list[TextChoice]
    usage: Usage
    timings: Timings


class TextChunkChoice(Reply):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None


class TextChunk(Head):
    """`usage` only if `stream_options.include_usage` asked for it."""

    object: Literal["text_completion"]
    choices: list[TextChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None


# Embeddings


class Embedding(Reply):
    """`embedding`: numbers, or base64 of float32, little-endian."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(Reply):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Reply):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


class OllamaEmbeddings(Reply):
    """Durations in nanoseconds."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbedding(Reply):
    embedding: list[float]


# Models


class ModelMeta(Reply):
    name: str
    family: str
    n_vocab: int
    n_ctx: int
    n_ctx_train: int
    n_embd: int
    n_params: int
    size: int
    quantization: str


class Model(Reply):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    meta: ModelMeta


class ModelList(Reply):
    object: Literal["list"]
    data: list[Model]


# Tokens and templates


class Piece(Reply):
    """A token; bytes where they are no text alone."""

    id: int
    piece: str | list[int]


class Tokenized(Reply):
    tokens: list[int | Piece]


class Detokenized(Reply):
    content: str


class AppliedTemplate(Reply):
    prompt: str
    tokens: list[int]


# How the server is


class Health(Reply):
    status: Literal["ok"]


class Slot(Reply):
    """A sequence that is computed now: tokens of its prompt, those computed, those of its answer."""

    id: int
    state: Literal["prompt", "generating"]
    n_prompt: int
    n_past: int
    n_decoded: int


class GenerationSettings(Reply):
    n_ctx: int
    params: dict[str, Any]


class Props(Reply):
    build_info: str
    model: str
    total_slots: int
    default_generation_settings: GenerationSettings
    chat_template: str | None
    running: int
    waiting: int
