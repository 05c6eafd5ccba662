"""Sampling against plain distributions written out here; stop strings against text that comes by characters."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from gemmart.errors import InvalidRequest, ModelFormatError
from gemmart.sampling import (
    FIRST_CANDIDATES,
    Candidates,
    Sampling,
    Settings,
    adjust,
    choose,
    default_sampling,
    logprobs,
    needed_candidates,
    resolve,
    uniform,
)
from gemmart.stops import StopStrings


def candidates(row: np.ndarray, k: int) -> Candidates:
    ids = np.array(sorted(range(len(row)), key=lambda id: (-row[id], id))[:k], np.int32)
    return Candidates(ids, row[ids], float(np.log(np.exp(row.astype(np.float64)).sum())), len(row))


def a_row(n: int = 500, seed: int = 0) -> np.ndarray:
    row = np.random.default_rng(seed).normal(0, 3, n).astype(np.float32)
    row[7] = row[11] = row[3]  # ties
    return row


def distribution(row: np.ndarray, s: Settings) -> dict[int, float]:
    """id → probability, in order of candidates: each step as a loop over the whole row."""
    p = np.exp(row.astype(np.float64))
    p /= p.sum()
    order = sorted(range(len(row)), key=lambda id: (-row[id], id))
    if s.top_k:
        order = order[: s.top_k]
    if s.typical_p < 1:
        q = {id: p[id] / sum(p[i] for i in order) for id in order}
        entropy = sum(-x * math.log(x) for x in q.values())
        mass, kept = 0.0, []
        for id in sorted(order, key=lambda id: abs(-math.log(q[id]) - entropy)):
            kept.append(id)
            mass += q[id]
            if mass >= s.typical_p:
                break
        order = [id for id in order if id in kept]
    if s.top_p < 1:
        total = sum(p[id] for id in order)
        mass, kept = 0.0, []
        for id in order:
            kept.append(id)
            mass += p[id]
            if mass >= s.top_p * total:
                break
    else:
        kept = order
    kept = [id for id in kept if p[id] >= s.min_p * p[order[0]]]
    weight = {id: p[id] ** (1 / s.temperature) for id in kept}
    return {id: w / sum(weight.values()) for id, w in weight.items()}


SETTINGS = [
    Settings(),
    Settings(temperature=0.7),
    Settings(top_k=1),
    Settings(top_k=40, temperature=1.5),
    Settings(top_p=0.9),
    Settings(top_p=0.0),
    Settings(min_p=0.05),
    Settings(min_p=1.0),
    Settings(typical_p=0.5),
    Settings(typical_p=0.9, top_k=50, top_p=0.6, min_p=0.01),
    Settings(top_k=64, top_p=0.95),
    Settings(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    Settings(top_p=0.999, temperature=2.0),
]


@pytest.mark.parametrize("settings", SETTINGS, ids=repr)
def test_choice_equals_inverse_cdf_of_the_plain_distribution(settings: Settings) -> None:
    for seed in range(3):
        row = a_row(seed=seed)
        expected = distribution(row, settings)
        cdf = np.cumsum(list(expected.values()))
        k = needed_candidates(settings, len(row))
        for position in range(200):
            while (index := choose(candidates(row, k), settings, seed, position)) is None:
                k = min(8 * k, len(row))
            place = min(int(np.searchsorted(cdf, uniform(seed, position), "right")), len(cdf) - 1)
            assert candidates(row, k).ids[index] == list(expected)[place]


def test_many_draws_follow_the_distribution() -> None:
    row, settings, n = a_row(50), Settings(temperature=0.8, top_k=20, top_p=0.97), 100_000
    expected = distribution(row, settings)
    given = candidates(row, 20)
    counts = np.zeros(len(expected))
    for position in range(n):
        index = choose(given, settings, 42, position)
        assert index is not None
        counts[index] += 1
    wanted = np.array(list(expected.values())) * n
    chi2 = ((counts - wanted) ** 2 / wanted).sum()
    freedom = len(expected) - 1
    assert chi2 < freedom + 4 * math.sqrt(2 * freedom), "four sigma"


def test_uniform_numbers_are_uniform_and_independent() -> None:
    n = 20_000
    for draws in (
        np.array([uniform(7, position) for position in range(n)]),
        np.array([uniform(seed, 3) for seed in range(n)]),
    ):
        assert 0 <= draws.min() < draws.max() < 1
        counts = np.histogram(draws, 50, (0, 1))[0]
        assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 49 + 4 * math.sqrt(98)
        assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 4 / math.sqrt(n)


def test_uniform_is_splitmix64_twice() -> None:
    def splitmix64(state: int) -> int:  # the published algorithm, step by step
        z = (state + 0x9E3779B97F4A7C15) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    assert splitmix64(0) == 0xE220A8397B1DCDAF, "its published first number"
    for seed, position in itertools.product([0, 1, 2**63, 2**64 - 1], [0, 1, 8191]):
        bits = splitmix64((seed + splitmix64(position + 1)) % 2**64)
        assert uniform(seed, position) == (bits // 2**11) / 2**53
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)


GOLDEN = [1, 18, 6, 6, 19, 0, 0, 0, 1, 11, 9, 2]


def test_same_seed_same_choices() -> None:
    given, settings = candidates(a_row(), 64), Settings(top_k=64)
    assert [choose(given, settings, 1, position) for position in range(12)] == GOLDEN
    assert [choose(given, settings, 2, position) for position in range(12)] != GOLDEN


def test_greedy_takes_the_first_and_ties_go_to_the_lower_id() -> None:
    row = np.zeros(10, np.float32)
    row[[8, 4, 6]] = 3
    settings = Settings(temperature=0)
    given = candidates(row, needed_candidates(settings, 10))
    assert [given.ids[choose(given, settings, seed, 0) or 0] for seed in range(5)] == [4] * 5


def test_tiny_temperature_is_nearly_greedy() -> None:
    assert choose(candidates(a_row(), 500), Settings(temperature=5e-324), 1, 1) in (0, 1, 2)
    row = np.arange(5, dtype=np.float32)
    assert choose(candidates(row, 5), Settings(temperature=1e-300), 1, 1) == 0


def test_as_many_candidates_as_needed() -> None:
    assert needed_candidates(Settings(temperature=0), 1000) == 1
    assert needed_candidates(Settings(top_k=40), 1000) == 40
    assert needed_candidates(Settings(top_k=40), 10) == 10
    assert needed_candidates(Settings(top_p=0.9), 1000) == FIRST_CANDIDATES
    assert needed_candidates(Settings(min_p=0.1), 10) == 10
    assert needed_candidates(Settings(), 1000) == 1000
    assert needed_candidates(Settings(typical_p=0.5), 1000) == 1000


def test_too_few_candidates_are_noticed() -> None:
    flat = np.zeros(1000, np.float32)
    for settings in (
        Settings(),
        Settings(top_p=0.9),
        Settings(min_p=0.5),
        Settings(typical_p=0.9),
        Settings(top_k=500),
    ):
        assert choose(candidates(flat, 256), settings, 0, 0) is None
        assert choose(candidates(flat, 1000), settings, 0, 0) is not None
    assert choose(candidates(flat, 256), Settings(top_p=0.2), 0, 0) is not None
    assert choose(candidates(flat, 256), Settings(top_k=256, top_p=0.9), 0, 0) is not None
    steep = -np.arange(1000, dtype=np.float32)
    assert choose(candidates(steep, 256), Settings(min_p=0.001), 0, 0) is not None


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_k", 2**31),
        ("top_p", 5),
        ("min_p", -1),
        ("typical_p", 1.01),
        ("repeat_penalty", 0),
        ("repeat_last_n", -2),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("logit_bias", {-1: 0}),
        ("logit_bias", {1: 101}),
        ("logit_bias", {"1": 0}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ],
)
def test_values_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidRequest, match=rf"{name}.*(expected .* from|at most 1024)"):
        Sampling(**{name: value})


def test_values_at_the_limit_are_taken() -> None:
    Sampling(0, 2**31 - 1, 0, 1, 1, 10, -1, -2, 2, dict.fromkeys(range(1024), -100))
    Sampling(np.float32(0.5), np.int64(3))  # type: ignore[arg-type]


def test_none_means_the_default() -> None:
    defaults = default_sampling("gemma2", {})
    assert (defaults.temperature, defaults.top_k, defaults.top_p, defaults.min_p) == (1.0, 64, 0.95, 0.0)
    assert resolve(None, defaults) == defaults
    mine = resolve(Sampling(temperature=0, top_k=0, logit_bias={3: 1}), defaults)
    assert (mine.temperature, mine.top_k, mine.top_p, mine.logit_bias) == (0, 0, 0.95, {3: 1})
    assert isinstance(mine, Settings)


def test_a_file_has_the_first_word() -> None:
    llama = default_sampling("llama", {"temp": 0.6, "penalty_repeat": 1.1, "mirostat": 0})
    assert (llama.temperature, llama.top_k, llama.top_p, llama.min_p, llama.repeat_penalty) == (
        0.6,
        40,
        0.95,
        0.05,
        1.1,
    )
    assert default_sampling("gemma3", {"top_k": 10}).top_k == 10
    with pytest.raises(ModelFormatError, match=r"general\.sampling: top_p is 7"):
        default_sampling("llama", {"top_p": 7})


# Bias, penalties, log-probabilities


def test_adjust_equals_a_loop() -> None:
    rng = random.Random(4)
    for last_n in (-1, 0, 1, 5, 64):
        row = a_row(40)
        recent = [rng.randrange(40) for _ in range(20)]
        settings = Settings(
            repeat_penalty=1.3,
            repeat_last_n=last_n,
            presence_penalty=0.5,
            frequency_penalty=-0.25,
            logit_bias={3: 5, 39: -100},
        )
        expected = row.astype(np.float64)
        window = recent if last_n == -1 else recent[-last_n:] if last_n else []
        for id in range(40):
            expected[id] += {3: 5, 39: -100}.get(id, 0)
            if id in window:
                expected[id] = expected[id] / 1.3 if expected[id] > 0 else expected[id] * 1.3
                expected[id] -= 0.5 - 0.25 * window.count(id)
        got = adjust(row, settings, recent)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
        assert (a_row(40) == row).all(), "the row given is left as it was"


def test_logprobs_are_those_of_the_whole_row() -> None:
    row = a_row(100)
    p = np.exp(row.astype(np.float64)) / np.exp(row.astype(np.float64)).sum()
    for n in (0, 1, 5, 20, 100, 200):
        chosen, ids, values = logprobs(row, 13, n)
        assert chosen == pytest.approx(math.log(p[13]))
        assert ids.tolist() == sorted(range(100), key=lambda id: (-row[id], id))[:n]
        np.testing.assert_allclose(values, np.log(p[ids]), rtol=1e-5)


# Stop strings


def plain(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Text arrives character by character; the longest stop that it ends with ends it. Returns the text before, and the
    stop."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


def streamed(pieces: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher, out = StopStrings(stops), ""
    for piece in pieces:
        emitted, stopped = matcher.push(piece)
        out += emitted
        if stopped:
            return out, matcher.found
    return out + matcher.finish(), matcher.found


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        ("hello END more", ["END"]),
        ("aaabaaab", ["aab"]),
        ("abcabd!", ["abd", "bc"]),
        ("xabcdx", ["abcde", "bc"]),
        ("über🙂🙃z", ["🙂🙃", "ü!"]),
        ("\n\nUser:", ["\nUser", "\n\nU"]),
        ("no stop, EN", ["END"]),
        ("ababac", ["abac"]),
        ("anything", []),
    ],
)
def test_every_split_gives_the_same(text: str, stops: list[str]) -> None:
    expected = plain(text, stops)
    for cuts in range(2 ** (len(text) - 1)):
        bounds = [0, *(i + 1 for i in range(len(text) - 1) if cuts >> i & 1), len(text)]
        assert streamed([text[a:b] for a, b in itertools.pairwise(bounds)], stops) == expected


def test_random_stops_and_splits() -> None:
    rng = random.Random(5)
    for _ in range(3_000):
        text = "".join(rng.choice("abé") for _ in range(rng.randrange(20)))
        stops = ["".join(rng.choice("abé") for _ in range(rng.randrange(1, 6))) for _ in range(rng.randrange(5))]
        pieces, rest = [], text
        while rest:
            n = rng.randrange(5)
            pieces.append(rest[:n])
            rest = rest[n:]
        assert streamed(pieces, stops) == plain(text, stops), (pieces, stops)


def test_only_what_may_become_a_stop_is_held_back() -> None:
    matcher = StopStrings(["<stop>", "END"])
    assert matcher.push("text <") == ("text ", False)
    assert matcher.push("b> E") == ("<b> ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.finish() == "EN"
    assert matcher.finish() == ""


@pytest.mark.parametrize("stops", [[""], ["a"] * 17, ["é" * 129], [3]])
def test_stops_have_limits(stops: list[Any]) -> None:
    with pytest.raises(InvalidRequest, match="stop"):
        StopStrings(stops)


def test_stops_at_the_limit_are_taken() -> None:
    StopStrings(["é" * 128] * 16)
