"""`gemmart show`: what a model's file says."""

from __future__ import annotations

import os
from typing import Any

import click

from gemmart.cli.models import only_model, resolve_model
from gemmart.cli.options import (
    MODEL,
    Command,
    flag,
    json_option,
    message_options,
    messages_of,
    model_options,
    options,
    print_json,
)


@click.command("show", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar="[MODEL]")
@model_options
@options("Output", (("--template",), flag("Print the chat template alone.", setting=False)))
@json_option
@message_options
def command(arguments: tuple[str, ...], template: bool, **given: Any) -> int:
    """What a model's file says of itself, its licence included."""
    from gemmart import show as show_module
    from gemmart.sources import shortnames
    from gemmart.terminal import table

    messages = messages_of(given)
    name = only_model(arguments, given)
    alias = None if name is None or os.path.exists(name) else shortnames.find(name)
    if alias is not None and not _is_here(name):
        about = {"name": name, "alias": alias.ref, "size": alias.size, "sha256": alias.sha256}
        if given["as_json"]:
            print_json(about)
        else:
            print(table((key, value) for key, value in about.items() if value is not None))
            messages.note(f"not fetched yet; `gemmart pull {name}` fetches it")
        return 0
    found = show_module.report(resolve_model(name, given, messages))
    found["alias"] = None if alias is None else alias.ref
    if template:
        if found["chat_template"] is None:
            raise click.UsageError(f"--template: {found['name']} is a base model: its file has no chat template")
        print(found["chat_template"], end="" if found["chat_template"].endswith("\n") else "\n")
    elif given["as_json"]:
        print_json(found)
    else:
        print(show_module.as_text(found))
    return 0


def _is_here(ref: str | None) -> bool:
    """Whether nothing need be fetched for a model."""
    from gemmart import sources
    from gemmart.errors import ModelNotFound

    try:
        sources.resolve(ref, offline=True)
    except ModelNotFound:
        return False
    return True
