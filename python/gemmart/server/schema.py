"""What requests may say: names and types of their fields. What `documented` says of them is checked elsewhere, as for
those who call the model from Python; names that are not here are ignored, except those of `refuse_unsupported`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gemmart.errors import InvalidRequest
from gemmart.sampling import MAX_BIAS, MAX_BIASES, RANGES
from gemmart.server import limits
from gemmart.server.errors import unsupported
from gemmart.stops import MAX_STOP_BYTES, MAX_STOPS
from gemmart.tools import MAX_TOOLS, NAME


def documented(**rules: Any) -> Meta:
    """What the document at /openapi.json tells of a field, in the words of JSON Schema."""
    return Meta(extra_json_schema=rules)


def within(name: str) -> Meta:
    """The range of one of sampling's options."""
    _, low, high = RANGES[name]
    return documented(minimum=low, maximum=high)


Stop = Annotated[str, documented(minLength=1, maxLength=MAX_STOP_BYTES)]
Stops = Annotated[list[Stop], documented(maxItems=MAX_STOPS)]
Token = Annotated[int, documented(minimum=0)]
Bias = Annotated[float, documented(minimum=-MAX_BIAS, maximum=MAX_BIAS)]


class StreamOptions(Struct):
    include_usage: bool | None = None


class Sampled(Struct, kw_only=True):
    """How tokens are chosen, in every protocol; None is the default everywhere."""

    seed: Annotated[int, documented(minimum=0, maximum=2**64 - 1)] | None = None
    temperature: Annotated[float, within("temperature")] | None = None
    top_p: Annotated[float, within("top_p")] | None = None
    top_k: Annotated[int, within("top_k")] | None = None
    min_p: Annotated[float, within("min_p")] | None = None
    typical_p: Annotated[float, within("typical_p")] | None = None
    repeat_penalty: Annotated[float, within("repeat_penalty")] | None = None
    repeat_last_n: Annotated[int, within("repeat_last_n")] | None = None
    presence_penalty: Annotated[float, within("presence_penalty")] | None = None
    frequency_penalty: Annotated[float, within("frequency_penalty")] | None = None


class NamedSchema(Struct):
    name: Annotated[str, Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema: dict[str, Any] | None = None  # of a json_object, as llama.cpp has it


class Options(Sampled, kw_only=True):
    """How to answer, for chats and completions."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    n: Annotated[int, Meta(ge=1, le=limits.CHOICES)] | None = None
    stop: Stop | Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logit_bias: (
        Annotated[dict[str, Bias], documented(maxProperties=MAX_BIASES, propertyNames={"pattern": "^[0-9]+$"})] | None
    ) = None
    ignore_eos: bool | None = None
    response_format: ResponseFormat | None = None
    grammar: str | None = None
    regex: str | None = None
    json_schema: dict[str, Any] | None = None

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class Part(Struct):
    type: str
    text: str | None = None


def part(*types: str) -> Meta:
    """One of these types, with a text."""
    return documented(required=["text"], properties={"type": {"enum": types}, "text": {"type": "string"}})


Parts = Annotated[list[Annotated[Part, part("text")]], Meta(max_length=limits.PARTS)]


class CalledFunction(Struct):
    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageCall(Struct):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] | None = None


class ChatMessage(Struct):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Parts | None = None
    name: str | None = None
    tool_calls: list[MessageCall] | None = None
    tool_call_id: str | None = None


def text_of(content: str | Sequence[Part], where: str, kinds: Sequence[str] = ("text",), between: str = "") -> str:
    """The text of a content, its parts joined. `where`: its place. `kinds`: of parts that are text. Raises
    InvalidRequest for any other part."""
    if isinstance(content, str):
        return content
    for i, part in enumerate(content):
        if part.type not in kinds or part.text is None:
            raise InvalidRequest(f"{where}[{i}] is no text part; this model reads text only", f"{where}[{i}]")
    return between.join(part.text or "" for part in content)


CALLING = {"role": {"const": "assistant"}, "tool_calls": {"type": "array", "minItems": 1}}
Messages = Annotated[
    list[
        Annotated[
            ChatMessage,
            documented(
                anyOf=[  # an assistant that calls tools need not say anything
                    {"required": ["content"], "properties": {"content": {"not": {"type": "null"}}}},
                    {"required": ["tool_calls"], "properties": CALLING},
                ]
            ),
        ]
    ],
    Meta(min_length=1, max_length=limits.MESSAGES),
]


ToolName = Annotated[str, documented(pattern=f"^{NAME.pattern}$")]


class Function(Struct):
    name: ToolName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolSpec(Struct):
    type: Literal["function"]
    function: Function


class FunctionName(Struct):
    name: str


class NamedTool(Struct):
    type: Literal["function"]
    function: FunctionName | None = None


class AllowedTools(Struct):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class ToolChoice(Struct):
    type: Literal["function", "allowed_tools"]
    function: FunctionName | None = None
    allowed_tools: AllowedTools | None = None


class ChatRequest(Options, kw_only=True):
    """POST /v1/chat/completions."""

    messages: Messages
    tools: Annotated[list[ToolSpec], documented(maxItems=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None


Tokens = Annotated[list[Token], documented(minItems=1)]
Mixed = list[str | Token | Tokens]


def _alike(most: int) -> Meta:
    """Either the ids of one text, or up to `most` texts or lists of ids."""
    items = ({"type": "string"}, {"type": "array"})
    several = [{"items": kind, "maxItems": most} for kind in items]
    return documented(minItems=1, anyOf=[{"items": {"type": "integer"}}, *several])


class CompletionRequest(Options, kw_only=True):
    """POST /v1/completions."""

    prompt: str | Annotated[Mixed, _alike(limits.PROMPTS)]
    logprobs: Annotated[int, Meta(ge=0, le=limits.COMPLETION_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: Annotated[int, documented(const=1)] | None = None
    suffix: Annotated[str, documented(maxLength=0)] | None = None
    parse_special: bool | None = None


class EmbeddingsRequest(Struct):
    """POST /v1/embeddings."""

    input: str | Annotated[Mixed, _alike(limits.INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None


class OllamaEmbedRequest(Struct):
    """POST /api/embed."""

    input: str | Annotated[list[str], documented(maxItems=limits.INPUTS)] | None
    model: str | None = None
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1, le=2**31 - 1)] | None = None


class OllamaEmbeddingsRequest(Struct):
    """POST /api/embeddings."""

    prompt: str
    model: str | None = None


class TokenizeRequest(Struct):
    """POST /tokenize."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Struct):
    """POST /detokenize."""

    tokens: list[Token]


class TemplateRequest(Struct):
    """POST /apply-template."""

    messages: Messages
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template: str | None = None


NOT_OFFERED = (
    *("tools", "functions", "function_call", "audio", "web_search_options"),
    *("grammar", "regex", "json_schema", "chat_template"),
)


def refuse_unsupported(fields: Mapping[str, Any], offered: Sequence[str]) -> None:
    """Raises HttpError for what a client asks for by name and would not get; `offered`: the fields that the endpoint
    has."""
    for name in NOT_OFFERED:
        # An empty object switches the search on.
        nothing: tuple[Any, ...] = (None,) if name == "web_search_options" else (None, [], {}, "")
        if name not in offered and fields.get(name) not in nothing:
            raise unsupported(name, "this server does not offer it here")
    if "tool_choice" not in offered and fields.get("tool_choice") not in (None, "none", "auto"):
        raise unsupported("tool_choice", "this server offers no tools here")
    modalities = fields.get("modalities")
    if modalities not in (None, []) and modalities != ["text"]:
        raise unsupported("modalities", "this server answers with text only")
    response_format = fields.get("response_format")
    if "response_format" not in offered and response_format not in (None, {"type": "text"}):
        raise unsupported("response_format", 'this server offers {"type": "text"} only here')


def biases(given: Mapping[str, float] | None) -> dict[int, float] | None:
    """logit_bias with token ids for keys."""
    if given is None:
        return None
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            where = f"logit_bias.{key[:40]}"
            raise InvalidRequest(f"logit_bias: {key[:40]!r} is no token id", where)
        found[int(key)] = value
    return found
