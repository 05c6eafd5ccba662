"""The process that renders a model file's chat template: jinja2's immutable sandbox under limits of time and memory.

A sandbox stops a template from reaching out, not from running for ever; a process can be ended. It is started by
`template.py` as a script, knows nothing of gemmart, and speaks frames on its standard streams: four bytes of length
(big-endian), then JSON. In: {"source", "variables"}. Out: {"text"}, {"error", "line", "raised"} or {"limit"}, and an
empty object when it is ready.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NoReturn

sys.path += sys.argv[1:]  # where the parent found jinja2

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

CPU_SECONDS = 1.0
MEMORY = 128 << 20  # bytes of address space above what the idle worker has
MAX_OUTPUT = 16 << 20  # bytes
MAX_NESTING = 200


WARM_UP = r"{{ '<a>\n' | striptags | pprint | tojson }}{{ strftime_now('%c') }}{{ raise_exception('') }}"
"""Makes Python and jinja2 load what they load on first use, before files can no longer be opened."""


class Limit(Exception):
    """The template asks for more than a limit allows."""


class Raised(jinja2.TemplateError):
    """The template itself refuses these messages."""


class Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012  # so declared by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def raise_exception(message: str) -> NoReturn:
    raise Raised(message)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> jinja2.Environment:
    """As Hugging Face renders chat templates."""
    env = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    env.globals["strftime_now"] = strftime_now
    return env


def check(tree: nodes.Template) -> None:
    """Refuse what no chat template needs: other files, names that begin with an underscore, deep nesting."""
    level: list[nodes.Node] = [tree]
    for _ in range(MAX_NESTING):
        for node in level:
            if isinstance(node, nodes.Include | nodes.Extends | nodes.Import | nodes.FromImport):
                raise jinja2.TemplateSyntaxError("a chat template cannot use other files", node.lineno)
            for field, value in node.iter_fields():
                text = value.value if isinstance(value, nodes.Const) and field == "arg" else value
                if isinstance(text, str) and text.startswith("_") and field not in ("data", "value"):
                    raise jinja2.TemplateSyntaxError(f"the name {text[:40]!r} begins with an underscore", node.lineno)
        level = [child for node in level for child in node.iter_child_nodes()]
        if not level:
            return
    raise Limit(f"is nested deeper than {MAX_NESTING} levels")


def render(template: jinja2.Template, variables: dict[str, Any]) -> str:
    parts, size = [], 0
    for part in template.generate(variables):
        size += len(part) if part.isascii() else len(part.encode("utf-8", "replace"))
        if size > MAX_OUTPUT:
            raise Limit(f"writes more than {MAX_OUTPUT} bytes")
        parts.append(part)
    return "".join(parts)


def line_of(error: BaseException) -> int | None:
    line, trace = None, error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


class Renderer:
    """Keeps the template that was compiled last."""

    def __init__(self) -> None:
        self.env = environment()
        self.source: str | None = None

    def answer(self, source: str, variables: dict[str, Any]) -> dict[str, Any]:
        try:
            if source != self.source:
                tree = self.env.parse(source)
                check(tree)
                self.template = self.env.from_string(tree)
                self.source = source
            return {"text": render(self.template, variables)}
        except Limit as limit:
            return {"limit": str(limit)}
        except (MemoryError, OverflowError) as error:
            return {"limit": f"goes too far: {error}" if str(error) else "needs too much memory"}
        except RecursionError:
            return {"limit": "is nested too deeply"}
        except jinja2.TemplateSyntaxError as error:
            return {"error": error.message, "line": error.lineno, "raised": False}
        except Exception as error:  # whatever a template makes happen is the template's error
            text = f"{error}" if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            return {"error": text[:2000], "line": line_of(error), "raised": isinstance(error, Raised)}


def frames() -> Iterator[Any]:
    while len(head := sys.stdin.buffer.read(4)) == 4:
        yield json.loads(sys.stdin.buffer.read(struct.unpack(">I", head)[0]))


def send(answer: dict[str, Any]) -> None:
    body = json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace")
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()


def address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: what an idle Python takes at most
        return 1 << 30


def limit(kind: int, value: int) -> None:
    resource.setrlimit(kind, (value, value))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    sys.setrecursionlimit(10_000)
    time.tzset()  # reads its file now
    renderer = Renderer()
    renderer.answer(WARM_UP, {})
    limit(resource.RLIMIT_AS, address_space() + MEMORY)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NOFILE, 0)
    send({})
    for request in frames():
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        answer = renderer.answer(request["source"], request["variables"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(answer)


if __name__ == "__main__":
    main()
