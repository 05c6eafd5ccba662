"""The JSON of OpenAI's answers, whole and in chunks."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.responses import Response

from gemmart.results import Completion, TokenLogprob
from gemmart.server.generation import DONE, PING, Choice, Generation, Placed, data
from gemmart.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemmart.server.app import App, Record

NEVER = -9999.0
"""What stands for a log-probability of minus infinity, which JSON cannot hold."""


class Shape(Protocol):
    """What chats and completions do differently."""

    prefix: str  # of an answer's id
    object: str
    chunk_object: str

    def whole(self, index: int, choice: Choice) -> dict[str, Any]: ...

    def first(self, index: int) -> dict[str, Any] | None:
        """What the stream of a choice begins with."""

    def part(self, index: int, text: str, logprobs: Sequence[Placed], finish_reason: str | None) -> dict[str, Any]:
        """A piece of a choice."""


class Chat:
    """Chat completions."""

    prefix = "chatcmpl-"
    object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.result is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice.logprobs) if choice.result.logprobs is not None else None,
            "finish_reason": choice.result.finish_reason,
        }

    def first(self, index: int) -> dict[str, Any] | None:
        return self._chunk(index, {"role": "assistant", "content": ""})

    def part(self, index: int, text: str, logprobs: Sequence[Placed], finish_reason: str | None) -> dict[str, Any]:
        delta = {} if finish_reason else {"content": text}
        return self._chunk(index, delta) | {
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    @staticmethod
    def _chunk(index: int, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def _logprobs(self, logprobs: Sequence[Placed]) -> dict[str, Any]:
        content = [
            self._token(logprob.token, logprob.logprob)
            | {"top_logprobs": [self._token(token, value) for token, value in logprob.top]}
            for _, logprob in logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        piece = self._tokenizer.piece(token)
        return {"token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": max(logprob, NEVER)}


class Text:
    """Completions."""

    prefix = "cmpl-"
    object = chunk_object = "text_completion"

    def __init__(self, tokenizer: Tokenizer, echo: Sequence[str] | None, n: int) -> None:
        """`echo`: the text of each prompt, to be repeated before its `n` answers."""
        self._tokenizer = tokenizer
        self._echo = echo
        self._n = n

    def whole(self, index: int, choice: Choice) -> dict[str, Any]:
        assert choice.result is not None
        found = self.part(index, self._echoed(index) + choice.text, choice.logprobs, choice.result.finish_reason)
        if choice.result.logprobs is not None:
            found["logprobs"] = self._logprobs(choice.logprobs)
        return found

    def first(self, index: int) -> dict[str, Any] | None:
        text = self._echoed(index)
        return self.part(index, text, [], None) if text else None

    def part(self, index: int, text: str, logprobs: Sequence[Placed], finish_reason: str | None) -> dict[str, Any]:
        return {
            "index": index,
            "text": text,
            "logprobs": self._logprobs(logprobs) if logprobs else None,
            "finish_reason": finish_reason,
        }

    def _echoed(self, index: int) -> str:
        return self._echo[index // self._n] if self._echo else ""

    def _logprobs(self, logprobs: Sequence[Placed]) -> dict[str, Any]:
        return {
            "tokens": [self._name(logprob.token) for _, logprob in logprobs],
            "token_logprobs": [max(logprob.logprob, NEVER) for _, logprob in logprobs],
            "top_logprobs": [self._top(logprob) for _, logprob in logprobs],
            "text_offset": [begin for begin, _ in logprobs],
        }

    def _top(self, logprob: TokenLogprob) -> dict[str, float]:
        found: dict[str, float] = {}
        for token, value in logprob.top:  # best first; of tokens that are written alike the best stays
            found.setdefault(self._name(token), max(value, NEVER))
        return found

    def _name(self, token: int) -> str:
        return self._tokenizer.piece(token).decode(errors="replace")


class Answer:
    """The answer to one call."""

    def __init__(self, app: App, record: Record, shape: Shape, generation: Generation, n_prompts: int, n: int) -> None:
        self._app = app
        self._record = record
        self._shape = shape
        self._generation = generation
        self._choices = [Choice(app.model.tokenizer) for _ in range(n_prompts * n)]
        self._n = n
        self._head = {
            "id": shape.prefix + secrets.token_hex(12),
            "object": shape.object,
            "created": int(time.time()),
            "model": app.model_id,
            "system_fingerprint": app.fingerprint,
        }

    async def whole(self) -> dict[str, Any]:
        async for event in self._generation.events():
            if event:
                self._choices[event[0]].push(event[1])
        choices = [self._shape.whole(index, choice) for index, choice in enumerate(self._choices)]
        results = self._results()
        return self._head | {"choices": choices, "usage": self._usage(results), "timings": timings(results[0])}

    async def stream(self, include_usage: bool) -> AsyncIterator[bytes]:
        head = self._head | {"object": self._shape.chunk_object}
        usage = {"usage": None} if include_usage else {}
        for index in range(len(self._choices)):
            if first := self._shape.first(index):
                yield data(head | {"choices": [first]} | usage)
        async for event in self._generation.events():
            if event is None:
                yield PING
                continue
            index = event[0]
            choice = self._choices[index]
            text, logprobs = choice.push(event[1])
            if text or logprobs:
                yield data(head | {"choices": [self._shape.part(index, text, logprobs, None)]} | usage)
            if choice.result:
                last = self._shape.part(index, "", [], choice.result.finish_reason)
                yield data(head | {"choices": [last]} | usage | {"timings": timings(choice.result)})
        found = self._usage(self._results())
        if include_usage:
            yield data(head | {"choices": [], "usage": found})
        yield DONE

    def _results(self) -> list[Completion]:
        return [choice.result for choice in self._choices if choice.result]

    def _usage(self, results: Sequence[Completion]) -> dict[str, Any]:
        """Of the finished answer; also tells the log and the counters."""
        firsts = results[:: self._n]  # a prompt counts once
        n_prompt = sum(result.usage.prompt_tokens for result in firsts)
        n_cached = sum(result.usage.cached_tokens for result in firsts)
        n_answer = sum(result.usage.completion_tokens for result in results)
        self._record.prompt_tokens, self._record.completion_tokens = n_prompt, n_answer
        self._app.metrics.count_answers(results)
        return {
            "prompt_tokens": n_prompt,
            "completion_tokens": n_answer,
            "total_tokens": n_prompt + n_answer,
            "prompt_tokens_details": {"cached_tokens": n_cached},
            "seed": results[0].seed,
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


def as_json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
