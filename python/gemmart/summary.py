"""A conversation whose oldest exchanges become a summary, which the model itself writes: overflow="summarise".

The model is asked for it behind these exchanges (INSTRUCTION), so what it has computed of them is used again, and at
temperature 0. The summary stands at the end of the system prompt, under HEADER; where a template has no system message,
in an exchange of its own. The next summary is made with the one before it in view, and takes its place.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import TYPE_CHECKING

from gemmart.errors import ContextOverflow, TemplateError
from gemmart.progress import Progress
from gemmart.request import Event, Request
from gemmart.results import Completion, Delta, Prefill
from gemmart.sampling import Sampling
from gemmart.session import Exchange, n_system

if TYPE_CHECKING:
    from gemmart.model import Message, Model

INSTRUCTION = (
    "Summarise our conversation up to here in at most {n_words} words, so that you can go on from the summary alone: "
    "what I asked for, facts, names, numbers, what was decided, what is still open. Write nothing but the summary."
)
HEADER = "[Summary of the conversation so far]"
NOTED = "I go on from there."
"""The answer to a summary that is an exchange of its own, and to the first half of a message."""
CONTINUED = "Go on."
"""The message before the second half of an answer that is too long to be summarised at once."""
MOST_TOKENS = 512
SHORT = 64
"""Characters of a message that is not halved."""


def most_tokens(ctx: int) -> int:
    """The length of a summary, in a context of so many tokens."""
    return min(MOST_TOKENS, ctx // 8)


def without_summary(system: str) -> str:
    """A system prompt as it was given."""
    return system.partition(HEADER)[0].rstrip()


def with_summary(model: Model, front: Sequence[Message], text: str) -> list[Message]:
    """The messages that begin a conversation: the system prompt in `front`, and a summary in place of one in there."""
    given = [without_summary(str(message["content"])) for message in front]
    note = f"{HEADER}\n{text}"
    system: list[Message] = [{"role": "system", "content": "\n\n".join(filter(None, [*given, note]))}]
    try:
        model.chat_tokens([*system, {"role": "user", "content": text}])
    except TemplateError:
        return [{"role": "user", "content": note}, {"role": "assistant", "content": NOTED}]
    return system


class Summarising:
    """The oldest exchanges of a conversation on their way to a summary: request() asks the model for one of as many as
    fit, take() its answer, until none is left."""

    def __init__(self, model: Model, salt: int, exchange: Exchange, n: int) -> None:
        """The n oldest ones before `exchange`. Raises ContextOverflow where that would not fit beside a summary."""
        self._model = model
        self._salt = salt
        self._exchange = exchange
        self._most = most_tokens(model.ctx)
        self._n_prompt = self._n_done = 0
        first = n_system(exchange.before)
        self._front, rest = exchange.before[:first], exchange.before[first:]
        starts = [i for i, message in enumerate(rest) if message["role"] == "user"]
        self._kept = rest[starts[n] :] if n < len(starts) else []
        bounds = [0, *starts[1:n], len(rest) - len(self._kept)]
        self._left = [rest[begin:end] for begin, end in pairwise(bounds)]
        n_prompt = len(model.chat_tokens([*self._front, *self._kept, exchange.turn]))
        if n_prompt + self._most >= model.ctx:
            raise ContextOverflow(n_prompt, model.ctx)
        exchange.forgotten = bounds[-1]

    def request(self, emit: Callable[[Event], object]) -> Request:
        """The next one. Raises ContextOverflow."""
        asked = [*self._front, *self._next(), self._instruction]
        prompt = self._model.chat_tokens(asked)
        self._n_prompt, self._n_done = len(prompt), 0
        return self._model.prepare(
            prompt, Sampling(temperature=0), emit=emit, seed=0, max_tokens=self._most, salt=self._salt
        )

    def tell(self, event: Event, progress: Progress) -> None:
        """How far it is."""
        if isinstance(event, Prefill):
            self._n_done = event.done
        elif isinstance(event, Delta):
            self._n_done = max(self._n_done, self._n_prompt) + len(event.tokens)
        progress("summarising", self._n_done, self._n_prompt + self._most)

    def take(self, result: Completion | Exception | None, progress: Progress) -> Completion | Exception | None:
        """The end of a request; returns that of the turn where it was stopped or failed."""
        progress("summarising", self._n_prompt + self._most, self._n_prompt + self._most)
        if not isinstance(result, Completion):
            return result
        if result.finish_reason == "cancelled":
            return replace(result, text="", tokens=())
        summary = result.text.strip() + ("…" if result.finish_reason == "length" else "")
        if summary:
            self._front = with_summary(self._model, self._front, summary)
        if not self._left:
            self._exchange.summarising, self._exchange.summary = None, summary
            self._exchange.before = [*self._front, *self._kept]
        return None

    @property
    def _instruction(self) -> Message:
        return {"role": "user", "content": INSTRUCTION.format(n_words=self._most // 2)}

    def _next(self) -> list[Message]:
        """As many of the exchanges that are left as fit, and no more left."""

        def size(n: int) -> int:
            prompt = [*self._front, *chain(*self._left[:n]), self._instruction]
            return len(self._model.chat_tokens(prompt)) + self._most

        while not (n := bisect_right(range(1, len(self._left) + 1), self._model.ctx, key=size)):
            halves = _halves(self._left[0])
            if not halves:
                raise ContextOverflow(size(1), self._model.ctx)
            self._left[:1] = halves
        taken = list(chain(*self._left[:n]))
        del self._left[:n]
        return taken


def _halves(exchange: list[Message]) -> list[list[Message]]:
    """An exchange as two, in the middle of its longest message; none where that is short."""
    i = max(range(len(exchange)), key=lambda i: len(str(exchange[i]["content"])))
    message, text = exchange[i], str(exchange[i]["content"])
    if len(text) < SHORT:
        return []
    middle = max(text.rfind(blank, SHORT // 4, len(text) // 2) for blank in " \n")
    middle = len(text) // 2 if middle < 0 else middle
    first, second = ({**message, "content": part} for part in (text[:middle], text[middle:]))
    after: list[Message] = [{"role": "assistant", "content": NOTED}]
    before: list[Message] = [{"role": "user", "content": CONTINUED}]
    if message["role"] == "user":
        return [[*exchange[:i], first, *after], [second, *exchange[i + 1 :]]]
    return [[*exchange[:i], first], [*before, second, *exchange[i + 1 :]]]
