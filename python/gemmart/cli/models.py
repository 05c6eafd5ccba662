"""Which model a command means, and its loading."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gemmart import Model
    from gemmart.sources import ModelSource
    from gemmart.terminal import Messages


def model_and_rest(arguments: Sequence[str], given: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The model, from -m or the first argument, and the rest of the arguments. One argument alone that holds a blank
    and is no file is a prompt for the default model."""
    rest = list(arguments)
    model: str | None = given["model_option"]
    is_prompt = len(rest) == 1 and len(rest[0].split()) > 1 and not os.path.exists(os.path.expanduser(rest[0]))
    if model is None and rest and not is_prompt:
        model = rest.pop(0)
    if len(rest) > 1:
        raise click.UsageError(f"{rest[1]!r}: too many arguments; a prompt of several words needs quotes")
    return model, rest


def only_model(arguments: Sequence[str], given: dict[str, Any]) -> str | None:
    """The model, from -m or the argument, where there are no others."""
    names = [name for name in (given["model_option"], *arguments) if name is not None]
    if len(names) > 1:
        raise click.UsageError(f"{names[1]!r}: too many arguments")
    return names[0] if names else None


def resolve_model(ref: str | None, given: dict[str, Any], messages: Messages) -> ModelSource:
    from gemmart import sources

    with messages.progress() as progress:
        return sources.resolve(ref, offline=given["offline"], progress=progress, notice=messages.warn)


def load_model(ref: str | None, given: dict[str, Any], messages: Messages, **more: Any) -> Model:
    import gemmart

    with messages.progress() as progress:
        return gemmart.load(
            ref,
            ctx=given["ctx"] or None,
            threads=given["threads"],
            batch=given["batch"],
            kv_type=given["kv_type"],
            mmap=given["mmap"],
            precise=given["precise"],
            offline=given["offline"],
            progress=progress,
            notice=messages.warn,
            **more,
        )
