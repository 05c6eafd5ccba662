"""Answers under way: from the engine's thread to the event loop, and what ends them early."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from math import nan
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gemmart.errors import Cancelled, GemmartError
from gemmart.model import Model
from gemmart.pace import Pace
from gemmart.request import Event
from gemmart.request import Request as EngineRequest
from gemmart.results import Completion, Delta, Echo, Prefill, TokenLogprob
from gemmart.server import limits
from gemmart.server.errors import ClientGone, HttpError, draining, log, public
from gemmart.tokenizer import Tokenizer

T = TypeVar("T")
Placed = tuple[int, TokenLogprob]
"""With the character of the answer that the token begins at."""
Prepare = Callable[[Callable[[Event], object], int], EngineRequest]
"""Makes the request for a choice of a prompt: (where its events go, which choice)."""


class Generation:
    """The answers to one call: to each of its prompts, `n` choices. `index` counts choices through all prompts.

    From its making until close() the server counts it as under way."""

    def __init__(self, model: Model, seconds: float, under_way: set[Generation]) -> None:
        self._model = model
        self._loop = asyncio.get_running_loop()
        self._deadline = time.monotonic() + seconds
        self._seconds = seconds
        self._events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._requests: list[EngineRequest] = []
        self._later: dict[int, list[EngineRequest]] = {}
        self._pace: Pace | None = None
        self.is_preparing = True
        self._under_way = under_way
        under_way.add(self)

    async def start(self, prompts: Sequence[Prepare], n: int, *, paced: bool = False) -> None:
        """Begin. paced: not with all prompts at once, but as the engine finds time for them. Raises what
        Model.prepare() raises."""

        def prepare() -> list[EngineRequest]:
            return [
                prompt(self._sink(at * n + choice), choice) for at, prompt in enumerate(prompts) for choice in range(n)
            ]

        self._requests = await asyncio.to_thread(prepare)  # to encode a long prompt takes its time
        # The other choices of a prompt wait until the first has computed it, and share that.
        for first in range(0, len(self._requests), n):
            self._later[first] = self._requests[first + 1 : first + n]
        if paced:
            self._pace = Pace(self._requests[::n], self._model)
            self._pace.go_on()
        else:
            for request in self._requests[::n]:
                self._model.submit(request)
        self.is_preparing = False

    @property
    def prompts(self) -> list[Sequence[int]]:
        """The token ids of each choice's prompt, once it has begun."""
        return [request.prompt for request in self._requests]

    async def events(self) -> AsyncIterator[tuple[int, Delta | Echo | Completion] | None]:
        """(index, event) as they come, up to the Completion of every choice; None where for a while none came. Raises
        what ends them."""
        n_open = len(self._requests)
        while n_open:
            now = time.monotonic()
            try:
                async with asyncio.timeout(min(limits.PING_SECONDS, self._deadline - now)):
                    index, event = await self._events.get()
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    raise HttpError(
                        504, "deadline_exceeded", f"the answer was not finished within {self._seconds:g} s"
                    ) from None
                yield None
                continue
            if isinstance(event, Cancelled):  # the model was closed
                raise draining()
            if isinstance(event, Exception):
                raise event
            for request in self._later.pop(index, ()):
                self._model.submit(request)
            if isinstance(event, Completion):
                n_open -= 1
                if self._pace:
                    self._pace.go_on(self._requests[index])
            if isinstance(event, Delta | Echo | Completion):
                yield index, event
                await asyncio.sleep(0)  # neither a queue that holds something nor a send lets others have the loop

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        self._events.put_nowait((0, error))

    def close(self) -> None:
        """Whatever is not finished is stopped within one step. Closing twice does no harm."""
        for request in self._requests:
            self._model.cancel(request)
        self._under_way.discard(self)

    def _sink(self, index: int) -> Callable[[Event], object]:
        def emit(event: Event) -> None:
            if isinstance(event, Prefill):
                return
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, event))

        return emit


class Choice:
    """One answer as it grows: its text, and the log-probabilities of the tokens that the text consists of."""

    def __init__(self, tokenizer: Tokenizer, echo: str = "") -> None:
        """echo: what it begins with when an Echo comes, the prompt's text."""
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder(start=False)
        self._echo = echo
        self._n_pushed = self._n_passed = 0  # characters: of tokens; of text
        self._held: list[Placed] = []
        self.text = ""
        self.logprobs: list[Placed] = []
        self.result: Completion | None = None

    def push(self, event: Delta | Echo | Completion) -> tuple[str, list[Placed]]:
        """Take the next event; returns the text that it adds, and the log-probabilities that belong to it: those of
        tokens of which a character has been passed on, since a stop string may still take back the others."""
        text = ""
        if isinstance(event, Echo):
            self.text, self.logprobs = self._echo, self._of_prompt(event)
            self._n_pushed = self._n_passed = len(self._echo)
            return self.text, list(self.logprobs)
        if isinstance(event, Delta):
            text = event.text
            for logprob in event.logprobs or ():
                self._held.append(self._place(logprob, len(self._decoder.push(logprob.token))))
        else:
            self.result = event
        self._n_passed += len(text)
        n = sum(begin < self._n_passed for begin, _ in self._held)
        if self.result and self.result.stop_string is None and not self.result.tool_calls:
            n = len(self._held)
        passed = self._held[:n]
        del self._held[:n]
        self.text += text
        self.logprobs += passed
        return text, passed

    def _place(self, logprob: TokenLogprob, n: int) -> Placed:
        """Of a token that adds n characters."""
        # What is more than its own text is U+FFFD for a character that a token before it left incomplete.
        n_before = max(0, n - len(logprob.piece.decode(errors="replace")))
        self._n_pushed += n
        return self._n_pushed - n + n_before, logprob

    def _of_prompt(self, echo: Echo) -> list[Placed]:
        """The first token has NaN: nothing says how likely it was. A BOS that the text does not have takes no place."""
        first = echo.tokens[0]
        piece = self._tokenizer.piece(first)
        is_added = first == self._tokenizer.bos and not self._echo.encode().startswith(piece)
        decoder = self._tokenizer.decoder(special=True)
        placed = [self._place(TokenLogprob(first, piece, nan, ()), 0 if is_added else len(decoder.push(first)))]
        return placed + [self._place(logprob, len(decoder.push(logprob.token))) for logprob in echo.logprobs]


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves: ClientGone."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """The pieces of a stream, one of events or of lines, over a generation, which ends with it. An error that comes
    after the beginning is a piece as well, and the last one."""

    def __init__(
        self,
        generation: Generation,
        pieces: AsyncIterator[bytes],
        media_type: str,
        failed: Callable[[GemmartError, str], bytes],
    ) -> None:
        """`failed`: the piece for an error in the request of that id."""
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # not in nginx's buffers either
        super().__init__(media_type=media_type, headers=headers)
        del self.headers["content-length"]
        self._generation = generation
        self._pieces = pieces
        self._failed = failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._write(scope, send))
        finally:
            self._generation.close()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for piece in self._pieces:
                if piece:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except Exception as error:
            record = scope["gemmart"]
            told = public(error)
            record.error = told.http_code
            if told.http_status == 500:
                log.error("%s: %s", record.id, error, exc_info=error)
            await send({"type": "http.response.body", "body": self._failed(told, record.id), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


NEWLINES = {character.encode(): f"\\u{ord(character):04x}".encode() for character in "\x85\u2028\u2029"}
"""Beside those that JSON escapes, what some readers of streams take for the end of a line."""


def json_line(value: Any) -> bytes:
    """A JSON value on one line, whoever reads it."""
    found = msgspec.json.encode(value)
    for character, escape in NEWLINES.items():
        found = found.replace(character, escape)
    return found


EVENTS = "text/event-stream"
PING = b": ping\n\n"


def data(value: Any) -> bytes:
    """An event that holds a JSON value."""
    return b"data: " + json_line(value) + b"\n\n"


def event(name: str, value: Any) -> bytes:
    """The same with a name."""
    return b"event: " + name.encode() + b"\n" + data(value)
