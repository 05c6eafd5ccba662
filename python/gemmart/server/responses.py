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
from gemmart.server.responses_schema import TEXT_PARTS, JsonObject, PlainText, ResponsesRequest
from gemmart.server.schema import text_of
from gemmart.tools import CallDelta

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
    app.log_prompt(request, messages)
    call = Call(
        prompts=[partial(app.model.chat_tokens, messages)],
        sampling=sampling_of(asked),
        seed=asked.seed,
        max_tokens=asked.max_output_tokens,
        logprobs=(asked.top_logprobs or 0) if logprobs else None,
        format=partial(_format, asked),
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
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        return [*messages, {"role": "user", "content": asked.input}]
    for i, item in enumerate(asked.input):
        if item.type != "message" or item.role is None or item.content is None:
            where = f"input[{i}]"
            raise InvalidRequest(
                f"{where} is no message, with a role and a content; this server reads these only", where
            )
        messages.append({"role": item.role, "content": text_of(item.content, f"input[{i}].content", TEXT_PARTS)})
    return messages


class Response:
    """An answer as a response of one message."""

    media_type = EVENTS
    ping = PING

    def __init__(self, app: App, asked: ResponsesRequest, call: Call) -> None:
        sampling = resolve(call.sampling, app.model.default_sampling)
        self._tokenizer = app.model.tokenizer
        self._n_events = 0
        self._text = ""
        self._logprobs: list[dict[str, Any]] = []
        self._item_id = "msg_" + secrets.token_hex(12)
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
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": asked.text.format if asked.text and asked.text.format else PlainText()},
            "tool_choice": "auto",
            "tools": [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        (choice,) = answer.choices
        self._take(choice.text, choice.logprobs)
        return self._finished(answer)

    def begin(self, answer: Answer) -> bytes:
        return (
            self._event("response.created", response=self._response)
            + self._event("response.in_progress", response=self._response)
            + self._event("response.output_item.added", output_index=0, item=self._item("in_progress", []))
            + self._part_event("response.content_part.added", part=self._part("", []))
        )

    def part(self, index: int, text: str, logprobs: Sequence[Placed]) -> bytes:
        added = self._take(text, logprobs)
        return self._part_event("response.output_text.delta", delta=text, logprobs=added)

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        raise NotImplementedError

    def last(self, index: int, result: Completion) -> bytes:
        part = self._part(self._text, self._logprobs)
        return (
            self._part_event("response.output_text.done", text=self._text, logprobs=self._logprobs)
            + self._part_event("response.content_part.done", part=part)
            + self._event("response.output_item.done", output_index=0, item=self._item(_status(result), [part]))
        )

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
        part = self._part(self._text, self._logprobs)
        return self._response | {
            "status": status,
            "completed_at": int(time.time()) if status == "completed" else None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "output": [self._item(status, [part])],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.prompt_tokens + usage.completion_tokens,
                "seed": result.seed,
            },
        }

    def _item(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    @staticmethod
    def _part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _part_event(self, name: str, **more: Any) -> bytes:
        return self._event(name, item_id=self._item_id, output_index=0, content_index=0, **more)

    def _event(self, name: str, **more: Any) -> bytes:
        self._n_events += 1
        return event(name, {"type": name, "sequence_number": self._n_events - 1, **more})


def _status(result: Completion) -> str:
    return "incomplete" if result.finish_reason == "length" else "completed"


DIALECT = replace(OPENAI, missing="responses are not kept here, so there is none to be read or changed")
