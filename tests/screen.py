"""The program on a terminal that is emulated: pexpect types, pyte shows."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pexpect
import pyte

import program

PROMPT = ">>>"


class Screen:
    """A running program, what it wrote (`raw`), and what of that is to be seen."""

    def __init__(
        self, arguments: Sequence[str | Path], home: Path, *, columns: int = 100, lines: int = 30, **env: str
    ) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=100_000)
        self._stream = pyte.ByteStream(self._screen)
        self.raw = b""
        self.child = pexpect.spawn(
            program.COMMAND[0],
            [*program.COMMAND[1:], *map(str, arguments)],
            env=program.environment(home) | {"TERM": "xterm-256color"} | env,
            dimensions=(lines, columns),
            timeout=60,
        )

    def text(self) -> str:
        """All lines, those scrolled out of sight included."""
        width = self._screen.columns
        top = ["".join(row[x].data for x in range(width)) for row in self._screen.history.top]
        return "\n".join(line.rstrip() for line in (*top, *self._screen.display)).rstrip()

    def until(self, condition: Callable[[str], object], seconds: float = 30) -> str:
        """Read on until the text fulfils the condition; returns it."""
        end = time.monotonic() + seconds
        while not condition(self.text()):
            assert time.monotonic() < end, f"not seen within {seconds} s:\n{self.text()}"
            self._read()
        return self.text()

    def until_shown(self, text: str) -> str:
        return self.until(lambda shown: text in shown)

    def until_prompt(self) -> str:
        """Until the last line is the prompt, and nothing else comes."""
        self.until(lambda shown: shown.rpartition("\n")[2].rpartition("  ")[0].rstrip().endswith(PROMPT))
        return self.text()

    def type(self, keys: str) -> None:
        self.child.send(keys)

    def ask(self, line: str) -> str:
        """Type a line; what is shown between it and the next prompt."""
        n_lines = self.until_prompt().count("\n")
        self.type(line + "\r")
        self.until(lambda shown: shown.count("\n") > n_lines)
        return "\n".join(self.until_prompt().split("\n")[n_lines + 1 : -1])

    def end(self) -> int:
        """Wait for the end; returns the exit code."""
        self.child.expect(pexpect.EOF)
        self._take(self.child.before)
        self.child.close()
        return int(self.child.exitstatus)

    def close(self) -> None:
        self.child.close(force=True)

    def _read(self) -> None:
        with contextlib.suppress(pexpect.TIMEOUT):
            self._take(self.child.read_nonblocking(65536, 0.05))

    def _take(self, data: bytes) -> None:
        self.raw += data
        self._stream.feed(data)
