"""Which model a command means, and its loading."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gemmart.cli.options import device_of, log

if TYPE_CHECKING:
    from gemmart import Model
    from gemmart.sources import ModelSource
    from gemmart.terminal import Messages


def model_and_rest(
    arguments: Sequence[str], given: dict[str, Any], *, several: bool = False
) -> tuple[str | None, list[str]]:
    """The model, from -m or the first argument, and the rest of the arguments: one, or `several`. One argument alone
    that holds a blank and is no file is a prompt for the model that a setting names, or the default one."""
    rest = list(arguments)
    is_prompt = len(rest) == 1 and len(rest[0].split()) > 1 and not os.path.exists(os.path.expanduser(rest[0]))
    model: str | None = given["model_option"] if _typed_option() or is_prompt or not rest else rest.pop(0)
    if len(rest) > 1 and not several:
        raise click.UsageError(f"{rest[1]!r}: too many arguments; a prompt of several words needs quotes")
    return model, rest


def only_model(arguments: Sequence[str], given: dict[str, Any]) -> str | None:
    """The model, from -m or the argument, or else a setting, where there are no other arguments."""
    names = typed_models(arguments, given)
    if len(names) > 1:
        raise click.UsageError(f"{names[1]!r}: too many arguments")
    name: str | None = names[0] if names else given["model_option"]
    return name


def resolve_model(ref: str | None, given: dict[str, Any], messages: Messages) -> ModelSource:
    """Find the model, fetching it if need be; None is the one that was used last, or else the default one."""
    from gemmart import sources

    ref = ref or last_or_default(given["offline"], messages)
    with messages.progress() as progress:
        return sources.resolve(ref, offline=given["offline"], progress=progress, notice=messages.warn)


def load_model(ref: str | None, given: dict[str, Any], messages: Messages, **more: Any) -> Model:
    """Load the model, and remember that it was used."""
    import gemmart
    from gemmart.terminal import on_gpus

    found = ref or last_or_default(given["offline"], messages)
    if given.pop("recompile", False):  # once: a chat may load other models later
        from gemmart.cli.compile import recompile

        recompile(given, messages)
    with messages.progress() as progress:
        model = gemmart.load(
            found,
            ctx=given["ctx"] or None,
            threads=given["threads"],
            batch=given["batch"],
            kv_type=given["kv_type"],
            mmap=given["mmap"],
            mlock=given["mlock"],
            check_weights=given["check_weights"],
            precise=given["precise"],
            offline=given["offline"],
            progress=progress,
            notice=messages.warn,
            **more,
        )
    if where := on_gpus(model.plan):
        log.info("gpu: %s", where)
    if ref is not None:
        _remember(ref)
    return model


def load_options(given: dict[str, Any]) -> dict[str, Any]:
    """What chat_options, draft_options, guess_options and those of GPUs say, as load_model() takes it."""
    names = ("lookup", "draft", "draft_max", "system_style", "strict_roles", "tinyblas")
    return {name: given[name] for name in names} | {"template": given["chat_template"]} | device_of(given)


def last_model_file() -> Path:
    """Where the name of the model is kept that was used last."""
    from platformdirs import user_state_path

    return user_state_path("gemmart") / "last-model"


def typed_models(arguments: Sequence[str], given: dict[str, Any]) -> list[str]:
    """-m and the arguments, as far as they stand on the command line."""
    return [*([given["model_option"]] if _typed_option() else []), *arguments]


def _typed_option() -> bool:
    """Whether -m stands on the command line."""
    return click.get_current_context().get_parameter_source("model_option") is ParameterSource.COMMANDLINE


def _remember(ref: str) -> None:
    path = os.path.abspath(os.path.expanduser(ref))
    with contextlib.suppress(OSError):  # a convenience, which a read-only home must not spoil
        last_model_file().parent.mkdir(parents=True, exist_ok=True)
        last_model_file().write_text(path if _is_here(path) else ref, encoding="utf-8")


def _is_here(path: str) -> bool:
    """Whether a path, ARCHIVE@ENTRY or the common name of .cat slices stands for something on this machine."""
    return any(map(os.path.exists, (path, path.rpartition("@")[0] or path, f"{path}.cat0")))


def last_or_default(offline: bool, messages: Messages) -> str | None:
    """The model for who names none; None stands for the default one, which on a terminal is asked for before it is
    fetched."""
    from gemmart import sources
    from gemmart.errors import ModelNotFound

    with contextlib.suppress(OSError, UnicodeDecodeError):
        last = last_model_file().read_text(encoding="utf-8").strip()
        if last and (not os.path.isabs(last) or _is_here(last)):
            messages.note(f"model: {last}, as last time")
            return last
        if last:
            messages.warn(f"the model of last time, {last}, is gone; taking the default one")
    if not offline and sys.stdin.isatty() and sys.stderr.isatty():
        try:
            sources.resolve(sources.DEFAULT, offline=True)
        except ModelNotFound:
            question = f"No model is named. Fetch {sources.DEFAULT} (about 1.7 GB) from the Hugging Face hub?"
            if not click.confirm(question, default=True, err=True):
                names = ", ".join(sorted(sources.aliases()))
                raise click.UsageError(f"no model: name a file, or one of {names}") from None
    return None
