"""Importance matrices: for each column of each matrix, the mean square of what it is multiplied with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemmart import _core
from gemmart.errors import GemmartError, ModelFormatError, ModelNotFound

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Mean squares of inputs by tensor: float32 [n_cols]."""

    path: Path
    squares: Mapping[str, NDArray[np.float32]]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int  # tokens

    def importance(self, name: str) -> NDArray[np.float32] | None:
        """What the square of an error in each column of a tensor counts, if it was measured."""
        return self.squares.get(name)
