"""Guessing the next tokens, so that the model checks several in one batch instead of computing one after the other.

A guesser proposes tokens; the engine computes the logits after each of them in one batch, samples position by position
as ever, and goes on as long as the token it samples is the one that was guessed. What the batch held beyond that is
trimmed away. So guesses change when tokens come, never which: the same bits are sampled with the same draws.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from gemmart import _core
from gemmart.errors import InvalidRequest
from gemmart.tokenizer import Vocabulary

if TYPE_CHECKING:
    from gemmart.constraint import Constraint

MAX_DRAFT = _core.KV_SLACK
"""Most tokens that can be guessed at once: further back the KV cache does not trim."""


class Pace:
    """How many tokens to guess: more while guesses come true, none where they do not pay.

    The unit is a step that decodes one token. An answer may lose START, and SHARE of its plain steps; what guesses win
    is credit for later ones, up to LIMIT. With the token before it, a guess makes a batch of 2, 4, 8 … rows: those
    cost the kernels least a row."""

    FIRST = 3  # tokens guessed at first
    START, SHARE, LIMIT = 0.25, 0.02, 4.0

    def __init__(self) -> None:
        self._length = self.FIRST
        self._credit = self.START

    @property
    def length(self) -> int:
        """Tokens to guess next; 0 for none."""
        return self._length if self._credit > 0 else 0

    def plain(self) -> None:
        """A step without a guess has passed."""
        self._credit = min(self.LIMIT, self._credit + self.SHARE)

    def checked(self, n_guessed: int, n_right: int, cost: float) -> None:
        """A step with a guess has passed, which cost as much as `cost` plain ones."""
        cost = min(cost, 1 + 2 * n_guessed)  # a hiccup of the machine is no reason to give up
        self._credit = min(self.LIMIT, self._credit + 1 + n_right - cost)
        self._length = 2 * n_guessed + 1 if n_right == n_guessed else (1 << (n_right + 1).bit_length()) - 1


class StepTimes:
    """What steps take: medians of the last few of each kind."""

    RECENT = 9

    def __init__(self) -> None:
        self._seconds: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=self.RECENT))

    def __contains__(self, kind: Hashable) -> bool:
        return kind in self._seconds

    def __getitem__(self, kind: Hashable) -> float:
        return median(self._seconds[kind])

    def add(self, kind: Hashable, seconds: float) -> None:
        self._seconds[kind].append(seconds)


class Guesser(Protocol):
    """What guesses for one sequence."""

    def guess(self, tokens: list[int], n: int) -> list[int]:
        """Up to `n` tokens, n >= 1, that may follow `tokens`, which are prompt and answer so far."""
        ...

    def close(self) -> None: ...


NewGuesser = Callable[[NDArray[np.int32]], Guesser]
"""Makes the one of a sequence, given its prompt."""


class Lookup:
    """Prompt lookup: guesses what followed where the last few tokens stood before, in the prompt or the answer."""

    LENGTHS = (3, 2)  # of the end that is looked up, longest first

    def __init__(self, prompt: NDArray[np.int32]) -> None:
        self._follows: dict[tuple[int, ...], int] = {}  # index of the token after the last such run of tokens
        self._n_read = 1  # tokens; the runs before each are in the table

    def guess(self, tokens: list[int], n: int) -> list[int]:
        for at in range(self._n_read, len(tokens)):
            for length in self.LENGTHS:
                if at >= length:
                    self._follows[tuple(tokens[at - length : at])] = at
        self._n_read = len(tokens)
        found = (self._follows.get(tuple(tokens[-length:])) for length in self.LENGTHS)
        at = next((at for at in found if at is not None), len(tokens))
        guess = tokens[at : at + n]
        while 0 < len(guess) < n:  # it reaches the end of the text: what repeats goes on repeating
            guess += guess[: n - len(guess)]
        return guess

    def close(self) -> None:
        pass


class Draft:
    """Guesses what a smaller model with the same vocabulary says: the likeliest token, each time."""

    def __init__(self, context: _core.Context, prompt: NDArray[np.int32], *, n_ctx: int, n_batch: int) -> None:
        """context: the smaller model's; this takes a sequence of it. n_ctx: most tokens that the model can read.
        n_batch: most tokens of a forward."""
        self._context, self._kv = context, context.kv
        self._n_ctx, self._n_batch = n_ctx, n_batch
        self._id, n_cached = self._kv.match_prefix(prompt)
        self._read: list[int] = prompt[:n_cached].tolist()  # tokens whose keys and values are there

    def guess(self, tokens: list[int], n: int) -> list[int]:
        n = min(n, self._n_ctx - len(tokens) + 1)
        if n < 1:
            return []
        self._forget(tokens)
        if len(tokens) - len(self._read) > min(MAX_DRAFT, self._n_batch):  # a prompt: a part of it at each step
            self._forward(tokens[len(self._read) : -1][: self._n_batch])
            return []
        guess: list[int] = []
        ahead = tokens[len(self._read) :]
        while len(guess) < n and self._forward(ahead):
            ahead = [int(self._context.select(0, 1)[0][0])]
            guess += ahead
        return guess

    def close(self) -> None:
        self._kv.free(self._id)

    def _forget(self, tokens: list[int]) -> None:
        """Trim guesses that did not come true."""
        n = min(len(self._read), len(tokens) - 1)
        while self._read[:n] != tokens[:n]:
            n -= 1
        n = self._kv.trim(self._id, n)
        del self._read[n:]

    def _forward(self, tokens: list[int]) -> bool:
        """Read tokens; False if there is no room for them."""
        if not self._kv.can_hold([self._id], [len(tokens)]):
            return False
        self._context.forward(np.array(tokens, np.int32), [(self._id, len(tokens))], [len(tokens) - 1])
        self._read += tokens
        return True


class Speculation:
    """The guessers of one sequence, those asked first in front, and how long steps take with their guesses and
    without."""

    PLAIN = "plain"

    def __init__(self, guessers: Sequence[Guesser], times: StepTimes) -> None:
        """times: shared by the sequences of a model."""
        self._guessers = [(guesser, Pace()) for guesser in guessers]
        self._times = times
        self._asked: tuple[Guesser, Pace] | None = None  # whose guess is under way
        self._began = 0.0

    def guess(self, tokens: list[int], n_most: int, constraint: Constraint | None = None) -> list[int]:
        """Up to `n_most` tokens that may follow, which `constraint` allows; the step begins here."""
        self._began = time.monotonic()
        if self.PLAIN in self._times:
            for guesser, pace in self._guessers:
                n = min(pace.length, n_most)
                guess = guesser.guess(tokens, n) if n > 0 else []
                if guess and constraint:
                    guess = guess[: constraint.possible(guess)]
                if guess:
                    self._asked = guesser, pace
                    return guess
        self._asked = None
        self._began = time.monotonic()
        return []

    def learn(self, n_guessed: int, n_right: int, ended: float) -> None:
        """The step of the last guess, or of none, has passed: its logits were there at `ended` (time.monotonic())."""
        seconds = ended - self._began
        if self._asked is None:
            self._times.add(self.PLAIN, seconds)
            for _, pace in self._guessers:
                pace.plain()
            return
        guesser, pace = self._asked
        kind = type(guesser), n_guessed
        self._times.add(kind, seconds)
        pace.checked(n_guessed, n_right, self._times[kind] / self._times[self.PLAIN])

    def close(self) -> None:
        for guesser, _ in self._guessers:
            guesser.close()


def check_same_vocabulary(draft: Vocabulary, main: Vocabulary) -> None:
    """Raises InvalidRequest that names the first difference: tokens, or which of them begin and end a text or turn."""
    what = f"draft: {draft.source} has another vocabulary than {main.source}"
    if draft.n_tokens != main.n_tokens:
        raise InvalidRequest(f"{what}: {draft.n_tokens} tokens, not {main.n_tokens}")
    if draft.blob != main.blob or not np.array_equal(draft.offsets, main.offsets):
        id = next(id for id in range(main.n_tokens) if draft.token(id) != main.token(id))
        names = [vocabulary.token(id).decode(errors="replace") for vocabulary in (draft, main)]
        raise InvalidRequest(f"{what}: token {id} is {names[0]!r}, not {names[1]!r}")
    for name in ("bos", "eos", "eot"):
        ids = getattr(draft, name), getattr(main, name)
        if ids[0] != ids[1]:
            raise InvalidRequest(f"{what}: {name}_token_id is {ids[0]}, not {ids[1]}")
