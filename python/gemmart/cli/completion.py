"""`gemmart completion`: what a shell needs to complete commands, flags and models."""

from __future__ import annotations

import click

from gemmart.cli.options import Command

VARIABLE = "_GEMMART_COMPLETE"  # set by the shells' scripts when they ask


@click.command("completion", cls=Command, options_metavar="")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def command(ctx: click.Context, shell: str) -> int:
    """Print a shell's completion script, as in: eval "$(gemmart completion bash)"."""
    from click.shell_completion import get_completion_class

    assert ctx.parent is not None
    kind = get_completion_class(shell)
    assert kind is not None
    print(kind(ctx.parent.command, {}, "gemmart", VARIABLE).source())
    return 0
