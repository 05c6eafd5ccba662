"""Tools in the protocols other than OpenAI's chats: the calls are those of Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import ollama
import openai
import pytest

import gemmart
from conftest import Tiny
from gemmart.server import ollama as served
from serving import MINUTE

MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "what is the word"}]


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0", n_ctx=1024), ctx=1024, threads=1) as model:
        yield model


@pytest.fixture(scope="module")
def server(model: gemmart.Model) -> Iterator[httpx.Client]:
    with model.serve() as running, httpx.Client(base_url=running.url, timeout=MINUTE) as client:
        yield client


def called(model: gemmart.Model, choice: str) -> tuple[int, gemmart.Completion]:
    """A seed with which an answer of at most 200 tokens calls a tool, once, and this answer."""
    options: Any = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    for seed in range(50):
        found = model.chat(MESSAGES, seed=seed, **options)
        if found.finish_reason == "tool_calls":
            return seed, found
    raise AssertionError


def ask(server: httpx.Client, path: str, **fields: Any) -> dict[str, Any]:
    response = server.post(path, json=fields)
    assert response.status_code == 200, response.text
    return response.json()


# Ollama

SAY = {"type": "object", "properties": {"it": {"enum": ["a", "b"]}}, "required": ["it"], "additionalProperties": False}
TOOLS = [{"type": "function", "function": {"name": "say", "description": "Says it", "parameters": SAY}}]


def test_ollama(server: httpx.Client, model: gemmart.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seed, forced = called(model, "required")
    options = {"seed": seed, "num_predict": 200}
    free = model.chat(MESSAGES, tools=TOOLS, seed=seed, max_tokens=200)
    assert (
        ask(server, "/api/chat", model="any", stream=False, messages=MESSAGES, tools=TOOLS, options=options)["message"][
            "content"
        ]
        == free.text
    )
    # Ollama's clients cannot ask for a call, and this model makes none by itself.
    monkeypatch.setattr(served, "Toolbox", lambda tools: gemmart.tools.Toolbox(tools, "required", parallel=False))
    calls = [{"function": {"name": "say", "arguments": json.loads(forced.tool_calls[0].arguments)}}]
    answer = ask(server, "/api/chat", model="any", stream=False, messages=MESSAGES, tools=TOOLS, options=options)
    assert answer["message"] == {"role": "assistant", "content": "", "tool_calls": calls}
    assert answer["done_reason"] == "stop"
    body = {"model": "any", "messages": MESSAGES, "tools": TOOLS, "options": options}
    lines = [json.loads(line) for line in server.post("/api/chat", json=body).text.splitlines()]
    assert [call for line in lines for call in line["message"].get("tool_calls", ())] == calls
    assert (lines[-1]["done"], lines[-1]["done_reason"]) == (True, "stop")
    with ollama.Client(str(server.base_url), timeout=MINUTE) as client:  # which writes the tools in its own way
        parts = list(client.chat("any", MESSAGES, tools=TOOLS, options=options, stream=True))
    (found,) = [call for part in parts for call in part.message.tool_calls or ()]
    assert (found.function.name, found.function.arguments["it"] in "ab") == ("say", True)


def test_ollama_results(server: httpx.Client, model: gemmart.Model) -> None:
    calls = [{"function": {"name": "say", "arguments": {"it": "a"}}}]
    said = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": calls}]
    plain = [*said, {"role": "tool", "name": "say", "content": "a!"}]
    expected = model.chat(plain, gemmart.Sampling(temperature=0), tools=TOOLS, max_tokens=9)
    said.append({"role": "tool", "tool_name": "say", "content": "a!"})
    answer = ask(
        server,
        "/api/chat",
        model="any",
        stream=False,
        messages=said,
        tools=TOOLS,
        options={"temperature": 0, "num_predict": 9},
    )
    assert answer["message"]["content"] == expected.text


# OpenAI's responses

FUNCTIONS = [{"type": "function", "name": "say", "description": "Says it", "parameters": SAY}]


def test_responses(server: httpx.Client, model: gemmart.Model) -> None:
    seed, expected = called(model, "say")
    (call,) = expected.tool_calls
    options: dict[str, Any] = {"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "say"}}
    options |= {"instructions": "be kind", "max_output_tokens": 200, "extra_body": {"seed": seed}}
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=MINUTE) as client:
        answer = client.responses.create(model="x", input=MESSAGES[1]["content"], **options)
        with client.responses.stream(model="x", input=MESSAGES[1]["content"], **options) as stream:
            pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
            streamed = stream.get_final_response()
    assert "".join(pieces) == call.arguments
    for found in (answer, streamed):
        (item,) = found.output
        assert (item.type, item.name, item.arguments, item.status) == (
            "function_call",
            "say",
            call.arguments,
            "completed",
        )
        assert found.status == "completed"


def test_responses_results(server: httpx.Client, model: gemmart.Model) -> None:
    items = [
        *MESSAGES,
        {"role": "assistant", "content": [{"type": "output_text", "text": "Well."}]},
        {"type": "function_call", "call_id": "c1", "name": "say", "arguments": '{"it": "a"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a!"},
    ]
    calls = [{"id": "c1", "function": {"name": "say", "arguments": '{"it": "a"}'}}]
    plain = [
        *MESSAGES,
        {"role": "assistant", "content": "Well.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "a!"},
    ]
    expected = model.chat(plain, gemmart.Sampling(temperature=0), tools=TOOLS, max_tokens=9)
    body = {"input": items, "tools": FUNCTIONS, "temperature": 0, "max_output_tokens": 9}
    answer = ask(server, "/v1/responses", **body)
    assert answer["output"][0]["content"][0]["text"] == expected.text
    assert answer["usage"]["input_tokens"] == expected.usage.prompt_tokens
    response = server.post("/v1/responses", json=body | {"input": items[-1:]})
    assert response.json()["error"]["param"] == "input[0].call_id"


# Anthropic

ASKED: dict[str, Any] = {"system": "be kind", "messages": MESSAGES[1:], "max_tokens": 20}


def events(server: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    text = server.post("/v1/messages", json=ASKED | fields | {"stream": True}).text
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: ")]


def text_of(found: list[dict[str, Any]]) -> str:
    return "".join(event["delta"]["text"] for event in found if event["type"] == "content_block_delta")


def messages_client(server: httpx.Client) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=str(server.base_url), api_key="none", max_retries=0, timeout=MINUTE)


USES = [{"name": "say", "description": "Says it", "input_schema": SAY}]


def test_anthropic(server: httpx.Client, model: gemmart.Model) -> None:
    seed, expected = called(model, "say")
    (call,) = expected.tool_calls
    options: dict[str, Any] = {"tools": USES, "tool_choice": {"type": "tool", "name": "say"}, "max_tokens": 200}
    answer = ask(server, "/v1/messages", **ASKED | options, seed=seed)
    (use,) = answer["content"]
    assert use.pop("id").startswith("call_")
    assert use == {"type": "tool_use", "name": "say", "input": json.loads(call.arguments)}
    assert answer["stop_reason"] == "tool_use"
    found = events(server, seed=seed, **options)
    assert [e["type"] for e in found if "block" not in e["type"]] == [
        "message_start",
        "ping",
        "message_delta",
        "message_stop",
    ]
    pieces = [event["delta"]["partial_json"] for event in found if event["type"] == "content_block_delta"]
    assert "".join(pieces) == call.arguments
    with (
        messages_client(server) as client,
        client.messages.stream(model="x", extra_body={"seed": seed}, **ASKED | options) as stream,
    ):
        final = stream.get_final_message()
    assert [(block.type, block.name, block.input) for block in final.content] == [("tool_use", "say", use["input"])]
    assert final.stop_reason == "tool_use"


def test_anthropic_words(server: httpx.Client, model: gemmart.Model) -> None:
    for choice, name in (({"type": "auto"}, "auto"), ({"type": "none"}, "none")):
        expected = model.chat(MESSAGES, tools=TOOLS, tool_choice=name, seed=2, max_tokens=20)
        options: dict[str, Any] = {"tools": USES, "tool_choice": choice}
        assert ask(server, "/v1/messages", **ASKED | options, seed=2)["content"] == [
            {"type": "text", "text": expected.text}
        ]
        assert text_of(events(server, seed=2, **options)) == expected.text


def test_anthropic_results(server: httpx.Client, model: gemmart.Model) -> None:
    said = [
        {"role": "user", "content": "say a"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "Well."},
                {"type": "tool_use", "id": "c1", "name": "say", "input": {"it": "a"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "a!"}]},
                {"type": "text", "text": "and?"},
            ],
        },
    ]
    plain = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "say a"},
        {
            "role": "assistant",
            "content": "Well.",
            "tool_calls": [{"id": "c1", "function": {"name": "say", "arguments": {"it": "a"}}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a!"},
        {"role": "user", "content": "and?"},
    ]
    expected = model.chat(plain, gemmart.Sampling(temperature=0), tools=TOOLS, max_tokens=20)
    answer = ask(server, "/v1/messages", **ASKED | {"messages": said}, tools=USES, temperature=0)
    assert answer["content"][0]["text"] == expected.text
    n = server.post("/v1/messages/count_tokens", json={"messages": said, "system": "be kind", "tools": USES}).json()
    assert n == {"input_tokens": expected.usage.prompt_tokens}
