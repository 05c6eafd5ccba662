"""Anthropic's endpoints: messages, and how many tokens they are."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from gemmart.errors import ContextOverflow, GemmartError
from gemmart.format import Format
from gemmart.results import Completion
from gemmart.server import body
from gemmart.server.answers import Answer, Call, answer, as_json, sampling_of
from gemmart.server.anthropic_input import Asked, messages_of, toolbox_of
from gemmart.server.anthropic_schema import AnthropicError, CountTokensRequest, MessagesRequest
from gemmart.server.errors import Dialect, unsupported
from gemmart.server.generation import EVENTS, Placed, event
from gemmart.tools import CallDelta, Toolbox, ToolCall

if TYPE_CHECKING:
    from gemmart.server.app import App

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""What Anthropic calls a status; every other one is an invalid_request_error."""


async def messages(request: Request) -> Response:
    app: App = request.app
    asked = await body.read(request, MessagesRequest)
    if asked.thinking and asked.thinking.type == "enabled":
        raise unsupported("thinking", "this server's models answer at once")
    toolbox = toolbox_of(asked)
    call = Call(
        prompts=[_encoder(request, asked, toolbox)],
        sampling=sampling_of(asked),
        seed=asked.seed,
        max_tokens=asked.max_tokens,
        stop=asked.stop_sequences,
        format=partial(_format, asked),
        toolbox=toolbox,
        stream=bool(asked.stream),
    )
    return await answer(request, call, Message(app, asked.max_tokens, may_call=bool(toolbox)))


def _format(asked: MessagesRequest) -> Format | None:
    wanted = asked.output_config and asked.output_config.format
    return Format.schema(wanted.schema, param="output_config.format.schema") if wanted else None


async def count_tokens(request: Request) -> Response:
    asked = await body.read(request, CountTokensRequest)
    return as_json({"input_tokens": len(await asyncio.to_thread(_encoder(request, asked, toolbox_of(asked))))})


def _encoder(request: Request, asked: Asked, toolbox: Toolbox) -> Callable[[], list[int]]:
    """What gives the token ids of the conversation. Where its last turn is the assistant's, the answer goes on with
    it."""
    app: App = request.app
    app.check_name(asked.model)
    chat = messages_of(asked)
    if chat[-1] == {"role": "assistant", "content": ""}:
        chat.pop()  # there is nothing to go on with
    app.log_prompt(request, chat)
    goes_on = bool(chat) and chat[-1]["role"] == "assistant" and "tool_calls" not in chat[-1]
    return partial(app.model.chat_tokens, chat, continue_final=goes_on, toolbox=toolbox)


class Message:
    """An answer as a message."""

    media_type = EVENTS
    ping = event("ping", {"type": "ping"})

    def __init__(self, app: App, max_tokens: int, *, may_call: bool) -> None:
        """may_call: it may be of calls of tools alone, without a text."""
        self._max_tokens = max_tokens
        self._may_call = may_call
        self._n_blocks = 0  # that are complete
        self._in_block = False
        self._head = {
            "id": "msg_" + secrets.token_hex(12),
            "type": "message",
            "role": "assistant",
            "model": app.model_id,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        (choice,) = answer.choices
        (result,) = answer.results
        content: list[dict[str, Any]] = [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call)} for call in result.tool_calls
        ]
        if choice.text or not content:
            content.insert(0, {"type": "text", "text": choice.text})
        return self._head | {"content": content} | self._stop(result) | {"usage": _usage(answer)}

    def begin(self, answer: Answer) -> bytes:
        # What of the prompt need not be computed again is known with the first token only.
        (prompt,) = answer.prompts
        usage = _tokens(len(prompt), n_cached=0, n_answer=0)
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = self._head | nothing | {"usage": usage}
        return (
            event("message_start", {"type": "message_start", "message": message})
            + (b"" if self._may_call else self._begin_block({"type": "text", "text": ""}))
            + self.ping
        )

    def part(self, index: int, text: str, logprobs: Sequence[Placed]) -> bytes:
        begin = b"" if self._in_block else self._begin_block({"type": "text", "text": ""})
        return begin + self._block("content_block_delta", delta={"type": "text_delta", "text": text})

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        events = b""
        for call in calls:
            if call.name is not None:
                events += self._end_block()
                events += self._begin_block({"type": "tool_use", "id": call.id, "name": call.name, "input": {}})
            if call.arguments:
                delta = {"type": "input_json_delta", "partial_json": call.arguments}
                events += self._block("content_block_delta", delta=delta)
        return events

    def last(self, index: int, result: Completion) -> bytes:
        nothing = not self._in_block and self._n_blocks == 0
        return (self._begin_block({"type": "text", "text": ""}) if nothing else b"") + self._end_block()

    def end(self, answer: Answer) -> bytes:
        (result,) = answer.results
        delta = {"type": "message_delta", "delta": self._stop(result), "usage": _usage(answer)}
        return event("message_delta", delta) + event("message_stop", {"type": "message_stop"})

    def failed(self, error: GemmartError, request_id: str) -> bytes:
        return event("error", error_body(error, request_id))

    def _begin_block(self, block: dict[str, Any]) -> bytes:
        self._in_block = True
        return self._block("content_block_start", content_block=block)

    def _end_block(self) -> bytes:
        if not self._in_block:
            return b""
        end = self._block("content_block_stop")
        self._in_block = False
        self._n_blocks += 1
        return end

    def _block(self, name: str, **more: Any) -> bytes:
        return event(name, {"type": name, "index": self._n_blocks, **more})

    def _stop(self, result: Completion) -> dict[str, Any]:
        """Why the answer ended."""
        if result.finish_reason == "length":
            full = result.usage.completion_tokens < self._max_tokens
            reason = "model_context_window_exceeded" if full else "max_tokens"
        elif result.finish_reason == "tool_calls":
            reason = "tool_use"
        else:
            reason = "end_turn" if result.stop_string is None else "stop_sequence"
        return {"stop_reason": reason, "stop_sequence": result.stop_string}


def _input(call: ToolCall) -> Any:
    """The arguments of a call; where the answer was cut, those that are complete are not known."""
    try:
        return json.loads(call.arguments)
    except (ValueError, RecursionError):
        return {}


def _usage(answer: Answer) -> dict[str, int]:
    """Of a finished answer."""
    found = answer.usage
    return _tokens(found.prompt_tokens, n_cached=found.cached_tokens, n_answer=found.completion_tokens)


def _tokens(n_prompt: int, *, n_cached: int, n_answer: int) -> dict[str, int]:
    """Anthropic counts what was computed, and beside it what was not."""
    return {
        "input_tokens": n_prompt - n_cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": n_cached,
        "output_tokens": n_answer,
    }


def error_body(error: GemmartError, request_id: str) -> dict[str, Any]:
    """The JSON that stands for an error."""
    message = str(error)
    if isinstance(error, ContextOverflow):  # in the words by which clients know it
        message = f"prompt is too long: {error.n_prompt} tokens > {error.n_ctx} maximum"
    kind = ERROR_TYPES.get(error.http_status, "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}


DIALECT = Dialect(error_body, AnthropicError, (b"x-request-id", b"request-id"))
