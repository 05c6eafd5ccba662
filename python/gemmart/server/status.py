"""How the server is: health, settings, counters."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from gemmart.server.answers import as_json
from gemmart.server.errors import draining

if TYPE_CHECKING:
    from gemmart.server.app import App


async def health(request: Request) -> Response:
    """200, or 503 while the model loads or the server ends."""
    app: App = request.app
    if app.is_draining:
        raise draining()
    _ = app.model
    return as_json({"status": "ok"})


async def props(request: Request) -> Response:
    """The settings, for pages and programs; under llama.cpp's names where it has one."""
    app: App = request.app
    model = app.model
    n_running, n_waiting = model.n_requests
    return as_json(
        {
            "build_info": app.fingerprint,
            "model": app.model_id,
            "total_slots": model.plan.parallel,
            "default_generation_settings": {"n_ctx": model.ctx, "params": asdict(model.default_sampling)},
            "chat_template": model.chat_template,
            "running": n_running,
            "waiting": n_waiting,
        }
    )


async def slots(request: Request) -> Response:
    """What is computed now; nothing of what it says."""
    app: App = request.app
    return as_json(app.model.slots)


async def metrics(request: Request) -> Response:
    app: App = request.app
    content, content_type = app.metrics.text()
    return Response(content, media_type=content_type)
