"""How well a model predicts a text: its perplexity, as llama.cpp measures it, so that figures can be compared.

The text's tokens are cut into chunks of n_ctx, each a new sequence that begins with BOS where the model has one; the
second half of each chunk is scored, so that every token scored has n_ctx / 2 before it or more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemmart.errors import InvalidRequest
from gemmart.model import Model
from gemmart.sampling import check_number


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token, and the standard error that the sample's spread suggests."""

    value: float
    error: float
    n_chunks: int
    n_ctx: int  # tokens of a chunk
    n_scored: int  # tokens in all


def measure(
    model: Model,
    text: str,
    *,
    n_ctx: int = 512,
    n_chunks: int | None = None,
    on_chunk: Callable[[Perplexity, int], None] = lambda so_far, n_chunks: None,
) -> Perplexity:
    """The perplexity of a text.

    n_ctx: tokens of a chunk. n_chunks: how many of them at most; None: all that the text has. on_chunk: called after
    each chunk with the result so far, and how many chunks there will be. Raises InvalidRequest where n_ctx is more than
    the model was loaded with, or the text has not n_ctx tokens."""
    check_number("n_ctx", n_ctx, int, 4, model.ctx)
    if n_chunks is not None:
        check_number("n_chunks", n_chunks, int, 1, 2**31 - 1)
    chunks = cut(model.tokenize, text, n_ctx)[:n_chunks]
    losses: list[float] = []
    for chunk in chunks:
        losses += score(model, chunk)
        result = summary(np.array(losses), len(losses) // n_scored(n_ctx), n_ctx)
        on_chunk(result, len(chunks))
    return result


def cut(tokenize: Callable[..., list[int]], text: str, n_ctx: int) -> list[list[int]]:
    """The text's tokens in chunks of n_ctx, what is left over dropped; each begins with BOS where the model wants one.
    Raises InvalidRequest where there are none."""
    bos = tokenize("", bos=True)[:1]
    tokens = tokenize(text, bos=True)
    if len(tokens) < n_ctx:
        raise InvalidRequest(
            f"the text has {len(tokens)} tokens and a chunk needs {n_ctx}: take a longer text, or shorter chunks"
        )
    starts = range(0, len(tokens) - n_ctx + 1, n_ctx)
    return [bos + tokens[start + len(bos) : start + n_ctx] for start in starts]


def n_scored(n_ctx: int) -> int:
    """Tokens of a chunk that are scored: those after its first half and one more."""
    return n_ctx - n_ctx // 2 - 1


def score(model: Model, tokens: Sequence[int]) -> list[float]:
    """Negative log-likelihoods of the tokens of a chunk's second half."""
    n = n_scored(len(tokens))
    losses: list[float] = []
    for logits in model.stream_logits(tokens[:-1], n):
        targets = tokens[len(tokens) - n + len(losses) :][: len(logits)]
        losses += negative_log_likelihoods(logits, targets).tolist()
    return losses


def negative_log_likelihoods(logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float64]:
    """-log softmax(logits [n, n_vocab])[tokens [n]]."""
    most = logits.max(axis=1, keepdims=True)
    sums = np.exp(logits - most).sum(axis=1, dtype=np.float64)
    return np.log(sums) + most[:, 0] - logits[np.arange(len(tokens)), tokens]  # type: ignore[no-any-return]


def summary(losses: NDArray[np.float64], n_chunks: int, n_ctx: int) -> Perplexity:
    mean = float(losses.mean())
    value = math.exp(mean)
    variance = max(0.0, float((losses**2).mean()) - mean**2)
    error = value * math.sqrt(variance / (len(losses) - 1)) if len(losses) > 1 else math.nan
    return Perplexity(value, error, n_chunks, n_ctx, len(losses))
