"""A sequence that answers a request: of which rows it wants something, which token it takes, what it hands out."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemmart import _core
from gemmart.errors import NumericError
from gemmart.request import Request
from gemmart.results import Completion, Delta, Echo, Slot, Timings, TokenLogprob, Usage
from gemmart.sampling import Candidates, choose, logprobs, needed_candidates
from gemmart.speculation import NewGuesser, Speculation, StepTimes
from gemmart.tokenizer import StreamDecoder, Tokenizer
from gemmart.tools import CallDelta

ANY_TOKEN = np.zeros(0, np.int32)
"""The mask that allows all."""


class ActiveSequence:
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
        self.pages = n_pages(len(prompt) + request.max_tokens)
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


def _check_finite(finite: Sequence[bool]) -> None:
    if not all(finite):
        raise NumericError("the results are not finite: a weight of the model is NaN or infinite, or too large")


def n_pages(n_tokens: int) -> int:
    return -(-n_tokens // _core.KV_PAGE_TOKENS)
