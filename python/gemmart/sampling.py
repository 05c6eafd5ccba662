"""From the best candidates for the next token to one of them.

The core adds the logit bias, applies the penalties and hands out the best `k` tokens of a row; here, in this order,
top-k, typical, top-p, min-p and temperature choose among them. Random numbers depend on (seed, position) alone, so
the same seed gives the same text, whatever else runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gemmart.errors import InvalidRequest, ModelFormatError

MAX_BIASES = 1024
MAX_BIAS = 100
FIRST_CANDIDATES = 256
"""How many candidates to look at first where only top-p or min-p bounds them."""

RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 2),
    "top_k": (int, 0, 2**31 - 1),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "typical_p": (float, 0, 1),
    "repeat_penalty": (float, 0.1, 10),
    "repeat_last_n": (int, -1, 2**31 - 1),
    "presence_penalty": (float, -2, 2),
    "frequency_penalty": (float, -2, 2),
}


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose tokens; None means the model's default (`default_sampling`). Raises InvalidRequest for a value
    outside its range, which is in brackets below."""

    temperature: float | None = None  # [0, 2]; 0 is greedy, equal logits go to the lower id
    top_k: int | None = None  # keep the k best; 0 keeps all
    top_p: float | None = None  # [0, 1]; keep the best that together have this probability; 1 keeps all
    min_p: float | None = None  # [0, 1]; keep what has this share of the best one's probability; 0 keeps all
    typical_p: float | None = None  # [0, 1]; keep the most typical that together have this probability; 1 keeps all
    repeat_penalty: float | None = None  # [0.1, 10]; divides the logits of recent tokens, multiplies negative ones
    repeat_last_n: int | None = None  # how many tokens are recent, for all three penalties; 0 none, -1 all
    presence_penalty: float | None = None  # [−2, 2]; subtracted once from the logit of a recent token
    frequency_penalty: float | None = None  # [−2, 2]; subtracted for each time that it occurs
    logit_bias: Mapping[int, float] | None = None  # [−100, 100]; added to the logits of up to 1,024 token ids

    def __post_init__(self) -> None:
        for name, (kind, low, high) in RANGES.items():
            value = getattr(self, name)
            if value is not None:
                check_number(name, value, kind, low, high)
        bias = self.logit_bias
        if bias is None:
            return
        if len(bias) > MAX_BIASES:
            raise InvalidRequest(f"logit_bias has {len(bias)} entries; at most {MAX_BIASES} are allowed", "logit_bias")
        for id, value in bias.items():
            if isinstance(id, bool) or not isinstance(id, int | np.integer) or not 0 <= id < 2**31:
                message = f"logit_bias: {id!r} is no token id, expected an integer from 0 to {2**31 - 1}"
                raise InvalidRequest(message, f"logit_bias.{id}")
            check_number(f"logit_bias.{id}", value, float, -MAX_BIAS, MAX_BIAS)


def check_number(name: str, value: Any, kind: type, low: float, high: float) -> None:
    """Raises InvalidRequest where `value` is no number of that kind (int or float) from `low` to `high`."""
    allowed = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    if isinstance(value, bool) or not isinstance(value, allowed) or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        raise InvalidRequest(f"{name} is {value!r}, expected {what} from {low} to {high}", name)


@dataclass(frozen=True, slots=True)
class Settings(Sampling):
    """A Sampling with nothing left open. By default nothing is cut or changed: the model's own distribution."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


GEMMA = Settings(temperature=1.0, top_k=64, top_p=0.95)
OTHERS = Settings(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05)

FILE_KEYS = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repeat_penalty",
    "penalty_last_n": "repeat_last_n",
}
"""Names under `general.sampling.` in a file, and ours."""


def default_sampling(architecture: str, general_sampling: Mapping[str, Any]) -> Settings:
    """A model's defaults: the file's `general.sampling.*` (given without that prefix), else the family's. Raises
    ModelFormatError for a value outside its range."""
    given = {ours: general_sampling[key] for key, ours in FILE_KEYS.items() if key in general_sampling}
    try:
        return replace(GEMMA if architecture.startswith("gemma") else OTHERS, **given)
    except InvalidRequest as error:
        raise ModelFormatError(f"general.sampling: {error}") from None


def resolve(sampling: Sampling | None, defaults: Settings) -> Settings:
    """`sampling` with each None replaced by the default."""
    given = {name: getattr(sampling, name) for name in (f.name for f in fields(Sampling))} if sampling else {}
    return replace(defaults, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """The best tokens of one row of logits after bias and penalties."""

    ids: npt.NDArray[np.int32]  # [k], k >= 1
    logits: npt.NDArray[np.float32]  # [k], falling; equal ones by rising id
    logsumexp: float  # of the whole row
    n_vocab: int  # length of the row; what a mask forbids is no part of it


def needed_candidates(settings: Settings, n_vocab: int) -> int:
    """How many candidates `choose` needs; where only top-p or min-p bounds them, how many to begin with."""
    if settings.temperature == 0:
        return 1
    if settings.top_k:
        return min(settings.top_k, n_vocab)
    bounded = settings.typical_p == 1 and (settings.top_p < 1 or settings.min_p > 0)
    return min(FIRST_CANDIDATES, n_vocab) if bounded else n_vocab


def choose(candidates: Candidates, settings: Settings, seed: int, position: int) -> int | None:
    """The index of the chosen candidate, or None: those given do not suffice, so ask again with more (eight times as
    many is a good step; `n_vocab` always suffice). `position` is the place of the token in its sequence, from 0."""
    if settings.temperature == 0:
        return 0
    logits = candidates.logits[: settings.top_k or None].astype(np.float64)
    complete = len(logits) in (settings.top_k, candidates.n_vocab)
    if settings.typical_p < 1 and not complete:
        return None
    kept = typical(logits, settings.typical_p)
    # Each step sees the probabilities among what the steps before it kept; what nobody has cut is the whole row.
    logsumexp = logits[0] + math.log(np.exp(logits[kept] - logits[0]).sum()) if complete else candidates.logsumexp
    n_top_p = top_p(logits[kept] - logsumexp, settings.top_p)
    n_min_p = min_p(logits[kept], settings.min_p)
    n = min(n_top_p, n_min_p)
    if n > len(kept) and not complete:
        return None
    kept = kept[:n]
    total = np.cumsum(temperature(logits[kept], settings.temperature))
    # The last sum is 1 but for rounding; a draw beyond it takes the last candidate.
    at = int(np.searchsorted(total, uniform(seed, position), "right"))
    return int(kept[min(at, len(kept) - 1)])


# The steps. Logits are float64 and falling, best first. Each of top_p and min_p says how many from the first on to
# keep; "more than given" is len + 1.


def top_p(logprobs: npt.NDArray[np.float64], p: float) -> int:
    """The fewest of the best tokens that together have probability `p`, at least one."""
    if p == 1:
        return len(logprobs) + 1
    return int(np.searchsorted(np.cumsum(np.exp(logprobs)), p, "left")) + 1


def min_p(logits: npt.NDArray[np.float64], p: float) -> int:
    """The tokens that have at least `p` times the probability of the best one."""
    if p == 0:
        return len(logits) + 1
    n = int(np.searchsorted(-logits, -(logits[0] + math.log(p)), "right"))
    return n if n < len(logits) else n + 1


def typical(logits: npt.NDArray[np.float64], p: float) -> npt.NDArray[np.intp]:
    """The indices, rising, of the tokens whose information −log(probability) is nearest to the entropy and which
    together have probability `p`, at least one; probabilities are those among `logits`."""
    if p == 1:
        return np.arange(len(logits))
    probability = temperature(logits, 1)
    information = -np.log(np.maximum(probability, np.finfo(np.float64).tiny))
    entropy = float(probability @ information)
    order = np.argsort(np.abs(information - entropy), kind="stable")
    n = int(np.searchsorted(np.cumsum(probability[order]), p, "left")) + 1
    return np.sort(order[:n])


def temperature(logits: npt.NDArray[np.float64], t: float) -> npt.NDArray[np.float64]:
    """Probabilities of the softmax of `logits` / `t`."""
    with np.errstate(over="ignore"):  # a tiny temperature
        weights = np.exp((logits - logits[0]) / t)
    return np.asarray(weights / weights.sum())


_MASK = 2**64 - 1


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on `seed` (modulo 2^64) and `position` alone: 53 bits of a hash that puts both
    through SplitMix64's finalizer."""
    return (_mix(seed + _mix(position + 1)) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _MASK
    return x ^ (x >> 31)


def adjust(
    logits: npt.NDArray[np.float32],
    settings: Settings,
    recent: Sequence[int],
    allowed: npt.NDArray[np.bool_] | None = None,
) -> npt.NDArray[np.float32]:
    """What the core does to a row [n_vocab] before it picks candidates, as a specification: the bias is added; then,
    for tokens among the last `repeat_last_n` of `recent` (the whole sequence so far), the repeat penalty divides a
    logit above 0 and multiplies another, and presence + frequency × count is subtracted. In float32. Tokens that are
    not `allowed` [n_vocab] are at last −inf, and no candidates."""
    row = logits.astype(np.float32)
    for id, bias in settings.logit_bias.items():
        row[id] += np.float32(bias)
    n = len(recent) if settings.repeat_last_n < 0 else min(settings.repeat_last_n, len(recent))
    ids, counts = np.unique(np.asarray(recent[len(recent) - n :], np.int64), return_counts=True)
    penalty = np.float32(settings.repeat_penalty)
    row[ids] = np.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    once, each = np.float32(settings.presence_penalty), np.float32(settings.frequency_penalty)
    row[ids] -= once + each * counts.astype(np.float32)
    return row if allowed is None else np.where(allowed, row, np.float32(-np.inf))


def logprobs(
    row: npt.NDArray[np.float32], id: int, n: int
) -> tuple[float, npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Of a row of logits [n_vocab] as the model gave it: the log-probability of `id`, and the ids and
    log-probabilities of the `n` best, best first, equal ones by rising id."""
    logits = row.astype(np.float64)
    top = logits.max()
    logprob = logits - (top + math.log(np.exp(logits - top).sum()))
    n = min(n, len(row))
    bound = np.partition(row, len(row) - n)[len(row) - n] if n else np.inf
    best = np.nonzero(row >= bound)[0]
    best = best[np.argsort(-row[best], kind="stable")][:n]
    return float(logprob[id]), best.astype(np.int32), logprob[best].astype(np.float32)
