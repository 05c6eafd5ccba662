"""Ollama's endpoints that answer: a chat, and a prompt."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gemmart.errors import GemmartError, InvalidRequest
from gemmart.format import Format
from gemmart.results import Completion
from gemmart.sampling import check_number
from gemmart.server import body
from gemmart.server.answers import Answer, Call, answer, as_json, sampling_of, token_logprobs
from gemmart.server.errors import Dialect, unsupported
from gemmart.server.formats import tool_of
from gemmart.server.generation import Placed, json_line
from gemmart.server.ollama_schema import (
    OllamaChatRequest,
    OllamaError,
    OllamaGenerateRequest,
    OllamaOptions,
    OllamaRequest,
)
from gemmart.stops import StopStrings
from gemmart.tools import NO_TOOLS, CallDelta, Toolbox

if TYPE_CHECKING:
    from gemmart.server.app import App

LINES = "application/x-ndjson"


async def chat(request: Request) -> Response:
    app: App = request.app
    asked = await body.read(request, OllamaChatRequest)
    _check(app, asked)
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(asked.messages or ()):
        if message.images:
            raise unsupported(f"messages[{i}].images", "this model reads text only")
        more: dict[str, Any] = {}
        if message.tool_calls:
            more["tool_calls"] = [{"function": msgspec.to_builtins(call.function)} for call in message.tool_calls]
        if message.tool_name is not None:
            more["name"] = message.tool_name
        messages.append({"role": message.role, "content": message.content or ""} | more)
    toolbox = Toolbox(tool_of(tool) for tool in asked.tools or ())
    goes_on = bool(messages) and messages[-1]["role"] == "assistant" and messages[-1]["content"] != ""
    goes_on = goes_on and "tool_calls" not in messages[-1]
    call = _call(asked, partial(app.model.chat_tokens, messages, continue_final=goes_on, toolbox=toolbox), toolbox)
    if not messages:
        return _loaded(app, {"message": {"role": "assistant", "content": ""}})
    app.log_prompt(request, messages)
    return await answer(request, call, Lines(app, lambda text: {"message": {"role": "assistant", "content": text}}))


async def generate(request: Request) -> Response:
    app: App = request.app
    asked = await body.read(request, OllamaGenerateRequest)
    _check(app, asked)
    for name in ("suffix", "template", "images"):
        if getattr(asked, name):
            raise unsupported(name, "this server does not offer it")
    if asked.raw and (asked.system or asked.context):
        raise InvalidRequest("raw: goes with neither system nor context", "raw")
    prompt = asked.prompt or ""
    call = _call(asked, partial(_encode, app, asked, prompt))
    if not prompt:
        return _loaded(app, {"response": ""})
    app.log_prompt(request, prompt)
    return await answer(request, call, Lines(app, lambda text: {"response": text}, tells_context=not asked.raw))


def _check(app: App, asked: OllamaRequest) -> None:
    check_name(app, asked.model)
    options = asked.options or OllamaOptions()
    if asked.think:
        raise unsupported("think", f"{name_of(app)} does not support thinking")
    if options.mirostat:
        raise unsupported("options.mirostat", "this server does not offer it")
    if options.tfs_z not in (None, 1):
        raise unsupported("options.tfs_z", "this server does not offer it")
    if options.num_ctx is not None and options.num_ctx > app.model.ctx:
        raise InvalidRequest(
            f"options.num_ctx: is {options.num_ctx}, but the server was started with a context of {app.model.ctx} "
            "tokens; leave it out, or start the server with a larger one",
            "options.num_ctx",
        )
    if asked.top_logprobs and not asked.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs: true", "top_logprobs")


def _call(asked: OllamaRequest, encode: Callable[[], list[int]], toolbox: Toolbox = NO_TOOLS) -> Call:
    """Raises InvalidRequest for a wrong option, under the name that it has here."""
    options = asked.options or OllamaOptions()
    n, seed = options.num_predict, options.seed
    stops = (options.stop,) if isinstance(options.stop, str) else tuple(options.stop or ())
    try:
        StopStrings(stops)
        if seed is not None:
            check_number("seed", seed, int, -(2**63), 2**64 - 1)
        sampling = sampling_of(options)
    except InvalidRequest as error:
        raise InvalidRequest(f"options.{error}", f"options.{error.param}") from None
    return Call(
        prompts=[encode],
        sampling=sampling,
        seed=None if seed is None or seed < 0 else seed,
        max_tokens=None if n is None or n <= 0 else n,  # -1, -2 and 0: as far as the context reaches
        stop=stops,
        logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
        format=partial(_format, asked),
        toolbox=toolbox,
        stream=asked.stream is not False,
    )


def _format(asked: OllamaRequest) -> Format | None:
    if not asked.format:
        return None
    return Format.json() if asked.format == "json" else Format.schema(asked.format)


def _encode(app: App, asked: OllamaGenerateRequest, prompt: str) -> list[int]:
    model = app.model
    if asked.raw:
        return model.tokenize(prompt, bos=True, special=True)
    if model.chat_template is None and not asked.system:
        ids = model.tokenize(prompt, bos=True)
    else:
        system = [{"role": "system", "content": asked.system}] if asked.system else []
        ids = model.chat_tokens([*system, {"role": "user", "content": prompt}])
    for token in asked.context or ():
        if token >= model.info.n_vocab:
            raise InvalidRequest(f"context: id {token} is outside 0 to {model.info.n_vocab - 1}", "context")
    if asked.context and ids[0] == model.tokenizer.bos:
        del ids[0]
    return [*(asked.context or ()), *ids]


def _loaded(app: App, empty: dict[str, Any]) -> Response:
    """The answer to a request that only wants the model to be there."""
    return as_json(_head(app) | empty | {"done": True, "done_reason": "load"})


def _head(app: App) -> dict[str, Any]:
    return {"model": name_of(app), "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def name_of(app: App) -> str:
    """The model as Ollama calls one, with a tag."""
    return app.model_id if ":" in app.model_id else f"{app.model_id}:latest"


def check_name(app: App, name: str | None, *, strict: bool = False) -> None:
    """Whether the model may be called so, as App.check_name(); the tag that everything has may be there."""
    app.check_name(name and name.removesuffix(":latest"), strict=strict)


class Lines:
    """An answer as lines of JSON, or as the last of them with all of the text."""

    media_type = LINES
    ping = b""

    def __init__(self, app: App, said: Callable[[str], dict[str, Any]], *, tells_context: bool = False) -> None:
        """`said`: the field for a text. `tells_context`: the token ids of prompt and answer, from which a next prompt
        may go on."""
        self._app = app
        self._said = said
        self._tells_context = tells_context
        self._began = time.monotonic_ns()

    def whole(self, answer: Answer) -> dict[str, Any]:
        (choice,) = answer.choices
        (result,) = answer.results
        logprobs = {} if result.logprobs is None else self._logprobs(choice.logprobs)
        said = self._said(choice.text)
        if called := _called(result):
            said["message"]["tool_calls"] = called
        return _head(self._app) | said | logprobs | self._done(answer)

    def begin(self, answer: Answer) -> bytes:
        return b""

    def part(self, index: int, text: str, logprobs: Sequence[Placed]) -> bytes:
        more = self._logprobs(logprobs) if logprobs else {}
        return _line(_head(self._app) | self._said(text) | {"done": False} | more)

    def calls(self, index: int, calls: Sequence[CallDelta]) -> bytes:
        return b""  # they are told when they are complete

    def last(self, index: int, result: Completion) -> bytes:
        called = _called(result)
        if not called:
            return b""
        message = {"role": "assistant", "content": "", "tool_calls": called}
        return _line(_head(self._app) | {"message": message, "done": False})

    def end(self, answer: Answer) -> bytes:
        return _line(_head(self._app) | self._said("") | self._done(answer))

    def failed(self, error: GemmartError, request_id: str) -> bytes:
        return _line(error_body(error, request_id))

    def _logprobs(self, logprobs: Sequence[Placed]) -> dict[str, Any]:
        return {"logprobs": token_logprobs(self._app.model.tokenizer, logprobs)}

    def _done(self, answer: Answer) -> dict[str, Any]:
        (result,) = answer.results
        context = {"context": [*answer.prompts[0], *result.tokens]} if self._tells_context else {}
        return {
            "done": True,
            "done_reason": "stop" if result.finish_reason == "tool_calls" else result.finish_reason,
            **context,
            "total_duration": time.monotonic_ns() - self._began,
            "load_duration": 0,
            "prompt_eval_count": result.usage.prompt_tokens,
            "prompt_eval_duration": round(1e9 * result.timings.prompt_s),
            "eval_count": result.usage.completion_tokens,
            "eval_duration": round(1e9 * result.timings.generate_s),
        }


def _called(result: Completion) -> list[dict[str, Any]]:
    """The calls of tools that are complete."""
    found = []
    for call in result.tool_calls:
        with suppress(ValueError, RecursionError):  # where the answer was cut
            found.append({"function": {"name": call.name, "arguments": json.loads(call.arguments)}})
    return found


def _line(value: dict[str, Any]) -> bytes:
    return json_line(value) + b"\n"


def error_body(error: GemmartError, request_id: str) -> dict[str, Any]:
    """The JSON that stands for an error."""
    return {"error": str(error)}


DIALECT = Dialect(
    error_body,
    OllamaError,
    missing="there is no such endpoint; this server has one model, and neither fetches nor changes any",
)
