"""/v1/responses, asked by OpenAI's client and by plain HTTP: the answers are those of Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest

import gemmart
from conftest import Tiny
from serving import CHAT, MINUTE, error_of

RESPONSES = "/v1/responses"
MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is the word"}]
ASKED: dict[str, Any] = {"instructions": "be kind", "input": "what is the word", "max_output_tokens": 20}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=4, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[openai.OpenAI]:
    url = f"{server.base_url}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=MINUTE) as client:
        yield client


def ask(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = server.post(RESPONSES, json=ASKED | fields)
    assert response.status_code == 200, response.text
    return response.json()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """Those of a stream; each is named as its type, and they are numbered."""
    assert response.headers["content-type"].startswith("text/event-stream")
    found = []
    for event in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def streamed(server: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    return events(server.post(RESPONSES, json=ASKED | fields | {"stream": True}))


def text_of(response: dict[str, Any]) -> str:
    (item,) = response["output"]
    (part,) = item["content"]
    assert (item["type"], item["role"], part["type"]) == ("message", "assistant", "output_text")
    return part["text"]


@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_the_answer_is_that_of_python(seed: int, server: httpx.Client, model: gemmart.Model) -> None:
    sampling = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01}
    expected = model.chat(MESSAGES, gemmart.Sampling(**sampling), seed=seed, max_tokens=20)
    answer = ask(server, seed=seed, store=True, user="u", metadata={"a": "b"}, **sampling)
    assert text_of(answer) == expected.text
    assert answer["id"].startswith("resp_")
    assert (answer["object"], answer["model"]) == ("response", model.info.path.stem)
    status = {"stop": "completed", "length": "incomplete"}[expected.finish_reason]
    assert (answer["status"], answer["output"][0]["status"]) == (status, status)
    reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
    assert answer["incomplete_details"] == reason
    assert (answer["temperature"], answer["top_p"], answer["store"]) == (0.7, 0.9, False)
    assert (answer["instructions"], answer["metadata"]) == ("be kind", {"a": "b"})
    usage = answer["usage"]
    assert usage["input_tokens"] == expected.usage.prompt_tokens
    assert usage["output_tokens"] == expected.usage.completion_tokens
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["seed"] == seed
    body = {"messages": MESSAGES, "seed": seed, "max_tokens": 20, **sampling}
    assert server.post(CHAT, json=body).json()["choices"][0]["message"]["content"] == expected.text


def test_the_input_is_a_conversation(server: httpx.Client, model: gemmart.Model) -> None:
    items = [
        {"role": "developer", "content": "be kind"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "what "}, {"type": "input_text", "text": "is it"}]},
        {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": [{"type": "output_text", "text": "a word", "annotations": []}]},
        {"role": "user", "content": "and that"},
    ]  # fmt: skip
    plain = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "what is it"},
        {"role": "assistant", "content": "a word"},
        {"role": "user", "content": "and that"},
    ]
    expected = model.chat(plain, gemmart.Sampling(temperature=0), max_tokens=20)
    assert text_of(ask(server, instructions=None, input=items, temperature=0)) == expected.text


def test_defaults_are_the_models(server: httpx.Client, model: gemmart.Model) -> None:
    answer = ask(server, seed=3, temperature=None, text={"format": {"type": "text"}, "verbosity": "low"})
    assert text_of(answer) == model.chat(MESSAGES, seed=3, max_tokens=20).text
    assert (answer["temperature"], answer["top_p"]) == (1.0, 0.95)


def test_stream(server: httpx.Client, model: gemmart.Model) -> None:
    expected = model.chat(MESSAGES, seed=2, max_tokens=20)
    found = streamed(server, seed=2)
    kinds = [event["type"].removeprefix("response.") for event in found]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    status = {"stop": "completed", "length": "incomplete"}[expected.finish_reason]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", status]
    deltas = found[4:-4]
    assert {event["type"] for event in deltas} == {"response.output_text.delta"}
    assert "".join(event["delta"] for event in deltas) == expected.text
    assert found[-4]["text"] == expected.text
    response = found[-1]["response"]
    assert text_of(response) == expected.text
    assert found[-2]["item"] == response["output"][0]
    assert found[-3]["part"] == response["output"][0]["content"][0]
    assert response["usage"]["output_tokens"] == expected.usage.completion_tokens
    for event in found[:2]:
        assert (event["response"]["id"], event["response"]["status"]) == (response["id"], "in_progress")
        assert (event["response"]["output"], event["response"]["usage"]) == ([], None)
    assert {event["item_id"] for event in found if "item_id" in event} == {response["output"][0]["id"]}


def test_length(server: httpx.Client) -> None:
    assert ask(server, max_output_tokens=2)["status"] == "incomplete"
    assert streamed(server, max_output_tokens=2)[-1]["type"] == "response.incomplete"


def test_logprobs(server: httpx.Client, model: gemmart.Model) -> None:
    body: dict[str, Any] = {"seed": 1, "include": ["message.output_text.logprobs"], "top_logprobs": 2}
    found = ask(server, **body)["output"][0]["content"][0]["logprobs"]
    expected = model.chat(MESSAGES, seed=1, max_tokens=20, logprobs=2).logprobs or ()
    assert [bytes(logprob["bytes"]) for logprob in found] == [logprob.piece for logprob in expected]
    assert [logprob["logprob"] for logprob in found] == [logprob.logprob for logprob in expected]
    assert all(len(logprob["top_logprobs"]) == 2 for logprob in found)
    parts = streamed(server, **body)
    assert [p for part in parts if part["type"].endswith("text.delta") for p in part["logprobs"]] == found
    assert parts[-4]["logprobs"] == found
    assert ask(server)["output"][0]["content"][0]["logprobs"] == []


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"input": None}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": [{"role": "x", "content": "x"}]}, "invalid_value", "input[0].role"),
        ({"input": [{"role": "user"}]}, "invalid_value", "input[0].content"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "invalid_value", "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "invalid_value", "input[0].content[0]"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_output_tokens": -1}, "invalid_value", "max_output_tokens"),
        ({"top_logprobs": 2}, "invalid_value", "top_logprobs"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "unsupported_parameter", "prompt"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"truncation": "auto"}, "unsupported_parameter", "truncation"),
        ({"tools": [{"type": "web_search"}]}, "invalid_value", "tools[0].type"),
        ({"text": {"format": {"type": "yaml"}}}, "invalid_value", "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "x"}}}}, "invalid_schema", "text.format.schema"),
    ],
)  # fmt: skip
def test_wrong_places(fields: dict[str, Any], code: str, param: str, server: httpx.Client) -> None:
    for stream in (False, True):
        error_of(server.post(RESPONSES, json=ASKED | fields | {"stream": stream}), 400, code, param)


def test_formats(server: httpx.Client, client: openai.OpenAI, model: gemmart.Model) -> None:
    schema = {
        "type": "object",
        "properties": {"word": {"enum": ["a", "b"]}},
        "required": ["word"],
        "additionalProperties": False,
    }
    named = {"type": "json_schema", "name": "word", "schema": schema, "strict": True}
    for given, format in (({"type": "json_object"}, gemmart.Format.json()), (named, gemmart.Format.schema(schema))):
        expected = model.chat(MESSAGES, seed=1, max_tokens=60, format=format)
        answer = ask(server, seed=1, max_output_tokens=60, text={"format": given})
        assert text_of(answer) == expected.text
        assert given.items() <= answer["text"]["format"].items()

    class Word(pydantic.BaseModel):
        word: Literal["a", "b"]

    parsed = client.responses.parse(model="x", text_format=Word, **ASKED | {"max_output_tokens": 60})
    assert parsed.output_parsed is not None
    assert parsed.output_parsed.word in "ab"


def test_nothing_is_kept(server: httpx.Client, client: openai.OpenAI) -> None:
    answer = ask(server)
    error_of(server.get(f"{RESPONSES}/{answer['id']}"), 404, "not_found")
    with pytest.raises(openai.NotFoundError, match="not kept"):
        client.responses.retrieve(answer["id"])


def test_an_error_in_a_stream(model: gemmart.Model) -> None:
    with model.serve(request_timeout=0.0) as running:
        *_, error, failed = events(httpx.post(running.url + RESPONSES, json=ASKED | {"stream": True}))
    assert (error["type"], error["code"]) == ("error", "deadline_exceeded")
    assert failed["type"] == "response.failed"
    assert (failed["response"]["status"], failed["response"]["error"]["code"]) == ("failed", "server_error")


# The client


def test_client(client: openai.OpenAI, model: gemmart.Model) -> None:
    options: dict[str, Any] = {"model": "gpt-4o", "extra_body": {"seed": 9}, **ASKED}
    expected = model.chat(MESSAGES, seed=9, max_tokens=20)
    answer = client.responses.create(**options)
    assert answer.output_text == expected.text
    assert answer.usage is not None
    assert answer.usage.output_tokens == expected.usage.completion_tokens
    with client.responses.stream(**options) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
    assert text == expected.text
    said: list[Any] = [{"role": "user", "content": "what is it"}]
    said += client.responses.create(model="x", input=said, temperature=0, max_output_tokens=9).output
    said.append({"role": "user", "content": "and that"})
    assert client.responses.create(model="x", input=said, temperature=0, max_output_tokens=9).output_text
    with pytest.raises(openai.BadRequestError) as raised:
        client.responses.create(**options | {"temperature": 3})
    assert raised.value.param == "temperature"
