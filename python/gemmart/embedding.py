"""Embeddings of many texts at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from gemmart.pace import Pace
from gemmart.request import Event
from gemmart.results import Completion

if TYPE_CHECKING:
    from gemmart.model import Model, Prompt


class Embeddings:
    """Those of one call as they come. A context manager, which ends with what is not finished cancelled."""

    def __init__(
        self,
        model: Model,
        texts: Prompt | Sequence[Prompt],
        emit: Callable[[tuple[int, Event]], object],
        *,
        pooling: str | None,
        normalize: bool,
    ) -> None:
        """As for Model.embed(). emit: called on the engine's thread with what take() is to be given."""
        given = cast("Sequence[Prompt]", [texts] if isinstance(texts, str) or not _are_texts(texts) else texts)

        def sink(i: int) -> Callable[[Event], object]:
            return lambda event: emit((i, event))

        self._requests = [
            model.prepare_embedding(text, f"texts[{i}]", emit=sink(i), pooling=pooling, normalize=normalize)
            for i, text in enumerate(given)
        ]
        self._model = model
        self._pace = Pace(self._requests, model)
        self.n_left = len(self._requests)
        """How many are not finished."""
        self.vectors: NDArray[np.float32] = np.empty((self.n_left, model.info.dim), np.float32)

    def __enter__(self) -> Self:
        self._pace.go_on()
        return self

    def take(self, of: tuple[int, Event]) -> None:
        """The next event. Raises it where it is an error."""
        i, event = of
        if isinstance(event, Exception):
            raise event
        if isinstance(event, np.ndarray):
            self.vectors[i] = event
        elif isinstance(event, Completion):
            self.n_left -= 1
            self._pace.go_on(self._requests[i])

    def __exit__(self, *_: object) -> None:
        for request in self._requests:
            self._model.cancel(request)


def _are_texts(texts: Sequence[Any]) -> bool:
    """Whether they are several texts, and not the ids of one."""
    return not any(isinstance(text, int | np.integer) for text in texts)
