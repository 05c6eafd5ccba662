"""Formats and tools over HTTP: OpenAI's fields and llama.cpp's, by plain HTTP and by OpenAI's client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest

import gemmart
import openapi_document
from conftest import Tiny
from gemmart import Format
from serving import CHAT, MINUTE, TEXT, error_of, events, question
from test_format import PERSON

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Paris", "Oslo"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "days"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0", n_ctx=2048), ctx=2048, parallel=4, threads=2) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    def check(response: httpx.Response) -> None:
        response.read()
        openapi_document.check(response)

    with (
        model.serve() as running,
        httpx.Client(base_url=running.url, timeout=MINUTE, event_hooks={"response": [check]}) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=MINUTE) as client:
        yield client


def ask(server: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = server.post(CHAT, json=question(**{"seed": 1, "max_tokens": 300} | fields))
    assert response.status_code == 200, response.text
    return response.json()


def named(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a_person", "strict": True, "schema": schema}}


@pytest.mark.parametrize(
    ("fields", "format"),
    [
        ({"response_format": named(PERSON)}, Format.schema(PERSON)),
        ({"response_format": {"type": "json_object", "schema": PERSON}}, Format.schema(PERSON)),
        ({"response_format": {"type": "json_object"}}, Format.json()),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "any"}}}, Format.json()),
        ({"json_schema": PERSON}, Format.schema(PERSON)),
        ({"regex": "[a-z]{3,9}!"}, Format.regex("[a-z]{3,9}!")),
        ({"grammar": 'start: "a" | /[0-9]+/ ","'}, Format.lark('start: "a" | /[0-9]+/ ","')),
        ({"grammar": 'root ::= "a" [bc]+ "d"'}, Format.lark('root ::= "a" [bc]+ "d"')),
        ({"response_format": {"type": "text"}, "grammar": "", "regex": None}, None),
    ],
)
def test_formats(server: httpx.Client, model: gemmart.Model, fields: dict[str, Any], format: Format | None) -> None:
    """As in Python, in chats and completions, streamed or not, with choices and log-probabilities."""
    wanted = [
        model.chat([{"role": "user", "content": "what is it"}], seed=seed, max_tokens=60, format=format)
        for seed in (5, 6)
    ]
    fields = fields | {"seed": 5, "max_tokens": 60, "n": 2, "logprobs": True}
    whole = ask(server, **fields)["choices"]
    assert [choice["message"]["content"] for choice in whole] == [answer.text for answer in wanted]
    assert [choice["finish_reason"] for choice in whole] == [answer.finish_reason for answer in wanted]
    found = events(server.post(CHAT, json=question(stream=True, **fields)))
    for index, choice in enumerate(whole):
        own = [c for event in found[:-1] for c in event["choices"] if c["index"] == index]
        assert "".join(c["delta"].get("content", "") for c in own) == choice["message"]["content"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
    text = model.generate("what", seed=5, max_tokens=20, format=format).text
    fields |= {"prompt": "what", "max_tokens": 20, "n": 1, "logprobs": None}
    assert server.post(TEXT, json=fields).json()["choices"][0]["text"] == text


def test_valid(server: httpx.Client) -> None:
    for seed in range(5):
        choice = ask(server, response_format=named(PERSON), seed=seed, temperature=1.5)["choices"][0]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["message"]["content"]), PERSON)
    cut = ask(server, response_format=named(PERSON), max_tokens=4)["choices"][0]
    assert cut["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
        ({"response_format": {"type": "json"}}, "invalid_value", "response_format.type"),
        ({"response_format": "json_object"}, "invalid_value", "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "invalid_value",
            "response_format.json_schema.name",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}},
            "invalid_value",
            "response_format.json_schema.name",
        ),
        ({"response_format": named({"not": {}})}, "invalid_schema", "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_object", "schema": {"type": 3}}},
            "invalid_schema",
            "response_format.schema",
        ),
        ({"json_schema": {"uniqueItems": True}}, "invalid_schema", "json_schema"),
        ({"grammar": "start: other"}, "invalid_schema", "grammar"),
        ({"regex": "(a"}, "invalid_schema", "regex"),
        ({"regex": "a" * 65_537}, "invalid_schema", "regex"),
        ({"regex": "a", "grammar": 'start: "a"'}, "invalid_value", "regex"),
        ({"regex": "a", "response_format": {"type": "json_object"}}, "invalid_value", "regex"),
        ({"regex": "a", "ignore_eos": True}, "invalid_value", "ignore_eos"),
        ({"tools": [WEATHER], "regex": "a"}, "invalid_value", "regex"),
        ({"tools": [WEATHER, WEATHER]}, "invalid_value", "tools"),
        ({"tools": [WEATHER] * 129}, "invalid_value", "tools"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools"),
        ({"tools": [{"type": "retrieval"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "invalid_value", "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]},
            "invalid_schema",
            "tools",
        ),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "a", "strict": True, "parameters": {"propertyNames": {}}},
                    }
                ]
            },
            "invalid_schema",
            "tools",
        ),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "invalid_value", "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "invalid_value",
            "tool_choice",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "invalid_value", "tool_choice.function"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}},
            "invalid_value",
            "tool_choice.allowed_tools",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "tool", "content": "b", "tool_call_id": "c"}]},
            "invalid_value",
            "messages[1].tool_call_id",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}, {"role": "user", "content": "b"}]},
            "invalid_value",
            "messages[0].tool_calls[0].function",
        ),
    ],
)
def test_refused(server: httpx.Client, fields: dict[str, Any], code: str, param: str) -> None:
    for stream in (False, True):
        error = error_of(server.post(CHAT, json=question(stream=stream) | fields), 400, code, param)
        assert error["message"].startswith(param)


def test_a_strict_tool_is_kept_to_and_others_are_told(server: httpx.Client) -> None:
    """A keyword that cannot be kept to."""
    tool = {"type": "function", "function": {"name": "a", "parameters": {"propertyNames": {"maxLength": 2}}}}
    ask(server, tools=[tool], max_tokens=3)


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "weather"}}],
            },
        },
    ],
)
def test_calls(server: httpx.Client, choice: Any) -> None:
    names = set()
    for seed in range(6):
        fields = {"tools": [WEATHER, CLOCK], "tool_choice": choice, "seed": seed, "temperature": 1.5}
        fields["parallel_tool_calls"] = False
        found = ask(server, **fields)["choices"][0]
        assert found["finish_reason"] == "tool_calls"
        assert found["message"]["content"] is None
        (call,) = found["message"]["tool_calls"]
        assert re.fullmatch("call_[0-9a-f]{24}", call["id"])
        names.add(call["function"]["name"])
        arguments = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "weather":
            jsonschema.validate(arguments, WEATHER["function"]["parameters"])
        else:
            assert arguments == {}
        stream = events(server.post(CHAT, json=question(stream=True, max_tokens=300, **fields)))
        assert stream[-1] == "[DONE]"
        choices = [event["choices"][0] for event in stream[:-1]]
        pieces = [piece for choice in choices for piece in choice["delta"].get("tool_calls", [])]
        assert {piece["index"] for piece in pieces} == {0}
        assert (pieces[0]["type"], pieces[0]["function"]["name"]) == ("function", call["function"]["name"])
        assert pieces[0]["id"].startswith("call_")
        assert all("id" not in piece and "name" not in piece["function"] for piece in pieces[1:])
        assert "".join(piece["function"]["arguments"] for piece in pieces) == call["function"]["arguments"]
        assert choices[-1]["finish_reason"] == "tool_calls"
        assert all(not choice["delta"].get("content") for choice in choices)
    assert names <= ({"weather", "clock"} if choice == "required" else {"weather"})


def test_no_call(server: httpx.Client) -> None:
    """By choice, or since there is nothing to call: the prompt does not tell of tools, and nothing is held to."""
    plain = ask(server, max_tokens=20)
    for fields in ({"tools": [WEATHER], "tool_choice": "none"}, {"tools": [], "tool_choice": "auto"}):
        found = ask(server, max_tokens=20, **fields)
        assert found["choices"] == plain["choices"]
    auto = ask(server, max_tokens=20, tools=[WEATHER])
    assert auto["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert auto["choices"][0]["message"]["content"]
    assert "tool_calls" not in auto["choices"][0]["message"]


def test_openai_client(client: openai.OpenAI) -> None:
    """Its helper for types, and a loop of calls and results."""
    pydantic = pytest.importorskip("pydantic")
    kind = pydantic.create_model("Kind", kind=(Literal["a", "b"], ...), n=(int | None, ...))
    answer = client.chat.completions.parse(
        model="any", messages=[{"role": "user", "content": "hello"}], response_format=kind, seed=1
    )
    parsed = answer.choices[0].message.parsed
    assert isinstance(parsed, kind)
    assert parsed.kind in ("a", "b")

    messages: list[Any] = [{"role": "user", "content": "hello"}]
    for choice in ("required", "required", "auto"):
        answer = client.chat.completions.create(
            model="any", messages=messages, tools=[WEATHER, CLOCK], tool_choice=choice, seed=2, max_tokens=150
        )
        message = answer.choices[0].message
        messages.append(message)
        if choice == "required":
            assert answer.choices[0].finish_reason in ("tool_calls", "length")
            assert message.tool_calls
        for call in message.tool_calls or ():
            messages.append({"role": "tool", "tool_call_id": call.id, "content": "sunny"})
    with client.chat.completions.stream(
        model="any", messages=[{"role": "user", "content": "a"}], tools=[WEATHER], tool_choice="required", seed=1
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    (call, *_) = final.choices[0].message.tool_calls or ()
    assert call.function.name == "weather"


def test_many_at_once(server: httpx.Client) -> None:
    bodies = [
        question("hello " * (i % 5), seed=i, max_tokens=30, stream=i % 2 == 0)
        | [{"regex": "[a-z ]{9,40}"}, {"json_schema": PERSON}, {"tools": [WEATHER], "tool_choice": "required"}, {}][
            i % 4
        ]
        for i in range(24)
    ]

    def text(body: dict[str, Any]) -> tuple[str, str]:
        response = server.post(CHAT, json=body)
        assert response.status_code == 200, response.text
        if body["stream"]:
            choices = [event["choices"][0]["delta"] for event in events(response)[:-1]]
            calls = [piece for delta in choices for piece in delta.get("tool_calls", ())]
            return (
                "".join(delta.get("content", "") for delta in choices),
                "".join(piece["function"]["arguments"] for piece in calls),
            )
        message = response.json()["choices"][0]["message"]
        calls = message.get("tool_calls", ())
        return message["content"] or "", "".join(call["function"]["arguments"] for call in calls)

    alone = [text(body) for body in bodies]
    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(text, bodies)) == alone
