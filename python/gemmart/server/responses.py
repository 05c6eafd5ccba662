"""OpenAI's responses, of which nothing is kept: the input is the whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from gemmart.errors import GemmartError, InvalidRequest
from gemmart.format import Format
from gemmart.results import Completion
from gemmart.sampling import resolve
from gemmart.server import body
from gemmart.server.answers import Answer, Call, answer, sampling_of, token_logprobs
from gemmart.server.errors import OPENAI, unsupported
from gemmart.server.generation import EVENTS, PING, Placed, event
from gemmart.server.responses_schema import NEEDED, TEXT_PARTS, FunctionChoice, JsonObject, PlainText, ResponsesRequest
from gemmart.server.schema import text_of
from gemmart.tools import CallDelta, Tool, Toolbox

if TYPE_CHECKING:
    from gemmart.server.app import App

LOGPROBS = "message.output_text.logprobs"


async def responses(request: Request) -> HttpResponse:
    app: App = request.app
    asked = await body.read(request, ResponsesRequest)
    app.check_name(asked.model)
    _refuse_state(asked)
    logprobs = LOGPROBS in (asked.include or ())
    if asked.top_logprobs and not logprobs:
        raise InvalidRequest(f'top_logprobs: needs include: ["{LOGPROBS}"]', "top_logprobs")
    messages = _messages(asked)
    toolbox = _toolbox(asked)
    app.log_prompt(request, messages)
    call = Call(
        prompts=[partial(app.model.chat_tokens, messages, toolbox=toolbox)],
        sampling=sampling_of(asked),
        seed=asked.seed,
        max_tokens=asked.max_output_tokens,
        logprobs=(asked.top_logprobs or 0) if logprobs else None,
        format=partial(_format, asked),
        toolbox=toolbox,
        stream=bool(asked.stream),
    )
    return await answer(request, call, Response(app, asked, call))


def _refuse_state(asked: ResponsesRequest) -> None:
    for name in ("previous_response_id", "conversation", "prompt"):
        if getattr(asked, name) is not None:
            raise unsupported(name, "nothing is kept here; send the whole conversation as input")
    if asked.background:
        raise unsupported("background", "this server answers at once, or as a stream")
    if asked.truncation == "auto":
        raise unsupported("truncation", "this server drops nothing of the input")


def _format(asked: ResponsesRequest) -> Format | None:
    wanted = asked.text and asked.text.format
    if not wanted or isinstance(wanted, PlainText):
        return None
    if isinstance(wanted, JsonObject):
        return Format.json(param="text.format")
    return Format.schema(wanted.schema, param="text.format.schema")


def _messages(asked: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation as templates take it."""
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    called: set[str] = set()
    for i, item in enumerate(asked.input):
        where = f"input[{i}]"
        for name in NEEDED[item.type]:
            if getattr(item, name) is None:
                raise InvalidRequest(f"{where}.{name}: is missing", f"{where}.{name}")
        if item.type == "message":
            content = text_of(item.content or "", f"{where}.content", TEXT_PARTS)
            messages.append({"role": item.role, "content": content})
        elif item.type == "function_call":
            called.add(str(item.call_id))
            call = {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            if messages and messages[-1]["role"] == "assistant":  # the same turn
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
        else:
            if item.call_id not in called:
                raise InvalidRequest(f"{where}.call_id: no call before has the id {item.call_id!r}", f"{where}.call_id")
            text = text_of(item.output or "", f"{where}.output", TEXT_PARTS)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": text})
    return messages


def _toolbox(asked: ResponsesRequest) -> Toolbox:
    given = asked.tools or ()
    tools = [Tool(tool.name, tool.description or "", tool.parameters, bool(tool.strict)) for tool in given]
    if isinstance(asked.tool_choice, FunctionChoice):
        return Toolbox(tools, "required", parallel=False, allowed=[asked.tool_choice.name])
    return Toolbox(tools, asked.tool_choice or "auto", parallel=asked.parallel_tool_calls is not False)


class Response:
    """An answer as a response of a message, of calls, or of both."""

    media_type = EVENTS
    ping = PING

    def __init__(self, app: App, asked: ResponsesRequest, call: Call) -> None:
        sampling = resolve(call.sampling, app.model.default_sampling)
        self._tokenizer = app.model.tokenizer
        self._n_events = 0
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._may_call = bool(call.toolbox)
        self._item: dict[str, Any] | None = None  # under way; its text, or its arguments, are in _text
        self._items: list[dict[str, Any]] = []  # that are complete
        self._response: dict[str, Any] = {
            "id": "resp_" + secrets.token_hex(12),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "background": False,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": app.model_id,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": asked.text.format if asked.text and asked.text.format else PlainText()},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        (choice,) = answer.choices
        (result,) = answer.results
        if choice.text or not result.tool_calls:
            self._begin_message()
            self._take(choice.text, choice.logprobs)
            self._end_item(_status(result))
        for call in result.tool_calls:
            self._begin_call(call.id, call.name)
            self._text = call.arguments
            self._end_item(_status(result))
        return self._finished(answer)

    def begin(self, answer: Answer) -> bytes:
        return (
            self._event("response.created", response=self._response)
            + self._event("response.in_progress", response=self._response)
            + (b"" if self._may_call else self._begin_message())
        )

    def part(self, index: int, text: str, logprobs: Sequence[Placed]) -> bytes:
        begin = b"" if self._item else self._begin_message()
        added = self._take(text, logprobs)
        return begin + self._part_event("response.output_text.delta", delta=text, logprobs=added)

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        events = b""
        for call in calls:
            if call.id is not None and call.name is not None:
                events += self._end_item("completed") + self._begin_call(call.id, call.name)
            if call.arguments:
                self._text += call.arguments
                events += self._item_event("response.function_call_arguments.delta", delta=call.arguments)
        return events

    def last(self, index: int, result: Completion) -> bytes:
        begin = b"" if self._item or self._items else self._begin_message()
        return begin + self._end_item(_status(result))

    def end(self, answer: Answer) -> bytes:
        response = self._finished(answer)
        return self._event(f"response.{response['status']}", response=response)

    def failed(self, error: GemmartError, request_id: str) -> bytes:
        param = getattr(error, "param", None)
        told = {"code": "server_error", "message": str(error)}
        return self._event("error", code=error.http_code, message=str(error), param=param) + self._event(
            "response.failed", response=self._response | {"status": "failed", "error": told}
        )

    def _take(self, text: str, logprobs: Sequence[Placed]) -> list[dict[str, Any]]:
        added = token_logprobs(self._tokenizer, logprobs)
        self._text += text
        self._logprobs += added
        return added

    def _finished(self, answer: Answer) -> dict[str, Any]:
        (result,) = answer.results
        usage = answer.usage
        status = _status(result)
        return self._response | {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": self._items,
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "seed": result.seed,
            },
        }

    def _begin_message(self) -> bytes:
        begin = self._begin_item(
            {"type": "message", "id": "msg_" + secrets.token_hex(12), "role": "assistant"}, content=[]
        )
        return begin + self._part_event("response.content_part.added", part=self._part("", []))

    def _begin_call(self, call_id: str, name: str) -> bytes:
        item = {"type": "function_call", "id": "fc_" + secrets.token_hex(12), "call_id": call_id, "name": name}
        return self._begin_item(item, arguments="")

    def _begin_item(self, item: dict[str, Any], **empty: Any) -> bytes:
        self._item, self._text, self._logprobs = item, "", []
        item = item | {"status": "in_progress"} | empty
        return self._event("response.output_item.added", output_index=len(self._items), item=item)

    def _end_item(self, status: str) -> bytes:
        """Of the one under way, if there is one."""
        if self._item is None:
            return b""
        if self._item["type"] == "message":
            part = self._part(self._text, self._logprobs)
            filled: dict[str, Any] = {"content": [part]}
            events = self._part_event("response.output_text.done", text=self._text, logprobs=self._logprobs)
            events += self._part_event("response.content_part.done", part=part)
        else:
            filled = {"arguments": self._text}
            events = self._item_event(
                "response.function_call_arguments.done", name=self._item["name"], arguments=self._text
            )
        item = self._item | {"status": status} | filled
        events += self._event("response.output_item.done", output_index=len(self._items), item=item)
        self._items.append(item)
        self._item = None
        return events

    @staticmethod
    def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _part_event(self, kind: str, **more: Any) -> bytes:
        return self._item_event(kind, content_index=0, **more)

    def _item_event(self, kind: str, **more: Any) -> bytes:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=len(self._items), **more)

    def _event(self, kind: str, **more: Any) -> bytes:
        self._n_events += 1
        return event(kind, {"type": kind, "sequence_number": self._n_events - 1, **more})


def _status(result: Completion) -> str:
    return "incomplete" if result.finish_reason == "length" else "completed"


DIALECT = replace(OPENAI, missing="responses are not kept here, so there is none to be read or changed")
