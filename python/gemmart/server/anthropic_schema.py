"""What requests to Anthropic's endpoints may say."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gemmart.server import limits
from gemmart.server.schema import Part, Sampled

Blocks = str | Annotated[list[Part], Meta(max_length=limits.PARTS)]


class Turn(Struct):
    role: Literal["user", "assistant", "system"]
    content: Blocks


class Thinking(Struct):
    type: str


Turns = Annotated[list[Turn], Meta(min_length=1, max_length=limits.MESSAGES)]


class CountTokensRequest(Struct, kw_only=True):
    """POST /v1/messages/count_tokens."""

    model: str | None = None
    messages: Turns
    system: Blocks | None = None


class MessagesRequest(Sampled, kw_only=True):
    """POST /v1/messages."""

    model: str | None = None
    messages: Turns
    system: Blocks | None = None
    max_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None
