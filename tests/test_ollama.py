"""Ollama's endpoints, asked by its client and by plain HTTP: the answers are those of Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

import gemmart
from conftest import Tiny
from gemmart.server import limits
from program import without_template
from serving import CHAT, MINUTE

TALK, GENERATE = "/api/chat", "/api/generate"
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is the word"}]
DURATIONS = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def name(model: gemmart.Model) -> str:
    return f"{model.info.path.stem}:latest"


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[ollama.Client]:
    with ollama.Client(str(server.base_url), timeout=MINUTE) as client:
        yield client


def ask(server: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = server.post(path, json={"model": "any"} | fields | {"stream": False})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def lines(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    assert response.text.endswith("\n")
    return [json.loads(line) for line in response.text.splitlines()]


def refused(response: httpx.Response, status: int) -> str:
    """The message of an error, after a look at its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"].startswith("req_")
    (message,) = response.json().values()
    assert response.json() == {"error": message}
    return message


def check_counts(answer: dict[str, Any], expected: gemmart.Completion) -> None:
    assert answer["prompt_eval_count"] == expected.usage.prompt_tokens
    assert answer["eval_count"] == expected.usage.completion_tokens
    assert all(isinstance(answer[duration], int) for duration in DURATIONS)
    assert answer["total_duration"] >= answer["prompt_eval_duration"] + answer["eval_duration"] > 0
    age = datetime.now(UTC) - datetime.fromisoformat(answer["created_at"])
    assert 0 <= age.total_seconds() < 60


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_chats_are_those_of_python(seed: int, server: httpx.Client, model: gemmart.Model, name: str) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 30, "repeat_penalty": 1.1, "repeat_last_n": 20}
    expected = model.chat(MESSAGES, gemmart.Sampling(**sampling), seed=seed, max_tokens=20)
    body = {
        "model": "any",
        "messages": MESSAGES,
        "options": {"seed": seed, "num_predict": 20, **sampling},
        "keep_alive": "5m",
    }
    answer = ask(server, TALK, **body)
    assert answer["model"] == name
    assert answer["message"] == {"role": "assistant", "content": expected.text}
    assert (answer["done"], answer["done_reason"]) == (True, expected.finish_reason)
    check_counts(answer, expected)
    assert "context" not in answer
    *parts, last = lines(server.post(TALK, json=body))  # a stream, unless it is not wanted
    assert "".join(part["message"]["content"] for part in parts) == expected.text
    assert all(not part["done"] and part["model"] == name and part["created_at"] for part in parts)
    assert last["message"] == {"role": "assistant", "content": ""}
    assert (last["done"], last["done_reason"]) == (True, expected.finish_reason)
    check_counts(last, expected)
    asked = {"messages": MESSAGES, "seed": seed, "max_tokens": 20, **sampling}
    assert server.post(CHAT, json=asked).json()["choices"][0]["message"]["content"] == expected.text


def test_a_prompt_is_a_turn(server: httpx.Client, model: gemmart.Model) -> None:
    expected = model.chat(MESSAGES, seed=3, max_tokens=20)
    body = {
        "model": "any",
        "prompt": MESSAGES[1]["content"],
        "system": "be kind",
        "options": {"seed": 3, "num_predict": 20},
    }
    answer = ask(server, GENERATE, **body)
    assert answer["response"] == expected.text
    check_counts(answer, expected)
    *parts, last = lines(server.post(GENERATE, json=body))
    assert "".join(part["response"] for part in parts) == expected.text
    assert last["context"] == answer["context"] == [*model.chat_tokens(MESSAGES), *expected.tokens]


def test_a_raw_prompt(server: httpx.Client, model: gemmart.Model) -> None:
    for prompt in ("hello that", "<bos><start_of_turn>user\nhello<end_of_turn>\n"):
        ids = model.tokenize(prompt, bos=True, special=True)
        assert ids.count(model.tokenizer.bos or -1) == 1
        expected = model.generate(ids, seed=3, max_tokens=20)
        answer = ask(server, GENERATE, prompt=prompt, raw=True, options={"seed": 3, "num_predict": 20})
        assert answer["response"] == expected.text
        assert "context" not in answer
    assert "raw" in refused(
        server.post(GENERATE, json={"model": "any", "prompt": "x", "raw": True, "system": "y"}), 400
    )
    assert "raw" in refused(
        server.post(GENERATE, json={"model": "any", "prompt": "x", "raw": True, "context": [1]}), 400
    )


def test_a_context_is_gone_on_with(server: httpx.Client, model: gemmart.Model) -> None:
    options = {"temperature": 0, "num_predict": 9}
    first = ask(server, GENERATE, prompt="hello", options=options)
    second = ask(server, GENERATE, prompt="and that", context=first["context"], options=options)
    turn = model.chat_tokens([{"role": "user", "content": "and that"}])
    expected = model.generate([*first["context"], *turn[1:]], gemmart.Sampling(temperature=0), max_tokens=9)
    assert second["response"] == expected.text
    assert "512" in refused(server.post(GENERATE, json={"model": "any", "prompt": "x", "context": [512]}), 400)


def test_an_answer_that_is_begun(server: httpx.Client, model: gemmart.Model) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "it is the"}]
    body = {"messages": begun, "continue_final_message": True, "temperature": 0, "max_tokens": 8}
    expected = server.post(CHAT, json=body).json()["choices"][0]["message"]["content"]
    answer = ask(server, TALK, messages=begun, options={"temperature": 0, "num_predict": 8})
    assert answer["message"]["content"] == expected


def test_a_base_model(tiny: Tiny, tmp_path: Path) -> None:
    base = without_template(tiny("gemma2", "Q8_0"), tmp_path / "base.gguf")
    with gemmart.load(base, ctx=128, threads=1) as model, model.serve() as running:
        expected = model.generate("hello", seed=1, max_tokens=5).text
        body = {"model": "any", "prompt": "hello", "options": {"seed": 1, "num_predict": 5}, "stream": False}
        assert httpx.post(running.url + GENERATE, json=body).json()["response"] == expected
        assert "template" in refused(httpx.post(running.url + TALK, json={"model": "any", "messages": MESSAGES}), 400)


def test_how_many(server: httpx.Client, model: gemmart.Model) -> None:
    prompt = "!" * (model.ctx - 20 - len(model.tokenize("", bos=True)))
    for n, expected in ((3, 3), (-1, 20), (-2, 20), (0, 20), (100, 20)):
        answer = ask(server, GENERATE, prompt=prompt, raw=True, options={"seed": 2, "num_predict": n})
        assert (answer["eval_count"], answer["done_reason"]) == (expected, "length")
    assert ask(server, GENERATE, prompt="x", options={"num_predict": 1, "seed": -1, "num_ctx": 256, "num_gpu": 1})


def test_stops_and_logprobs(server: httpx.Client, model: gemmart.Model) -> None:
    whole = model.chat(MESSAGES, seed=1, max_tokens=20, logprobs=2)
    stop = whole.text[5:7]
    options = {"seed": 1, "num_predict": 20}
    for stops in (stop, ["never there", stop]):
        answer = ask(server, TALK, messages=MESSAGES, options=options | {"stop": stops})
        assert answer["message"]["content"] == whole.text[: whole.text.index(stop)]
        assert answer["done_reason"] == "stop"
    body = {"model": "any", "messages": MESSAGES, "options": options, "logprobs": True, "top_logprobs": 2}
    found = ask(server, TALK, **body)["logprobs"]
    assert [logprob["logprob"] for logprob in found] == [logprob.logprob for logprob in whole.logprobs or ()]
    assert all(len(logprob["top_logprobs"]) == 2 for logprob in found)
    parts = lines(server.post(TALK, json=body))
    assert [logprob for part in parts for logprob in part.get("logprobs", ())] == found


def test_formats(server: httpx.Client, model: gemmart.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"word": {"enum": ["a", "b"]}},
        "required": ["word"],
        "additionalProperties": False,
    }
    for given, format in (("json", gemmart.Format.json()), (schema, gemmart.Format.schema(schema))):
        expected = model.chat(MESSAGES, seed=1, max_tokens=60, format=format)
        answer = ask(server, TALK, messages=MESSAGES, format=given, options={"seed": 1, "num_predict": 60})
        assert answer["message"]["content"] == expected.text
    assert json.loads(expected.text)["word"] in "ab"


@pytest.mark.parametrize("fields", [{}, {"messages": []}, {"messages": None, "keep_alive": 0}, {"prompt": ""}])
def test_only_to_load(fields: dict[str, Any], server: httpx.Client, name: str) -> None:
    response = server.post(GENERATE if "prompt" in fields else TALK, json=fields | {"model": name})
    answer = response.json()
    assert (answer["model"], answer["done"], answer["done_reason"]) == (name, True, "load")


@pytest.mark.parametrize(
    ("path", "fields", "place"),
    [
        (TALK, {"model": None}, "model"),
        (TALK, {"options": {"temperature": 3}}, "temperature"),
        (TALK, {"options": {"top_k": -1}}, "top_k"),
        (TALK, {"options": {"seed": "x"}}, "options.seed"),
        (TALK, {"options": {"num_ctx": 257}}, "options.num_ctx"),
        (TALK, {"options": {"mirostat": 1}}, "options.mirostat"),
        (TALK, {"options": {"tfs_z": 0.5}}, "options.tfs_z"),
        (TALK, {"options": {"stop": [""]}}, "stop[0]"),
        (TALK, {"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "messages[0].images"),
        (TALK, {"messages": [{"role": "x", "content": "x"}]}, "messages[0].role"),
        (TALK, {"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        (TALK, {"messages": "x"}, "messages"),
        (TALK, {"stream": 1}, "stream"),
        (TALK, {"think": True}, "does not support thinking"),
        (TALK, {"think": "high"}, "does not support thinking"),
        (TALK, {"format": "yaml"}, "format"),
        (TALK, {"format": {"type": "nothing"}}, "format"),
        (TALK, {"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        (GENERATE, {"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        (TALK, {"top_logprobs": 2}, "top_logprobs"),
        (GENERATE, {"suffix": "x"}, "suffix"),
        (GENERATE, {"template": "{{ .Prompt }}"}, "template"),
        (GENERATE, {"images": ["aGk="]}, "images"),
        (GENERATE, {"prompt": 1}, "prompt"),
    ],
)
def test_wrong_places(path: str, fields: dict[str, Any], place: str, server: httpx.Client) -> None:
    body = {"model": "any", **({"messages": MESSAGES} if path == TALK else {"prompt": "x"})} | fields
    assert place in refused(server.post(path, json=body), 400)


def test_what_changes_nothing(server: httpx.Client) -> None:
    for body in ({"think": False}, {"format": ""}, {"format": None}, {"tools": []}, {"options": {"mirostat": 0}}):
        assert (
            server.post(
                TALK, json={"model": "any", "messages": MESSAGES, "options": {"num_predict": 1}} | body
            ).status_code
            == 200
        )


def test_errors(model: gemmart.Model, server: httpx.Client) -> None:
    for path in ("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/nothing"):
        assert "one model" in refused(server.post(path, json={"model": "x"}), 404)
    refused(server.get(TALK), 405)
    refused(server.post(TALK, content=b"{", headers={"content-type": "application/json"}), 400)
    refused(server.post(TALK, content=b"{}"), 415)
    body = b" " * (limits.BODY_BYTES + 1)
    refused(server.post(TALK, content=body, headers={"content-type": "application/json"}), 413)
    refused(server.post(TALK, json={}, headers={"origin": "http://evil.example"}), 403)
    long = {"model": "any", "messages": [{"role": "user", "content": "hello " * 300}]}
    assert "maximum context length is 256 tokens" in refused(server.post(TALK, json=long), 400)
    with model.serve(api_keys=["k"], strict_model=True, model_id="gemma2:2b", aliases=["word"]) as running:
        refused(httpx.get(running.url + "/api/tags"), 401)
        key = {"Authorization": "Bearer k"}
        for name in ("gemma2:2b", "word", "word:latest", ""):
            body = {"model": name, "prompt": "x", "options": {"num_predict": 1}, "stream": False}
            response = httpx.post(running.url + GENERATE, json=body, headers=key)
            assert response.json()["model"] == "gemma2:2b"
        refused(httpx.post(running.url + GENERATE, json={"model": "other", "prompt": "x"}, headers=key), 404)


def test_the_model(server: httpx.Client, model: gemmart.Model, name: str) -> None:
    (found,) = server.get("/api/tags").json()["models"]
    details = {
        "parent_model": "",
        "format": "gguf",
        "family": "gemma2",
        "families": ["gemma2"],
        "parameter_size": f"{model.info.n_parameters / 1000:.0f}K",
        "quantization_level": "Q8_0",
    }
    assert found == {
        "name": name,
        "model": name,
        "size": model.info.file_bytes,
        "digest": found["digest"],
        "details": details,
        "modified_at": found["modified_at"],
    }
    assert len(bytes.fromhex(found["digest"])) == 32
    assert datetime.fromisoformat(found["modified_at"]).timestamp() == pytest.approx(model.info.path.stat().st_mtime)
    (running,) = server.get("/api/ps").json()["models"]
    assert (running["name"], running["digest"], running["context_length"]) == (name, found["digest"], 256)
    for asked in (name, name.removesuffix(":latest")):
        shown = server.post("/api/show", json={"model": asked}).json()
        assert shown["details"] == details
        assert shown["template"] == model.info.chat_template
        assert shown["model_info"]["general.architecture"] == "gemma2"
        assert shown["model_info"]["gemma2.context_length"] == 512
        assert shown["license"] == "apache-2.0"
        assert shown["capabilities"] == ["completion", "tools"]
    refused(server.post("/api/show", json={"model": "other"}), 404)
    assert server.get("/api/version").json()["gemmart"] == gemmart.__version__


def test_an_error_in_a_stream(model: gemmart.Model) -> None:
    with model.serve(request_timeout=0.0) as running:
        (line,) = lines(httpx.post(running.url + TALK, json={"model": "any", "messages": MESSAGES}))
        assert "was not finished" in line["error"]
        with (
            ollama.Client(running.url) as client,
            pytest.raises(ollama.ResponseError, match="was not finished"),
        ):
            list(client.chat("x", MESSAGES, stream=True))


# The client


def test_client(client: ollama.Client, model: gemmart.Model, name: str) -> None:
    options = {"seed": 9, "num_predict": 15}
    expected = model.chat(MESSAGES, seed=9, max_tokens=15)
    answer = client.chat(name, MESSAGES, options=options)
    assert answer.message.content == expected.text
    assert answer.eval_count == expected.usage.completion_tokens
    parts = list(client.chat(name, MESSAGES, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == expected.text
    assert parts[-1].done_reason == expected.finish_reason
    plain = client.generate(name, MESSAGES[1]["content"], system="be kind", options=options)
    assert plain.response == expected.text
    assert client.generate(name).done_reason == "load"
    (listed,) = client.list().models
    assert (listed.model, listed.size) == (name, model.info.file_bytes)
    (running,) = client.ps().models
    assert running.context_length == model.ctx
    assert (client.show(name).modelinfo or {})["general.architecture"] == "gemma2"
    with pytest.raises(ollama.ResponseError) as raised:
        client.show("other")
    assert raised.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="temperature"):
        client.chat(name, MESSAGES, options={"temperature": 3})
    with pytest.raises(ollama.ResponseError, match="one model"):
        client.pull("gemma2")
