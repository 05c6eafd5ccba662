"""`gemmart help`: the manual."""

from __future__ import annotations

import sys

import click

from gemmart.cli.options import Command, Option


@click.command("help", cls=Command, options_metavar="")
@click.argument("name", required=False, metavar="[COMMAND]")
@click.option(
    "--man", cls=Option, group="Output", setting=False, is_flag=True, help="As the source of a man page, for man(1)."
)
@click.pass_context
def command(ctx: click.Context, name: str | None, man: bool) -> int:
    """The manual of gemmart, or of a command."""
    from gemmart.cli import manual, version

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
    found = manual.sections(about, about_ctx)
    if man:
        print(manual.as_man_page(about_ctx.command_path.replace(" ", "-"), version(), found), end="")
    elif sys.stdout.isatty():
        click.echo_via_pager(manual.as_text(found))
    else:
        print(manual.as_text(found), end="")
    return 0
