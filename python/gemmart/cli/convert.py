"""`gemmart convert`: a Hugging Face model folder becomes a GGUF file."""

from __future__ import annotations

from typing import Any

import click

from gemmart.cli.options import Command, flag, message_options, messages_of, options


@click.command("convert", cls=Command, options_metavar="[options]")
@click.argument("folder", metavar="HF_DIR")
@click.argument("out", metavar="OUT")
@options(
    "Output",
    (
        ("--type",),
        {
            "metavar": "TYPE",
            "default": "auto",
            "setting": False,
            "help": "Of the matrices: bf16, f16, f32, or auto (default), as they are stored; "
            "`gemmart quantize` makes smaller ones.",
        },
    ),
    (("--force",), flag("Replace OUT.", setting=False)),
)
@message_options
def command(folder: str, out: str, type: str, force: bool, **given: Any) -> int:
    """Make a GGUF file of a Hugging Face model folder: Gemma 1 to 3 or Llama, as safetensors."""
    from gemmart.convert import TYPES, convert

    messages = messages_of(given)
    if type.lower() not in (*TYPES, "auto"):
        raise click.UsageError(
            f"--type {type}: expected {', '.join(TYPES)} or auto; for quantised types convert first, then "
            f"`gemmart quantize {out} NEW.gguf {type}`"
        )
    with messages.progress() as progress:
        path = convert(folder, out, type=type.lower(), force=force, progress=progress, notice=messages.warn)
    messages.note(f"{path}: {path.stat().st_size:,} bytes")
    return 0
