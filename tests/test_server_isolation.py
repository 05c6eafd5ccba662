"""What one request says, and what goes wrong in it, is its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

import gemmart
from conftest import Tiny
from edit import edit
from serving import CHAT, TEXT, error_of, events, question, wait_until

BROKEN = 9
"""A token whose embedding is no number."""


@pytest.fixture(scope="module")
def model(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Iterator[gemmart.Model]:
    sound = tiny("llama", tied=False)
    (tensor,) = (tensor for tensor in GGUFReader(sound).tensors if tensor.name == "token_embd.weight")
    embedding = np.array(dequantize(tensor.data, tensor.tensor_type))
    embedding[BROKEN] = np.nan
    path = tmp_path_factory.mktemp("broken") / "m.gguf"
    with gemmart.load(edit(sound, path, tensors={"token_embd.weight": embedding}), ctx=256, parallel=4) as model:
        yield model


@pytest.fixture(scope="module")
def url(model: gemmart.Model) -> Iterator[str]:
    with model.serve(queue=200) as running:
        yield running.url


# Faults


def test_a_fault_in_one_leaves_the_others_as_they_are(model: gemmart.Model, url: str) -> None:
    """Seven that are sound beside as many that are not, streamed and whole, as prompts, chats and embeddings."""
    good = [{"prompt": [100 + i, 101, 102 + i] * (5 + i), "seed": i, "max_tokens": 30} for i in range(7)]
    bad = [{"prompt": [100, BROKEN, 102] * 5, "stream": i % 2 == 0} for i in range(7)]

    def answer(body: dict[str, Any]) -> httpx.Response:
        return httpx.post(url + TEXT, json=body, timeout=60)

    expected = [answer(body).json()["choices"] for body in good]
    vector = httpx.post(url + "/v1/embeddings", json={"input": [100, 101]}).json()["data"]
    with ThreadPoolExecutor(16) as pool:
        for _ in range(3):
            broken = [pool.submit(answer, body) for body in bad]
            broken_vector = pool.submit(httpx.post, url + "/v1/embeddings", json={"input": [[100], [100, BROKEN]]})
            sound = [pool.submit(answer, body) for body in good]
            sound_vector = pool.submit(httpx.post, url + "/v1/embeddings", json={"input": [100, 101]})
            assert [found.result(60).json()["choices"] for found in sound] == expected
            assert sound_vector.result(60).json()["data"] == vector
            for body, found in zip(bad, broken, strict=True):
                response = found.result(60)
                if body["stream"]:
                    assert events(response)[-1]["error"]["code"] == "numeric_error"
                else:
                    assert error_of(response, 500, "numeric_error")["type"] == "server_error"
                    assert response.headers["x-should-retry"] == "false"
            error_of(broken_vector.result(60), 500, "numeric_error")
    wait_until(lambda: model.n_requests == (0, 0))
    assert model.kv_pages.held == 0


# Secrets


def test_what_is_said_stays_between_the_two(
    model: gemmart.Model, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Each client has a key and a word of its own: in system prompts, questions, names of fields and of models, in
    requests that are wrong. Nobody else sees it: in answers, errors, counters, states, the log."""
    keys = [f"key-{i:04d}-canary" for i in range(8)]
    words = [f"zq{i}xj{i * 7919 % 997}canary" for i in range(8)]

    def talk(i: int, url: str) -> list[tuple[int, str]]:
        """(who may see it, what came)"""
        found = []
        word = words[i]
        bodies = [
            (CHAT, {"messages": [{"role": "system", "content": word}, *question(word)["messages"]], "max_tokens": 9}),
            (CHAT, question(word, max_tokens=9, stream=True, user=word, metadata={word: word}, **{word: 1})),
            (TEXT, {"prompt": word, "echo": True, "logprobs": 1, "max_tokens": 3}),
            (TEXT, {"prompt": word, "stop": word, "temperature": word}),
            (CHAT, {"messages": [{"role": word, "content": word}]}),
            (CHAT, question(word, model=word)),
            (CHAT, question(word * 300)),
            ("/v1/embeddings", {"input": [word, [BROKEN]]}),
            ("/" + word, {}),
            ("/tokenize", {"content": word}),
        ]
        with httpx.Client(base_url=url, headers={"X-Api-Key": keys[i]}, timeout=60) as client:
            for path, body in bodies * 3:
                response = client.post(path, json=body)
                found.append((i, f"{response.text} {response.headers}"))
                for status in ("/metrics", "/slots", "/props", "/v1/models", "/health", "/openapi.json"):
                    found.append((-1, client.get(status).text))
        return found

    with caplog.at_level(logging.DEBUG), model.serve(api_keys=keys, strict_model=True) as running:
        with ThreadPoolExecutor(8) as pool:
            seen = [found for talk in pool.map(talk, range(8), [running.url] * 8) for found in talk]
        seen.append((-1, httpx.get(running.url + "/props").text))
    logged = [record.getMessage() for record in caplog.records if record.name.startswith("gemmart")]
    assert len(logged) > 100
    captured = capfd.readouterr()
    # The path and the names of fields that were not known are logged, as they were sent; nothing else of a request is.
    seen += [
        (-1, line) for line in (*logged, captured.out, captured.err) if " /zq" not in line and "ignored" not in line
    ]
    assert any(words[0] in text for who, text in seen if who == 0)
    for i in range(8):
        for who, text in seen:
            assert keys[i] not in text
            assert who == i or words[i] not in text


def test_computed_prefixes_are_not_shared_between_keys(model: gemmart.Model) -> None:
    """Neither by answers nor through what scoring and embedding compute."""
    prompt = [200 + i % 50 for i in range(100)]
    with model.serve(api_keys=["one", "two", "three"]) as running:

        def ask(key: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
            answer = httpx.post(running.url + path, json=body, headers={"X-Api-Key": key}, timeout=60)
            assert answer.status_code == 200
            return answer.json()

        ask("one", TEXT, {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0})
        ask("two", "/v1/embeddings", {"input": prompt})
        for key, n_cached in (("three", 0), ("one", 96), ("two", 96)):
            usage = ask(key, TEXT, {"prompt": prompt, "max_tokens": 1})["usage"]
            assert usage["prompt_tokens_details"]["cached_tokens"] == n_cached


# States


def test_slots(model: gemmart.Model, url: str) -> None:
    body = {"prompt": "the secret word", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=60) as client:
        assert client.get("/slots").json() == []
        with httpx.stream("POST", url + TEXT, json=body, timeout=60) as response:
            lines = response.iter_lines()
            for _ in range(5):
                next(lines)
            (slot,) = client.get("/slots").json()
            text = client.get("/slots").text
        wait_until(lambda: client.get("/slots").json() == [])
    assert slot["state"] == "generating"
    assert slot["n_prompt"] == len(model.tokenize("the secret word", bos=True))
    assert slot["n_past"] - slot["n_prompt"] <= slot["n_decoded"] <= 200
    assert slot["n_decoded"] >= 1
    assert "secret" not in text
