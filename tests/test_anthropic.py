"""Anthropic's endpoints, asked by its client and by plain HTTP: the answers are those of Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest

import gemmart
from conftest import Tiny
from gemmart.server import limits
from serving import CHAT, MINUTE, error_of

MESSAGES = "/v1/messages"
CHAT_MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is the word"}]
ASKED: dict[str, Any] = {"system": "be kind", "messages": CHAT_MESSAGES[1:], "max_tokens": 20}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[anthropic.Anthropic]:
    url = str(server.base_url)
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=MINUTE) as client:
        yield client


def ask(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = server.post(MESSAGES, json=ASKED | fields)
    assert response.status_code == 200, response.text
    assert response.headers["request-id"] == response.headers["x-request-id"]
    return response.json()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Those of a stream; each is named as its type."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def streamed(server: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    return events(server.post(MESSAGES, json=ASKED | fields | {"stream": True}))


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")


def refused(response: httpx.Response, status: int, kind: str) -> str:
    """The message of an error, after a look at its shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert body.keys() == {"type", "error", "request_id"}
    assert body["type"] == "error"
    assert body["error"].keys() == {"type", "message"}
    assert body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"]
    return body["error"]["message"]


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_the_answer_is_that_of_python(seed: int, server: httpx.Client, model: gemmart.Model) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 30}
    expected = model.chat(CHAT_MESSAGES, gemmart.Sampling(**sampling), seed=seed, max_tokens=20)
    answer = ask(server, seed=seed, metadata={"user_id": "u"}, service_tier="auto", **sampling)
    usage = answer.pop("usage")
    assert answer.pop("id").startswith("msg_")
    assert answer == {
        "type": "message",
        "role": "assistant",
        "model": model.info.path.stem,
        "content": [{"type": "text", "text": expected.text}],
        "stop_reason": {"stop": "end_turn", "length": "max_tokens"}[expected.finish_reason],
        "stop_sequence": None,
    }
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected.usage.prompt_tokens
    assert usage["output_tokens"] == expected.usage.completion_tokens
    body = {"messages": CHAT_MESSAGES, "seed": seed, "max_tokens": 20, **sampling}
    assert server.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == expected.text
    assert text_of(streamed(server, seed=seed, **sampling)) == expected.text


def test_contents_of_blocks(server: httpx.Client, model: gemmart.Model) -> None:
    blocks = [{"type": "text", "text": "what "}, {"type": "text", "text": "is it", "cache_control": {"type": "x"}}]
    answer = ask(server, system=blocks, messages=[{"role": "user", "content": blocks}], temperature=0)
    messages = [{"role": "system", "content": "what \n\nis it"}, {"role": "user", "content": "what is it"}]
    expected = model.chat(messages, gemmart.Sampling(temperature=0), max_tokens=20)
    assert answer["content"][0]["text"] == expected.text


def test_an_answer_that_is_begun(server: httpx.Client, model: gemmart.Model) -> None:
    begun = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "it is the"}]
    body = {"messages": begun, "continue_final_message": True, "temperature": 0, "max_tokens": 8}
    expected = server.post(CHAT, json=body).json()
    answer = ask(server, system="", messages=begun, temperature=0, max_tokens=8)
    assert answer["content"][0]["text"] == expected["choices"][0]["message"]["content"]
    nothing = [begun[0], {"role": "assistant", "content": ""}]
    assert (
        ask(server, messages=nothing, temperature=0)["content"]
        == ask(server, messages=begun[:1], temperature=0)["content"]
    )


def test_why_it_stops(server: httpx.Client, model: gemmart.Model) -> None:
    whole = model.chat(CHAT_MESSAGES, seed=1, max_tokens=20).text
    stop = whole[5:7]
    text = whole[: whole.index(stop)]
    answer = ask(server, seed=1, stop_sequences=["never there", stop])
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    assert answer["content"] == [{"type": "text", "text": text}]
    found = streamed(server, seed=1, stop_sequences=["never there", stop])
    assert text_of(found) == text
    assert found[-2]["delta"] == {"stop_reason": "stop_sequence", "stop_sequence": stop}
    assert ask(server, seed=1, max_tokens=3)["stop_reason"] == "max_tokens"
    n_left = 3
    n_fixed = len(model.chat_tokens([{"role": "user", "content": ""}]))
    full = [{"role": "user", "content": "!" * (model.ctx - n_left - n_fixed)}]
    answer = ask(server, system="", messages=full, seed=1)
    assert answer["usage"]["output_tokens"] == n_left
    assert answer["stop_reason"] == "model_context_window_exceeded"


def test_stream(server: httpx.Client, model: gemmart.Model) -> None:
    expected = model.chat(CHAT_MESSAGES, seed=2, max_tokens=20)
    found = streamed(server, seed=2)
    n = len(found)
    kinds = [event["type"] for event in found]
    assert kinds[:3] == ["message_start", "content_block_start", "ping"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds[3:-3] == ["content_block_delta"] * (n - 6)
    message = found[0]["message"]
    assert message.pop("id").startswith("msg_")
    assert message == {
        "type": "message",
        "role": "assistant",
        "model": model.info.path.stem,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {
            "input_tokens": expected.usage.prompt_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 0,
        },
    }
    assert found[1] == {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}
    usage = found[-2]["usage"]
    assert usage["output_tokens"] == expected.usage.completion_tokens
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == expected.usage.prompt_tokens


def test_format(server: httpx.Client, model: gemmart.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"word": {"enum": ["a", "b"]}},
        "required": ["word"],
        "additionalProperties": False,
    }
    expected = model.chat(CHAT_MESSAGES, seed=1, max_tokens=60, format=gemmart.Format.schema(schema))
    answer = ask(server, seed=1, max_tokens=60, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert answer["content"][0]["text"] == expected.text
    assert json.loads(expected.text)["word"] in "ab"


def test_no_tokens(server: httpx.Client) -> None:
    answer = ask(server, max_tokens=0)
    assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": ""}], "max_tokens")
    assert answer["usage"]["output_tokens"] == 0


def test_count_tokens(server: httpx.Client, model: gemmart.Model) -> None:
    response = server.post(MESSAGES + "/count_tokens", json={"messages": CHAT_MESSAGES[1:], "system": "be kind"})
    assert response.json() == {"input_tokens": len(model.chat_tokens(CHAT_MESSAGES))}


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"system": [{"type": "image"}]}, "system[0]"),
        ({"system": 1}, "system"),
        ({"temperature": 3}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": "x"}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stream": 1}, "stream"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0]"),
        ({"tools": [{"name": "f", "input_schema": {}}] * 2}, "tools"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "id": "x"}]}]},
            "messages[0].content[0].name",
        ),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "x"}}}},
            "output_config.format.schema",
        ),
        ({"output_config": {"format": {"type": "json_object"}}}, "output_config.format.type"),
    ],
)
def test_wrong_places(fields: dict[str, Any], place: str, server: httpx.Client) -> None:
    message = refused(server.post(MESSAGES, json=ASKED | fields), 400, "invalid_request_error")
    assert place in message


def test_errors(model: gemmart.Model, server: httpx.Client) -> None:
    refused(server.get(MESSAGES), 405, "invalid_request_error")
    refused(server.get(MESSAGES + "/batches"), 404, "not_found_error")
    refused(
        server.post(MESSAGES, content=b"{", headers={"content-type": "application/json"}), 400, "invalid_request_error"
    )
    refused(server.post(MESSAGES, content=b"{}", headers={"content-type": "text/plain"}), 415, "invalid_request_error")
    refused(
        server.post(MESSAGES, content=b" " * (limits.BODY_BYTES + 1), headers={"content-type": "application/json"}),
        413,
        "request_too_large",
    )
    refused(server.post(MESSAGES, json=ASKED, headers={"origin": "http://evil.example"}), 403, "permission_error")
    long = [{"role": "user", "content": "hello " * 300}]
    message = refused(server.post(MESSAGES, json=ASKED | {"messages": long}), 400, "invalid_request_error")
    assert message.startswith("prompt is too long: ")
    error_of(server.get("/v1/nothing"), 404, "not_found")
    with model.serve(api_keys=["k"], strict_model=True) as running:
        refused(httpx.post(running.url + MESSAGES, json=ASKED), 401, "authentication_error")
        key = {"x-api-key": "k", "anthropic-version": "2023-06-01"}
        assert httpx.post(running.url + MESSAGES, json=ASKED, headers=key).status_code == 200
        wrong = httpx.post(running.url + MESSAGES, json=ASKED | {"model": "claude"}, headers=key)
        refused(wrong, 404, "not_found_error")


def test_an_error_in_a_stream(model: gemmart.Model) -> None:
    with model.serve(request_timeout=0.0) as running:
        *_, last = events(httpx.post(running.url + MESSAGES, json=ASKED | {"stream": True}))
        assert (last["type"], last["error"]["type"]) == ("error", "timeout_error")
        with (
            anthropic.Anthropic(base_url=running.url, api_key="none", max_retries=0) as client,
            pytest.raises(anthropic.APIStatusError) as raised,
            client.messages.stream(model="x", **ASKED) as stream,
        ):
            stream.get_final_message()
        assert raised.value.type == "timeout_error"


# The client


def test_client(client: anthropic.Anthropic, model: gemmart.Model) -> None:
    options: dict[str, Any] = {"model": "claude-3", "extra_body": {"seed": 9}, **ASKED}
    expected = model.chat(CHAT_MESSAGES, seed=9, max_tokens=20)
    answer = client.messages.create(**options)
    assert answer.content[0].text == expected.text
    assert answer._request_id
    with client.messages.stream(**options) as stream:
        texts = list(stream.text_stream)
        final = stream.get_final_message()
    assert "".join(texts) == expected.text
    assert final.content[0].text == expected.text
    assert final.usage.output_tokens == expected.usage.completion_tokens
    assert final.stop_reason == answer.stop_reason
    assert (
        client.messages.count_tokens(model="x", messages=CHAT_MESSAGES[1:], system="be kind").input_tokens
        == expected.usage.prompt_tokens
    )
    with pytest.raises(anthropic.BadRequestError) as raised:
        client.messages.create(**options | {"extra_body": {"temperature": 3}})
    assert raised.value.type == "invalid_request_error"
    assert raised.value.request_id
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        client.messages.create(model="x", max_tokens=1, messages=[{"role": "user", "content": "hello " * 300}])


def test_a_conversation(client: anthropic.Anthropic, model: gemmart.Model) -> None:
    said: list[Any] = []
    for i in range(3):
        said.append({"role": "user", "content": f"word {i}"})
        answer = client.messages.create(model="x", max_tokens=9, messages=said, extra_body={"temperature": 0})
        plain = [m | {"content": m["content"] if isinstance(m["content"], str) else m["content"][0].text} for m in said]
        expected = model.chat(plain, gemmart.Sampling(temperature=0), max_tokens=9)
        assert answer.content[0].text == expected.text
        said.append({"role": "assistant", "content": answer.content})
    assert answer.usage.cache_read_input_tokens
