"""The loop that computes: it admits requests, makes a batch, runs it, samples and hands out tokens.

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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from gemmart import _core
from gemmart.errors import (
    Cancelled,
    ContextOverflow,
    GemmartError,
    InternalError,
    InvalidRequest,
    NumericError,
    OutOfMemory,
)
from gemmart.pooling import Pool
from gemmart.results import Completion, Delta, Echo, KvPages, Prefill, Slot, Timings, TokenLogprob, Usage
from gemmart.sampling import Candidates, Settings, choose, logprobs, needed_candidates
from gemmart.speculation import NewGuesser, Speculation, StepTimes
from gemmart.stops import StopStrings
from gemmart.tokenizer import StreamDecoder, Tokenizer
from gemmart.tools import CallDelta, CallParser

if TYPE_CHECKING:
    from gemmart.constraint import Constraint

LOGIT_BYTES = 256 << 20
"""Most bytes of logits that one step keeps, where a request wants them all."""
ANY_TOKEN = np.zeros(0, np.int32)
"""The mask that allows all."""
LEAST_SHARE = 128
"""Tokens of a prompt in a step, where it has so many. Of 32 short prompts that come together some are answered at once
then, and the last one as early as if all were read side by side."""
LENT_SECONDS = 0.02
"""How often a request that waits for lent pages, and for nothing else, looks for them."""

T = TypeVar("T")
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
        self._window_pages = _pages(window + _core.KV_SLACK + min(n_batch, _core.KV_CHUNK)) + 2
        self._inbox: deque[Request] = deque()
        self._jobs: deque[tuple[Callable[[_core.KvCache], object], Future[object]]] = deque()
        self.lent: dict[int, int] = {}
        """Pages of the sequences that jobs have opened."""
        self._active: list[_Sequence] = []
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
                self._active.append(_Sequence(request, self._kv, self._tokenizer, self._guessers, self._times))
            except Exception as error:
                request.emit(_public(error))
        self._inbox = waiting

    def _overfull(self, request: Request) -> bool:
        """Whether the request and those under way might come to need more pages than there are."""
        if not (self._active or self.lent):
            return False
        wanted = [s.pages for s in self._active] + [_pages(len(request.prompt) + request.max_tokens)]
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

    def _make_batch(self) -> list[tuple[_Sequence, int]]:
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


class _Sequence:
    """A request under way."""

    def __init__(
        self,
        request: Request,
        kv: _core.KvCache,
        tokenizer: Tokenizer,
        guessers: Sequence[NewGuesser],
        times: StepTimes,
    ) -> None:
        self.request = request
        self._kv = kv
        self._tokenizer = tokenizer
        prompt = np.array(request.prompt, np.int32)
        self.pages = _pages(len(prompt) + request.max_tokens)
        self._ids = prompt.tolist()  # of the prompt and, so far, the answer
        self.finished = False
        self.started = 0.0
        self.last_step = 0
        self._first = self._last = 0.0
        self._text: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob] = []
        self._decoder: StreamDecoder = tokenizer.decoder(start=False)
        self._stops = request.stops
        self.speculation = Speculation([new(prompt) for new in guessers] if request.is_answered else [], times)
        self._n_guessed = self._n_accepted = 0
        bias = dict(request.sampling.logit_bias)
        if request.ignore_stop_tokens:
            bias |= dict.fromkeys(tokenizer.stop_ids, -np.inf)
        self._bias_ids, self._bias = np.array(list(bias), np.int32), np.array(list(bias.values()), np.float32)
        self.id, self.n_cached = kv.match_prefix(prompt[:0] if request.wants_all_rows else prompt, request.salt)
        self.pending: list[int] = self._ids[self.n_cached :]
        if request.max_tokens == 0 and not request.wants_all_rows:
            self.finish("length")

    @property
    def _n_left(self) -> int:
        """Tokens that may still be generated."""
        return len(self.request.prompt) + self.request.max_tokens - len(self._ids)

    @property
    def slot(self) -> Slot:
        n_prompt, n_past = len(self.request.prompt), len(self._ids) - len(self.pending)
        state = "prompt" if n_past < n_prompt else "generating"
        return Slot(self.id, state, n_prompt, n_past, n_decoded=len(self._ids) - n_prompt)

    @property
    def decodes(self) -> bool:
        """Whether its next step computes the logits after one token."""
        return len(self.pending) == 1 and self.request.is_answered and self.request.max_tokens > 0

    def rows(self, n: int, guess: Sequence[int]) -> range:
        """Of which rows logits or states are wanted, when n pending tokens and `guess` are computed."""
        left = len(self.pending) - n
        if self.request.pool is not None:
            return self.request.pool.rows(len(self._ids) - len(self.pending), n)
        if self.request.n_logits:
            return range(max(0, n - max(0, self.request.n_logits - left)), n)
        first = n if left else n - 1
        return range(0 if self._reads_logprobs else first, n if left else n + len(guess))

    @property
    def _reads_logprobs(self) -> bool:
        """Whether the pending tokens are of a prompt whose log-probabilities are wanted."""
        return self.request.n_prompt_logprobs is not None and len(self._ids) == len(self.request.prompt)

    def guess(self, n_most: int) -> list[int]:
        """Up to `n_most` tokens that may follow."""
        n_most = min(n_most, self._n_left - 1)  # one more is sampled than is right
        return self.speculation.guess(self._ids, n_most, self.request.constraint)

    def hand_out(self, context: _core.Context, outputs: range, finite: Sequence[bool]) -> None:
        """Give away rows of logits."""
        _check_finite(finite[outputs.start : outputs.stop])
        if outputs:
            self.request.emit(np.stack([context.row(output) for output in outputs]))
        if not self.pending:
            self.finish("stop")

    def collect(self, states: NDArray[np.float32], finite: Sequence[bool]) -> None:
        """Pool rows of states; give the embedding away when all are there."""
        _check_finite(finite)
        pool = self.request.pool
        assert pool is not None
        pool.add(states)
        if not self.pending:
            self.request.emit(pool.result())
            self.finish("stop")

    def read(self, context: _core.Context, outputs: range, finite: Sequence[bool]) -> range:
        """Take from the rows what is wanted of the prompt; returns those that are left, to sample from."""
        if not self._reads_logprobs:
            return outputs
        request, n_prompt = self.request, len(self._ids)
        n_known = min(len(outputs), n_prompt - 1 - len(self._prompt_logprobs))  # rows whose next token is the prompt's
        _check_finite(finite[outputs.start : outputs.start + n_known])
        for output in outputs[:n_known]:
            token = self._ids[len(self._prompt_logprobs) + 1]
            self._prompt_logprobs.append(self._logprob(context, output, token, request.n_prompt_logprobs or 0))
        if not self.pending:
            request.emit(Echo(tuple(self._ids), tuple(self._prompt_logprobs)))
            if request.max_tokens == 0:
                self.finish("length")
        return outputs[n_known:] if request.max_tokens else range(0)

    def _logprob(self, context: _core.Context, output: int, token: int, n: int) -> TokenLogprob:
        """Of a token, with `n` alternatives."""
        chosen, ids, values = logprobs(context.row(output), token, n)
        return TokenLogprob(
            token, self._tokenizer.piece(token), chosen, tuple(zip(ids.tolist(), values.tolist(), strict=True))
        )

    def advance(self, context: _core.Context, outputs: range, finite: Sequence[bool], guess: list[int]) -> int:
        """Sample the token after the last pending one, and after each of `guess` as long as it was the one sampled.
        `outputs`: the rows for that. Returns how many guesses were right."""
        self._n_guessed += len(guess)
        n_right = 0
        for output, guessed in zip(outputs, [*guess, None], strict=True):
            _check_finite(finite[output : output + 1])
            token = self._choose(context, output)
            if token == guessed:
                n_right += 1
                self._n_accepted += 1
            self._take(token, context, output)
            if token != guessed or self.finished:
                break
            if self.request.constraint:
                self.request.constraint.fill()
        if n_right < len(guess):
            self._kv.trim(self.id, len(self._ids) - 1)
        return n_right

    def _choose(self, context: _core.Context, output: int) -> int:
        settings, n_vocab, position = self.request.sampling, self._tokenizer.n_tokens, len(self._ids)
        mask = self.request.constraint.mask if self.request.constraint else ANY_TOKEN
        recent = self._ids[max(0, position - settings.repeat_last_n) if settings.repeat_last_n >= 0 else 0 :]
        k = needed_candidates(settings, n_vocab)
        while True:
            ids, logits, logsumexp = context.select(
                output,
                k,
                bias_ids=self._bias_ids,
                bias=self._bias,
                recent=np.array(recent, np.int32),
                repeat_penalty=settings.repeat_penalty,
                presence_penalty=settings.presence_penalty,
                frequency_penalty=settings.frequency_penalty,
                mask=mask,
            )
            n_allowed = n_vocab if len(ids) == k else len(ids)  # fewer than were asked for are all there are
            index = choose(Candidates(ids, logits, logsumexp, n_allowed), settings, self.request.seed, position)
            if index is not None:
                return int(ids[index])
            k = min(8 * k, n_vocab)

    def _take(self, token: int, context: _core.Context, output: int) -> None:
        """Hand out a token; `output` is the row that it was chosen from."""
        self._last = time.monotonic()
        self._first = self._first or self._last
        self._ids.append(token)
        request = self.request
        ends = token in self._tokenizer.stop_ids and not request.ignore_stop_tokens
        logprob: tuple[TokenLogprob, ...] | None = None
        # Who scores a prompt counts on one for every token; otherwise they are of those that the text consists of.
        if request.n_logprobs is not None and (not ends or request.n_prompt_logprobs is not None):
            logprob = (self._logprob(context, output, token, request.n_logprobs),)
            self._logprobs += logprob
        if ends:
            if logprob:
                request.emit(Delta("", (), logprob))
            self.finish("stop")
            return
        text, stopped = self._stops.push(self._decoder.push(token))
        text, calls = request.calls.push(text) if request.calls else (text, ())
        self._text.append(text)
        request.emit(Delta(text, (token,), logprob, calls))
        complete = request.constraint is not None and request.constraint.take(token)
        if stopped:
            self._rest("")
            self._finish("stop")
        elif complete:
            self.finish("stop")
        elif self._n_left == 0:
            self.finish("length")
        else:
            self.pending = [token]

    def finish(self, reason: str) -> None:
        """End with what the decoder and the stop strings still hold back."""
        if self.finished:
            return
        self._rest(self._stops.push(self._decoder.finish())[0] + self._stops.finish())
        self._finish(reason)

    def _rest(self, text: str) -> None:
        """Hand out text that belongs to no token of its own."""
        calls: tuple[CallDelta, ...] = ()
        if self.request.calls:
            text, calls = self.request.calls.push(text)
            text += self.request.calls.finish()
        if text or calls:
            self._text.append(text)
            self.request.emit(Delta(text, (), calls=calls))

    def _finish(self, reason: str) -> None:
        request, now = self.request, time.monotonic()
        started, first = self.started or now, self._first or now
        tokens = self._ids[len(request.prompt) :]
        tool_calls = tuple(request.calls.calls) if request.calls else ()
        if request.calls and tool_calls and reason == "stop" and not request.calls.is_open:
            reason = "tool_calls"
        self._end(
            Completion(
                text="".join(self._text),
                tokens=tuple(tokens),
                finish_reason=reason,
                usage=Usage(len(request.prompt), len(tokens), self.n_cached),
                timings=Timings(
                    queued_s=started - request.submitted,
                    prompt_s=first - started,
                    generate_s=max(0.0, self._last - first),
                    drafted_tokens=self._n_guessed,
                    accepted_tokens=self._n_accepted,
                ),
                seed=request.seed,
                logprobs=tuple(self._logprobs) if request.n_logprobs is not None else None,
                stop_string=self._stops.found,
                tool_calls=tool_calls,
                prompt_logprobs=tuple(self._prompt_logprobs) if request.n_prompt_logprobs is not None else None,
            )
        )

    def fail(self, error: Exception) -> None:
        self._end(error)

    def _end(self, event: Completion | Exception) -> None:
        if not self.finished:
            self.finished = True
            self.request.emit(event)


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


def _check_finite(finite: Sequence[bool]) -> None:
    if not all(finite):
        raise NumericError("the results are not finite: a weight of the model is NaN or infinite, or too large")


def _pages(n_tokens: int) -> int:
    return -(-n_tokens // _core.KV_PAGE_TOKENS)
