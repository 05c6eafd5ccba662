"""`gemmart pack`: a model in one executable file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemmart.cli.models import resolve_model
from gemmart.cli.options import (
    MODEL,
    Command,
    flag,
    message_options,
    messages_of,
    options,
    output_options,
)


@click.command("pack", cls=Command, options_metavar="[options]")
@click.argument("model", type=MODEL)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="[-- FLAGS …]")
@output_options
@options(
    "Output",
    (
        ("--with-runtime",),
        flag("Carry gemmart too, for this Python and system, so that it need not be installed.", setting=False),
    ),
)
@options("Model", (("--offline",), flag("Use what is on this machine; fetch nothing.")))
@message_options
def command(model: str, arguments: tuple[str, ...], out: str, **given: Any) -> int:
    """Write a model into one executable file that runs it.

    The model is stored in the file and mapped from where it lies there. FLAGS are flags of `gemmart run`, which hold
    unless others are typed: `gemmart pack gemma2:2b -o gemma.gemmart -- --temp 0`, then `./gemma.gemmart`.
    """
    from gemmart import pack
    from gemmart.cli.packed import check

    check(arguments)
    messages = messages_of(given)
    source = resolve_model(model, given, messages)
    with messages.progress() as progress:
        pack.pack(
            source,
            Path(out).absolute(),
            arguments,
            with_runtime=given["with_runtime"],
            force=given["force"],
            progress=progress,
        )
    print(out)
    return 0
