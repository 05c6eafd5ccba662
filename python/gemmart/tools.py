"""Tools that a model may call: how it is told of them, how it calls them, how it is told what came of that.

No family that runs here has a format of its own for all this, so there is one for all, of plain text (docs/tools.md).
The system prompt ends with the tools and how to call them. A call is

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

after which another one may follow, and then nothing. The answer is held to this: from <tool_call> on, the name is that
of a tool and the arguments are as its schema says. Results come as a user turn of <tool_response>s.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from gemmart.contents import text_of
from gemmart.errors import ConstraintError, InvalidRequest
from gemmart.format import Format

MAX_TOOLS = 128
MAX_CALLS = 16  # of one answer
NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")

PLAIN = frozenset(("$defs", "$schema", "definitions", "description", "properties", "required", "title", "type"))
"""Keys of a schema beside which no other names properties."""
BEGIN, END = "<tool_call>", "</tool_call>"
SECTION = """\
You may call tools. Each line is one of them: its name, what it does, and the JSON schema of its arguments.

{tools}

To call a tool, write its name and its arguments so, one or several times, and nothing after it:

<tool_call>
{{"name": "the tool", "arguments": {{"an argument": "its value"}}}}
</tool_call>

What it returns comes with the next message. Call a tool only if it helps to answer; otherwise answer in words."""

FRAME = re.compile(r'\n\{"name": ("[^"]*"), "arguments": ')
"""What stands between BEGIN and a call's arguments."""

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """Something that a model may call. Raises InvalidRequest for a name that is none."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] | None = None  # the JSON schema of its arguments, an object; None: it has none
    strict: bool = False  # what its schema says and cannot be kept to is an error; otherwise the model is only told

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise InvalidRequest(
                f"tools: the name {self.name!r} is not 1 to 128 letters, digits or any of _ . : / -", "tools"
            )

    @classmethod
    def of(cls, given: Tool | Mapping[str, Any], where: str = "tools") -> Tool:
        """From OpenAI's {"type": "function", "function": {…}}, or what is in it."""
        if isinstance(given, Tool):
            return given
        if not isinstance(given, Mapping):
            raise InvalidRequest(f"{where}: is {type(given).__name__}, expected a tool", where)
        if given.get("type", "function") != "function":
            raise InvalidRequest(f"{where}.type: is {given['type']!r}, expected 'function'", f"{where}.type")
        function = given.get("function", given)
        if not isinstance(function, Mapping):
            raise InvalidRequest(f"{where}.function: is no object", f"{where}.function")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise InvalidRequest(f"{where}.function.parameters: is no JSON schema", f"{where}.function.parameters")
        return cls(
            name=function.get("name", ""),
            description=str(function.get("description") or ""),
            parameters=parameters,
            strict=bool(function.get("strict")),
        )


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that an answer makes."""

    id: str
    name: str
    arguments: str  # JSON; where the answer was cut, perhaps only its beginning

    def to_openai(self) -> dict[str, Any]:
        """As messages have it under `tool_calls`."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class CallDelta:
    """A piece of a call, in a stream: its first one has the id and the name."""

    index: int  # which call of the answer
    arguments: str = ""
    id: str | None = None
    name: str | None = None


class Toolbox:
    """The tools of one answer, and whether it must call one.

    choice: "auto", it may; "required", it must; "none", it cannot, and knows of none; or the name of the one that it
    must call. parallel: whether it may call several at once. allowed: the names of those that it may call, beside which
    it knows the others; None: all. Raises InvalidRequest."""

    def __init__(
        self,
        tools: Iterable[Tool | Mapping[str, Any]],
        choice: str = "auto",
        *,
        parallel: bool = True,
        allowed: Sequence[str] | None = None,
    ) -> None:
        given = [Tool.of(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
        if len(given) > MAX_TOOLS:
            raise InvalidRequest(f"tools: there are {len(given)}, at most {MAX_TOOLS} are allowed", "tools")
        names = [tool.name for tool in given]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidRequest(f"tools: two have the name {twice!r}", "tools")
        for name in (*(allowed or ()), *([choice] if choice not in ("auto", "required", "none") else ())):
            if name not in names:
                raise InvalidRequest(f"tool_choice: there is no tool {name!r}", "tool_choice")
        self._told = () if choice == "none" else tuple(given)
        self._callable = tuple(
            tool
            for tool in self._told
            if choice in ("auto", "required", tool.name) and (allowed is None or tool.name in allowed)
        )
        if choice == "required" and not self._callable:
            raise InvalidRequest("tool_choice: a call is required, but there is no tool to call", "tool_choice")
        self._must = choice not in ("auto", "none")
        self._several = parallel and choice in ("auto", "required")

    def __bool__(self) -> bool:
        """Whether there is anything to call."""
        return bool(self._callable)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """A conversation as any chat template takes it: the tools are in its system prompt, calls and their results are
        text."""
        written = written_out(messages)
        if not self._told:
            return written
        section = SECTION.format(tools="\n".join(_described(tool) for tool in self._told))
        if written and isinstance(written[0], Mapping) and written[0].get("role") in ("system", "developer"):
            content = text_of(written[0].get("content"), "messages[0].content")
            return [{**written[0], "content": f"{content}\n\n{section}" if content else section}, *written[1:]]
        return [{"role": "system", "content": section}, *written]

    @property
    def format(self) -> Format | None:
        """What the answer must look like. Raises ConstraintError."""
        if not self._callable:
            return None
        heads = [
            f'"\\n{{\\"name\\": \\"{tool.name}\\", \\"arguments\\": " arguments_{i}'
            for i, tool in enumerate(self._callable)
        ]
        more = f'("\\n{BEGIN}" call){{0,{MAX_CALLS - 1}}}' if self._several else ""
        start = f'"{BEGIN}" call {more}' if self._must else f"text | begin call {more}"
        rules = [
            f"start: {start}",
            "text: /(?s:.*)/",
            f"begin[lazy]: /(?s:.*){BEGIN}/",
            f'call: ({" | ".join(heads)}) "}}\\n{END}"',
            *(f"arguments_{i}: {_arguments(tool)}" for i, tool in enumerate(self._callable)),
        ]
        if self._must:
            del rules[1:3]
        return Format.made("\n".join(rules) + "\n", param="tools")

    def parser(self) -> CallParser | None:
        """What finds the calls in the answer."""
        return CallParser() if self._callable else None


class CallParser:
    """Splits an answer that comes in pieces into text and calls."""

    def __init__(self) -> None:
        self._held = ""  # what may belong to something that is not complete
        self._in_call = False
        self._scan: _JsonScanner | None = None  # of the arguments under way
        self.calls: list[ToolCall] = []

    @property
    def is_open(self) -> bool:
        """Whether a call is under way."""
        return self._in_call or self._scan is not None

    def push(self, text: str) -> tuple[str, tuple[CallDelta, ...]]:
        """The text and the pieces of calls that are certain now."""
        self._held += text
        words, deltas = "", []
        while True:
            if self._scan is not None:
                n = self._scan.push(self._held)
                deltas += self._arguments(self._held[:n])
                self._held = self._held[n:]
                if not self._scan.complete:
                    break
                self._scan = None
            elif self._in_call:
                found = FRAME.match(self._held)
                if found is None:
                    break
                call = ToolCall("call_" + secrets.token_hex(12), json.loads(found[1]), "")
                deltas.append(CallDelta(len(self.calls), id=call.id, name=call.name))
                self.calls.append(call)
                self._held = self._held[found.end() :]
                self._scan = _JsonScanner()
                self._in_call = False
            elif (at := self._held.find(BEGIN)) >= 0:
                if not self.calls:
                    words += self._held[:at].rstrip()
                self._held = self._held[at + len(BEGIN) :]
                self._in_call = True
            else:
                if not self.calls:
                    n = _certain(self._held)
                    words += self._held[:n]
                    self._held = self._held[n:]
                break
        return words, tuple(deltas)

    def finish(self) -> str:
        """The answer has ended: the text that was held back."""
        held, self._held = self._held, ""
        if self.calls or self._scan:
            return ""
        return BEGIN + held if self._in_call else held

    def _arguments(self, text: str) -> list[CallDelta]:
        if not text:
            return []
        call = self.calls[-1]
        self.calls[-1] = ToolCall(call.id, call.name, call.arguments + text)
        return [CallDelta(len(self.calls) - 1, text)]


class _JsonScanner:
    """Finds the end of a JSON object."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.complete = False

    def push(self, text: str) -> int:
        """How many characters of `text` belong to it."""
        for i, char in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif char == "\\":
                    self._escaped = True
                elif char == '"':
                    self._in_string = False
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.complete = True
                    return i + 1
        return len(text)


def _certain(text: str) -> int:
    """How much of `text` is no part of what leads to a call: blanks at its end, or the beginning of BEGIN."""
    for n in range(min(len(BEGIN) - 1, len(text)), 0, -1):
        if text.endswith(BEGIN[:n]):
            return len(text[:-n].rstrip())
    return len(text.rstrip())


def _described(tool: Tool) -> str:
    found = {"name": tool.name, "description": tool.description, "parameters": tool.parameters or {}}
    try:
        return json.dumps({name: value for name, value in found.items() if value}, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(
            f"tools: {tool.name}: the parameters must be what JSON can hold: {error}", "tools"
        ) from None


def _arguments(tool: Tool) -> str:
    """The rule of a tool's arguments."""
    schema = dict(tool.parameters or {"properties": {}})
    if schema.setdefault("type", "object") != "object":
        raise ConstraintError(f"tools: the parameters of {tool.name} are no object", "tools")
    if schema.keys() <= PLAIN:  # what it does not name is not made up
        schema.setdefault("additionalProperties", False)
    return Format.schema(schema, param=f"tools: {tool.name}", lenient=not tool.strict).source.removeprefix("start: ")


def written_out(messages: Sequence[Message]) -> list[Message]:
    """A conversation in which calls and their results are text, results in user turns. Raises InvalidRequest."""
    names: dict[str, str] = {}  # of the calls by their ids
    written: list[Message] = []
    before = None  # the role of the message before
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        where = f"messages[{i}].content"
        if role == "assistant" and message.get("tool_calls"):
            calls = [
                _written(call, f"messages[{i}].tool_calls[{at}]", names)
                for at, call in enumerate(message["tool_calls"])
            ]
            text = "" if message.get("content") is None else text_of(message["content"], where)
            written.append({"role": "assistant", "content": "\n".join([*([text] if text else []), *calls])})
        elif role == "tool":
            text = _result(message, i, names)
            if before == "tool":
                text = f"{written.pop()['content']}\n{text}"
            written.append({"role": "user", "content": text})
        elif role == "user" and before == "tool":  # templates want roles that alternate
            text = text_of(message.get("content"), where)
            written[-1] = {**message, "content": f"{written[-1]['content']}\n\n{text}"}
        else:
            written.append(message)
        before = role
    return written


def _result(message: Message, i: int, names: Mapping[str, str]) -> str:
    """What came of a call, the i-th message, as the model is told it."""
    id = message.get("tool_call_id")
    if id is not None and id not in names:
        where = f"messages[{i}].tool_call_id"
        raise InvalidRequest(f"{where}: no call before has the id {id!r}", where)
    name = message.get("name") if id is None else names[id]
    result = {} if name is None else {"name": name}
    result["content"] = text_of(message.get("content"), f"messages[{i}].content")
    return "<tool_response>\n" + json.dumps(result, ensure_ascii=False).replace("</", "<\\/") + "\n</tool_response>"


def _written(call: Any, where: str, names: dict[str, str]) -> str:
    """A call of the conversation as the model would write it; its name is noted."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise InvalidRequest(f"{where}: is no call of a function", where)
    names[str(call.get("id"))] = function["name"]
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):  # of an answer that was cut off they are a beginning, and stay text
            arguments = json.loads(arguments or "{}")
    value = json.dumps(arguments, ensure_ascii=False)
    return f'{BEGIN}\n{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": {value}}}\n{END}'


NO_TOOLS = Toolbox(())
"""Of an answer that calls nothing."""
