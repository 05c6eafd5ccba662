"""What every protocol does alike: a call is started in the engine, and its answer is sent whole or as a stream.

A protocol reads its requests into a Call, and has a Shape for what comes of it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gemmart.errors import GemmartError
from gemmart.format import Format
from gemmart.request import Event
from gemmart.request import Request as EngineRequest
from gemmart.results import Completion, Delta, Usage
from gemmart.sampling import RANGES, Sampling
from gemmart.server.generation import Choice, EventStream, Generation, Placed, Prepare, while_connected
from gemmart.tokenizer import Tokenizer
from gemmart.tools import NO_TOOLS, CallDelta, Toolbox

if TYPE_CHECKING:
    from gemmart.server.app import App, Record


NEVER = -9999.0
"""What stands for a log-probability of minus infinity, which JSON cannot hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """What a request asks for; None is the model's default. As for Model.stream()."""

    prompts: Sequence[Callable[[], list[int]]]  # each gives its token ids, on another thread
    sampling: Sampling
    n: int = 1  # choices for each prompt
    seed: int | None = None  # of the first choice; the i-th has seed + i
    max_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    logprobs: int | None = None
    echo: Sequence[str] | None = None  # the prompts' texts, where their log-probabilities are wanted too
    ignore_eos: bool = False
    format: Callable[[], Format | None] | None = None  # gives what the answers must look like, on another thread
    toolbox: Toolbox = NO_TOOLS  # what they may call, of which the prompts tell
    stream: bool = False


class Answer:
    """The choices of a call as they grow."""

    def __init__(self, app: App, record: Record, call: Call, generation: Generation) -> None:
        self._app = app
        self._record = record
        self._generation = generation
        self._n = call.n
        echo = call.echo or [""] * len(call.prompts)
        self.choices = [Choice(app.model.tokenizer, text) for text in echo for _ in range(call.n)]

    @property
    def results(self) -> list[Completion]:
        """Of those choices that are finished."""
        return [choice.result for choice in self.choices if choice.result]

    @property
    def prompts(self) -> list[Sequence[int]]:
        """Their token ids."""
        return self._generation.prompts[:: self._n]

    @property
    def usage(self) -> Usage:
        """Of the finished answer; a prompt counts once."""
        firsts = self.results[:: self._n]
        return Usage(
            prompt_tokens=sum(map(len, self.prompts)),
            completion_tokens=sum(result.usage.completion_tokens for result in self.results),
            cached_tokens=sum(result.usage.cached_tokens for result in firsts),
        )

    async def whole(self, shape: Shape) -> Any:
        """The JSON of the finished answer."""
        async for event in self._generation.events():
            if event:
                self.choices[event[0]].push(event[1])
        self._count()
        return shape.whole(self)

    async def stream(self, shape: Shape) -> AsyncIterator[bytes]:
        yield shape.begin(self)
        async for event in self._generation.events():
            if event is None:
                yield shape.ping
                continue
            index = event[0]
            choice = self.choices[index]
            text, logprobs = choice.push(event[1])
            if text or logprobs:
                yield shape.part(index, text, logprobs)
            if isinstance(event[1], Delta) and event[1].calls:
                yield shape.calls(index, event[1].calls)
            if choice.result:
                yield shape.last(index, choice.result)
        self._count()
        yield shape.end(self)

    def _count(self) -> None:
        """Tell the log and the counters."""
        usage = self.usage
        self._record.prompt_tokens, self._record.completion_tokens = usage.prompt_tokens, usage.completion_tokens
        self._app.metrics.count_answers(self.results)


class Shape(Protocol):
    """An answer in a protocol's words: whole, or in pieces of a stream, each of which may be of several events, or of
    none."""

    media_type: str  # of the stream
    ping: bytes  # that it lives, while nothing comes

    def whole(self, answer: Answer) -> Any:
        """The JSON of all."""

    def begin(self, answer: Answer) -> bytes: ...

    def part(self, index: int, text: str, logprobs: Sequence[Placed]) -> bytes:
        """More of the choice `index`."""

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        """More of the calls of tools that the choice `index` makes; only where the call has a toolbox."""

    def last(self, index: int, result: Completion) -> bytes:
        """The choice `index` has ended."""

    def end(self, answer: Answer) -> bytes:
        """All have."""

    def failed(self, error: GemmartError, request_id: str) -> bytes:
        """Instead of what else would have come."""


async def answer(request: Request, call: Call, shape: Shape) -> Response:
    """Do what `call` asks for; whoever leaves ends it. Raises what Model.prepare() raises, HttpError, ClientGone."""
    app: App = request.app
    salt = app.access.salt(request.scope)
    generation = app.admit()
    try:
        await generation.start([_prepare(app, call, encode, salt) for encode in call.prompts], call.n)
        found = Answer(app, request.scope["gemmart"], call, generation)
        if call.stream:
            return EventStream(generation, found.stream(shape), shape.media_type, shape.failed)
        whole = await while_connected(request.receive, found.whole(shape))
    except BaseException:
        generation.close()
        raise
    generation.close()
    return as_json(whole)


def _prepare(app: App, call: Call, encode: Callable[[], list[int]], salt: int) -> Prepare:
    ids: list[int] = []
    format: Format | None = None

    def prepare(emit: Callable[[Event], object], choice: int) -> EngineRequest:
        nonlocal format
        if not ids:
            ids.extend(encode())
            format = call.format() if call.format else None
        return app.model.prepare(
            ids,
            call.sampling,
            emit=emit,
            seed=call.seed if call.seed is None or choice == 0 else (call.seed + choice) % 2**64,
            max_tokens=call.max_tokens,
            stop=call.stop,
            logprobs=call.logprobs,
            prompt_logprobs=None if call.echo is None else call.logprobs,
            ignore_eos=call.ignore_eos,
            format=format,
            toolbox=call.toolbox,
            salt=salt,
        )

    return prepare


def sampling_of(options: object, **more: Any) -> Sampling:
    """From a request's fields, of those that it has. Raises InvalidRequest for a value outside its range."""
    return Sampling(**{name: getattr(options, name, None) for name in RANGES}, **more)


def token_logprobs(tokenizer: Tokenizer, logprobs: Sequence[Placed]) -> list[dict[str, Any]]:
    """Log-probabilities as JSON: of each token, and of the likeliest in its place."""

    def found(token: int, logprob: float) -> dict[str, Any]:
        piece = tokenizer.piece(token)
        return {"token": piece.decode(errors="replace"), "bytes": list(piece), "logprob": max(logprob, NEVER)}

    return [
        found(logprob.token, logprob.logprob) | {"top_logprobs": [found(token, value) for token, value in logprob.top]}
        for _, logprob in logprobs
    ]


def as_json(value: Any) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
