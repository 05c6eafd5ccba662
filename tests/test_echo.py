"""Log-probabilities of prompts: those of the model's own distribution, computed beside whatever else."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest

import gemmart
from conftest import Tiny
from serving import TEXT, events

GREEDY = gemmart.Sampling(temperature=0)
PROMPT = "the word is <b>é</b> and it was not"


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=3, batch=32, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=60) as client:
        yield client


def ask(server: httpx.Client, **body: Any) -> dict[str, Any]:
    response = server.post(TEXT, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


# The model


@pytest.mark.parametrize("n", [1, 2, 32, 33, 150])
def test_they_are_those_of_the_logits(n: int, model: gemmart.Model) -> None:
    ids = np.random.default_rng(n).integers(7, 512, n).tolist()
    expected = log_softmax(model.logits(ids))
    plain = model.generate(ids, max_tokens=9, seed=3)
    for max_tokens in (0, 9):
        found = model.generate(ids, max_tokens=max_tokens, seed=3, prompt_logprobs=4)
        assert found.prompt_logprobs is not None
        assert [entry.token for entry in found.prompt_logprobs] == ids[1:]
        for entry, token, row in zip(found.prompt_logprobs, ids[1:], expected, strict=False):
            assert entry.logprob == pytest.approx(row[token], abs=1e-9)
            assert [id for id, _ in entry.top] == np.argsort(-row, kind="stable")[:4].tolist()
            assert entry.piece == model.tokenizer.piece(token)
        assert found.tokens == plain.tokens[:max_tokens]
        assert found.usage.cached_tokens == 0
    assert plain.prompt_logprobs is None


def test_in_company(model: gemmart.Model, rng: np.random.Generator) -> None:
    prompts = [rng.integers(7, 512, n).tolist() for n in rng.integers(1, 120, 12)]
    alone = [model.generate(prompt, GREEDY, max_tokens=5, prompt_logprobs=2) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        others = [pool.submit(model.generate, prompt, max_tokens=30) for prompt in prompts]
        calls = [pool.submit(model.generate, prompt, GREEDY, max_tokens=5, prompt_logprobs=2) for prompt in prompts]
        for call, expected in zip(calls, alone, strict=True):
            found = call.result(60)
            assert (found.tokens, found.prompt_logprobs) == (expected.tokens, expected.prompt_logprobs)
        for other in others:
            other.result(60)


def test_what_it_computes_is_a_prefix_for_others(model: gemmart.Model) -> None:
    ids = list(range(100, 200))
    model.generate(ids, max_tokens=1, prompt_logprobs=0)
    assert model.generate(ids, max_tokens=1).usage.cached_tokens == 96


def test_values_out_of_range(model: gemmart.Model) -> None:
    for n in (-1, 21, True):
        with pytest.raises(gemmart.InvalidRequest, match="prompt_logprobs"):
            model.generate("it", prompt_logprobs=n)


# The server


@pytest.mark.parametrize("form", ["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1, 8])
def test_echo_with_logprobs(form: str, max_tokens: int, server: httpx.Client, model: gemmart.Model) -> None:
    ids = model.tokenize(PROMPT, bos=True)
    prompt = PROMPT if form == "text" else ids
    answer = ask(server, prompt=prompt, echo=True, logprobs=3, max_tokens=max_tokens, seed=1, ignore_eos=True)
    plain = model.generate(ids, max_tokens=max_tokens, seed=1, ignore_eos=True, logprobs=3, prompt_logprobs=3)
    (choice,) = answer["choices"]
    shown = PROMPT if form == "text" else "<bos>" + PROMPT
    assert choice["text"] == shown + plain.text
    found = choice["logprobs"]
    assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
    entries = [*(plain.prompt_logprobs or ()), *(plain.logprobs or ())]
    assert found["token_logprobs"][1:] == [entry.logprob for entry in entries]
    assert [max(top.values()) for top in found["top_logprobs"][1:]] == [entry.top[0][1] for entry in entries]
    assert found["tokens"] == [model.tokenizer.piece(id).decode(errors="replace") for id in [*ids, *plain.tokens]]
    assert len(found["text_offset"]) == len(ids) + max_tokens
    for token, offset in list(zip(found["tokens"], found["text_offset"], strict=True))[form == "text" :]:
        if "\N{REPLACEMENT CHARACTER}" not in token:
            assert choice["text"][offset:].startswith(token)
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (len(ids), max_tokens)


def test_streams_of_several(server: httpx.Client) -> None:
    """In a stream the prompt comes first, with its log-probabilities."""
    body = {"prompt": [PROMPT, "it was"], "n": 2, "echo": True, "logprobs": 1, "max_tokens": 4, "seed": 1}
    whole = ask(server, **body)["choices"]
    *chunks, last = events(server.post(TEXT, json=body | {"stream": True}))
    assert last == "[DONE]"
    for index, choice in enumerate(whole):
        parts = [found for chunk in chunks for found in chunk["choices"] if found["index"] == index]
        assert parts[0]["text"] == (PROMPT if index < 2 else "it was")
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for part in parts if part["logprobs"] for value in part["logprobs"][name]] == values
        assert choice["logprobs"]["token_logprobs"].count(None) == 1


@pytest.mark.parametrize("ends", [False, True])
def test_scoring_a_continuation(ends: bool, server: httpx.Client, model: gemmart.Model) -> None:
    """As evaluation harnesses do: ids, one token is generated and cut off, whatever it is, an end too."""
    context, continuation = [2, 100, 101, 102], [103, 104]
    bias = {"1": 100} if ends else {"1": -100}
    body = {"prompt": [context + continuation], "max_tokens": 1, "temperature": 0, "logit_bias": bias}
    (choice,) = ask(server, echo=True, logprobs=1, **body)["choices"]
    found = choice["logprobs"]["token_logprobs"][len(context) : -1]
    rows = log_softmax(model.logits(context + continuation))
    assert found == pytest.approx([rows[3, 103], rows[4, 104]], abs=1e-9)
    assert (choice["finish_reason"] == "stop") == ends
    assert (choice["logprobs"]["tokens"][-1] == "<eos>") == ends


def test_stop_strings_concern_the_answer_alone(server: httpx.Client, model: gemmart.Model) -> None:
    body = {"prompt": PROMPT, "echo": True, "logprobs": 0, "max_tokens": 20, "seed": 1, "ignore_eos": True}
    whole = ask(server, **body)["choices"][0]
    answer = whole["text"].removeprefix(PROMPT)
    stop = answer[3:5]
    cut = ask(server, **body, stop=["word", stop])["choices"][0]
    assert cut["text"] == PROMPT + answer[: answer.index(stop)]
    n = len(cut["logprobs"]["tokens"])
    assert cut["logprobs"]["token_logprobs"] == whole["logprobs"]["token_logprobs"][:n]
    assert all(offset <= len(cut["text"]) for offset in cut["logprobs"]["text_offset"])
