"""What a request says of its answer's format and of tools, as the model takes it."""

from __future__ import annotations

from gemmart.errors import InvalidRequest
from gemmart.format import Format
from gemmart.server.schema import ChatRequest, FunctionName, Options, ToolSpec
from gemmart.tools import Tool, Toolbox


def format_of(asked: Options) -> Format | None:
    """From response_format, grammar, regex or json_schema, of which there may be one. Raises InvalidRequest,
    ConstraintError."""
    wanted = asked.response_format
    given = [name for name in ("grammar", "regex", "json_schema") if getattr(asked, name) not in (None, "")]
    if wanted is not None and wanted.type != "text":
        given.insert(0, "response_format")
    if len(given) > 1:
        raise InvalidRequest(f"{given[1]}: an answer has one format, and there is {given[0]} too", given[1])
    if asked.grammar:
        return Format.lark(asked.grammar, param="grammar")
    if asked.regex:
        return Format.regex(asked.regex, param="regex")
    if asked.json_schema is not None:
        return Format.schema(asked.json_schema, param="json_schema")
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        if wanted.schema is None:
            return Format.json(param="response_format")
        return Format.schema(wanted.schema, param="response_format.schema")
    if wanted.json_schema is None:
        raise InvalidRequest("response_format.json_schema: is missing", "response_format.json_schema")
    schema = {"type": "object"} if wanted.json_schema.schema is None else wanted.json_schema.schema
    return Format.schema(schema, param="response_format.json_schema.schema")


def toolbox_of(asked: ChatRequest) -> Toolbox:
    """From tools, tool_choice and parallel_tool_calls. Raises InvalidRequest."""
    tools = [tool_of(tool) for tool in asked.tools or ()]
    parallel = asked.parallel_tool_calls is not False
    choice = asked.tool_choice
    if choice is None or isinstance(choice, str):
        return Toolbox(tools, choice or "auto", parallel=parallel)
    if choice.type == "function":
        # By "allowed", since a tool may be called as a mode is.
        name = _name(choice.function, "tool_choice.function")
        return Toolbox(tools, "required", parallel=False, allowed=[name])
    if choice.allowed_tools is None:
        raise InvalidRequest("tool_choice.allowed_tools: is missing", "tool_choice.allowed_tools")
    names = [
        _name(tool.function, f"tool_choice.allowed_tools.tools[{i}].function")
        for i, tool in enumerate(choice.allowed_tools.tools)
    ]
    return Toolbox(tools, choice.allowed_tools.mode, parallel=parallel, allowed=names)


def tool_of(tool: ToolSpec) -> Tool:
    function = tool.function
    return Tool(function.name, function.description or "", function.parameters, bool(function.strict))


def _name(function: FunctionName | None, where: str) -> str:
    if function is None:
        raise InvalidRequest(f"{where}: is missing", where)
    return function.name
