"""What requests may say: names and types of their fields. Ranges that the model's own options have are checked there;
names that are not here are ignored, except those of `refuse_unsupported`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gemmart.errors import InvalidRequest
from gemmart.server import limits
from gemmart.server.errors import unsupported


class StreamOptions(Struct):
    include_usage: bool | None = None


class Sampled(Struct, kw_only=True):
    """How tokens are chosen, in every protocol; None is the default everywhere."""

    seed: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None


class Options(Sampled, kw_only=True):
    """How to answer, for chats and completions."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=limits.CHOICES)] | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


TEXT_PARTS = ("text", "input_text", "output_text")


class Part(Struct):
    type: str
    text: str | None = None


class ChatMessage(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Meta(max_length=limits.PARTS)] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


def text_of(content: str | Sequence[Part], where: str, between: str = "") -> str:
    """The text of a content, its parts joined. Raises InvalidRequest for a part that is none; `where`: its place."""
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type not in TEXT_PARTS or part.text is None:
            raise InvalidRequest(f"{where}[{i}] is no text part; this model reads text only", f"{where}[{i}]")
    return between.join(part.text or "" for part in content)


Messages = Annotated[list[ChatMessage], Meta(min_length=1, max_length=limits.MESSAGES)]


class ChatRequest(Options, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    continue_final_message: bool | None = None


class CompletionRequest(Options, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    logprobs: Annotated[int, Meta(ge=0, le=limits.COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None
    parse_special: bool | None = None


class TokenizeRequest(Struct):
    """POST /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Struct):
    """POST /detokenize."""

    tokens: list[int]


class TemplateRequest(Struct):
    """POST /apply-template."""

    messages: Messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False


NOT_OFFERED = (
    *("tools", "functions", "function_call", "audio", "web_search_options"),
    *("grammar", "regex", "json_schema", "chat_template"),
)


def refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """Raises HttpError for what a client asks for by name and would not get."""
    for name in NOT_OFFERED:
        if fields.get(name) not in (None, [], {}, ""):
            raise unsupported(name, "this server does not offer it")
    if fields.get("tool_choice") not in (None, "none", "auto"):
        raise unsupported("tool_choice", "this server offers no tools")
    modalities = fields.get("modalities")
    if modalities not in (None, []) and modalities != ["text"]:
        raise unsupported("modalities", "this server answers with text only")
    response_format = fields.get("response_format")
    if response_format is not None and response_format != {"type": "text"}:
        raise unsupported("response_format", 'this server offers {"type": "text"} only')


def biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """logit_bias with token ids for keys."""
    if given is None:
        return None
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal()):
            where = f"logit_bias.{key[:40]}"
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is no token id", where)
        found[int(key)] = value
    return found
