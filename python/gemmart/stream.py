"""An answer while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np
from numpy.typing import NDArray

from gemmart.errors import InternalError
from gemmart.progress import Progress, no_progress
from gemmart.request import Event, Request
from gemmart.results import Completion, Delta, Echo, Prefill

if TYPE_CHECKING:
    from gemmart.model import Model


class Answer:
    """What has been read of an answer."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._result: Completion | Exception | None = None
        self._n_prompt = 0
        self.text = ""
        """What has been read so far."""
        self.progress: Progress = no_progress
        """Called, while this is iterated over, with how much of a long prompt is read."""

    def _take(self, event: Event) -> Delta | None:
        """The next event; returns it where it is for the reader."""
        if isinstance(event, Prefill):
            self._n_prompt = event.total
            self.progress("reading prompt", event.done, event.total)
        if not isinstance(event, Delta):
            return None
        if self._n_prompt:
            self.progress("reading prompt", self._n_prompt, self._n_prompt)
            self._n_prompt = 0
        self.text += event.text
        return event

    def _completion(self) -> Completion:
        if not isinstance(self._result, Completion):
            raise InternalError("a stream ended without a result")
        return self._result


class Stream(Answer):
    """An answer while it is written: iterate over its Deltas, then ask for result(). Leaving early cancels it."""

    def __init__(self, model: Model, request: Request, events: SimpleQueue[Event]) -> None:
        super().__init__(model)
        self._request = request
        self._events = events

    def events(self) -> Iterator[Delta | Echo | Prefill | NDArray[np.float32]]:
        while self._result is None:
            event = self._events.get()
            if isinstance(event, Completion | Exception):
                self._result = event
                self._events.put(event)  # for a thread that waits beside this one
            else:
                yield event
        if isinstance(self._result, Exception):
            raise self._result

    def __iter__(self) -> Iterator[Delta]:
        for event in self.events():
            delta = self._take(event)
            if delta is not None:
                yield delta

    def result(self) -> Completion:
        """The finished answer; reads what is left of the stream. Raises what stream() says."""
        for _ in self:
            pass
        return self._completion()

    def cancel(self) -> None:
        """Have it end within one step; what comes until then can still be read."""
        self._model.cancel(self._request)

    def close(self) -> None:
        """Cancel, if it is not finished: its sequence is freed within one step. result() then has what was written."""
        self.cancel()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if self._result is None:
            self._request.cancelled = True  # no lock in a finaliser; the engine looks at each step
