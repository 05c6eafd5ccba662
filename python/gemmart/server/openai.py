"""OpenAI's endpoints: chat completions, completions, models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gemmart.errors import InvalidRequest
from gemmart.server import body, limits
from gemmart.server.answers import Call, answer, as_json, sampling_of
from gemmart.server.errors import unsupported
from gemmart.server.formats import format_of, toolbox_of
from gemmart.server.openai_shapes import Chat, Text
from gemmart.server.schema import ChatMessage, ChatRequest, CompletionRequest, Options, biases
from gemmart.tools import NO_TOOLS, Toolbox

if TYPE_CHECKING:
    from gemmart.server.app import App


async def models(request: Request) -> Response:
    app: App = request.app
    return as_json({"object": "list", "data": [app.describe()]})


async def model(request: Request) -> Response:
    app: App = request.app
    app.check_name(request.path_params["id"], strict=True)
    return as_json(app.describe())


async def chat_completions(request: Request) -> Response:
    app: App = request.app
    asked = await body.read(request, ChatRequest)
    app.check_name(asked.model)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidRequest("top_logprobs: needs logprobs: true", "top_logprobs")
    max_tokens = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    logprobs = (asked.top_logprobs or 0) if asked.logprobs else None
    messages = [message_dict(message) for message in asked.messages]
    app.log_prompt(request, messages)

    toolbox = toolbox_of(asked)
    continue_final = bool(asked.continue_final_message)
    template = app.template_of(asked.chat_template)
    encode = partial(app.model.chat_tokens, messages, continue_final=continue_final, toolbox=toolbox, template=template)
    call = _call(asked, [encode], max_tokens=max_tokens, logprobs=logprobs, toolbox=toolbox)
    return await answer(request, call, Chat(app, asked.include_usage))


async def completions(request: Request) -> Response:
    app: App = request.app
    asked = await body.read(request, CompletionRequest)
    app.check_name(asked.model)
    if asked.suffix:
        raise unsupported("suffix", "this server does not fill in between")
    if asked.best_of not in (None, 1):
        raise unsupported("best_of", "this server offers 1 only")
    prompts = prompts_of(asked.prompt, "prompt")
    if len(prompts) * (asked.n or 1) > limits.PROMPTS:
        raise InvalidRequest(
            f"prompt: {len(prompts)} prompts with n = {asked.n or 1} are more than {limits.PROMPTS} answers", "prompt"
        )
    app.log_prompt(request, prompts)
    echo = await asyncio.to_thread(_texts_of, app, prompts) if asked.echo else None
    scored = asked.logprobs is not None  # then the prompt comes when it is read, with its log-probabilities
    encoders = [partial(_encode, app, prompt, special=bool(asked.parse_special)) for prompt in prompts]
    call = _call(asked, encoders, max_tokens=asked.max_tokens, logprobs=asked.logprobs, echo=echo if scored else None)
    return await answer(request, call, Text(app, asked.include_usage, None if scored else echo, asked.n or 1))


def _call(
    asked: Options,
    prompts: Sequence[Callable[[], list[int]]],
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echo: Sequence[str] | None = None,
    toolbox: Toolbox = NO_TOOLS,
) -> Call:
    return Call(
        prompts=prompts,
        sampling=sampling_of(asked, logit_bias=biases(asked.logit_bias)),
        n=asked.n or 1,
        seed=asked.seed,
        max_tokens=max_tokens,
        stop=asked.stop,
        logprobs=logprobs,
        echo=echo,
        ignore_eos=bool(asked.ignore_eos),
        format=partial(format_of, asked),
        toolbox=toolbox,
        stream=bool(asked.stream),
    )


def prompts_of(given: str | list[str | int | list[int]], name: str) -> list[str | list[int]]:
    """The prompts of the field `name`: a text, ids, or a list of texts or of lists of ids. Raises InvalidRequest."""
    if isinstance(given, str):
        return [given]
    if not given:
        raise InvalidRequest(f"{name}: is empty", name)
    ids = [token for token in given if isinstance(token, int)]
    if len(ids) == len(given):
        return [ids]
    prompts = [prompt for prompt in given if not isinstance(prompt, int)]
    if ids:
        raise InvalidRequest(f"{name}: token ids stand beside texts or lists", name)
    return prompts


def _encode(app: App, prompt: str | list[int], *, special: bool) -> list[int]:
    return app.model.tokenize(prompt, bos=True, special=special) if isinstance(prompt, str) else prompt


def _texts_of(app: App, prompts: Sequence[str | list[int]]) -> list[str]:
    return [
        prompt if isinstance(prompt, str) else app.model.detokenize(prompt, special=True, name="prompt")
        for prompt in prompts
    ]


def message_dict(message: ChatMessage) -> dict[str, Any]:
    """A message as templates take it."""
    found = msgspec.to_builtins(message)
    return {name: value for name, value in found.items() if value is not None or name == "content"}
