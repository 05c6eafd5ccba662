"""`gemmart config`: each setting, and where it came from."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

from gemmart.cli.options import Command, Option, json_option, preset_option, print_json


@click.command("config", cls=Command, options_metavar="[options]")
@click.argument("name", default="run", metavar="[COMMAND]")
@preset_option
@json_option
@click.pass_context
def command(ctx: click.Context, name: str, as_json: bool, preset: str | None) -> int:
    """The settings of a command (run, unless named) and where each came from; the folders in use."""
    from gemmart.cli.models import last_model_file
    from gemmart.places import config_files
    from gemmart.sources.store import models_folder
    from gemmart.terminal import table

    assert ctx.parent is not None
    group = ctx.parent.command
    assert isinstance(group, click.Group)
    about = group.get_command(ctx.parent, name)
    if about is None:
        raise click.UsageError(f"{name}: no such command; there are {', '.join(group.list_commands(ctx.parent))}")
    arguments = [] if preset is None else ["--preset", preset]
    with about.make_context(name, arguments, parent=ctx.parent, resilient_parsing=False) as about_ctx:
        settings = [_row(about_ctx, param) for param in about.params if isinstance(param, Option) and param.key]
    folders = [(str(path), "read" if path.exists() else "not there") for path in config_files()]
    folders += [(str(models_folder()), "fetched models"), (str(last_model_file()), "the model used last")]
    if as_json:
        print_json({"command": name, "files": dict(folders), "settings": settings})
        return 0
    print(table(folders) + "\n")
    print(table((row["name"], f"{_shown(row['value']):16} {row['from']}") for row in settings))
    return 0


def _row(ctx: click.Context, option: Option) -> dict[str, Any]:
    source = ctx.get_parameter_source(option.name or "")
    origin = "default"
    if source is ParameterSource.ENVIRONMENT:
        origin = str(option.envvar)
    elif source is ParameterSource.DEFAULT_MAP:
        origin = ctx.meta["gemmart.settings"][option.name].origin
    return {"name": option.key, "value": ctx.params[option.name or ""], "from": origin}


def _shown(value: object) -> str:
    return "–" if value in (None, ()) else str(value)
