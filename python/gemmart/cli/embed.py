"""`gemmart embed`: texts as vectors."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from gemmart.cli.models import load_model, model_and_rest
from gemmart.cli.options import (
    MODEL,
    Command,
    check_options,
    clean_text,
    context_options,
    device_of,
    device_options,
    gpu_option,
    json_option,
    lock_options,
    memory_options,
    message_options,
    messages_of,
    model_options,
    options,
    precise_options,
    preset_option,
    print_json,
    read_text,
)

AT_ONCE = 256
"""Texts that are read before the first is printed."""


@click.command("embed", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar="MODEL TEXT...")
@model_options
@options(
    "Texts",
    (
        ("-f", "--file"),
        {"metavar": "FILE", "setting": False, "help": "Each line of FILE is a text; - is stdin."},
    ),
    (
        ("--pooling",),
        {
            "type": click.Choice(["mean", "cls", "last"]),
            "help": "Of all tokens the mean, or the first or last one's state; default: what the file says, or mean.",
        },
    ),
    (("--normalize/--no-normalize",), {"default": True, "help": "Vectors of length 1; default: yes."}),
)
@context_options
@precise_options
@memory_options
@lock_options
@check_options
@gpu_option
@device_options
@json_option
@preset_option
@message_options
def command(arguments: tuple[str, ...], file: str | None, **given: Any) -> int:
    """Texts as vectors: a JSON array for each, one a line.

    Each TEXT is a text; without any, each line of stdin is one. --json prints one object, as /v1/embeddings of the
    server answers.
    """
    messages = messages_of(given)
    model_name, rest = model_and_rest(arguments, given, several=True)
    if rest and file is not None:
        raise click.UsageError("--file: TEXT is given too")
    if not rest and file is None and sys.stdin.isatty():
        raise click.UsageError("TEXT is missing; --file FILE reads texts from a file")
    texts = [clean_text(text, messages) for text in rest] or _lines(read_text(file or "-", messages))
    if not texts:
        raise click.UsageError(f"{file or 'stdin'}: holds no text")
    found: list[list[float]] = []
    with load_model(model_name, given, messages, lookup=False, **device_of(given)) as model:
        tokens = [model.embedding_tokens(text, f"text {i + 1}") for i, text in enumerate(texts)]
        for first in range(0, len(tokens), AT_ONCE):
            part = model.embed(
                tokens[first : first + AT_ONCE], pooling=given["pooling"], normalize=given["normalize"]
            ).tolist()
            if given["as_json"]:
                found += part
            else:
                print(*map(json.dumps, part), sep="\n", flush=True)
        if given["as_json"]:
            data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(found)]
            n_tokens = sum(map(len, tokens))
            usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
            print_json({"object": "list", "model": model.info.path.stem, "data": data, "usage": usage})
    return 0


def _lines(text: str) -> list[str]:
    return text.replace("\r\n", "\n").removesuffix("\n").split("\n") if text else []
