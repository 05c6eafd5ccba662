"""The loop that computes: it admits requests, makes a batch, runs it and hands its rows out.

One thread runs it; any thread may submit and cancel. Each step is all sequences that decode, one row each, and as much
of the waiting prompts as the batch still holds, shared fairly; a sequence that is alone has guesses checked too. What
it says does not depend on its company: the core's results are the same bits in every batch, and draws depend on seed
and position alone."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np

from gemmart import _core
from gemmart.errors import (
    Cancelled,
    ContextOverflow,
    GemmartError,
    InternalError,
    InvalidRequest,
    OutOfMemory,
)
from gemmart.request import Request
from gemmart.results import KvPages, Prefill, Slot
from gemmart.sequence import ActiveSequence, n_pages
from gemmart.speculation import NewGuesser, StepTimes
from gemmart.tokenizer import Tokenizer

if TYPE_CHECKING:
    from gemmart.constraint import Constraint

LOGIT_BYTES = 256 << 20
"""Most bytes of logits that one step keeps, where a request wants them all."""
LEAST_SHARE = 128
"""Tokens of a prompt in a step, where it has so many. Of 32 short prompts that come together some are answered at once
then, and the last one as early as if all were read side by side."""
LENT_SECONDS = 0.02
"""How often a request that waits for lent pages, and for nothing else, looks for them."""

T = TypeVar("T")


def logit_bytes(n_vocab: int, n_batch: int, n_sequences: int) -> int:
    """Most bytes of logits that a step of a model keeps."""
    row = 4 * n_vocab
    return row * min(n_batch, max(n_sequences, LOGIT_BYTES // row))


class Engine:
    """Continuous batching over one core context."""

    def __init__(
        self,
        context: _core.Context,
        tokenizer: Tokenizer,
        *,
        n_ctx: int,
        n_batch: int,
        window: int,
        guessers: Sequence[NewGuesser],
        draft_max: int,
    ) -> None:
        """n_ctx: most tokens of a sequence. n_batch: rows of a step. window: tokens that the windowed layers see.
        guessers: what guesses for a sequence, those asked first in front. draft_max: most tokens guessed at once."""
        self._context = context
        self._kv = context.kv
        self._tokenizer = tokenizer
        self.n_ctx = n_ctx
        self._n_batch = n_batch
        self._guessers = guessers
        self._draft_max = min(draft_max, n_batch - 1)
        self._times = StepTimes()
        # Pages that a sequence can hold at once of the windowed layers: what they see, what a rewind needs, what a step
        # adds.
        self._window_pages = n_pages(window + _core.KV_SLACK + min(n_batch, _core.KV_CHUNK)) + 2
        self._inbox: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[_core.KvCache], object], Future[object]]] = deque()
        self.lent: dict[int, int] = {}
        """Pages of the sequences that jobs have opened."""
        self._active: list[ActiveSequence] = []
        self._wake = threading.Condition()
        self._closing = False
        self._n_steps = 0
        self.pages = self._count_pages()
        """How many there are, are held by sequences and are kept for their contents, since the last step."""
        self._pid = os.getpid()
        self._aside = ThreadPoolExecutor(1, "gemmart-masks")  # for what is done while the core computes
        self._thread = threading.Thread(target=self._loop, name="gemmart-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ContextOverflow, InvalidRequest."""
        n = len(request.prompt)
        if n == 0:
            raise InvalidRequest("prompt: is empty; at least one token is needed", "prompt")
        if n + (1 if request.max_tokens else 0) > self.n_ctx:
            raise ContextOverflow(n, self.n_ctx)
        self._check_process()
        with self._wake:
            if self._closing:
                raise InvalidRequest("model: it is closed")
            self._inbox.append(request)
            self._wake.notify()

    def cancel(self, request: Request) -> None:
        """Stop a request; its Completion says "cancelled". What has ended already stays as it is."""
        request.cancelled = True  # the loop runs as long as there is a request, and looks at each step

    @property
    def is_closed(self) -> bool:
        return self._closing

    @property
    def n_running(self) -> int:
        """Sequences under way."""
        return len(self._active)

    @property
    def n_waiting(self) -> int:
        """Requests that are not yet admitted."""
        return len(self._inbox)

    @property
    def slots(self) -> list[Slot]:
        """What is under way."""
        return [sequence.slot for sequence in self._active]

    def run(self, job: Callable[[_core.KvCache], T]) -> T:
        """Call `job` with the cache between two steps, on the engine's thread, and return what it returns. Raises what
        it raises, InvalidRequest."""
        done: Future[object] = Future()
        self._check_process()
        with self._wake:
            if self._closing:
                raise InvalidRequest("model: it is closed")
            self._jobs.append((job, done))
            self._wake.notify()
        return cast("T", done.result())

    def close(self) -> None:
        """End the loop and free the memory; requests under way fail with Cancelled."""
        if os.getpid() != self._pid:
            return  # there is no thread
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:  # as where it collects garbage, a model
            self._thread.join()

    def _check_process(self) -> None:
        """Before the lock: the parent's thread may have held it when this process was forked off."""
        if os.getpid() != self._pid:
            raise InvalidRequest("model: it was loaded before a fork; load it in the process that uses it")

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._closing or self._jobs or self._inbox or self._active):
                    self._wake.wait()
                if self._closing:
                    break
                self._admit()
                if not (self._jobs or self._active):
                    self._wake.wait(LENT_SECONDS)
                    continue
            self._do_jobs()
            try:
                self._step()
            except Exception as error:
                # The step's batch is lost, with its sequences; the engine lives.
                for sequence in self._active:
                    sequence.fail(_public(error))
                self._remove_finished()
        for sequence in self._active:
            sequence.fail(Cancelled("the model was closed"))
        self._remove_finished()
        for request in self._inbox:
            request.emit(Cancelled("the model was closed"))
        for _, done in self._jobs:
            done.set_exception(InvalidRequest("model: it is closed"))
        self._aside.shutdown()
        del self._context, self._kv, self._guessers

    def _do_jobs(self) -> None:
        while self._jobs:
            job, done = self._jobs.popleft()
            try:
                done.set_result(job(self._kv))
            except Exception as error:
                done.set_exception(error)

    def _admit(self) -> None:
        """Take requests from the inbox, in order, while every admitted sequence can grow to its full length; cancelled
        ones at once, since a step ends them."""
        waiting: deque[Request] = deque()
        for request in self._inbox:
            if not request.cancelled and (waiting or self._overfull(request)):
                waiting.append(request)
                continue
            try:
                self._active.append(ActiveSequence(request, self._kv, self._tokenizer, self._guessers, self._times))
            except Exception as error:
                request.emit(_public(error))
        self._inbox = waiting

    def _overfull(self, request: Request) -> bool:
        """Whether the request and those under way might come to need more pages than there are."""
        if not (self._active or self.lent):
            return False
        wanted = [s.pages for s in self._active] + [n_pages(len(request.prompt) + request.max_tokens)]
        wanted += self.lent.values()
        windowed = [min(n, self._window_pages) for n in wanted]
        stats = self._kv.stats()
        groups = (stats["global"]["n_pages"], wanted), (stats["windowed"]["n_pages"], windowed)
        return any(n_pages and sum(pages) > n_pages for n_pages, pages in groups)

    def _step(self) -> None:
        for sequence in self._active:
            if sequence.request.cancelled:
                sequence.finish("cancelled")
        self._remove_finished()
        batch = self._make_batch()
        if not batch:
            return
        lone = batch[0][0] if len(self._active) == 1 and batch[0][0].decodes else None
        guess = lone.guess(self._draft_max) if lone else []
        tokens: list[int] = []
        runs: list[tuple[int, int]] = []
        outputs: list[int] = []  # the rows that want logits
        hidden: list[int] = []  # the rows that want their state
        wanted: list[range] = []  # for each sequence, which of either are its own
        constraints: list[Constraint] = []  # of those that choose a token
        for sequence, n in batch:
            run = sequence.pending[:n] + guess
            rows = sequence.rows(n, guess)
            to = outputs if sequence.request.pool is None else hidden
            wanted.append(range(len(to), len(to) + len(rows)))
            to += range(len(tokens) + rows.start, len(tokens) + rows.stop)
            tokens += run
            runs.append((sequence.id, len(run)))
            sequence.started = sequence.started or time.monotonic()
            if rows and sequence.request.constraint:
                constraints.append(sequence.request.constraint)
        masks = self._aside.submit(_fill, constraints) if constraints else None
        finite = self._context.forward(np.array(tokens, np.int32), runs, outputs, hidden)
        states = self._context.hidden()
        ended = time.monotonic()
        if masks:
            masks.result()
        self._n_steps += 1
        for (sequence, n), own in zip(batch, wanted, strict=True):
            del sequence.pending[:n]
            sequence.last_step = self._n_steps
            try:
                if sequence.request.pool is not None:
                    sequence.collect(states[own.start : own.stop], finite[len(outputs) :][own.start : own.stop])
                elif sequence.request.n_logits:
                    sequence.hand_out(self._context, own, finite)
                elif own := sequence.read(self._context, own, finite):
                    n_right = sequence.advance(self._context, own, finite, guess)
                    if sequence is lone:
                        lone.speculation.learn(len(guess), n_right, ended)
                elif not sequence.finished:
                    n_prompt = len(sequence.request.prompt)
                    sequence.request.emit(Prefill(n_prompt - len(sequence.pending), n_prompt))
            except Exception as error:
                sequence.fail(_public(error))
        self._remove_finished()

    def _make_batch(self) -> list[tuple[ActiveSequence, int]]:
        """(sequence, number of its pending tokens): one for each, as far as they go; prompts have equal shares of the
        rest, those that waited longest, if shares would be small."""
        self._active.sort(key=lambda s: s.last_step)  # whoever waited longest comes first
        chosen = self._active[: self._n_batch]
        batch = [(s, 1) for s in chosen if len(s.pending) == 1]
        prompts = [s for s in chosen if len(s.pending) > 1]
        room = self._n_batch - len(batch)
        logit_rows = max(1, LOGIT_BYTES // (4 * self._tokenizer.n_tokens))
        for i, sequence in enumerate(prompts):
            share = max(LEAST_SHARE, -(-room // (len(prompts) - i)))
            n = min(len(sequence.pending), share, room, _core.KV_CHUNK)
            if sequence.request.n_logits or sequence.request.n_prompt_logprobs is not None:
                n = min(n, logit_rows)
                logit_rows -= n
            if n > 0:
                batch.append((sequence, n))
                room -= n
        return batch

    def _remove_finished(self) -> None:
        for sequence in self._active:
            if sequence.finished:
                self._kv.free(sequence.id)
                sequence.speculation.close()
        self._active = [s for s in self._active if not s.finished]
        self.pages = self._count_pages()

    def _count_pages(self) -> KvPages:
        groups = [group for group in self._kv.stats().values() if isinstance(group, dict)]
        total, free, cached = (sum(group[name] for group in groups) for name in ("n_pages", "n_free", "n_cached"))
        return KvPages(total, total - free - cached, cached)


def _fill(constraints: Sequence[Constraint]) -> None:
    for constraint in constraints:
        constraint.fill()


def _public(error: Exception) -> GemmartError:
    """What a caller is told of an error on the engine's thread."""
    if isinstance(error, GemmartError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemory(f"memory ran out while the model computed: {error}")
    internal = InternalError(f"the engine failed: {error!r}")
    internal.__cause__ = error
    return internal
