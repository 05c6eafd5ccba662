"""The JSON of OpenAI's chat completions and completions, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import isnan
from typing import TYPE_CHECKING, Any

from gemmart.errors import GemmartError
from gemmart.results import Completion, TokenLogprob
from gemmart.server.answers import NEVER, Answer, token_logprobs
from gemmart.server.errors import body
from gemmart.server.generation import EVENTS, PING, Choice, Placed, data
from gemmart.tools import CallDelta, ToolCall

if TYPE_CHECKING:
    from gemmart.server.app import App

DONE = b"data: [DONE]\n\n"


class _Chunks(ABC):
    """What both have in common."""

    media_type = EVENTS
    ping = PING

    prefix: str  # of an answer's id
    object: str
    chunk_object: str

    def __init__(self, app: App, include_usage: bool) -> None:
        """`include_usage`: at the end of a stream."""
        self._tokenizer = app.model.tokenizer
        self._include_usage = include_usage
        self._head = {
            "id": self.prefix + secrets.token_hex(12),
            "object": self.object,
            "created": int(time.time()),
            "model": app.model_id,
            "system_fingerprint": app.fingerprint,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        choices = [self._choice(index, choice) for index, choice in enumerate(answer.choices)]
        return self._head | {"choices": choices, "usage": usage(answer), "timings": timings(answer.results[0])}

    def begin(self, answer: Answer) -> bytes:
        return b"".join(self._chunk([first]) for i in range(len(answer.choices)) if (first := self._first(i)))

    def part(self, index: int, text: str, logprobs: Sequence[Placed]) -> bytes:
        return self._chunk([self._piece(index, text, logprobs, None)])

    @abstractmethod
    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes: ...

    def last(self, index: int, result: Completion) -> bytes:
        return self._chunk([self._piece(index, "", [], result.finish_reason)], timings=timings(result))

    def end(self, answer: Answer) -> bytes:
        return (self._chunk([], usage=usage(answer)) if self._include_usage else b"") + DONE

    def failed(self, error: GemmartError, request_id: str) -> bytes:
        return data(body(error))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        no_usage = {"usage": None} if self._include_usage else {}
        return data(self._head | {"object": self.chunk_object, "choices": choices} | no_usage | more)

    @abstractmethod
    def _choice(self, index: int, choice: Choice) -> dict[str, Any]: ...

    @abstractmethod
    def _first(self, index: int) -> dict[str, Any] | None:
        """What the stream of a choice begins with."""

    @abstractmethod
    def _piece(
        self, index: int, text: str, logprobs: Sequence[Placed], finish_reason: str | None
    ) -> dict[str, Any]: ...


class Chat(_Chunks):
    """Chat completions."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.result is not None
        return {
            "index": index,
            "message": self._message(choice.text, choice.result.tool_calls),
            "logprobs": self._logprobs(choice.logprobs) if choice.result.logprobs is not None else None,
            "finish_reason": choice.result.finish_reason,
        }

    @staticmethod
    def _message(text: str, calls: Sequence[ToolCall]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text or None if calls else text, "refusal": None}
        return message | {"tool_calls": [call.to_openai() for call in calls]} if calls else message

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        return self._chunk([self._delta(index, {"tool_calls": [self._call(call) for call in calls]})])

    @staticmethod
    def _call(call: CallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        function = {"name": call.name, "arguments": call.arguments}
        return {"index": call.index, "id": call.id, "type": "function", "function": function}

    def _first(self, index: int) -> dict[str, Any] | None:
        return self._delta(index, {"role": "assistant", "content": ""})

    def _piece(self, index: int, text: str, logprobs: Sequence[Placed], finish_reason: str | None) -> dict[str, Any]:
        delta = {} if finish_reason else {"content": text}
        return self._delta(index, delta) | {
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    @staticmethod
    def _delta(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, logprobs: Sequence[Placed]) -> dict[str, Any]:
        return {"content": token_logprobs(self._tokenizer, logprobs), "refusal": None}


class Text(_Chunks):
    """Completions."""

    prefix = "cmpl-"
    object = chunk_object = "text_completion"

    def __init__(self, app: App, include_usage: bool, echo: Sequence[str] | None, n: int) -> None:
        """`echo`: the text of each prompt, to be repeated before its `n` answers."""
        super().__init__(app, include_usage)
        self._echo = echo
        self._n = n

    def _choice(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.result is not None
        found = self._piece(index, self._echoed(index) + choice.text, choice.logprobs, choice.result.finish_reason)
        if choice.result.logprobs is not None:
            found["logprobs"] = self._logprobs(choice.logprobs)
        return found

    def _first(self, index: int) -> dict[str, Any] | None:
        text = self._echoed(index)
        return self._piece(index, text, [], None) if text else None

    def _piece(self, index: int, text: str, logprobs: Sequence[Placed], finish_reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        return b""  # completions take no tools

    def _echoed(self, index: int) -> str:
        return self._echo[index // self._n] if self._echo else ""

    def _logprobs(self, logprobs: Sequence[Placed]) -> dict[str, Any]:
        return {
            "tokens": [self._name(logprob.token) for _, logprob in logprobs],
            "token_logprobs": [
                None if isnan(logprob.logprob) else max(logprob.logprob, NEVER) for _, logprob in logprobs
            ],
            "top_logprobs": [None if isnan(logprob.logprob) else self._top(logprob) for _, logprob in logprobs],
            "text_offset": [begin for begin, _ in logprobs],
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, value in logprob.top:  # best first; of tokens that are written alike the best stays
            found.setdefault(self._name(token), max(value, NEVER))
        return found

    def _name(self, token: int) -> str:
        return self._tokenizer.piece(token).decode(errors="replace")


def usage(answer: Answer) -> dict[str, Any]:
    """Of a finished answer."""
    found = answer.usage
    return {
        "prompt_tokens": found.prompt_tokens,
        "completion_tokens": found.completion_tokens,
        "total_tokens": found.prompt_tokens + found.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": found.cached_tokens},
        "seed": answer.results[0].seed,
    }


def timings(result: Completion) -> dict[str, Any]:
    """How fast an answer came, in llama.cpp's words."""
    usage, times = result.usage, result.timings
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": usage.prompt_tokens - usage.cached_tokens,
        "prompt_ms": 1000 * times.prompt_s,
        "prompt_per_second": times.prompt_tokens_per_s(usage),
        "predicted_n": usage.completion_tokens,
        "predicted_ms": 1000 * times.generate_s,
        "predicted_per_second": times.tokens_per_s(usage),
        "draft_n": times.drafted_tokens,
        "draft_n_accepted": times.accepted_tokens,
    }
