"""What requests to Anthropic's endpoints may say, and their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gemmart.server import limits
from gemmart.server.replies import Reply
from gemmart.server.schema import Parts, Sampled, documented
from gemmart.stops import MAX_STOP_BYTES, MAX_STOPS
from gemmart.tools import MAX_TOOLS, NAME

Blocks = str | Parts


class Block(Struct, kw_only=True):
    """A text, a call of a tool, or what came of one."""

    type: Annotated[str, documented(enum=["text", "tool_use", "tool_result"])]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: Blocks | None = None
    is_error: bool | None = None


NEEDED = {"text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}
"""Which fields the blocks of a type have."""
NEEDS = documented(
    anyOf=[
        {
            "required": ["type", *names],
            "properties": {"type": {"const": kind}, **{name: {"not": {"type": "null"}} for name in names}},
        }
        for kind, names in NEEDED.items()
    ]
)


class Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: str | Annotated[list[Annotated[Block, NEEDS]], Meta(max_length=limits.PARTS)]


class AnthropicTool(Struct, kw_only=True):
    name: Annotated[str, documented(pattern=f"^{NAME.pattern}$")]
    input_schema: dict[str, Any]
    description: str | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None


class AnthropicToolChoice(Struct, kw_only=True):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


Tools = Annotated[list[AnthropicTool], documented(maxItems=MAX_TOOLS)]


class OutputFormat(Struct):
    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct):
    format: OutputFormat | None = None


class Thinking(Struct):
    type: str


Turns = Annotated[list[Turn], Meta(min_length=1, max_length=limits.MESSAGES)]


StopSequence = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_BYTES)]


class CountTokensRequest(Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: Turns
    system: Blocks | None = None
    tools: Tools | None = None
    tool_choice: AnthropicToolChoice | None = None


class MessagesRequest(Sampled, kw_only=True):
    """POST /v1/messages."""

    model: str | None = None
    messages: Turns
    system: Blocks | None = None
    tools: Tools | None = None
    tool_choice: AnthropicToolChoice | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    stop_sequences: Annotated[list[StopSequence], Meta(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None


class AnthropicRefusal(Reply):
    type: str
    message: str


class AnthropicError(Reply):
    """Every error of these endpoints has this shape, also as the last event of a stream."""

    type: Literal["error"]
    error: AnthropicRefusal
    request_id: str


class TokenCount(Reply):
    input_tokens: int


class MessageUsage(Reply):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextBlock(Reply, tag="text"):
    text: str


class ToolUse(Reply, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


class Stopped(Reply):
    stop_reason: Literal["end_turn", "stop_sequence", "max_tokens", "model_context_window_exceeded", "tool_use"] | None
    stop_sequence: str | None


class Message(Stopped):
    """The answer; what a stream begins with has no content and no reason yet."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[TextBlock | ToolUse]
    usage: MessageUsage


class MessageStart(Reply, tag="message_start"):
    message: Message


class BlockStart(Reply, tag="content_block_start"):
    index: int
    content_block: TextBlock | ToolUse


class TextDelta(Reply, tag="text_delta"):
    text: str


class InputDelta(Reply, tag="input_json_delta"):
    partial_json: str


class BlockDelta(Reply, tag="content_block_delta"):
    index: int
    delta: TextDelta | InputDelta


class BlockStop(Reply, tag="content_block_stop"):
    index: int


class MessageDelta(Reply, tag="message_delta"):
    delta: Stopped
    usage: MessageUsage


class MessageStop(Reply, tag="message_stop"):
    pass


class Ping(Reply, tag="ping"):
    pass


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | Ping
