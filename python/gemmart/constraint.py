"""Formats at work: which tokens an answer may go on with.

llguidance compiles a format to a parser, and tells after each token which ones keep the answer possible, as a bit mask
over the vocabulary. Nothing is forced beyond that: what is sampled is the model's own distribution without the tokens
that the format forbids.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import llguidance
import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from gemmart.errors import ConstraintError
from gemmart.format import MADE, Format
from gemmart.tokenizer import Tokenizer
from gemmart.worker import Worker, WorkerEnded

LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 150_000,  # of compiling
    "step_lexer_fuel": 200_000,  # of a token: about 15 ms
    "step_max_items": 50_000,  # of a token: about 3 ms
    "max_lexer_states": 32_768,  # about 2 kB each
    "max_grammar_size": 200_000,  # symbols
}
COMPILE_TIMEOUT = 10.0
"""Seconds; the worker ends itself after 0.2 seconds of computing."""
MAX_MESSAGE = 600
"""Characters of a compiler's message; a longer one, which repeats what it is about, loses its middle."""

CACHED_FORMATS = 64
CACHED_BYTES = 256 << 10
"""What is kept compiled, at most: by number and by the length of their sources; compiled, a format can be a few hundred
times as long."""

NO_FORCING = '\n%llguidance {"no_forcing": true}\n'
"""Every token that keeps an answer possible is allowed, also where only one spelling can follow."""


class Constraint:
    """Where one answer stands in its format. Belongs to one thread at a time."""

    def __init__(self, matcher: LLMatcher, n_vocab: int, param: str) -> None:
        self._matcher = matcher
        self._param = param
        self._mask = np.zeros(-(-n_vocab // 32), np.int32)
        self._pointer = self._mask.ctypes.data
        self._failure: BaseException | None = None

    def fill(self) -> None:
        """Find out which tokens may come next. Raises nothing, releases the GIL."""
        try:
            self._matcher.unsafe_compute_mask_ptr(self._pointer, self._mask.nbytes)
        except BaseException as error:  # a panic of the library is no Exception
            self._failure = error

    @property
    def mask(self) -> NDArray[np.int32]:
        """What fill() found, as _core.Context.select() takes it. Raises ConstraintError."""
        self._check()
        return self._mask

    def take(self, token: int) -> bool:
        """Go on with a token; returns whether the answer is complete, and nothing can follow. Raises
        ConstraintError."""
        self._matcher.consume_token(token)
        self._check()
        return self._matcher.is_stopped()

    def possible(self, tokens: Sequence[int]) -> int:
        """How many of these tokens, from the first on, the answer could go on with."""
        return self._matcher.validate_tokens(list(tokens))

    def _check(self) -> None:
        reason = repr(self._failure) if self._failure else self._matcher.get_error()
        if reason:
            message = f"{self._param}: the answer cannot go on: {_short(reason)}"
            raise ConstraintError(message, self._param) from self._failure


class Constraints:
    """Compiles formats for one vocabulary. Any number of threads may call it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lock = threading.Lock()
        self._compiled: OrderedDict[Format, LLMatcher] = OrderedDict()
        self._vocabulary: LLTokenizer | None = None
        self._limits = LLParserLimits(**LIMITS, verbose_errors=False)
        self._worker = Worker("format_worker.py", (llguidance,), COMPILE_TIMEOUT)

    def begin(self, format: Format) -> Constraint:
        """The constraint of a new answer. Raises ConstraintError for what does not compile, or takes too much."""
        with self._lock:
            matcher = self._compiled.get(format)
            if matcher is not None:
                self._compiled.move_to_end(format)
        if matcher is None:
            matcher = self._compile(format)
            with self._lock:
                self._compiled[format] = matcher
                while len(self._compiled) > CACHED_FORMATS or self._n_bytes() > CACHED_BYTES:
                    self._compiled.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._tokenizer.n_tokens, format.param)

    def _n_bytes(self) -> int:
        return sum(len(format.source) for format in self._compiled)

    def _compile(self, format: Format) -> LLMatcher:
        """What is too much is found out in a process that can be ended; only what is not is compiled here."""
        try:
            answer = self._worker.ask({"source": format.source, "kind": format.kind, "limits": LIMITS})
        except TimeoutError:
            raise _refused(format, "it does not compile in time") from None
        except WorkerEnded as ended:
            reason = "it takes too long to compile" if ended.too_long else "it is too large or too deep to compile"
            raise _refused(format, reason) from None
        if "error" in answer:
            raise _refused(format, answer["error"])
        grammar = LLMatcher.grammar_from_lark(answer["lark"] + NO_FORCING)
        matcher = LLMatcher(self._tokens(), grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # the first mask is the dearest, and tells whether there is an answer at all
        if matcher.is_error():
            raise _refused(format, matcher.get_error())
        return matcher

    def _tokens(self) -> LLTokenizer:
        """The vocabulary as llguidance wants it, a prefix tree; about a second for 262,144 tokens."""
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = LLTokenizer(
                    TokenizerWrapper(_Tokens(self._tokenizer)),
                    eos_token=sorted(self._tokenizer.stop_ids),
                    slices=LLTokenizer.json_slices(),
                )
            return self._vocabulary


class _Tokens:
    """What a TokenizerWrapper wants to know."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_ids)
        self.bos_token_id = tokenizer.bos
        self.tokens = tokenizer.pieces()
        ids = range(tokenizer.n_tokens)
        self.special_token_ids = [id for id in ids if tokenizer.is_control(id) or id in tokenizer.stop_ids]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def _refused(format: Format, reason: str) -> ConstraintError:
    if reason.startswith("NoExtensionBias"):
        reason = "no answer can satisfy it"
    reason = re.sub(r"\n +\d+ \|.*", "", reason, flags=re.DOTALL)  # the line again
    if format.kind == MADE:  # nobody knows its lines
        reason = re.sub(r"^at \d+\(\d+\): (failed to compile JSON schema: )?", "", reason)
    return ConstraintError(f"{format.param}: {_short(reason.strip())}", format.param)


def _short(text: str) -> str:
    text = text.removesuffix("\n<non-verbose/>")
    half = MAX_MESSAGE // 2
    return text if len(text) <= MAX_MESSAGE else f"{text[:half]} … {text[-half:]}"
