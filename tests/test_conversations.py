"""A conversation with a real model, if it is here, through every client: all of them are told the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import anthropic
import ollama
import openai
import pytest

import gemmart
from gemmart.sources import resolve

MODEL = "smollm2-135m"
SYSTEM = "You are a helpful assistant who answers in one sentence."
ASKED = ("What is the capital of France?", "Which river flows through it?", "Say hello in German.")
N = 24

Turn = dict[str, str]
Say = Callable[[list[Turn]], str]


@pytest.fixture(scope="module")
def model() -> Iterator[gemmart.Model]:
    try:
        resolve(MODEL, offline=True)
    except gemmart.GemmartError as error:
        pytest.skip(f"{MODEL} is not here: {error}")
    with gemmart.load(MODEL, ctx=1024, parallel=2, offline=True) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemmart.Model) -> Iterator[str]:
    with model.serve() as running:
        yield running.url


def converse(say: Say) -> list[str]:
    """What it says to each question, knowing what was said before."""
    turns: list[Turn] = []
    for question in ASKED:
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": say(turns)})
    return [turn["content"] for turn in turns[1::2]]


@pytest.fixture(scope="module")
def expected(model: gemmart.Model) -> list[str]:
    system = [{"role": "system", "content": SYSTEM}]
    greedy = gemmart.Sampling(temperature=0)
    found = converse(lambda turns: model.chat([*system, *turns], greedy, max_tokens=N).text)
    assert "Paris" in found[0]
    return found


def test_chat_completions(url: str, expected: list[str]) -> None:
    def say(turns: list[Turn]) -> str:
        messages: Any = [{"role": "system", "content": SYSTEM}, *turns]
        stream = client.chat.completions.create(model="x", messages=messages, max_tokens=N, temperature=0, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        assert converse(say) == expected


def test_responses(url: str, expected: list[str]) -> None:
    options: dict[str, Any] = {"model": "x", "instructions": SYSTEM, "max_output_tokens": N, "temperature": 0}

    def whole(turns: list[Turn]) -> str:
        return client.responses.create(input=turns, **options).output_text

    def streamed(turns: list[Turn]) -> str:
        with client.responses.stream(input=turns, **options) as stream:
            return "".join(event.delta for event in stream if event.type == "response.output_text.delta")

    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        assert converse(whole) == expected
        assert converse(streamed) == expected


def test_anthropic(url: str, expected: list[str]) -> None:
    options: dict[str, Any] = {"model": "x", "system": SYSTEM, "max_tokens": N, "extra_body": {"temperature": 0}}

    def whole(turns: list[Turn]) -> str:
        return client.messages.create(messages=turns, **options).content[0].text

    def streamed(turns: list[Turn]) -> str:
        with client.messages.stream(messages=turns, **options) as stream:
            return stream.get_final_text()

    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        assert converse(whole) == expected
        assert converse(streamed) == expected


def test_ollama(url: str, expected: list[str]) -> None:
    system = {"role": "system", "content": SYSTEM}
    options = {"num_predict": N, "temperature": 0}

    def whole(turns: list[Turn]) -> str:
        return client.chat("x", [system, *turns], options=options).message.content or ""

    def streamed(turns: list[Turn]) -> str:
        parts = client.chat("x", [system, *turns], options=options, stream=True)
        return "".join(part.message.content or "" for part in parts)

    with ollama.Client(url) as client:
        assert converse(whole) == expected
        assert converse(streamed) == expected
        assert client.generate("x", ASKED[0], system=SYSTEM, options=options).response == expected[0]
