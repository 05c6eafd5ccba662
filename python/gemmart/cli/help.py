"""`gemmart help`: explain a command."""

from __future__ import annotations

import sys

import click


@click.command("help", options_metavar="")
@click.argument("name", required=False, metavar="[COMMAND]")
@click.pass_context
def command(ctx: click.Context, name: str | None) -> int:
    """Explain a command."""
    assert ctx.parent is not None
    group = ctx.parent.command
    assert isinstance(group, click.Group)
    about: click.Command = group
    about_ctx = ctx.parent
    if name is not None:
        named = group.get_command(ctx.parent, name)
        if named is None:
            raise click.UsageError(f"{name}: no such command; there are {', '.join(group.list_commands(ctx.parent))}")
        about = named
        about_ctx = click.Context(about, info_name=name, parent=ctx.parent)
    text = about.get_help(about_ctx) + "\n"
    if sys.stdout.isatty():
        click.echo_via_pager(text)
    else:
        print(text, end="")
    return 0
