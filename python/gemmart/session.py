"""A conversation that grows turn by turn."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemmart.errors import InvalidRequest
from gemmart.model import Message
from gemmart.request import Event, Request
from gemmart.results import Completion, Delta, Echo, Prefill
from gemmart.sampling import Sampling
from gemmart.stream import Stream

if TYPE_CHECKING:
    from gemmart.aio import AsyncSession
    from gemmart.model import Model
    from gemmart.summary import Summarising

OVERFLOW = ("error", "forget", "summarise")


class Session:
    """A conversation: `messages` grows with each turn. The model keeps the computed prefix, so a turn costs only what
    is new."""

    def __init__(
        self, model: Model, messages: Sequence[Message], *, overflow: str = "error", salt: int = 0, **options: Any
    ) -> None:
        """Made by Model.session() and Model.restore()."""
        if overflow not in OVERFLOW:
            raise InvalidRequest(f"overflow is {overflow!r}, expected one of {', '.join(OVERFLOW)}")
        self._model = model
        self._salt = salt
        self.messages = list(messages)
        self.overflow = overflow
        self.options = options
        """Those of Model.stream() that hold for each turn, `sampling` among them."""

    @property
    def tokens(self) -> list[int]:
        """The conversation so far as token ids."""
        return self._model.chat_tokens(self.messages, add_generation_prompt=False) if self.messages else []

    @property
    def context(self) -> tuple[int, int]:
        """Tokens used, and tokens in all."""
        return len(self.tokens), self._model.ctx

    @property
    def aio(self) -> AsyncSession:
        """Its turns for coroutines."""
        from gemmart.aio import AsyncSession

        return AsyncSession(self)

    def send(self, content: str, sampling: Sampling | None = None, **options: Any) -> Completion:
        """Say something, wait for the whole answer; options as for Model.stream(). On an error the conversation is as
        before."""
        return self.stream(content, sampling, **options).result()

    def stream(self, content: str, sampling: Sampling | None = None, **options: Any) -> Turn:
        """The same as a Stream. The turn enters `messages` when the answer ends, or is stopped half-way, with what is
        written of it; where that is nothing, the turn is dropped."""
        return self._answer(self._said(content), sampling, options)

    def retry(self, content: str | None = None, sampling: Sampling | None = None, **options: Any) -> Turn:
        """Answer the last user message anew, or `content` in its place; the new turn replaces the old one when it
        enters `messages`. Raises InvalidRequest where there is no user message."""
        return self._answer(self._said_again(content), sampling, options)

    def undo(self, turns: int = 1) -> None:
        """Forget the last exchanges: user messages, and what follows them. Raises InvalidRequest where there are not so
        many."""
        starts = self._enough(turns)
        del self.messages[starts[-turns] :]

    def forget(self, turns: int = 1) -> None:
        """Forget the oldest exchanges after the system prompt; the rest is read anew at the next turn. Raises
        InvalidRequest where there are not so many."""
        starts = self._enough(turns)
        self.messages[:] = self._without(self.messages, starts, turns)

    def fork(self) -> Session:
        """A second conversation that begins as this one."""
        return Session(self._model, self.messages, overflow=self.overflow, salt=self._salt, **self.options)

    def save(self, path: str | PathLike[str]) -> int:
        """Write the conversation, its options (but `format` and `overflow`) and the keys and values that are computed
        to one file, which only its owner can read; under a name that ends in .json the first two alone. Returns for how
        many tokens keys and values were written. An existing file is replaced when the new one is complete. Raises
        OSError."""
        from gemmart import saved

        return saved.write(path, self._model, self)

    def _said(self, content: str) -> Exchange:
        return Exchange(self, list(self.messages), {"role": "user", "content": content})

    def _said_again(self, content: str | None) -> Exchange:
        starts = self._starts()
        if not starts:
            raise InvalidRequest("there is no user message that could be answered")
        last = self.messages[starts[-1]]
        return Exchange(self, self.messages[: starts[-1]], last if content is None else {**last, "content": content})

    def _answer(self, exchange: Exchange, sampling: Sampling | None, options: dict[str, Any]) -> Turn:
        events: SimpleQueue[Event] = SimpleQueue()
        prepare = partial(self._prepare, exchange, sampling, options)
        request = prepare(events.put)
        self._model.submit(request)
        return Turn(self._model, request, events, exchange, prepare)

    def _prepare(
        self, exchange: Exchange, sampling: Sampling | None, options: dict[str, Any], emit: Callable[[Event], object]
    ) -> Request:
        """The request for an answer, after the oldest exchanges are forgotten where that has to be; or for a summary of
        these, and when that has ended once more for what comes next."""
        options = {**self.options, **options}
        default = options.pop("sampling", None)
        if exchange.summarising is None and exchange.summary is None:
            self._make_room(exchange, options.get("max_tokens"))
        if exchange.summarising is not None:
            return exchange.summarising.request(emit)
        prompt = self._model.chat_tokens([*exchange.before, exchange.turn])
        return self._model.prepare(prompt, sampling or default, emit=emit, salt=self._salt, **options)

    def _make_room(self, exchange: Exchange, max_tokens: int | None) -> None:
        """Leave a quarter of the context, or as much as is wanted, for the answer, as `overflow` says. Raises
        ContextOverflow where no summary would help."""
        ctx = self._model.ctx
        room = ctx // 4 if max_tokens is None else min(max_tokens, ctx // 4)
        n = 0 if self.overflow == "error" else self._too_many(exchange, ctx - room)
        if n and self.overflow == "summarise":
            from gemmart.summary import Summarising, most_tokens

            n = self._too_many(exchange, ctx // 2 - most_tokens(ctx))
            exchange.summarising = Summarising(self._model, self._salt, exchange, n)
        elif n:
            exchange.forget(self._without(exchange.before, self._starts(exchange.before), n))

    def _too_many(self, exchange: Exchange, most: int) -> int:
        """The fewest oldest exchanges without which the prompt has at most so many tokens, or all."""
        starts = self._starts(exchange.before)

        def fits(n: int) -> bool:
            kept = self._without(exchange.before, starts, n)
            return len(self._model.chat_tokens([*kept, exchange.turn])) <= most

        return bisect_left(range(len(starts)), True, key=fits)

    def _starts(self, messages: Sequence[Message] | None = None) -> list[int]:
        """Where the exchanges begin: at the user messages."""
        found = enumerate(self.messages if messages is None else messages)
        return [i for i, message in found if message["role"] == "user"]

    def _enough(self, turns: int) -> list[int]:
        starts = self._starts()
        if not 1 <= turns <= len(starts):
            raise InvalidRequest(f"turns: {turns}, but the conversation has {len(starts)}")
        return starts

    @staticmethod
    def _without(messages: Sequence[Message], starts: Sequence[int], n: int) -> list[Message]:
        """`messages` without the n oldest exchanges; system messages in front stay."""
        if n == 0:
            return list(messages)
        return [*messages[: n_system(messages)], *(messages[starts[n] :] if n < len(starts) else ())]


def n_system(messages: Sequence[Message]) -> int:
    """How many system messages stand in front."""
    return next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))


@dataclass(slots=True)
class Exchange:
    """A user message that is being answered; with its answer it joins the conversation."""

    session: Session | None
    before: list[Message]
    turn: Message
    forgotten: int = 0
    summarising: Summarising | None = None
    summary: str | None = None

    def forget(self, kept: list[Message]) -> None:
        """Answer it after `kept` alone."""
        self.forgotten = len(self.before) - len(kept)
        self.before = kept

    def enter(self, result: Completion | Exception | None, text: str) -> None:
        """Once: join the conversation with the result, or with `text` where that is all there is of it; not where it
        failed, or was stopped before a word."""
        session, self.session = self.session, None
        if session is None or isinstance(result, Exception):
            return
        text = text if result is None else result.text
        if text or (result is not None and result.finish_reason != "cancelled"):
            session.messages[:] = [*self.before, self.turn, {"role": "assistant", "content": text}]


class Turn(Stream):
    """The stream of one answer, which enters the session's messages when it ends."""

    def __init__(
        self,
        model: Model,
        request: Request,
        events: SimpleQueue[Event],
        exchange: Exchange,
        prepare: Callable[[Callable[[Event], object]], Request],
    ) -> None:
        """prepare: makes the request that follows a summary."""
        super().__init__(model, request, events)
        self._exchange = exchange
        self._prepare = prepare
        self._is_stopped = False

    @property
    def forgotten(self) -> int:
        """How many old messages are dropped for this turn, or become a summary."""
        return self._exchange.forgotten

    @property
    def summary(self) -> str | None:
        """What the model wrote in place of old messages, "" where it had no words; None where it was not asked."""
        return self._exchange.summary

    def events(self) -> Iterator[Delta | Echo | Prefill | NDArray[np.float32]]:
        while (summarising := self._exchange.summarising) is not None and self._result is None:
            for event in super().events():
                summarising.tell(event, self.progress)
            self._result = summarising.take(self._result, self.progress)
            if self._result is None:
                self._go_on()
        yield from super().events()
        self._exchange.enter(self._result, self.text)

    def cancel(self) -> None:
        self._is_stopped = True
        super().cancel()

    def close(self) -> None:
        self._is_stopped = True
        super().close()
        self._exchange.enter(self._result, self.text)

    def __del__(self) -> None:
        super().__del__()
        self._exchange.enter(self._result, self.text)

    def _go_on(self) -> None:
        """Ask for the next summary, or the answer."""
        self._events = SimpleQueue()
        try:
            self._request = self._prepare(self._events.put)
            self._request.cancelled = self._is_stopped
            self._model.submit(self._request)
        except Exception as error:
            self._result = error
