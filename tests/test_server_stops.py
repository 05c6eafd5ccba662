"""Stop strings and characters of several bytes, over HTTP, in answers whose text is known and whose tokens are any that
spell it: what is sent ends exactly before the stop, streamed or not, and is good UTF-8 in every event."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

import gemmart
from conftest import Tiny
from serving import CHAT, MINUTE, events, question

# (text, which is its own regular expression, stops, what is sent)
STOPS = [
    ("hello that was the word", ["that"], "hello "),
    ("hello that was the word", [" the word"], "hello that was"),
    ("hello that", ["h"], ""),  # the first character
    ("hello that", ["hello"], ""),  # the first token
    ("hello that", ["hello that"], ""),
    ("hello that", ["t"], "hello "),
    ("hello that", ["at"], "hello th"),  # the end
    ("hello that", ["that was"], "hello that"),  # never complete
    ("hello that", ["thaw", "that"], "hello "),
    ("ababac", ["abac"], "ab"),  # begins again inside itself
    ("aaaab", ["aab"], "aa"),
    ("abcabd", ["abd", "bca"], "a"),  # two that overlap: the one that is complete first
    ("abcd", ["bcd", "bc"], "a"),
    ("abcd", ["cd", "bcd"], "a"),  # complete together: the longer one
    ("one\n\ntwo", ["\n\n"], "one"),
    ("one\n\ntwo", ["\ntwo"], "one\n"),
    ("naïve café", ["é"], "naïve caf"),  # a character of several tokens
    ("日本語の文", ["語"], "日本"),
    ("日本語の文", ["語の"], "日本"),
    ("日本語の文", ["本誌", "の"], "日本語"),  # begins as the text does, in its bytes too
    ("go 🦙🦜 on", ["🦜"], "go 🦙"),  # differs from what comes before it in its last byte alone
    ("e\u0301e\u0300", ["\u0300"], "e\u0301e"),
    ("ÃÃ©é", ["é"], "ÃÃ©"),
]
ALPHABET = "aé ß\n日本語🦙🦜\u0301ÃЖ\u200d𝔘"


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=128, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


def both(server: httpx.Client, body: dict[str, Any]) -> tuple[str, str, int]:
    """The text of an answer and why it ended, whole and streamed alike, and how many tokens it took."""
    whole = server.post(CHAT, json=body).json()
    choice = whole["choices"][0]
    response = server.post(CHAT, json=body | {"stream": True})
    response.content.decode()
    *chunks, _ = [chunk["choices"][0] for chunk in events(response)[:-1]]
    texts = [chunk["delta"].get("content", "") for chunk in chunks]
    assert "".join(texts) == choice["message"]["content"]
    return choice["message"]["content"], choice["finish_reason"], whole["usage"]["completion_tokens"]


@pytest.mark.parametrize(("text", "stops", "sent"), STOPS)
def test_ends_before_the_stop(text: str, stops: list[str], sent: str, server: httpx.Client) -> None:
    counts = set()
    for seed in range(10):
        found, reason, n_tokens = both(
            server, question(regex=text, seed=seed, temperature=2, top_k=0, top_p=1, stop=stops)
        )
        assert (found, reason) == (sent, "stop")
        counts.add(n_tokens)
    assert len(counts) > 1 or len(text) < 12  # the stop lay differently over the tokens


@pytest.mark.parametrize("seed", range(100))
def test_characters_token_by_token(seed: int, server: httpx.Client) -> None:
    text = "".join(random.Random(seed).choices(ALPHABET, k=12))
    stops = [text[-n:] + "!" for n in range(1, 5)]  # they begin as the text ends, and never come
    found, reason, _ = both(server, question(regex=text, seed=seed, temperature=1, stop=stops))
    assert (found, reason) == (text, "stop")
