"""`gemmart unpack`: the model of an archive as a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gemmart.cli.models import resolve_model
from gemmart.cli.options import MODEL, Command, flag, message_options, messages_of, options, output_options


@click.command("unpack", cls=Command, options_metavar="[options]")
@click.argument("model", type=MODEL)
@output_options
@options("Model", (("--offline",), flag("Use what is on this machine; fetch nothing.")))
@message_options
def command(model: str, out: str, **given: Any) -> int:
    """Write the model of an archive, or of .cat slices, as a GGUF file of its own."""
    from gemmart import pack

    messages = messages_of(given)
    source = resolve_model(model, given, messages)
    with messages.progress() as progress:
        pack.unpack(source, Path(out).absolute(), force=given["force"], progress=progress)
    print(out)
    return 0
