"""The arguments that a packed model carries: defaults of `gemmart run`, below what is typed.

They come with a file from elsewhere, so they may shape the answers but touch no file, network or device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gemmart.cli.options import Option
from gemmart.errors import ModelFormatError

if TYPE_CHECKING:
    from gemmart.sources import ModelSource

GROUPS = ("Prompt", "Context", "Sampling (defaults: the model's)", "Chat format", "Computing")
FLAGS_LEFT_OUT = ("--file", "--chat-template", "--draft")


def check(arguments: Sequence[str]) -> None:
    """Raise UsageError for arguments that cannot be packed."""
    _parse(arguments)


def use(source: ModelSource, given: dict[str, Any]) -> None:
    """Put the arguments of the model's archive where nothing was typed, and no variable set. Raises ModelFormatError
    for what may not be packed."""
    from gemmart.sources import packed_arguments

    arguments = packed_arguments(source)
    where = arguments.index("...") if "..." in arguments else len(arguments)
    arguments = [*arguments[:where], *arguments[where + 1 :]]
    if len(arguments) > 1 and arguments[0] in ("-m", "--model"):  # as llamafile's do: it is the entry beside them
        arguments = arguments[2:]
    try:
        packed = _parse(arguments)
    except click.UsageError as error:
        raise ModelFormatError(f"{source.path}@.args: {error.format_message()}") from None
    ctx = click.get_current_context()
    for name, value in packed.items():
        if ctx.get_parameter_source(name) in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP):
            given[name] = value


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options among the arguments, by parameter name."""
    from gemmart.cli import run

    parent = click.get_current_context().parent
    ctx = click.Context(run.command, info_name="run", parent=parent)
    values, _, order = run.command.make_parser(ctx).parse_args(list(arguments))
    rest = values.get("arguments")  # click's own mark where there are none
    if isinstance(rest, list | tuple) and rest:
        raise click.UsageError(f"{rest[0]!r}: only flags can be packed; a prompt is -p")
    options = [param for param in order if isinstance(param, Option)]
    for option in options:
        if option.group not in GROUPS or option.flag in FLAGS_LEFT_OUT:
            raise click.UsageError(
                f"{option.flag}: may not be packed, since it may touch files, the network or devices"
            )
    return {str(option.name): option.type_cast_value(ctx, values[str(option.name)]) for option in options}
