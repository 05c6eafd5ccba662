"""What requests to /v1/responses may say, and their answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from gemmart.server import limits
from gemmart.server.replies import Reply, TokenLogprob
from gemmart.server.schema import Part, Sampled, documented, part
from gemmart.tools import MAX_TOOLS, NAME

# Requests


TEXT_PARTS = ("input_text", "output_text", "text")


ItemParts = Annotated[list[Annotated[Part, part(*TEXT_PARTS)]], Meta(max_length=limits.PARTS)]


class Item(Struct):
    """Of the input."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | ItemParts | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | ItemParts | None = None


NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
}
"""Which fields the items of a type have."""
SAID = documented(
    anyOf=[
        {
            "required": [*names, *(["type"] if kind != "message" else [])],
            "properties": {"type": {"const": kind}, **{name: {"not": {"type": "null"}} for name in names}},
        }
        for kind, names in NEEDED.items()
    ]
)


class FunctionTool(Struct, kw_only=True):
    type: Literal["function"]
    name: Annotated[str, documented(pattern=f"^{NAME.pattern}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FunctionChoice(Struct):
    type: Literal["function"]
    name: str


class PlainText(Struct, tag="text"):
    pass


class JsonObject(Struct, tag="json_object"):
    pass


class JsonSchema(Struct, tag="json_schema", kw_only=True):
    name: str
    schema: dict[str, Any]
    description: str | None = None
    strict: bool | None = None


TextFormat = PlainText | JsonObject | JsonSchema


class TextConfig(Struct):
    format: TextFormat | None = None


Absent = Annotated[Any, documented(type="null")]


class ResponsesRequest(Sampled, kw_only=True):
    """POST /v1/responses."""

    input: str | Annotated[list[Annotated[Item, SAID]], Meta(min_length=1, max_length=limits.MESSAGES)]
    instructions: str | None = None
    model: str | None = None
    max_output_tokens: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    stream: bool | None = None
    include: list[str] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=limits.TOP_LOGPROBS)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[FunctionTool], documented(maxItems=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None
    truncation: Annotated[Literal["auto", "disabled"], documented(const="disabled")] | None = None
    background: Annotated[bool, documented(const=False)] | None = None
    previous_response_id: Absent = None
    conversation: Absent = None
    prompt: Absent = None


# Answers

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputText(Reply):
    type: Literal["output_text"]
    text: str
    annotations: list[None]
    logprobs: list[TokenLogprob]


class OutputMessage(Reply, tag="message"):
    id: str
    status: Status
    role: Literal["assistant"]
    content: list[OutputText]


class OutputCall(Reply, tag="function_call"):
    id: str
    status: Status
    call_id: str
    name: str
    arguments: str


class InputDetails(Reply):
    cached_tokens: int
    cache_write_tokens: int


class OutputDetails(Reply):
    reasoning_tokens: int


class ResponseUsage(Reply):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int
    seed: int


class Incomplete(Reply):
    reason: Literal["max_output_tokens"]


class Failure(Reply):
    code: Literal["server_error"]
    message: str


class TextSettings(Reply):
    format: TextFormat


class WholeResponse(Reply):
    id: str
    object: Literal["response"]
    created_at: int
    status: Status
    completed_at: int | None
    error: Failure | None
    incomplete_details: Incomplete | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage | OutputCall]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: TextSettings
    tool_choice: str | FunctionChoice
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class Numbered(Reply):
    sequence_number: int


class OfResponse(Numbered):
    response: WholeResponse


class Created(OfResponse, tag="response.created"):
    pass


class InProgress(OfResponse, tag="response.in_progress"):
    pass


class Completed(OfResponse, tag="response.completed"):
    pass


class Ended(OfResponse, tag="response.incomplete"):
    pass


class Failed(OfResponse, tag="response.failed"):
    pass


class OfItem(Numbered):
    output_index: int
    item: OutputMessage | OutputCall


class ItemAdded(OfItem, tag="response.output_item.added"):
    pass


class ItemDone(OfItem, tag="response.output_item.done"):
    pass


class OfPart(Numbered):
    item_id: str
    output_index: int
    content_index: int


class PartAdded(OfPart, tag="response.content_part.added"):
    part: OutputText


class PartDone(OfPart, tag="response.content_part.done"):
    part: OutputText


class TextAdded(OfPart, tag="response.output_text.delta"):
    delta: str
    logprobs: list[TokenLogprob]


class TextDone(OfPart, tag="response.output_text.done"):
    text: str
    logprobs: list[TokenLogprob]


class OfCall(Numbered):
    item_id: str
    output_index: int


class ArgumentsAdded(OfCall, tag="response.function_call_arguments.delta"):
    delta: str


class ArgumentsDone(OfCall, tag="response.function_call_arguments.done"):
    name: str
    arguments: str


class ErrorEvent(Numbered, tag="error"):
    code: str
    message: str
    param: str | None


ResponseEvent = (
    Created | InProgress | ItemAdded | PartAdded | TextAdded | TextDone | PartDone | ItemDone | Completed | Ended
    | ArgumentsAdded | ArgumentsDone | ErrorEvent | Failed
)  # fmt: skip
