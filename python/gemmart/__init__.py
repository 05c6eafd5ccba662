"""Run Gemma on your own machine.

    import gemmart

    with gemmart.load("gemma-2-2b-it") as model:
        for delta in model.stream_chat([{"role": "user", "content": "Hello!"}]):
            print(delta.text, end="", flush=True)

Errors are gemmart.errors.GemmartError and its subclasses. The package prints nothing; it logs to the logger "gemmart".
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemmart.aio import AsyncModel, AsyncStream
    from gemmart.errors import (
        BuildError,
        Cancelled,
        ChecksumError,
        ConstraintError,
        ContextOverflow,
        DeviceError,
        DiskFull,
        DownloadError,
        GemmartError,
        InternalError,
        InvalidRequest,
        ModelChanged,
        ModelFormatError,
        ModelNotFound,
        NumericError,
        OutOfMemory,
        TemplateError,
        TemplateLimit,
        TruncatedModel,
        UnsupportedModel,
    )
    from gemmart.format import Format
    from gemmart.loading import devices, load, plan
    from gemmart.model import Model
    from gemmart.results import Completion, Delta, Device, GpuPlan, MemoryPlan, ModelInfo, Timings, TokenLogprob, Usage
    from gemmart.sampling import Sampling
    from gemmart.session import Session
    from gemmart.sources import pull
    from gemmart.stream import Stream
    from gemmart.tools import Tool, ToolCall

# Where each public name is; imported when it is first asked for, so that `import gemmart` is quick.
_HOMES = {
    "aio": "AsyncModel AsyncStream",
    "errors": (
        "BuildError Cancelled ChecksumError ConstraintError ContextOverflow DeviceError DiskFull DownloadError "
        "GemmartError InternalError InvalidRequest ModelChanged ModelFormatError ModelNotFound NumericError "
        "OutOfMemory TemplateError TemplateLimit TruncatedModel UnsupportedModel"
    ),
    "format": "Format",
    "loading": "devices load plan",
    "model": "Model",
    "results": "Completion Delta Device GpuPlan MemoryPlan ModelInfo Timings TokenLogprob Usage",
    "sampling": "Sampling",
    "session": "Session",
    "sources": "pull",
    "tools": "Tool ToolCall",
    "stream": "Stream",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

__all__ = [
    "AsyncModel",
    "AsyncStream",
    "BuildError",
    "Cancelled",
    "ChecksumError",
    "Completion",
    "ConstraintError",
    "ContextOverflow",
    "Delta",
    "Device",
    "DeviceError",
    "DiskFull",
    "DownloadError",
    "Format",
    "GemmartError",
    "GpuPlan",
    "InternalError",
    "InvalidRequest",
    "MemoryPlan",
    "Model",
    "ModelChanged",
    "ModelFormatError",
    "ModelInfo",
    "ModelNotFound",
    "NumericError",
    "OutOfMemory",
    "Sampling",
    "Session",
    "Stream",
    "TemplateError",
    "TemplateLimit",
    "Timings",
    "TokenLogprob",
    "Tool",
    "ToolCall",
    "TruncatedModel",
    "UnsupportedModel",
    "Usage",
    "devices",
    "load",
    "plan",
    "pull",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("gemmart")
    if name not in _HOME:
        raise AttributeError(f"module 'gemmart' has no attribute {name!r}")
    return getattr(import_module(f"gemmart.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
