"""Ollama's endpoints that tell of the model."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import Response

from gemmart import __version__
from gemmart.server import body
from gemmart.server.answers import as_json
from gemmart.server.ollama import check_name, name_of
from gemmart.server.ollama_schema import OllamaShowRequest

if TYPE_CHECKING:
    from gemmart.server.app import App

VERSION = "0.13.0"
"""Of Ollama, whose API is followed here: clients look at it before they ask for anything."""
NEVER = "9999-12-31T23:59:59Z"


async def version(request: Request) -> Response:
    return as_json({"version": VERSION, "gemmart": __version__})


async def tags(request: Request) -> Response:
    app: App = request.app
    return as_json({"models": [await _entry(app) | {"modified_at": _modified(app)}]})


async def ps(request: Request) -> Response:
    app: App = request.app
    model = app.model
    running = {
        "size": model.plan.total_bytes,
        "size_vram": 0,
        "expires_at": NEVER,
        "context_length": model.ctx,
    }
    return as_json({"models": [await _entry(app) | running]})


async def show(request: Request) -> Response:
    app: App = request.app
    asked = await body.read(request, OllamaShowRequest)
    check_name(app, asked.model, strict=bool(asked.model))
    model = app.model
    sampling = model.default_sampling
    parameters = {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return as_json(
        {
            "license": model.info.license or "",
            "modelfile": "",
            "parameters": "\n".join(f"{name:<30} {value}" for name, value in parameters.items()),
            "template": model.chat_template or "",
            "details": _details(app),
            "model_info": model.metadata | {"general.parameter_count": model.info.n_parameters},
            "capabilities": ["completion"] if model.chat_template is None else ["completion", "tools"],
            "modified_at": _modified(app),
        }
    )


async def _entry(app: App) -> dict[str, Any]:
    name, model = name_of(app), app.model
    digest = await asyncio.to_thread(lambda: str(model.computed_by["model"]))
    return {"name": name, "model": name, "size": model.info.file_bytes, "digest": digest, "details": _details(app)}


def _details(app: App) -> dict[str, Any]:
    info = app.model.info
    return {
        "parent_model": "",
        "format": "gguf",
        "family": info.family,
        "families": [info.family],
        "parameter_size": _short(info.n_parameters),
        "quantization_level": info.quantization,
    }


def _modified(app: App) -> str:
    return datetime.fromtimestamp(app.modified, UTC).isoformat().replace("+00:00", "Z")


def _short(n: int) -> str:
    """A number of parameters as Ollama writes it: "27.2B", "134.52M"."""
    for size, unit, n_digits in ((10**9, "B", 1), (10**6, "M", 2), (10**3, "K", 0)):
        if n >= size:
            return f"{n / size:.{n_digits}f}{unit}"
    return str(n)
