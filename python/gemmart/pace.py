"""Many requests of one call, let into the engine as it finds time for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from gemmart.request import Request

if TYPE_CHECKING:
    from gemmart.model import Model

STEPS = 2
"""Prompt tokens that are under way at most, in steps: one is filled while the other is computed."""
AT_ONCE = 64
WAITING = 8
"""Requests that wait from which on none is added: all at once would stand before everybody else's."""


class Pace:
    def __init__(self, requests: Iterable[Request], model: Model) -> None:
        self._waiting = deque(requests)
        self._model = model
        self._n_tokens = self._n_requests = 0  # under way

    def go_on(self, ended: Request | None = None) -> None:
        """Submit what there is room for, after `ended` has ended. Raises what Model.submit() does."""
        if ended is not None:
            self._n_tokens -= len(ended.prompt)
            self._n_requests -= 1
        while self._waiting and self._has_room(len(self._waiting[0].prompt)):
            request = self._waiting.popleft()
            self._n_tokens += len(request.prompt)
            self._n_requests += 1
            self._model.submit(request)

    def _has_room(self, n_tokens: int) -> bool:
        fits = self._n_requests < AT_ONCE and self._n_tokens + n_tokens <= STEPS * self._model.plan.batch
        return not self._n_requests or (fits and self._model.n_requests[1] < WAITING)
