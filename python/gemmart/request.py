"""What the engine is asked, and what it says to that."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gemmart.pooling import Pool
from gemmart.results import Completion, Delta, Echo, Prefill
from gemmart.sampling import Settings
from gemmart.stops import StopStrings
from gemmart.tools import CallParser

if TYPE_CHECKING:
    from gemmart.constraint import Constraint

Event = Delta | Echo | Prefill | Completion | NDArray[np.float32] | Exception


@dataclass(slots=True, eq=False)
class Request:
    """What to compute, and where its events go: how far the prompt is read, its Echo where that is wanted, deltas (or
    arrays of logits, or an embedding), then a Completion or an exception."""

    emit: Callable[[Event], object]  # called on the engine's thread; must neither block nor raise
    prompt: Sequence[int]
    sampling: Settings
    seed: int
    max_tokens: int  # how many may be generated
    stops: StopStrings = field(default_factory=lambda: StopStrings(()))
    n_logprobs: int | None = None
    n_prompt_logprobs: int | None = None  # alternatives for the prompt's tokens; None: nothing of them is wanted
    ignore_stop_tokens: bool = False
    constraint: Constraint | None = None  # what the answer must look like
    calls: CallParser | None = None  # what finds calls of tools in it
    n_logits: int = 0  # of how many of the last prompt tokens logits are wanted, instead of an answer
    pool: Pool | None = None  # what makes an embedding of the prompt's states, instead of an answer
    salt: int = 0  # only requests of the same salt share computed prefixes
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)

    @property
    def is_answered(self) -> bool:
        """Whether tokens are generated."""
        return not self.n_logits and self.pool is None

    @property
    def wants_all_rows(self) -> bool:
        """Whether something is wanted of each token of the prompt, so that a stored prefix, of which there are keys and
        values alone, is of no use."""
        return not self.is_answered or self.n_prompt_logprobs is not None
