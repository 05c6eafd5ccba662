"""`gemmart list`: the models on this machine."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import click

from gemmart.cli.options import Command, flag, message_options, messages_of, options


@click.command("list", cls=Command, options_metavar="[options]")
@options("Output", (("--json", "as_json"), flag("Print a JSON array.", setting=False)))
@message_options
def command(**given: Any) -> int:
    """The models on this machine: fetched by gemmart, in the hub's cache, in Ollama's and LM Studio's folders."""
    from gemmart.sources import installed
    from gemmart.terminal import mib

    messages = messages_of(given)
    models = installed.models()
    when = [datetime.fromtimestamp(model.modified).astimezone() for model in models]
    if given["as_json"]:
        rows = [
            {
                "ref": model.ref,
                "place": model.place,
                "files": [str(file) for file in model.files],
                "bytes": model.n_bytes,
                "quant": model.quant,
                "modified": time.isoformat(timespec="seconds"),
            }
            for model, time in zip(models, when, strict=True)
        ]
        print(json.dumps(rows, ensure_ascii=False))
        return 0
    if not models:
        messages.note("no models here yet; `gemmart pull gemma-2-2b-it` fetches one")
        return 0
    table = [("MODEL", "SIZE", "QUANT", "PLACE", "MODIFIED")]
    table += [
        (model.ref, mib(model.n_bytes), model.quant or "-", model.place, f"{time:%Y-%m-%d %H:%M}")
        for model, time in zip(models, when, strict=True)
    ]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0
