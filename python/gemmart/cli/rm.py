"""`gemmart rm`: remove a model that was fetched."""

from __future__ import annotations

import sys
from typing import Any

import click

from gemmart.cli.options import MODEL, Command, flag, message_options, messages_of, options


@click.command("rm", cls=Command, options_metavar="[options]")
@click.argument("ref", type=MODEL, metavar="MODEL")
@options("Model", (("-y", "--yes"), flag("Do not ask.", setting=False)))
@message_options
def command(ref: str, yes: bool, **given: Any) -> int:
    """Remove a model from the hub's cache or gemmart's own folder; never one of Ollama's or LM Studio's."""
    from gemmart.sources import installed
    from gemmart.terminal import mib

    messages = messages_of(given)
    models = installed.named(ref)
    if not yes and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise click.UsageError("nobody can be asked here whether to remove it; -y removes it without asking")
    for model in models:
        messages.note(f"{model.ref}  {mib(model.n_bytes)}")
    if not yes and not click.confirm("Remove?", default=False, err=True):
        return 0
    for model in models:
        installed.remove(model)
    messages.note(f"removed: {mib(sum(model.n_bytes for model in models))}")
    return 0
