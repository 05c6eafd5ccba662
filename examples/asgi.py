"""The server within an application of your own: MODEL=gemma-2-2b-it uvicorn --app-dir examples asgi:app"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import gemmart


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    model = await asyncio.to_thread(gemmart.load, os.environ.get("MODEL"), parallel=4)
    app.state.model = model
    app.mount("/llm", model.asgi())  # http://127.0.0.1:8000/llm/v1/chat/completions
    yield
    await asyncio.to_thread(model.close)


async def title(request: Request) -> Response:
    """A title for a text; on the engine that the server uses too."""
    question = "A title for this text, and nothing else:\n\n" + (await request.body()).decode()
    answer = await request.app.state.model.aio.chat([{"role": "user", "content": question}], max_tokens=20)
    return PlainTextResponse(answer.text)


app = Starlette(routes=[Route("/title", title, methods=["POST"])], lifespan=lifespan)
