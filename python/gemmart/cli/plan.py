"""`gemmart plan`: memory, before it is taken."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from gemmart.cli.models import last_or_default, only_model
from gemmart.cli.options import (
    AT_LEAST_1,
    MODEL,
    Command,
    context_options,
    draft_options,
    json_option,
    lock_options,
    memory_options,
    message_options,
    messages_of,
    model_options,
    options,
    preset_option,
    print_json,
)


@click.command("plan", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar="[MODEL]")
@model_options
@context_options
@memory_options
@lock_options
@draft_options
@options(
    "Computing",
    (("--parallel",), {"type": AT_LEAST_1, "metavar": "N", "default": 1, "help": "Sequences at once; default 1."}),
)
@json_option
@preset_option
@message_options
def command(arguments: tuple[str, ...], parallel: int, **given: Any) -> int:
    """The memory that a model will take."""
    import gemmart
    from gemmart.terminal import mib, table

    messages = messages_of(given)
    with messages.progress() as progress:
        found = gemmart.plan(
            only_model(arguments, given) or last_or_default(given["offline"], messages),
            ctx=given["ctx"] or None,
            parallel=parallel,
            batch=given["batch"],
            threads=given["threads"],
            kv_type=given["kv_type"],
            draft=given["draft"],
            mmap=given["mmap"],
            mlock=given["mlock"],
            offline=given["offline"],
            progress=progress,
            notice=messages.warn,
        )
    if given["as_json"]:
        print_json(asdict(found) | {"total_bytes": found.total_bytes, "fits": found.fits})
        return 0
    weights = f"{mib(found.mapped_bytes)} mapped, in the file" if found.mmap else "packed"
    weights += ", locked in memory" if found.mlock else ""
    kv = f"{found.kv_type}, {found.ctx} tokens, sequences: {found.parallel}"
    draft = [("draft model", mib(found.draft_bytes))] if found.draft_bytes else []
    print(
        table(
            [
                ("weights", f"{mib(found.weight_bytes)} ({weights})"),
                ("keys and values", f"{mib(found.kv_bytes)} ({kv})"),
                ("buffers", f"{mib(found.buffer_bytes)} (batch {found.batch}, threads: {found.threads})"),
                *draft,
                ("total", mib(found.total_bytes)),
                ("available", f"{mib(found.available_bytes)}: it {'fits' if found.fits else 'does not fit'}"),
            ]
        )
    )
    return 0
