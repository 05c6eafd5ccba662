"""`gemmart show`: what a model's file says."""

from __future__ import annotations

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

    messages = messages_of(given)
    found = show_module.report(resolve_model(only_model(arguments, given), given, messages))
    if template:
        if found["chat_template"] is None:
            raise click.UsageError(f"--template: {found['name']} is a base model: its file has no chat template")
        print(found["chat_template"], end="" if found["chat_template"].endswith("\n") else "\n")
    elif given["as_json"]:
        print_json(found)
    else:
        print(show_module.as_text(found))
    return 0
