"""The process that compiles a format before gemmart does, under limits of time and memory.

The compiler has limits of its own, but not for all that a request can hold: some schemas take it minutes, some grammars
its stack. It is started by `worker.py` as a script. In: {"source", "kind", "limits"}. Out: {"lark"} or {"error"}.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import sys
import threading
from collections.abc import Iterator
from typing import Any

sys.path += sys.argv[1:]  # where the parent found llguidance

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark

CPU_SECONDS = 0.2
MEMORY = 256 << 20  # bytes of address space above what the idle worker has
STACK = 1 << 20  # bytes; the threads of gemmart have more


def compile(source: str, kind: str, limits: dict[str, Any]) -> dict[str, str]:
    if kind == "gbnf":
        try:
            source = gbnf_to_lark(source)
        except RecursionError:
            return {"error": "the GBNF grammar is nested too deeply"}
        except Exception as error:  # the converter raises no narrower class
            return {"error": f"the GBNF grammar cannot be converted: {error}"}
    # A vocabulary of bytes: what a format costs does not depend much on that, and it is made at once.
    matcher = LLMatcher(
        LLTokenizer("byte"),
        LLMatcher.grammar_from_lark(source),
        log_level=0,
        limits=LLParserLimits(**limits, verbose_errors=False),
    )
    return {"error": matcher.get_error()} if matcher.is_error() else {"lark": source}


def answer(request: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    thread = threading.Thread(target=lambda: found.update(compile(**request)))
    thread.start()
    thread.join()
    return found


def frames() -> Iterator[Any]:
    while len(head := sys.stdin.buffer.read(4)) == 4:
        yield json.loads(sys.stdin.buffer.read(struct.unpack(">I", head)[0]))


def send(value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    sys.stdout.buffer.write(struct.pack(">I", len(body)) + body)
    sys.stdout.buffer.flush()


def address_space() -> int:
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux: what an idle Python takes at most
        return 1 << 30


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is meant for the parent
    threading.stack_size(STACK)
    answer({"source": "start: /a/", "kind": "lark", "limits": {}})
    for kind, value in (
        (resource.RLIMIT_AS, address_space() + MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
    ):
        resource.setrlimit(kind, (value, value))
    send({})
    for request in frames():
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # its signal ends the process
        found = answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        send(found)


if __name__ == "__main__":
    main()
