"""llama.cpp's endpoints for tokens and templates."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from gemmart.model import Model
from gemmart.server import body
from gemmart.server.answers import as_json
from gemmart.server.openai import message_dict
from gemmart.server.schema import DetokenizeRequest, TemplateRequest, TokenizeRequest

if TYPE_CHECKING:
    from gemmart.server.app import App


async def tokenize(request: Request) -> Response:
    asked = await body.read(request, TokenizeRequest)
    model = _model(request)

    def work() -> list[Any]:
        ids = model.tokenize(asked.content, bos=asked.add_special, special=asked.parse_special)
        return [{"id": id, "piece": _piece(model.tokenizer.piece(id))} for id in ids] if asked.with_pieces else ids

    return as_json({"tokens": await asyncio.to_thread(work)})


async def detokenize(request: Request) -> Response:
    asked = await body.read(request, DetokenizeRequest)
    return as_json({"content": await asyncio.to_thread(_model(request).detokenize, asked.tokens, special=True)})


async def apply_template(request: Request) -> Response:
    """The text, for people to read, and the ids, in which what a message says is never a control token."""
    asked = await body.read(request, TemplateRequest)
    model = _model(request)
    messages = [message_dict(message) for message in asked.messages]
    template = request.app.template_of(asked.chat_template)

    def work() -> dict[str, Any]:
        options: dict[str, Any] = {
            "add_generation_prompt": asked.add_generation_prompt,
            "continue_final": asked.continue_final_message,
            "template": template,
        }
        return {
            "prompt": model.apply_template(messages, **options),
            "tokens": model.chat_tokens(messages, **options),
        }

    return as_json(await asyncio.to_thread(work))


def _piece(piece: bytes) -> str | list[int]:
    """A token's text, or its bytes where they are no text alone."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _model(request: Request) -> Model:
    app: App = request.app
    return app.model
