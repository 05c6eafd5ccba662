"""`gemmart perplexity`: how well a model predicts a text."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from gemmart.cli.models import load_model, model_and_rest
from gemmart.cli.options import (
    AT_LEAST_1,
    Command,
    check_options,
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
    size,
)

if TYPE_CHECKING:
    from gemmart.perplexity import Perplexity


@click.command("perplexity", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar="MODEL FILE")
@model_options
@options(
    "Measurement",
    (
        ("-c", "--ctx", "--ctx-size", "ctx"),
        {"type": size, "setting": False, "metavar": "N", "default": 512, "help": "Tokens of a chunk; default 512."},
    ),
    (
        ("--chunks",),
        {"type": AT_LEAST_1, "setting": False, "metavar": "N", "help": "Chunks at most; default: all of the text."},
    ),
)
@precise_options
@memory_options
@lock_options
@check_options
@gpu_option
@device_options
@json_option
@preset_option
@message_options
def command(arguments: tuple[str, ...], chunks: int | None, **given: Any) -> int:
    """How well a model predicts the text of FILE, as llama.cpp measures it; - is stdin.

    The text is cut into chunks of -c tokens, and the second half of each is scored. On a terminal the values so far are
    shown; the last one, with its standard error, is on stdout.
    """
    from gemmart import perplexity

    messages = messages_of(given)
    model_name, rest = model_and_rest(arguments, given)
    if not rest:
        raise click.UsageError("FILE is missing")
    text = read_text(rest[0], messages)
    shows = sys.stderr.isatty() and not messages.quiet
    with load_model(model_name, given, messages, lookup=False, **device_of(given)) as model:

        def on_chunk(so_far: Perplexity, n_chunks: int) -> None:
            if shows:
                end = "\n" if so_far.n_chunks == n_chunks else " "
                print(f"[{so_far.n_chunks}/{n_chunks}] {so_far.value:.4f}", end=end, file=sys.stderr, flush=True)

        found = perplexity.measure(model, text, n_ctx=given["ctx"], n_chunks=chunks, on_chunk=on_chunk)
        name = model.info.name
    if given["as_json"]:
        about = asdict(found) | {"error": None if math.isnan(found.error) else found.error}
        print_json({"model": name} | about)
    else:
        print(f"Final estimate: PPL = {found.value:.4f} +/- {found.error:.5f}")
    return 0
