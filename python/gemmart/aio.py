"""A model for coroutines: the same calls, awaited. Nothing here blocks the event loop, and nothing polls.

Any number of event loops and threads may use one model; each stream belongs to the loop that reads it."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gemmart.embedding import Embeddings
from gemmart.errors import Cancelled
from gemmart.request import Event, Request
from gemmart.results import Completion, Delta, Echo, Prefill
from gemmart.sampling import Sampling
from gemmart.stream import Answer

if TYPE_CHECKING:
    from gemmart.model import Message, Model, Prompt
    from gemmart.session import Exchange, Session

Emit = Callable[[Event], object]


class AsyncModel:
    """The calls of a Model as coroutines, with its options, results and errors. A call that is cancelled, by a timeout
    too, stops computing within one step.

    Made by Model.aio."""

    def __init__(self, model: Model) -> None:
        self._model = model

    async def generate(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> Completion:
        """Continue a text or token ids; the options are those of Model.stream()."""
        return await self.stream(prompt, sampling, **options).result()

    def stream(self, prompt: Prompt, sampling: Sampling | None = None, **options: Any) -> AsyncStream:
        """The same as an AsyncStream."""

        def prepare(emit: Emit) -> Request:
            return self._model.prepare(prompt, sampling, emit=emit, **options)

        return AsyncStream(self._model, prepare)

    async def chat(self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Any) -> Completion:
        """Answer a conversation; as Model.chat()."""
        return await self.stream_chat(messages, sampling, **options).result()

    def stream_chat(self, messages: Sequence[Message], sampling: Sampling | None = None, **options: Any) -> AsyncStream:
        """The same as an AsyncStream."""

        def prepare(emit: Emit) -> Request:
            return self._model.prepare_chat(messages, sampling, emit=emit, **options)

        return AsyncStream(self._model, prepare)

    async def batch(
        self, prompts: Sequence[Prompt], sampling: Sampling | None = None, **options: Any
    ) -> list[Completion]:
        """Continue many prompts at once; each answer is what generate() would give. Where one fails, the others are
        cancelled."""
        streams = [self.stream(prompt, sampling, **options) for prompt in prompts]
        try:
            for stream in streams:
                await stream.start()
            return [await stream.result() for stream in streams]
        finally:
            for stream in streams:
                stream.cancel()

    async def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each of `tokens` [n], as Model.logits(): float32 [n, n_vocab]."""

        def prepare(emit: Emit) -> Request:
            return self._model.prepare_logits(tokens, max(1, len(tokens)), emit=emit)

        stream = AsyncStream(self._model, prepare)
        rows = []
        while (event := await stream.next_event()) is not None:
            if isinstance(event, np.ndarray):
                rows.append(event)
        return np.concatenate(rows)

    async def embed(
        self, texts: Prompt | Sequence[Prompt], *, pooling: str | None = None, normalize: bool = True
    ) -> NDArray[np.float32]:
        """Embeddings, as Model.embed(): float32 [n, dim]."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event]]()

        def emit(event: tuple[int, Event]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended, so nobody reads on
                loop.call_soon_threadsafe(events.put_nowait, event)

        prepare = partial(Embeddings, self._model, texts, emit, pooling=pooling, normalize=normalize)
        with await asyncio.to_thread(prepare) as embeddings:
            while embeddings.n_left:
                embeddings.take(await events.get())
        return embeddings.vectors

    async def tokenize(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text, as Model.tokenize()."""
        return await asyncio.to_thread(self._model.tokenize, text, bos=bos, special=special)


class AsyncStream(Answer):
    """An answer while it is written: `async for` over its Deltas, then `await` its result(). It begins with the first
    of these, or with `async with`, and leaving that early cancels it. So does the cancellation of a task that waits for
    it."""

    def __init__(self, model: Model, prepare: Callable[[Emit], Request]) -> None:
        """Made by AsyncModel.stream(). prepare: makes the request, in a thread."""
        super().__init__(model)
        self._prepare = prepare
        self._request: Request | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._is_started = self._is_cancelled = False

    async def start(self) -> None:
        """Begin, if it has not begun. Raises what Model.stream() says."""
        if not self._is_started:
            self._is_started = True
            await self._start()
        if isinstance(self._result, Exception):
            raise self._result

    async def _start(self) -> None:
        emit = _passing_on(self, asyncio.get_running_loop())
        try:
            self._request = await asyncio.to_thread(self._prepare, emit)  # to encode a long prompt takes its time
            self._request.cancelled = self._is_cancelled
            self._model.submit(self._request)
        except Exception as error:
            self._end(error)
        except BaseException:
            self._end(Cancelled("the answer was cancelled before it began"))
            raise

    async def next_event(self) -> Delta | Echo | Prefill | NDArray[np.float32] | None:
        """What comes next, None at the end. Raises what Model.stream() says."""
        await self.start()
        if self._result is None:
            try:
                event = await self._events.get()
            except BaseException:
                self.cancel()
                raise
            if not isinstance(event, Completion | Exception):
                return event
            self._end(event)
        if isinstance(self._result, Exception):
            raise self._result
        return None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        while (event := await self.next_event()) is not None:
            delta = self._take(event)
            if delta is not None:
                return delta
        raise StopAsyncIteration

    async def result(self) -> Completion:
        """The finished answer; reads what is left of the stream. Raises what Model.stream() says."""
        async for _ in self:
            pass
        return self._completion()

    def cancel(self) -> None:
        """Have it end within one step; what comes until then can still be read."""
        self._is_cancelled = True
        if self._request is not None:
            self._model.cancel(self._request)

    async def aclose(self) -> None:
        """Cancel, if it is not finished: its sequence is freed within one step. result() then has what was written."""
        self.cancel()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if self._request is not None and self._result is None:
            self._request.cancelled = True  # no lock in a finaliser; the engine looks at each step

    def _end(self, event: Completion | Exception) -> None:
        self._result = event
        self._events.put_nowait(event)  # for a task that waits beside this one


class AsyncSession:
    """The turns of a Session as coroutines; everything else is the Session's own. Made by Session.aio."""

    def __init__(self, session: Session) -> None:
        self._session = session

    async def send(self, content: str, sampling: Sampling | None = None, **options: Any) -> Completion:
        """Say something, wait for the whole answer; as Session.send(). After an error, and where it is cancelled, the
        conversation is as before."""
        turn = self.stream(content, sampling, **options)
        try:
            return await turn.result()
        except BaseException:
            turn.drop()
            raise

    def stream(self, content: str, sampling: Sampling | None = None, **options: Any) -> AsyncTurn:
        """The same as an AsyncStream; the turn enters `messages` as that of Session.stream() does."""
        return self._answer(self._session._said(content), sampling, options)

    def retry(self, content: str | None = None, sampling: Sampling | None = None, **options: Any) -> AsyncTurn:
        """Answer the last user message anew, or `content` in its place; as Session.retry()."""
        return self._answer(self._session._said_again(content), sampling, options)

    def _answer(self, exchange: Exchange, sampling: Sampling | None, options: dict[str, Any]) -> AsyncTurn:
        session = self._session
        return AsyncTurn(session._model, partial(session._prepare, exchange, sampling, options), exchange)


class AsyncTurn(AsyncStream):
    """The stream of one answer, which enters the session's messages when it ends."""

    def __init__(self, model: Model, prepare: Callable[[Emit], Request], exchange: Exchange) -> None:
        """Made by AsyncSession.stream()."""
        super().__init__(model, prepare)
        self._exchange = exchange

    @property
    def forgotten(self) -> int:
        """How many old messages are dropped for this turn, or become a summary; known when it has begun."""
        return self._exchange.forgotten

    @property
    def summary(self) -> str | None:
        """As Turn.summary; known when the answer has begun."""
        return self._exchange.summary

    async def next_event(self) -> Delta | Echo | Prefill | NDArray[np.float32] | None:
        await self.start()
        while (summarising := self._exchange.summarising) is not None and self._result is None:
            while (event := await super().next_event()) is not None:
                summarising.tell(event, self.progress)
            self._result = summarising.take(self._result, self.progress)
            if self._result is None:
                self._events = asyncio.Queue()
                await self._start()
        event = await super().next_event()
        if event is None:
            self._enter()
        return event

    async def aclose(self) -> None:
        await super().aclose()
        self._enter()

    def drop(self) -> None:
        """Cancel; the conversation stays as it was."""
        self.cancel()
        self._exchange.session = None

    def __del__(self) -> None:
        super().__del__()
        self._enter()

    def _enter(self) -> None:
        self._exchange.enter(self._result, self.text)


def _passing_on(stream: AsyncStream, loop: asyncio.AbstractEventLoop) -> Emit:
    """An `emit` that puts events where the stream reads them, on its loop. It does not keep the stream alive."""
    events, kept = stream._events, weakref.ref(stream)

    def emit(event: Event) -> None:
        try:
            loop.call_soon_threadsafe(events.put_nowait, event)
        except RuntimeError:  # the loop has ended, so nobody reads on
            if unread := kept():
                unread.cancel()

    return emit
