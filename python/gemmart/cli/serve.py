"""`gemmart serve`: the HTTP server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from gemmart.cli.browser import open_page
from gemmart.cli.models import load_model, load_options, only_model
from gemmart.cli.options import (
    AT_LEAST_1,
    MODEL,
    Command,
    chat_options,
    check_effect,
    check_options,
    context_options,
    device_options,
    draft_options,
    flag,
    gpu_option,
    guess_options,
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
)

if TYPE_CHECKING:
    from gemmart import Model
    from gemmart.server.app import AppOptions
    from gemmart.server.running import ListenOptions
    from gemmart.terminal import Messages

SECONDS = click.FloatRange(min=0)

SERVING = ("server",)  # the mode, which a chat with a server behind it is in too

server_options = options(
    "Server",
    (
        ("--host",),
        {
            "metavar": "HOST",
            "default": "127.0.0.1",
            "help": "Where to listen: a name, an address or unix:PATH.",
        },
    ),
    (
        ("--port",),
        {
            "type": click.IntRange(0, 65535),
            "metavar": "N",
            "default": 8080,
            "help": "Default 8080; 0: a free one.",
        },
    ),
    (
        ("--api-key",),
        {"metavar": "KEY", "help": "Ask for this key; others on this machine can see an argument."},
    ),
    (
        ("--api-key-file",),
        {"metavar": "FILE", "help": "Ask for one of the keys in this file, one a line."},
    ),
    (("--require-key",), flag("Refuse to be reached from other machines without a key.")),
    (
        ("--cors-origin", "cors_origins"),
        {
            "metavar": "URL",
            "multiple": True,
            "help": "Pages of this origin may ask; * for all; repeatable.",
        },
    ),
    (
        ("--allowed-host", "allowed_hosts"),
        {
            "metavar": "NAME",
            "multiple": True,
            "help": "Another name of this server; * for all; repeatable.",
        },
    ),
    (
        ("--root-path",),
        {"metavar": "PATH", "default": "", "help": "What a proxy takes from the front of paths."},
    ),
    (("--ssl-certfile",), {"metavar": "FILE", "help": "Serve HTTPS with this certificate."}),
    (("--ssl-keyfile",), {"metavar": "FILE", "help": "Its key, if that is in a file of its own."}),
    (
        ("--request-timeout",),
        {
            "type": SECONDS,
            "metavar": "S",
            "default": 600,
            "help": "Seconds for an answer; default 600.",
        },
    ),
    (
        ("--drain",),
        {"type": SECONDS, "metavar": "S", "default": 30, "help": "Seconds to finish in; default 30."},
    ),
    (
        ("--queue",),
        {
            "type": AT_LEAST_1,
            "metavar": "N",
            "default": 64,
            "help": "Requests that may wait; default 64.",
        },
    ),
    (("--strict-model",), flag("Refuse requests for a model of another name.")),
    (
        ("--share-cache",),
        flag("Share computed prefixes between keys; the time of an answer tells of them."),
    ),
    (
        ("--allow-request-template",),
        flag("Take chat templates from requests, as chat_template; they are rendered in a sandbox."),
    ),
    (("--log-prompts",), flag("Log what is asked.")),
    (
        ("--log-format",),
        {
            "type": click.Choice(["text", "json"]),
            "default": "text",
            "help": "Lines of the log: text (default), or JSON objects.",
        },
    ),
    modes=SERVING,
)
parallel_options = options(
    "Computing",
    (
        ("-np", "--parallel"),
        {
            "type": AT_LEAST_1,
            "metavar": "N",
            "help": "Sequences of full length at once; default: 4, or 2 beside a chat.",
        },
    ),
    modes=SERVING,
)
browser_options = options(
    "Server", (("--no-browser", "--nobrowser"), flag("Do not open the web page, which a terminal with a display does."))
)


@click.command("serve", cls=Command, options_metavar="[options]")
@click.argument("arguments", nargs=-1, type=MODEL, metavar="[MODEL]")
@model_options
@server_options
@browser_options
@context_options
@parallel_options
@chat_options
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
@preset_option
@message_options
def command(arguments: tuple[str, ...], **given: Any) -> int:
    """Serve a model over HTTP to OpenAI's, Anthropic's and Ollama's clients, and a web page to chat with it.

    The server listens while the model loads; then, from a terminal with a display, the page opens in the browser.
    Ctrl-C or SIGTERM lets running answers end; a second one ends at once.
    """
    messages = messages_of(given)
    check_effect({"server"}, "in a server", messages)
    return serve(only_model(arguments, given), given, messages)


def serve(ref: str | None, given: dict[str, Any], messages: Messages) -> int:
    """Serve a model until a signal comes; returns the exit code."""
    from gemmart.server.running import serve_forever
    from gemmart.terminal import on_gpus

    if given["log_format"] == "json":
        from gemmart.logs import LoggedMessages

        messages = LoggedMessages(given["color"], quiet=given["quiet"])
    if not given["quiet"]:
        logging.getLogger("gemmart.server").setLevel(min(logging.INFO, logging.getLogger("gemmart").level))

    def ready(url: str, model: Model) -> None:
        if where := on_gpus(model.plan):
            messages.note(where)
        messages.note(f"{model.info.name}: {url}")
        if not given["no_browser"]:
            open_page(url, messages)

    return serve_forever(
        lambda: load_model(ref, given, messages, parallel=given["parallel"] or 4, **load_options(given)),
        listen_options(given),
        app_options(given, ref, messages),
        ready,
    )


def listen_options(given: dict[str, Any], *, or_any_port: bool = False) -> ListenOptions:
    """What server_options say of the address. `or_any_port`: where the port is taken, any free one."""
    from gemmart.server.running import ListenOptions

    names = ("host", "port", "require_key", "root_path", "ssl_certfile", "ssl_keyfile", "drain")
    return ListenOptions(**{name: given[name] for name in names}, or_any_port=or_any_port)


def app_options(given: dict[str, Any], ref: str | None, messages: Messages) -> AppOptions:
    """What server_options say of the application. `ref`: how the user calls the model."""
    from gemmart.server.app import AppOptions

    names = (
        *("cors_origins", "allowed_hosts", "request_timeout", "queue", "strict_model"),
        *("share_cache", "allow_request_template", "log_prompts"),
    )
    return AppOptions(
        **{name: given[name] for name in names}, api_keys=_keys(given, messages), aliases=() if ref is None else (ref,)
    )


def _keys(given: dict[str, Any], messages: Messages) -> list[str]:
    """Of --api-key and of the file. Raises click.UsageError for a file without any."""
    keys = [] if given["api_key"] is None else [given["api_key"]]
    if keys and click.get_current_context().get_parameter_source("api_key") is ParameterSource.COMMANDLINE:
        messages.warn("--api-key: everybody on this machine can see arguments; better: --api-key-file, GEMMART_API_KEY")
    if given["api_key_file"] is None:
        return keys
    try:
        lines = Path(given["api_key_file"]).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"--api-key-file: {given['api_key_file']} cannot be read: {error}") from None
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise click.UsageError(f"--api-key-file: {given['api_key_file']} holds no key")
    return keys + found
