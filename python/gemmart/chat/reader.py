"""What the person says: from a terminal with line editing, from a dumb one, or from a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from gemmart.terminal import Messages, Output, from_bytes

MORE = "... "
QUOTES = '"""'
PATHS = "<paths>"
Complete = Callable[[str], Iterable[str]]
"""What Tab offers: from the line before the cursor to whole words that may stand at its end, PATHS among them for
files."""


class Reader(Protocol):
    """Where the lines come from."""

    interactive: bool  # a person is there
    can_edit: bool  # `default` counts

    def read(self, prompt: str, gauge: str, default: str = "") -> str:
        """The next text. gauge: how full the context is; default: what to begin with, where it can be edited. Raises
        EOFError at the end, KeyboardInterrupt at Ctrl-C on an empty line."""
        ...


def open_reader(output: Output, messages: Messages, history: Path | None, complete: Complete) -> Reader:
    """The best reader for what stdin and the terminal are."""
    if not sys.stdin.isatty():
        return PipeReader(messages)
    if is_dumb() or not (output.is_terminal or sys.stderr.isatty()):
        return PlainReader(output)
    from gemmart.chat.editor import LineEditor

    return LineEditor(messages, history, complete)


def is_dumb() -> bool:
    """Whether the terminal understands no escape codes."""
    return os.environ.get("TERM", "dumb") in ("dumb", "unknown", "")


def unfinished(text: str) -> bool:
    """Whether more lines are to follow: after a \\ at the end, or inside of triple quotes."""
    if text.startswith(QUOTES):
        body = text.rstrip()
        return len(body) < 2 * len(QUOTES) or not body.endswith(QUOTES)
    return text.endswith("\\") and not text.endswith("\\\\")


def finished(text: str) -> str:
    """What a text says: without the triple quotes around it, or the \\ at the ends of its lines."""
    if text.startswith(QUOTES):
        return text.rstrip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")
    return text.replace("\\\n", "\n")


class PipeReader:
    """Stdin that is no terminal: one line is one turn."""

    interactive = can_edit = False

    def __init__(self, messages: Messages) -> None:
        self._messages = messages

    def read(self, prompt: str, gauge: str, default: str = "") -> str:
        data = sys.stdin.buffer.readline()
        if not data:
            raise EOFError
        return from_bytes(data, "stdin", self._messages).rstrip("\r\n")


class PlainReader:
    """A terminal without escape codes."""

    interactive = True
    can_edit = False

    def __init__(self, output: Output) -> None:
        self._output = output

    def read(self, prompt: str, gauge: str, default: str = "") -> str:
        import readline

        while True:
            lines: list[str] = []
            try:
                while not lines or unfinished("\n".join(lines)):
                    lines.append(self._line(MORE if lines else prompt))
                return finished("\n".join(lines))
            except EOFError:
                print(file=sys.stderr)
                raise
            except KeyboardInterrupt:
                print(file=sys.stderr)
                if not (lines or readline.get_line_buffer()):
                    raise

    def _line(self, prompt: str) -> str:
        if self._output.is_terminal:
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout is for answers
        return input()


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """What is typed meanwhile is not shown, where it would stand in the midst of an answer, but kept for the next
    prompt; Ctrl-C works."""
    if not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    wanted = termios.tcgetattr(sys.stdin)
    wanted[0] &= ~termios.ICRNL  # Enter must still be Enter for who reads it later
    wanted[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, wanted)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
