"""Anthropic's conversations and tools as the model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gemmart.errors import InvalidRequest
from gemmart.server.anthropic_schema import NEEDED, Block, CountTokensRequest, MessagesRequest, Turn
from gemmart.server.schema import text_of
from gemmart.tools import Tool, Toolbox

Asked = CountTokensRequest | MessagesRequest


def messages_of(asked: Asked) -> list[dict[str, Any]]:
    """The conversation. Raises InvalidRequest for a block that has not what it needs, or tells of an unknown call."""
    system = text_of(asked.system, "system", between="\n\n") if asked.system else ""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    called: set[str] = set()
    for i, turn in enumerate(asked.messages):
        if isinstance(turn.content, str):
            messages.append({"role": turn.role, "content": turn.content})
        else:
            messages += _messages(turn, turn.content, f"messages[{i}].content", called)
    return messages


def _messages(turn: Turn, blocks: Sequence[Block], where: str, called: set[str]) -> list[dict[str, Any]]:
    """Those of one turn: results of calls come before what is said. `called`: the ids of the calls so far."""
    said, calls, results = "", [], []
    for at, block in enumerate(blocks):
        place = f"{where}[{at}]"
        if block.type not in NEEDED:
            message = f"{place}.type: {block.type!r} is no text, call or result; this model reads text only"
            raise InvalidRequest(message, f"{place}.type")
        for name in NEEDED[block.type]:
            if getattr(block, name) is None:
                raise InvalidRequest(f"{place}.{name}: is missing", f"{place}.{name}")
        if block.type == "text":
            said += block.text or ""
        elif block.type == "tool_use":
            called.add(str(block.id))
            calls.append({"id": block.id, "function": {"name": block.name, "arguments": block.input}})
        else:
            if block.tool_use_id not in called:
                place += ".tool_use_id"
                raise InvalidRequest(f"{place}: no call before has the id {block.tool_use_id!r}", place)
            text = text_of(block.content or "", f"{place}.content")
            text = f"error: {text}" if block.is_error else text
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": text})
    if calls:
        return [*results, {"role": turn.role, "content": said, "tool_calls": calls}]
    return [*results, {"role": turn.role, "content": said}] if said or not results else results


def toolbox_of(asked: Asked) -> Toolbox:
    """Raises InvalidRequest."""
    given = asked.tools or ()
    tools = [Tool(tool.name, tool.description or "", tool.input_schema, bool(tool.strict)) for tool in given]
    choice = asked.tool_choice
    if choice is None:
        return Toolbox(tools)
    if choice.type == "tool":
        if choice.name is None:
            raise InvalidRequest("tool_choice.name: is missing", "tool_choice.name")
        return Toolbox(tools, "required", parallel=False, allowed=[choice.name])
    kind = "required" if choice.type == "any" else choice.type
    return Toolbox(tools, kind, parallel=not choice.disable_parallel_tool_use)
