"""`gemmart plan`: memory, before it is taken."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from gemmart.cli.models import last_or_default, only_model
from gemmart.cli.options import (
    AT_LEAST_1,
    MODEL,
    Command,
    context_options,
    device_of,
    device_options,
    draft_options,
    gpu_option,
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

if TYPE_CHECKING:
    from gemmart.results import GpuPlan, MemoryPlan


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
@gpu_option
@device_options
@json_option
@preset_option
@message_options
def command(arguments: tuple[str, ...], parallel: int, **given: Any) -> int:
    """The memory that a model will take, here and on a GPU."""
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
            **device_of(given),
        )
    if given["as_json"]:
        gpus = [asdict(gpu) | {"total_bytes": gpu.total_bytes, "fits": gpu.fits} for gpu in found.gpus]
        print_json(asdict(found) | {"gpus": gpus, "total_bytes": found.total_bytes, "fits": found.fits})
        return 0
    weights = f"{mib(found.mapped_bytes)} mapped, in the file" if found.mmap else "packed"
    weights += ", locked in memory" if found.mlock else ""
    kv = f"{found.kv_type}, {found.ctx} tokens, sequences: {found.parallel}"
    draft = [("draft model", mib(found.draft_bytes))] if found.draft_bytes else []
    fits_here = found.total_bytes <= found.available_bytes
    print(
        table(
            [
                ("weights", f"{mib(found.weight_bytes)} ({weights})"),
                ("keys and values", f"{mib(found.kv_bytes)} ({kv})"),
                ("buffers", f"{mib(found.buffer_bytes)} (batch {found.batch}, threads: {found.threads})"),
                *draft,
                ("total", mib(found.total_bytes)),
                ("available", f"{mib(found.available_bytes)}: it {'fits' if fits_here else 'does not fit'}"),
                *(row for gpu in found.gpus for row in _gpu_rows(gpu, found)),
            ]
        )
    )
    return 0


def _gpu_rows(gpu: GpuPlan, plan: MemoryPlan) -> list[tuple[str, str]]:
    from gemmart.terminal import layers, mib

    parts = f"weights {mib(gpu.weight_bytes)}, keys and values {mib(gpu.kv_bytes)}, buffers {mib(gpu.buffer_bytes)}"
    most = "" if plan.most_gpu_layers is None else f"; -ngl {plan.most_gpu_layers} does"
    fits = "it fits" if gpu.fits else f"it does not fit{most}"
    return [
        (gpu.device, f"{layers(gpu, plan)}: {mib(gpu.total_bytes)} ({parts})"),
        ("", f"{mib(gpu.available_bytes)} are free on {gpu.description}: {fits}"),
    ]
