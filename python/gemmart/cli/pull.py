"""`gemmart pull`: fetch a model, and say where it is."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from gemmart.cli.options import MODEL, Command, flag, message_options, messages_of, options, print_json
from gemmart.progress import Progress

GEMMA_TERMS = "https://ai.google.dev/gemma/terms"
EVENT_SECONDS = 0.1  # between two events of progress


@click.command("pull", cls=Command, options_metavar="[options]")
@click.argument("ref", type=MODEL, metavar="MODEL")
@options(
    "Model",
    (("--verify",), flag("Compare what is here already with its SHA-256 again.", setting=False)),
    (("--offline",), flag("Use what is on this machine; fetch nothing.")),
)
@options("Output", (("--json", "as_json"), flag("Print events, a JSON object a line.", setting=False)))
@message_options
def command(ref: str, verify: bool, **given: Any) -> int:
    """Fetch a model and print where its file is; nothing is fetched twice."""
    from gemmart import _core, sources

    messages = messages_of(given)

    def notice(text: str) -> None:
        messages.warn(text)
        if given["as_json"]:
            print_json({"event": "notice", "text": text})

    with events() if given["as_json"] else messages.progress() as progress:
        source = sources.resolve(ref, offline=given["offline"], verify=verify, progress=progress, notice=notice)
    gguf = _core.Gguf(*source.parts)  # a sound file
    licence, family = (gguf.get(key) if key in gguf else "" for key in ("general.license", "general.architecture"))
    terms = f"; the Gemma terms: {GEMMA_TERMS}" if str(family).startswith("gemma") else ""
    messages.note(f"licence: {licence or 'not given in the file'}{terms}")
    if given["as_json"]:
        about = {"origin": source.origin, "bytes": source.length, "license": licence or None}
        files = list(dict.fromkeys(str(part.path) for part in source.parts))
        print_json({"event": "done", "ref": ref, "path": files[0], "files": files, "entry": source.entry, **about})
    else:
        print(source.path)
    return 0


@contextmanager
def events() -> Iterator[Progress]:
    """A Progress that prints events."""
    last: dict[str, float] = {}

    def tell(what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if done == total or now - last.get(what, -EVENT_SECONDS) >= EVENT_SECONDS:
            last[what] = now
            print_json({"event": "progress", "what": what, "done": done, "total": total})

    yield tell
