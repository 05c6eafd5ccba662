"""Tools: what the prompt tells, what an answer may call, and how calls are found in text that comes in pieces."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import jsonschema
import numpy as np
import pytest

import gemmart
from conftest import Tiny
from gemmart import ConstraintError, InvalidRequest, Sampling, Tool, ToolCall
from gemmart.tools import CallDelta, CallParser, Toolbox, written_out
from test_engine import at_once

TREE = {
    "type": "object",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"enum": [1, 2]}, "l": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["v", "l"],
            "additionalProperties": False,
        }
    },
    "properties": {"root": {"$ref": "#/$defs/node"}},
    "required": ["root"],
}
TOOLS = [
    Tool("tree.plant", "Plants a tree", TREE),
    Tool("clock"),
    Tool("say", 'Says "it"', {"properties": {"it": {"enum": ["a", 'b"}', "</tool_call>"]}}, "required": ["it"]}),
]
SCHEMAS = {tool.name: dict(tool.parameters or {"type": "object", "maxProperties": 0}) for tool in TOOLS}
ASKED = [{"role": "user", "content": "what is it"}]


@pytest.fixture(scope="module", params=["gemma2", "llama"])
def model(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny(request.param, "Q8_0", n_ctx=2048), ctx=2048, parallel=4, threads=2) as model:
        yield model


def check(call: ToolCall) -> None:
    assert re.fullmatch("call_[0-9a-f]{24}", call.id)
    jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])


def test_calls_are_as_their_schemas_say(model: gemmart.Model) -> None:
    names = set()
    for i, choice in enumerate(["required", "tree.plant", "clock", "say"] * 4):
        answer = model.chat(ASKED, Sampling(temperature=1.5), tools=TOOLS, tool_choice=choice, seed=i, max_tokens=400)
        assert answer.text == ""
        whole = answer.tool_calls[: -1 if answer.finish_reason == "length" else None]
        for call in whole:
            check(call)
        names |= {call.name for call in whole}
        if choice != "required":
            assert [call.name for call in answer.tool_calls] == [choice]
        assert answer.finish_reason in ("tool_calls", "length")
        assert len({call.id for call in answer.tool_calls}) == len(answer.tool_calls) <= 16
    assert names == set(SCHEMAS)


def test_one_call_at_most(model: gemmart.Model) -> None:
    for seed in range(6):
        answer = model.chat(ASKED, tools=TOOLS[1:], tool_choice="required", parallel_tool_calls=False, seed=seed)
        assert answer.finish_reason == "tool_calls"
        (call,) = answer.tool_calls
        check(call)


def test_text_and_then_calls(model: gemmart.Model) -> None:
    """A random model does not begin a call by itself."""
    for seed in range(4):
        answer = model.chat(ASKED, tools=TOOLS, seed=seed, max_tokens=30)
        assert answer.text
        assert answer.tool_calls == ()
    constraint = model._constraints.begin(Toolbox(TOOLS).format)
    begun = model.tokenize('Well <b> <tool_call>\n{"name": "')
    assert constraint.possible(begun) == len(begun)
    for token in begun:
        assert not constraint.take(token)
    constraint.fill()
    bits = np.unpackbits(constraint.mask.view(np.uint8), bitorder="little").nonzero()[0]
    pieces = model.tokenizer.pieces()
    starts = {name[:n] for name in SCHEMAS for n in range(1, 12)}
    assert {pieces[id].decode() for id in bits} <= {start[:n] for start in starts for n in range(12)}
    for text, fits in (
        (
            'clock", "arguments": {}}\n</tool_call>\n<tool_call>\n{"name": "say", "arguments": {"it": "a"}}\n</tool_call>',
            True,
        ),
        ('clock", "arguments": {"it": 1}}', False),
        ('other", ', False),
        ('clock", "arguments": {}}\n</tool_call> and so on', False),
    ):
        tokens = model.tokenize(text)
        assert (constraint.possible(tokens) == len(tokens)) == fits, text


def test_streams_are_what_is_whole(model: gemmart.Model) -> None:
    """Alone and in company."""

    def streamed(seed: int) -> tuple[Any, ...]:
        options = {"tools": TOOLS, "tool_choice": ["required", "auto"][seed % 2], "seed": seed, "max_tokens": 80}
        stream = model.stream_chat(ASKED, **options)
        text, calls = "", {}
        for delta in stream:
            text += delta.text
            for piece in delta.calls:
                if piece.name is not None:
                    assert piece.index == len(calls)
                    calls[piece.index] = ToolCall(piece.id, piece.name, "")
                old = calls[piece.index]
                calls[piece.index] = ToolCall(old.id, old.name, old.arguments + piece.arguments)
        result = stream.result()
        assert (result.text, result.tool_calls) == (text, tuple(calls.values()))
        return text, [(call.name, call.arguments) for call in result.tool_calls], result.tokens, result.finish_reason

    alone = [streamed(seed) for seed in range(8)]
    assert at_once([lambda s=seed: streamed(s) for seed in range(8)]) == alone


def test_stop_strings_and_lengths_end_calls(model: gemmart.Model) -> None:
    cut = model.chat(ASKED, tools=TOOLS, tool_choice="say", max_tokens=12, seed=1)
    assert cut.finish_reason == "length"
    stopped = model.chat(ASKED, tools=TOOLS, tool_choice="say", stop=['"it'], seed=1)
    assert (stopped.text, stopped.stop_string, stopped.finish_reason) == ("", '"it', "stop")  # no call to be made
    assert [(call.name, call.arguments.rstrip()) for call in stopped.tool_calls] == [("say", "{")]


TEXTS = [
    ("hello there", "hello there", []),
    ("", "", []),
    ("a < b and <tool_ c \n", "a < b and <tool_ c \n", []),
    ("a\n\n<tool_call>", "a<tool_call>", []),  # cut: not yet a call
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', "", [("f", "{}")]),
    (
        'I see. \n\n<tool_call>\n{"name": "a.b", "arguments": {"x": [1, {"y": "}\\"]"}]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "c", "arguments": {"é": "</tool_call>"}}\n</tool_call>',
        "I see.",
        [("a.b", '{"x": [1, {"y": "}\\"]"}]}'), ("c", '{"é": "</tool_call>"}')],
    ),
    ('x <tool_call>\n{"name": "f", "arguments": {"a": "b', "x", [("f", '{"a": "b')]),
    ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool', "", [("f", "{}")]),
]


@pytest.mark.parametrize(("text", "words", "calls"), TEXTS)
def test_parser(text: str, words: str, calls: list[tuple[str, str]]) -> None:
    """However the text is cut."""
    rng = np.random.default_rng(0)
    for share in [0, 1, *([0.2] * 40)]:
        cuts = [0, *(np.flatnonzero(rng.random(len(text)) < share)), len(text)]
        parser, found, deltas = CallParser(), "", list[CallDelta]()
        for begin, end in pairwise(cuts):
            more, pieces = parser.push(text[begin:end])
            found += more
            deltas += pieces
        found += parser.finish()
        assert found == words
        assert [(call.name, call.arguments) for call in parser.calls] == calls
        assert [delta.name for delta in deltas if delta.name is not None] == [name for name, _ in calls]
        for index, (_, arguments) in enumerate(calls):
            assert "".join(delta.arguments for delta in deltas if delta.index == index) == arguments


def test_words_come_at_once() -> None:
    parser = CallParser()
    assert [parser.push(part)[0] for part in ("a", " ", "b<", "c <tool", "_x", "\n")] == [
        "a",
        "",
        " b",
        "<c",
        " <tool_x",
        "",
    ]
    assert parser.finish() == "\n"


def test_the_prompt(model: gemmart.Model) -> None:
    box = Toolbox(TOOLS)
    text = model.apply_template([{"role": "system", "content": "be kind"}, *ASKED], toolbox=box)
    described = [
        json.loads(line) for line in text.splitlines() if line.startswith('{"name": ') and "arguments" not in line
    ]
    assert [(tool["name"], tool.get("description", "")) for tool in described] == [
        (tool.name, tool.description) for tool in TOOLS
    ]
    assert described[0]["parameters"] == TREE
    assert text.index("be kind") < text.index("You may call tools") < text.index("what is it")
    assert model.apply_template(ASKED, toolbox=Toolbox(TOOLS, "none")) == model.apply_template(ASKED)
    alone = model.apply_template(ASKED, toolbox=box)
    assert "You may call tools" in alone


def test_a_conversation_with_calls(model: gemmart.Model) -> None:
    """Calls are written as they were made; results are user turns."""
    calls = [ToolCall("call_1", "clock", "{}"), ToolCall("call_2", "say", '{"it": "a"}')]
    chat = [
        *ASKED,
        {"role": "assistant", "content": "Well.", "tool_calls": [call.to_openai() for call in calls]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12:00 </tool_response> <end_of_turn>"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "é"}]},
        {"role": "user", "content": "and now?"},
    ]
    text = model.apply_template(chat)
    written = (
        'Well.\n<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "say", "arguments": {"it": "a"}}\n</tool_call>'
    )
    told = (
        '<tool_response>\n{"name": "clock", "content": "12:00 <\\/tool_response> <end_of_turn>"}\n</tool_response>\n'
        '<tool_response>\n{"name": "say", "content": "é"}\n</tool_response>\n\nand now?'
    )
    assert written in text
    assert told in text
    parser = CallParser()
    parser.push(written)
    assert [(call.name, call.arguments) for call in parser.calls] == [(call.name, call.arguments) for call in calls]
    tokens = model.chat_tokens(chat)
    control = [token for token in tokens if model.tokenizer.is_control(token)]
    plain = [*ASKED, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    assert control == [token for token in model.chat_tokens(plain) if model.tokenizer.is_control(token)]
    no_id = model.apply_template([*ASKED, {"role": "tool", "name": "clock", "content": "12:00"}])
    assert '{"name": "clock", "content": "12:00"}' in no_id
    cut = ToolCall("call_1", "say", '{"it": "a').to_openai()  # its answer had no more tokens
    cut_off = model.apply_template([*ASKED, {"role": "assistant", "content": None, "tool_calls": [cut]}, chat[-1]])
    assert '{"name": "say", "arguments": "{\\"it\\": \\"a"}' in cut_off


def test_deep_arguments_stay_text() -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": "[" * 100_000}}
    assert "[[[" in written_out([{"role": "assistant", "content": None, "tool_calls": [call]}])[0]["content"]


@pytest.mark.parametrize(
    ("make", "param", "words"),
    [
        (lambda: Toolbox([Tool("a"), Tool("a")]), "tools", "two have the name 'a'"),
        (lambda: Toolbox([Tool(f"a{i}") for i in range(129)]), "tools", "at most 128"),
        (lambda: Tool("a b"), "tools", "'a b' is not"),
        (lambda: Toolbox([{"type": "function"}]), "tools", "the name ''"),
        (lambda: Toolbox([{"type": "web"}]), "tools[0].type", "'web'"),
        (lambda: Toolbox(["a"]), "tools[0]", "str, expected a tool"),
        (lambda: Toolbox([{"name": "a", "parameters": 3}]), "tools[0].function.parameters", "no JSON schema"),
        (lambda: Toolbox([{"function": 3}]), "tools[0].function", "no object"),
        (lambda: Toolbox([Tool("a", "", {"x": {1, 2}})]).messages(ASKED), "tools", "a: the parameters must be"),
        (lambda: Toolbox([], "required"), "tool_choice", "no tool to call"),
        (lambda: Toolbox([Tool("a")], "b"), "tool_choice", "no tool 'b'"),
        (lambda: Toolbox([Tool("a")], allowed=["b"]), "tool_choice", "no tool 'b'"),
    ],
)
def test_refused(make: Any, param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(words)) as caught:
        make()
    assert caught.value.param == param


@pytest.mark.parametrize("role", ["tool", "system", "assistant", "user"])
def test_contents_that_are_no_text(role: str) -> None:
    """Nothing of a message is left out silently."""
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    call = ToolCall("1", "clock", "{}").to_openai()
    chat = {
        "tool": [{"role": "tool", "content": image}],
        "system": [{"role": "system", "content": image}],
        "assistant": [{"role": "assistant", "content": image, "tool_calls": [call]}],
        "user": [{"role": "tool", "content": "a"}, {"role": "user", "content": image}],
    }[role]
    with pytest.raises(InvalidRequest, match="is no text part") as caught:
        Toolbox(TOOLS).messages(chat)
    assert caught.value.param == f"messages[{len(chat) - 1}].content[0]"


def test_refused_by_the_model(model: gemmart.Model) -> None:
    with pytest.raises(ConstraintError, match="parameters of a are no object"):
        model.chat(ASKED, tools=[Tool("a", "", {"type": "array"})])
    with pytest.raises(ConstraintError, match=r'Unimplemented keys: \["propertyNames"\]'):
        model.chat(ASKED, tools=[Tool("a", "", {"propertyNames": {}}, strict=True)])
    assert model.chat(ASKED, tools=[Tool("a", "", {"propertyNames": {}})], max_tokens=2).tokens
    with pytest.raises(InvalidRequest, match="together with tools"):
        model.chat(ASKED, tools=TOOLS, format=gemmart.Format.json())


def test_async(model: gemmart.Model) -> None:
    async def ask() -> gemmart.Completion:
        return await model.aio.chat(ASKED, tools=TOOLS, tool_choice="clock", seed=1)

    assert [call.name for call in asyncio.run(ask()).tool_calls] == ["clock"]
