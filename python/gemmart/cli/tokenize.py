"""`gemmart tokenize`: the tokens of a text."""

from __future__ import annotations

from typing import Any

import click

from gemmart.cli.models import model_and_rest, resolve_model
from gemmart.cli.options import (
    MODEL,
    Command,
    clean_text,
    flag,
    json_option,
    message_options,
    messages_of,
    model_options,
    options,
    print_json,
    read_text,
)


@click.command("tokenize", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar="MODEL TEXT")
@model_options
@options(
    "Text",
    (("--bos",), flag("Begin with the BOS token.", setting=False)),
    (("--special",), flag("Recognise control tokens in the text.", setting=False)),
)
@json_option
@message_options
def command(arguments: tuple[str, ...], bos: bool, special: bool, **given: Any) -> int:
    """The tokens of a text; TEXT - is stdin."""
    from gemmart import show as show_module

    messages = messages_of(given)
    model, rest = model_and_rest(arguments, given)
    if not rest:
        raise click.UsageError("TEXT is missing")
    text = read_text("-", messages) if rest[0] == "-" else clean_text(rest[0], messages)
    tokenizer = show_module.tokenizer(resolve_model(model, given, messages))
    ids = tokenizer.encode(text, bos=bos, special=special)
    pieces = [tokenizer.piece(id).decode(errors="replace") for id in ids]
    if given["as_json"]:
        print_json({"tokens": ids, "pieces": pieces})
    else:
        for id, piece in zip(ids, pieces, strict=True):
            print(f"{id:7} {piece!r}")
    return 0
