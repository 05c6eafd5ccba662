"""`gemmart bench`: speed."""

from __future__ import annotations

from typing import Any

import click

from gemmart.cli.models import last_or_default, only_model, typed_models
from gemmart.cli.options import (
    AT_LEAST_1,
    MODEL,
    Command,
    device_of,
    device_options,
    flag,
    gpu_option,
    json_option,
    memory_options,
    message_options,
    messages_of,
    model_options,
    options,
    precise_options,
    preset_option,
    print_json,
)


@click.command("bench", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar="[MODEL]")
@model_options
@options(
    "Measurement",
    (
        ("--prompt",),
        {"type": AT_LEAST_1, "setting": False, "metavar": "N", "default": 512, "help": "Tokens to read; default 512."},
    ),
    (
        ("--decode",),
        {
            "type": AT_LEAST_1,
            "setting": False,
            "metavar": "N",
            "default": 64,
            "help": "Tokens to generate; default 64.",
        },
    ),
    (
        ("--repeat",),
        {
            "type": AT_LEAST_1,
            "setting": False,
            "metavar": "N",
            "default": 3,
            "help": "How often; medians are shown; default 3.",
        },
    ),
    (("--phases",), flag("Show where the time goes instead; it decodes after the prompt.", setting=False)),
    (
        ("--kernels",),
        flag("Measure single kernels instead, on one thread unless -t says otherwise; needs no model.", setting=False),
    ),
)
@options(
    "Output",
    (
        ("--compare",),
        {"setting": False, "metavar": "FILE", "help": "Beside an earlier measurement, which --json wrote."},
    ),
    (("--plot",), {"setting": False, "metavar": "FILE", "help": "Draw it too, as .png, .svg or .pdf."}),
)
@precise_options
@memory_options
@gpu_option
@device_options
@json_option
@preset_option
@message_options
def command(arguments: tuple[str, ...], phases: bool, kernels: bool, **given: Any) -> int:
    """Measure the speed of a model next to that of the memory."""
    from gemmart import bench as model_bench
    from gemmart import bench_report, kernel_bench

    if kernels and (phases or typed_models(arguments, given)):
        raise click.UsageError("--kernels goes without a model and without --phases")
    if (kernels or phases) and (given["compare"] or given["plot"]):
        raise click.UsageError("--compare and --plot go without --kernels and --phases")
    on_gpu = device_of(given)
    if (kernels or phases) and (
        on_gpu["gpu"] in ("nvidia", "amd")
        or on_gpu["ngl"] not in ("auto", 0)
        or on_gpu["device"] not in (None, "cpu")
        or on_gpu["split"]
    ):
        raise click.UsageError("--kernels and --phases are of the CPU")
    messages = messages_of(given)
    earlier = bench_report.read(given["compare"]) if given["compare"] else None
    with messages.progress() as progress:
        if kernels:
            found = kernel_bench.measure(
                threads=given["threads"] or 1, n_bytes=model_bench.BANDWIDTH_BYTES[1], progress=progress
            )
        else:
            found = (model_bench.phases if phases else model_bench.measure)(
                only_model(arguments, given) or last_or_default(given["offline"], messages),
                **{name: given[name] for name in ("prompt", "decode", "repeat", "threads", "batch")},
                **{name: given[name] for name in ("kv_type", "mmap", "precise", "offline")},
                **({} if phases else on_gpu),
                progress=progress,
                notice=messages.warn,
            )
    if given["plot"]:
        bench_report.plot(given["plot"], found, earlier)
    if given["as_json"]:
        print_json(found)
    elif earlier is not None:
        print(bench_report.compared(earlier, found))
    elif kernels:
        print(kernel_bench.as_text(found))
    else:
        print((model_bench.phases_as_text if phases else model_bench.as_text)(found))
    return 0
