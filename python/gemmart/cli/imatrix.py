"""`gemmart imatrix`: which columns of a model's matrices matter."""

from __future__ import annotations

import os
from typing import Any

import click

from gemmart.cli.models import model_and_rest
from gemmart.cli.options import (
    AT_LEAST_1,
    Command,
    flag,
    message_options,
    messages_of,
    model_options,
    options,
    preset_option,
    read_text,
    size,
)


@click.command("imatrix", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar="MODEL TEXTFILE")
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
@options(
    "Output",
    (
        ("-o", "--output", "out"),
        {"setting": False, "metavar": "OUT", "default": "imatrix.gguf", "help": "The file; default imatrix.gguf."},
    ),
    (("--force",), flag("Replace OUT if it exists.", setting=False)),
)
@options(
    "Computing",
    (
        ("-t", "--threads"),
        {"type": AT_LEAST_1, "metavar": "N", "help": "Threads; default: the physical cores allowed."},
    ),
    (
        ("--mmap/--no-mmap",),
        {"default": None, "help": "Weights stay in the file, or are packed in memory; default: in memory if they fit."},
    ),
)
@preset_option
@message_options
def command(arguments: tuple[str, ...], out: str, force: bool, chunks: int | None, **given: Any) -> int:
    """Measure on a text which columns of a model's matrices matter, for `gemmart quantize --imatrix`; - is stdin.

    The file is one of llama.cpp's kind. Some hundred chunks of text like what the model will be used for are enough.
    """
    from gemmart import imatrix
    from gemmart.new_file import check_target

    messages = messages_of(given)
    model, rest = model_and_rest(arguments, given)
    if not rest:
        raise click.UsageError("TEXTFILE is missing")
    check_target(out, force=force)  # before the work
    text = read_text(rest[0], messages)
    with messages.progress() as progress:
        found = imatrix.collect(
            model or "",
            text,
            dataset="stdin" if rest[0] == "-" else os.path.basename(rest[0]),
            n_ctx=given["ctx"],
            n_chunks=chunks,
            threads=given["threads"],
            mmap=given["mmap"],
            offline=given["offline"],
            progress=progress,
            notice=messages.warn,
        )
    imatrix.write(found, out, force=force)
    messages.note(f"{out}: {len(found.squares)} matrices, {found.n_chunks} chunks of {found.chunk_size} tokens")
    return 0
