"""What holds in every protocol alike: the same seed gives the same text, streams cut no character, and who leaves frees
their place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

import gemmart
from conftest import Tiny
from gemmart.server.generation import json_line
from serving import MINUTE, send, wait_until
from tiny import write_tiny

Json = dict[str, Any]


@dataclass(frozen=True)
class Protocol:
    path: str
    body: Callable[[str, int, Json], Json]  # of a question, at most so many tokens, and sampling
    whole: Callable[[Json], str]  # the text of an answer
    part: Callable[[Json], str]  # and of an event or a line of a stream


def turns(text: str) -> list[Json]:
    return [{"role": "user", "content": text}]


PROTOCOLS = [
    Protocol(
        "/v1/chat/completions",
        lambda text, n, sampling: {"messages": turns(text), "max_tokens": n, **sampling},
        lambda answer: answer["choices"][0]["message"]["content"],
        lambda event: event["choices"][0]["delta"].get("content", ""),
    ),
    Protocol(
        "/v1/responses",
        lambda text, n, sampling: {"input": text, "max_output_tokens": n, **sampling},
        lambda answer: answer["output"][0]["content"][0]["text"],
        lambda event: event.get("delta", ""),
    ),
    Protocol(
        "/v1/messages",
        lambda text, n, sampling: {"messages": turns(text), "max_tokens": n, **sampling},
        lambda answer: answer["content"][0]["text"],
        lambda event: event.get("delta", {}).get("text", ""),
    ),
    Protocol(
        "/api/chat",
        lambda text, n, sampling: {"model": "any", "messages": turns(text), "options": {"num_predict": n, **sampling}},
        lambda answer: answer["message"]["content"],
        lambda line: line["message"]["content"],
    ),
    Protocol(
        "/api/generate",
        lambda text, n, sampling: {"model": "any", "prompt": text, "options": {"num_predict": n, **sampling}},
        lambda answer: answer["response"],
        lambda line: line["response"],
    ),
]
every_protocol = pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda protocol: protocol.path)


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[gemmart.Model]:
    """Whose answers do not end within a test."""
    file: Path = write_tiny(tmp_path_factory.mktemp("long") / "long.gguf", "gemma2", "Q8_0", n_ctx=65536)
    with gemmart.load(file, threads=1, lookup=False) as model:
        yield model


def streamed(server: httpx.Client, protocol: Protocol, body: Json) -> str:
    text = ""
    for line in server.post(protocol.path, json=body | {"stream": True}).text.split("\n"):
        data = line.removeprefix("data: ")
        if data.startswith("{"):
            text += protocol.part(json.loads(data))
    return text


@every_protocol
def test_the_same_seed_gives_the_same_text(protocol: Protocol, server: httpx.Client, model: gemmart.Model) -> None:
    for seed, temperature in ((0, 0.0), (1, 0.7), (2**64 - 1, 2.0)):
        body = protocol.body("what is the word", 30, {"seed": seed, "temperature": temperature})
        expected = model.chat(
            turns("what is the word"), gemmart.Sampling(temperature=temperature), seed=seed, max_tokens=30
        )
        assert protocol.whole(server.post(protocol.path, json=body | {"stream": False}).json()) == expected.text
        assert streamed(server, protocol, body) == expected.text


WIDE = {"temperature": 2.0, "top_k": 0, "top_p": 1.0}
QUESTION = "é 🙂 \u2028 \ufdd0"


@pytest.fixture(scope="module")
def wide_texts(model: gemmart.Model) -> dict[int, str]:
    """By seed: half of the vocabulary is single bytes, some of which make characters together, if one waits for it."""
    found = {}
    for seed in range(300):
        text = model.chat(turns(QUESTION), gemmart.Sampling(**WIDE), seed=seed, max_tokens=60).text
        if any(ord(character) >= 0x80 and character != "\ufffd" for character in text):
            found[seed] = text
        if len(found) == 4:
            break
    assert found
    return found


@every_protocol
def test_characters_are_never_cut(protocol: Protocol, server: httpx.Client, wide_texts: dict[int, str]) -> None:
    for seed, text in wide_texts.items():
        body = protocol.body(QUESTION, 60, {"seed": seed, **WIDE})
        assert protocol.whole(server.post(protocol.path, json=body | {"stream": False}).json()) == text
        assert streamed(server, protocol, body) == text


def test_only_ends_of_lines_end_lines() -> None:
    """Some readers split at these too."""
    value = {"text": "a\x85b\u2028c\u2029d\r\ne\x0b\x0c\x1c"}
    line = json_line(value).decode()
    assert line.splitlines() == [line]
    assert json.loads(line) == value


@pytest.mark.parametrize("stream", [False, True])
@every_protocol
def test_who_leaves_frees_their_place(protocol: Protocol, stream: bool, long_model: gemmart.Model) -> None:
    with long_model.serve(drain=0) as running:
        for seed in range(3):  # some of them may soon come to an end by themselves
            body = protocol.body("what is it", 60_000, {"seed": seed, "temperature": 2.0}) | {"stream": stream}
            with send(running.url, body, protocol.path) as client:
                wait_until(lambda: long_model.n_requests == (1, 0))
                if stream:
                    assert client.recv(1000)
            wait_until(lambda: long_model.n_requests == (0, 0), 5)
