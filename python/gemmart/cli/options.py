"""What the commands share: options under headings, and what they do with them."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

if TYPE_CHECKING:
    from gemmart.cli.settings import Setting
    from gemmart.terminal import Messages

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger("gemmart")


class Command(click.Command):
    """A command whose help lists its options in groups, and whose settings may stand in the configuration file."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        from gemmart.cli.settings import settings_of

        ctx.default_map = {}
        ctx.meta["gemmart.settings"] = {}
        self.take(ctx, settings_of(self, lambda: all_commands(ctx)))
        return super().parse_args(ctx, args)

    @staticmethod
    def take(ctx: click.Context, settings: dict[str, Setting]) -> None:
        """Settings that come before those taken earlier, as defaults."""
        ctx.meta["gemmart.settings"] |= settings
        ctx.default_map = {**(ctx.default_map or {}), **{name: setting.value for name, setting in settings.items()}}

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                groups.setdefault(getattr(param, "group", "Help"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class Option(click.Option):
    """An option under the heading `group`. A setting may also come from a GEMMART_ variable or the configuration file;
    what is no setting says what to do this once. `modes`: those of its command in which it has an effect, None for all;
    what is not there to have one, but is `accepted` from the command lines of others, is told so once."""

    def __init__(
        self,
        names: Sequence[str],
        *,
        group: str,
        setting: bool = True,
        modes: Collection[str] | None = None,
        accepted: bool = False,
        **kwargs: Any,
    ) -> None:
        self.flag = next(name for name in names if name.startswith("--")).partition("/")[0]
        self.group = group
        self.modes = modes
        self.accepted = accepted
        self.key = self.flag.removeprefix("--") if setting and not accepted else None
        variable = f"GEMMART_{self.key.upper().replace('-', '_')}" if self.key else None
        kwargs.setdefault("hidden", accepted)
        super().__init__(names, envvar=variable, expose_value=not accepted, **kwargs)

    def value_from_envvar(self, ctx: click.Context) -> Any:
        if self.multiple:  # one value, which may hold blanks
            text = self.resolve_envvar_value(ctx)
            return None if text is None else (text,)
        return super().value_from_envvar(ctx)

    def process_value(self, ctx: click.Context, value: Any) -> Any:
        try:
            return super().process_value(ctx, value)
        except click.BadParameter as error:
            source = ctx.get_parameter_source(self.name or "")
            if source is ParameterSource.ENVIRONMENT:
                origin = str(self.envvar)
            elif source is ParameterSource.DEFAULT_MAP:
                origin = ctx.meta["gemmart.settings"][self.name].origin
            else:
                raise
            raise click.BadParameter(f"{error.message} (from {origin})", ctx, self) from None


def all_commands(ctx: click.Context) -> dict[str, click.Command]:
    """By name."""
    root = ctx.find_root()
    if not isinstance(root.command, click.Group):
        return {ctx.command.name or "": ctx.command}
    names = root.command.list_commands(root)
    return {name: found for name in names if (found := root.command.get_command(root, name))}


def use_preset(ctx: click.Context, _: click.Parameter, name: str | None) -> str | None:
    """A callback, which comes before the other options look for their defaults."""
    from gemmart.cli.settings import preset_of

    if name is not None and isinstance(ctx.command, Command):
        ctx.command.take(ctx, preset_of(name, ctx.command, lambda: all_commands(ctx)))
    return name


class ModelName(click.ParamType[str]):
    """Names of models, which a shell completes with the short names, with what is here, and with files."""

    name = "model"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from gemmart.sources import aliases, installed

        names = [*aliases(), *(model.ref for model in installed.models())]
        known = [CompletionItem(name) for name in names if name.startswith(incomplete)]
        return [*known, CompletionItem(incomplete, type="file")]


def size(text: str) -> int:
    """A number of tokens; 8k is 8192."""
    match = re.fullmatch(r"(\d{1,9})([kK]?)", str(text))
    if not match:
        raise click.BadParameter(f"{text!r} is not a number of tokens, such as 4096 or 8k")
    return int(match[1]) * (1024 if match[2] else 1)


def layers(text: str) -> str | int:
    """A number of layers, or a word for one."""
    if text in ("auto", "all"):
        return text
    if not re.fullmatch(r"\d{1,9}", text):
        raise click.BadParameter(f"{text!r} is not auto, all or a number of layers")
    return int(text)


def shares(text: str) -> tuple[float, ...]:
    """Numbers with commas between them."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not shares of devices, such as 3,1") from None


def token_bias(text: str) -> tuple[int, float]:
    """ID=BIAS"""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not ID=BIAS, such as 106=-5") from None


def options(
    group: str, *specs: tuple[tuple[str, ...], dict[str, Any]], modes: Collection[str] | None = None
) -> Callable[[F], F]:
    """A decorator that adds options under one heading, which have an effect in these modes."""

    def add(function: F) -> F:
        for names, settings in reversed(specs):
            function = click.option(*names, cls=Option, group=group, **{"modes": modes, **settings})(function)
        return function

    return add


def flag(help: str, **settings: Any) -> dict[str, Any]:
    return {"is_flag": True, "help": help, **settings}


MODEL = ModelName()
AT_LEAST_1 = click.IntRange(min=1)

model_options = options(
    "Model",
    (
        ("-m", "--model", "model_option"),
        {"type": MODEL, "metavar": "MODEL", "help": "The model, instead of the argument."},
    ),
    (("--offline",), flag("Use what is on this machine; fetch nothing.")),
)
memory_options = options(
    "Computing",
    (
        ("-t", "--threads"),
        {"type": AT_LEAST_1, "metavar": "N", "help": "Threads; default: the physical cores allowed."},
    ),
    (
        ("-b", "--batch"),
        {"type": AT_LEAST_1, "metavar": "N", "default": 512, "help": "Tokens of a prompt read at once; default 512."},
    ),
    (("--kv-type",), {"default": "f16", "metavar": "TYPE", "help": "Keys and values: f16 (default), bf16, f32, q8_0."}),
    (
        ("--mmap/--no-mmap",),
        {"default": None, "help": "Weights stay in the file, or are packed in memory; default: in memory if they fit."},
    ),
)
lock_options = options(
    "Computing",
    (("--mlock",), flag("Lock the weights in memory, so that the system never moves them out.")),
)
check_options = options(
    "Computing",
    (
        ("--check-weights", "--check-tensors"),
        flag("Look for NaN and infinity in all weights before the model is loaded."),
    ),
)
precise_options = options(
    "Computing",
    (
        ("--precise/--no-precise",),
        {
            "default": None,
            "help": "Activations nearly in float32 instead of 8 bits, slower; default: for small models.",
        },
    ),
)
draft_options = options(
    "Computing",
    (
        ("--draft", "-md", "--model-draft", "draft"),
        {
            "type": MODEL,
            "metavar": "MODEL",
            "help": "A smaller model with the same vocabulary, which guesses what comes next.",
        },
    ),
)
guess_options = options(
    "Computing",
    (
        ("--draft-max", "--draft-n"),
        {
            "type": click.IntRange(min=0),
            "metavar": "N",
            "default": 7,
            "help": "Most tokens guessed at once; default 7.",
        },
    ),
    (
        ("--lookup/--no-lookup",),
        {"default": True, "help": "Whether to guess that what stood before stands again; default: yes."},
    ),
)
gpu_option = options(
    "GPU",
    (
        ("--gpu",),
        {
            "type": click.Choice(["auto", "nvidia", "amd", "none", "disable"]),
            "default": "auto",
            "help": "Whose: auto (default): one that can be used, if there is one; one that is named must be there.",
        },
    ),
)
device_options = options(
    "GPU",
    (
        ("-ngl", "--ngl", "--n-gpu-layers", "ngl"),
        {
            "type": layers,
            "metavar": "N|all|auto",
            "default": "auto",
            "help": "How many of the last layers are on the GPU; auto (default): as many as fit.",
        },
    ),
    (
        ("--device",),
        {"metavar": "NAME", "help": "Which one: cuda:0, or several by commas; default: the fewest that are needed."},
    ),
    (
        ("--split",),
        {"type": shares, "metavar": "A,B", "help": "The devices' shares of the layers; default: by their free memory."},
    ),
)
module_options = options(
    "GPU",
    (("--tinyblas",), flag("Multiply with our own kernels, also where cuBLAS or hipBLAS could.")),
    (("--recompile",), flag("Build the GPU module for this machine first, if that was not done.", setting=False)),
)
chat_options = options(
    "Chat format",
    (
        ("--chat-template", "--prompt-template"),
        {
            "metavar": "TEMPLATE",
            "modes": ("chat", "answer", "server"),
            "help": "Instead of the file's: gemma, chatml, a file, or Jinja source.",
        },
    ),
    (
        ("--system-style",),
        {
            "type": click.Choice(["fold", "turn", "user"]),
            "default": "fold",
            "modes": ("chat", "answer", "server"),
            "help": "How Gemma is told the system prompt: folded into the next user turn (default), in a turn of its "
            "own, or in a user turn.",
        },
    ),
    (
        ("--strict-roles",),
        flag("Messages that Google's template refuses are an error.", modes=("chat", "answer", "server")),
    ),
)
llamafile_options = options(
    "From llamafile",
    (("--fast",), flag("there is one way to compute", accepted=True)),
    (("--v2",), flag("there is one server", accepted=True)),
    (("--nologo",), flag("there is no logo", accepted=True)),
    (("--ascii",), flag("there is no logo", accepted=True)),
    (("-fa", "--flash-attn"), flag("attention is always fused", accepted=True)),
    (("-cb", "--cont-batching"), flag("requests always run together", accepted=True)),
    (("--no-warmup",), flag("there is no warm-up", accepted=True)),
    (("--unsecure",), flag("there is no sandbox to leave out", accepted=True)),
    (("--no-compile", "--nocompile"), flag("nothing is compiled unless --recompile asks for it", accepted=True)),
)
context_options = options(
    "Context",
    (
        ("-c", "--ctx", "--ctx-size", "ctx"),
        {
            "type": size,
            "metavar": "N",
            "help": "Tokens of context, such as 4096 or 8k; default or 0: what the model is trained for.",
        },
    ),
)
output_options = options(
    "Output",
    (("-o", "--out"), {"required": True, "setting": False, "metavar": "FILE", "help": "The file to write."}),
    (("--force",), flag("Replace it where it exists.", setting=False)),
)
preset_option = options(
    "Settings",
    (
        ("--preset",),
        {
            "metavar": "NAME",
            "is_eager": True,
            "callback": use_preset,
            "help": "The settings of [presets.NAME] in the configuration file.",
        },
    ),
)
message_options = options(
    "Messages",
    (("-v", "--verbose"), {"count": True, "help": "More messages on stderr; -vv also shows where an error arose."}),
    (("-q", "--quiet", "--log-disable"), flag("Nothing on stderr but errors.")),
    (
        ("--color",),
        {"type": click.Choice(["auto", "always", "never"]), "default": "auto", "help": "Colour of messages on stderr."},
    ),
)
json_option = options("Output", (("--json", "as_json"), flag("Print one JSON object.", setting=False)))


def device_of(given: dict[str, Any]) -> dict[str, Any]:
    """gpu_option and device_options as `gemmart.load` and `gemmart.plan` take them."""
    gpu = "none" if given["gpu"] == "disable" else given["gpu"]
    return {"gpu": gpu} | {name: given[name] for name in ("ngl", "device", "split")}


def check_effect(modes: Collection[str], told: str, messages: Messages) -> None:
    """Raise UsageError for a flag on the command line that has no effect in any of `modes`, which `told` names; note
    those that are only accepted."""
    ctx = click.get_current_context()
    for option in ctx.command.params:
        typed = ctx.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if not typed or not isinstance(option, Option):
            continue
        if option.accepted:
            messages.note(f"{option.flag}: accepted, but without effect: {option.help}")
        elif option.modes is not None and not set(modes) & set(option.modes):
            raise click.UsageError(f"{option.flag}: has no effect {told}")


def messages_of(given: dict[str, Any]) -> Messages:
    """Stderr as the options want it; also sets up what is logged there."""
    from gemmart.terminal import Messages

    level = (
        logging.ERROR if given["quiet"] else (logging.WARNING, logging.INFO, logging.DEBUG)[min(given["verbose"], 2)]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("gemmart: %(levelname)s: %(message)s"))
    if given.get("log_format") == "json":
        from gemmart.logs import JsonFormatter

        handler.setFormatter(JsonFormatter())
    log.handlers = [handler]
    log.setLevel(level)
    return Messages(given["color"], quiet=given["quiet"] or given.get("as_json", False))


def print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def read_text(path: str, messages: Messages) -> str:
    """The text of a prompt file, or of stdin for -."""
    from gemmart.terminal import from_bytes

    if path == "-":
        return from_bytes(sys.stdin.buffer.read(), "stdin", messages)
    try:
        with open(path, "rb") as file:
            return from_bytes(file.read(), path, messages)
    except OSError as error:
        raise click.UsageError(f"-f {path}: {error.strerror}") from None


def clean_text(text: str, messages: Messages) -> str:
    """An argument of the command line, which may hold bytes that are not UTF-8."""
    from gemmart.terminal import from_bytes

    return from_bytes(os.fsencode(text), "the prompt", messages)
