"""The unfinished end of an answer on the terminal: plain text that can be taken back while it is in sight."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

TAB = 8


class Tail:
    """Text that is written as it comes and may be erased. Its rows are broken here, never by the terminal, one column
    early, so that how many there are is certain; it cannot be erased any more where they are more than the terminal
    has, or the terminal's size changed."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._size = os.terminal_size((0, 0))
        self.clear()

    def clear(self) -> None:
        """What is shown stays; from here on a new one."""
        self._rows = 1
        self._column = 0
        self._word, self._word_columns = "", 0  # since the last blank of this row
        self._lost = False
        self.empty = True

    def stay(self) -> None:
        """What comes now goes on with what stands there, and cannot be erased either."""
        self._size = shutil.get_terminal_size()
        self._lost, self.empty = True, False

    def put(self, text: str) -> None:
        """Write text without control characters but \\n and \\t."""
        if not text:
            return
        size = shutil.get_terminal_size()
        if self.empty:
            self._size = size
        elif size != self._size:
            self._lost = True
        self.empty = False
        out: list[str] = []
        for char in text:
            self._put(char, out)
        self._lost = self._lost or self._rows > self._size.lines
        self._write("".join(out))

    def erase(self) -> str | None:
        """What to write to erase it, or None if that is not possible any more."""
        if self.empty:
            return ""
        if self._lost or shutil.get_terminal_size() != self._size:
            return None
        return "\r" + (f"\x1b[{self._rows - 1}A" if self._rows > 1 else "") + "\x1b[J"

    @property
    def at_line_start(self) -> bool:
        return self._column == 0

    def _put(self, char: str, out: list[str]) -> None:
        if char == "\n":
            self._next_row(out)
            return
        if char == "\t":
            char = " " * (TAB - self._column % TAB)
        n = sum(map(columns, char))
        if self._column + n >= self._size.columns:
            keeps = not char.isspace() and 0 < self._word_columns < self._size.columns // 2
            word, word_columns = (self._word, self._word_columns) if keeps else ("", 0)
            if keeps:  # the word moves on to the next row
                out.append(f"\x1b[{word_columns}D\x1b[K")
            self._next_row(out)
            out.append(word)
            self._word, self._word_columns, self._column = word, word_columns, word_columns
            if char.isspace():
                return
        out.append(char)
        self._column += n
        if char.isspace():
            self._word, self._word_columns = "", 0
        else:
            self._word += char
            self._word_columns += n

    def _next_row(self, out: list[str]) -> None:
        out.append("\n")
        self._rows += 1
        self._column = 0
        self._word, self._word_columns = "", 0


def columns(char: str) -> int:
    """How many columns a character takes at most: a terminal may join several to fewer."""
    from rich.cells import get_character_cell_size

    if char == "\ufe0f" or "\U0001f1e6" <= char <= "\U0001f1ff":
        return 2 if char != "\ufe0f" else 1
    return get_character_cell_size(char)
