"""From the states of a text's tokens to its embedding."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

POOLINGS = ("mean", "cls", "last")
"""Of all tokens the mean; the first one's state; the last one's."""

FILE_POOLINGS = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
"""What a file's FAMILY.pooling_type means; 0 is "none", which leaves it to us."""


class Pool:
    """Pools the states of `n_tokens` tokens as they come, so that of a long text only sums are kept."""

    def __init__(self, pooling: str, n_tokens: int, *, normalize: bool) -> None:
        """pooling: one of POOLINGS. normalize: to length 1, but for a vector of zeros."""
        self._wanted = {"mean": range(n_tokens), "cls": range(1), "last": range(n_tokens - 1, n_tokens)}[pooling]
        self._normalize = normalize
        self._sum: NDArray[np.float64] | None = None

    def rows(self, first: int, n: int) -> range:
        """Which of the n tokens from the one numbered `first` on have a state that is wanted; counted from `first`."""
        begin = max(self._wanted.start - first, 0)
        return range(begin, max(begin, min(self._wanted.stop - first, n)))

    def add(self, states: NDArray[np.float32]) -> None:
        """The next wanted states [n, dim]."""
        if self._sum is None:
            self._sum = np.zeros(states.shape[1])
        for state in states:  # one by one, or the sum would depend on how the tokens were parted into steps
            self._sum += state

    def result(self) -> NDArray[np.float32]:
        """The embedding [dim]."""
        assert self._sum is not None
        mean = self._sum / len(self._wanted)
        length = np.sqrt(mean @ mean) if self._normalize else 1.0
        return (mean / length if length > 0 else mean).astype(np.float32)
