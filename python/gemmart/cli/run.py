"""`gemmart run`: chat in the terminal, or answer one prompt."""

from __future__ import annotations

import json
import re
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gemmart.cli.browser import open_page
from gemmart.cli.models import load_model, load_options, model_and_rest, resolve_model
from gemmart.cli.options import (
    MODEL,
    Command,
    chat_options,
    check_effect,
    check_options,
    clean_text,
    context_options,
    device_options,
    draft_options,
    flag,
    gpu_option,
    guess_options,
    json_option,
    llamafile_options,
    lock_options,
    memory_options,
    message_options,
    messages_of,
    model_options,
    module_options,
    options,
    precise_options,
    preset_option,
    print_json,
    read_text,
    token_bias,
)
from gemmart.cli.serve import app_options, browser_options, listen_options, parallel_options, serve, server_options

if TYPE_CHECKING:
    from gemmart import Completion, Format, Model
    from gemmart.server.running import RunningServer
    from gemmart.terminal import Messages

ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "0": "\0", "\\": "\\", '"': '"', "'": "'"}
INTERRUPTED = 130
ANSWERING = ("chat", "answer", "cli")  # the modes that answer here


@click.command("run", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar='[MODEL] ["PROMPT"]')
@model_options
@options(
    "Model",
    (
        ("--use-args",),
        flag("Take the flags that the model's archive carries, unless others are typed.", setting=False),
    ),
)
@options(
    "Prompt",
    (("-p", "--prompt"), {"setting": False, "metavar": "TEXT", "help": "The prompt; with --chat the system prompt."}),
    (("-f", "--file"), {"setting": False, "metavar": "FILE", "help": "The same, from a file; - is stdin."}),
    (("--system",), {"metavar": "TEXT", "modes": ("chat", "answer"), "help": "The system prompt."}),
    (
        ("--cli", "raw"),
        flag("Complete the prompt as it stands: no chat template; control tokens in it count.", setting=False),
    ),
    (("--chat",), flag("Chat only; where stdin is no terminal, one line is one turn.", setting=False)),
    (
        ("-e", "--escape/--no-escape"),
        {"modes": ANSWERING, "default": None, "help": r"Whether \n in the prompt is a newline; default: with --cli."},
    ),
)
@options(
    "Server",
    (("--server",), flag("Serve over HTTP, without a chat: `gemmart serve`.", setting=False)),
    (("--no-server",), flag("Chat without a server behind it.", modes=("chat",))),
)
@server_options
@browser_options
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
    (
        ("--temp", "temperature"),
        {"type": float, "metavar": "X", "help": "Temperature; 0 takes the likeliest token."},
    ),
    (
        ("--top-k",),
        {"type": int, "metavar": "N", "help": "Choose among the K likeliest tokens; 0: all."},
    ),
    (
        ("--top-p",),
        {
            "type": float,
            "metavar": "X",
            "help": "Choose among the likeliest tokens that add up to P.",
        },
    ),
    (
        ("--min-p",),
        {
            "type": float,
            "metavar": "X",
            "help": "Leave out what is less likely than P times the likeliest.",
        },
    ),
    (
        ("--typical", "typical_p"),
        {"type": float, "metavar": "X", "help": "Locally typical sampling; 1: off."},
    ),
    (
        ("--repeat-penalty",),
        {"type": float, "metavar": "X", "help": "Divides the logits of recent tokens; 1: off."},
    ),
    (("--repeat-last-n",), {"type": int, "metavar": "N", "help": "How many tokens are recent."}),
    (
        ("--presence-penalty",),
        {"type": float, "metavar": "X", "help": "Subtracted once from each recent token."},
    ),
    (
        ("--frequency-penalty",),
        {"type": float, "metavar": "X", "help": "Subtracted for each time a token is recent."},
    ),
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
        {
            "type": click.IntRange(min=0),
            "metavar": "N",
            "help": "Same seed, same text; default: a random one.",
        },
    ),
    (
        ("--stop",),
        {"multiple": True, "metavar": "TEXT", "help": "Stop before this text; repeatable."},
    ),
    (("--ignore-eos",), flag("Go on where the model would end.")),
    modes=ANSWERING,
)
@options(
    "Format of answers",
    (
        ("-j", "--json-schema"),
        {"metavar": "SCHEMA|@FILE", "help": "JSON that this schema describes; {} is any."},
    ),
    (
        ("--grammar",),
        {"metavar": "TEXT|@FILE", "help": "What this grammar describes, in llguidance's Lark or in GBNF."},
    ),
    (("--grammar-file",), {"metavar": "FILE", "help": "The same, from a file."}),
    (("--regex",), {"metavar": "REGEX", "help": "What this regular expression matches as a whole."}),
    modes=ANSWERING,
)
@chat_options
@options(
    "Chat",
    (
        ("--resume",),
        {
            "setting": False,
            "modes": ("chat",),
            "type": click.Path(exists=True, dir_okay=False, path_type=Path),
            "metavar": "FILE",
            "help": "Go on with a conversation that /save wrote.",
        },
    ),
    (
        ("--overflow",),
        {
            "type": click.Choice(["error", "forget", "summarise"]),
            "default": "error",
            "modes": ("chat",),
            "help": "Where the context is full: say so (default), forget the oldest messages, or have the model "
            "summarise them.",
        },
    ),
    (
        ("--history/--no-history",),
        {"default": True, "modes": ("chat",), "help": "Whether typed lines are kept for the next run; default: yes."},
    ),
)
@parallel_options
@precise_options
@memory_options
@lock_options
@check_options
@draft_options
@guess_options
@gpu_option
@device_options
@module_options
@llamafile_options
@json_option
@preset_option
@message_options
def command(arguments: tuple[str, ...], **given: Any) -> int:
    """Chat in the terminal, or answer one prompt.

    The prompt is an argument, -p, -f or stdin; what stands on stdin is added to the others after a blank line. A base
    model, whose file has no chat template, completes the prompt. Without a prompt, on a terminal: a chat.
    """
    messages = messages_of(given)
    if given["use_args"]:
        from gemmart.cli import packed

        archive, _ = model_and_rest(arguments, given)
        if archive is None:
            raise click.UsageError("--use-args: name the model whose flags are meant")
        packed.use(resolve_model(archive, given, messages), given)
    if given["server"]:
        check_effect({"server"}, "with --server", messages)
        return serve(_served(arguments, given), given, messages)
    model_name, prompt, system = _prompt(arguments, given, messages)
    if prompt is None and given["as_json"]:
        raise click.UsageError("--json: needs a prompt")
    behind = prompt is None and sys.stdin.isatty() and not (given["chat"] or given["no_server"])
    if given["raw"]:
        check_effect({"cli"}, "with --cli: the prompt is completed as it stands", messages)
    elif prompt is not None:
        check_effect({"answer"}, "with a prompt", messages)
    elif behind:
        check_effect({"chat", "server"}, "in a chat", messages)
    else:
        check_effect({"chat"}, "in a chat without a server", messages)
    if not behind:
        given["log_format"] = "text"  # what a file sets for the server
        messages = messages_of(given)
    parallel = (given["parallel"] or 2) if behind else 1
    generation = _generation(given)
    with ExitStack() as opened:
        model = opened.enter_context(load_model(model_name, given, messages, parallel=parallel, **load_options(given)))
        if system is not None and not model.has_template:
            name = "-p" if given["chat"] else "--system"
            raise click.UsageError(f"{name}: {model.info.name} is a base model: it has no system prompt")
        if system is not None and given["resume"] is not None:
            raise click.UsageError("--system, --resume: a saved conversation has its own system prompt")
        if prompt is not None:
            return _answer(model, prompt, system, generation, given, messages)
        url = opened.enter_context(_server_behind(model, model_name, given, messages)).url if behind else None
        if url is not None and not given["no_browser"]:
            open_page(url, messages)
        return _chat(model, system, generation, given, messages, url)


def _chat(
    model: Model,
    system: str | None,
    generation: dict[str, Any],
    given: dict[str, Any],
    messages: Messages,
    url: str | None,
) -> int:
    """A chat until its end. `url`: of the server behind it."""
    from gemmart.chat import Chat
    from gemmart.chat.history import history_path
    from gemmart.terminal import Output

    # Another model has a format of its own, and a vocabulary that the draft model need not have.
    others = load_options(given) | {"template": None, "draft": None}
    return Chat(
        model,
        generation,
        system=system,
        output=Output(given["color"]),
        messages=messages,
        history=history_path() if given["history"] else None,
        overflow=given["overflow"],
        server_url=url,
        resume=given["resume"],
        typed=_typed(generation),
        load_model=lambda ref: load_model(ref, given, messages, **others),
    ).run()


def _server_behind(model: Model, ref: str | None, given: dict[str, Any], messages: Messages) -> RunningServer:
    """The server that answers beside the chat, on the same engine; on another port where the wanted one is taken."""
    from gemmart.server.running import RunningServer

    server = RunningServer(listen_options(given, or_any_port=True), app_options(given, ref, messages), model)
    if given["port"] and not server.url.endswith(f":{given['port']}"):
        messages.say(f"port {given['port']} is taken: the server is at {server.url}")
    return server


def _served(arguments: tuple[str, ...], given: dict[str, Any]) -> str | None:
    """The model of --server, with which nothing is asked here."""
    wrong = [name for name in ("cli", "chat") if given["raw" if name == "cli" else name]]
    wrong += [name for name in ("prompt", "file") if given[name] is not None]
    model, rest = model_and_rest(arguments, given)
    if wrong or rest:
        raise click.UsageError(f"{f'--{wrong[0]}' if wrong else repr(rest[0])}: has no effect with --server")
    return model


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
    output = Output()
    with messages.progress() as progress:
        stream.progress = progress
        completion = finish(stream, lambda text: None) if given["as_json"] else output.answer(stream)
    if given["as_json"]:
        print_json(_as_dict(model, completion))
    else:
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
    model, rest = model_and_rest(arguments, given)
    if given["chat"] and given["raw"]:
        raise click.UsageError("--chat, --cli: only one of them")
    sources = [("the argument", rest[0] if rest else None), ("-p", given["prompt"]), ("-f", given["file"])]
    named = [(name, value) for name, value in sources if value is not None]
    if len(named) > 1:
        raise click.UsageError(f"{' and '.join(name for name, _ in named)} both give a prompt")
    name, value = named[0] if named else (None, None)
    text = read_text(value, messages) if name == "-f" and value is not None else value
    if text is not None and name != "-f":
        text = clean_text(text, messages)
        if given["raw"] if given["escape"] is None else given["escape"]:
            text = re.sub(r"\\(.)", lambda m: ESCAPES.get(m[1], m[0]), text, flags=re.DOTALL)
    system = given["system"] if given["system"] is None else clean_text(given["system"], messages)
    if given["chat"]:
        if name == "the argument":
            raise click.UsageError("--chat: reads its turns from the terminal; the system prompt is -p")
        if text is not None and system is not None:
            raise click.UsageError(f"--system, {name}: with --chat both give the system prompt")
        return model, None, system if text is None else text
    if not sys.stdin.isatty() and (name, value) != ("-f", "-"):
        piped = read_text("-", messages)
        text = "\n\n".join(part for part in (text, piped) if part) or None
        if text is None:
            raise click.UsageError("no prompt: give it as an argument, with -p, -f or on stdin; or --chat")
    elif text is None and given["raw"]:
        raise click.UsageError("--cli: needs a prompt: give it with -p, -f or on stdin")
    return model, text, system


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
        "format": _format(given),
    }


def _typed(generation: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that stand on the command line, but for the format."""
    from gemmart import Sampling

    source = click.get_current_context().get_parameter_source

    def is_typed(name: str) -> bool:
        return source(name) is ParameterSource.COMMANDLINE

    options = {name: generation[name] for name in ("seed", "max_tokens", "stop", "ignore_eos") if is_typed(name)}
    wanted = {name: value for name, value in asdict(generation["sampling"]).items() if is_typed(name)}
    return options | ({"sampling": Sampling(**wanted)} if wanted else {})


def _format(given: dict[str, Any]) -> Format | None:
    """What answers must look like. Raises click.UsageError, ConstraintError."""
    from gemmart import Format

    flags = {name: f"--{name.replace('_', '-')}" for name in ("json_schema", "grammar", "grammar_file", "regex")}
    wanted = [name for name in flags if given[name] is not None]
    if not wanted:
        return None
    if len(wanted) > 1:
        raise click.UsageError(f"{flags[wanted[0]]}, {flags[wanted[1]]}: an answer has one format")
    (name,) = wanted
    flag, text = flags[name], given[name]
    if name == "regex":
        return Format.regex(text, param=flag)
    if name == "grammar_file" or text.startswith("@"):
        path = Path(text if name == "grammar_file" else text[1:])
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise click.UsageError(f"{flag}: {path} cannot be read: {reason}") from None
    if name != "json_schema":
        return Format.lark(text, param=flag)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{flag}: no JSON: {error}") from None
    if not isinstance(schema, dict):
        raise click.UsageError(f"{flag}: a schema is a JSON object")
    return Format.schema(schema, param=flag)
