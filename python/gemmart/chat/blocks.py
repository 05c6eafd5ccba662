"""Where the blocks of a Markdown text end, line by line as it is written."""

from __future__ import annotations

import re
from dataclasses import dataclass

FENCE = re.compile(r"\s*(`{3,}|~{3,})([^`]*)$")
ITEM = re.compile(r"(\s*)(?:[-*+]|\d{1,9}[.)])(?:\s|$)")
HEADING = re.compile(r"#{1,6}(?:\s|$)")
CONTEXT_LINES = 100
"""How many lines of a code block say how the next one is coloured: each is coloured when it ends."""


@dataclass(frozen=True, slots=True)
class Text:
    """A finished block: a paragraph, a heading, an item of a list, a table, a quotation."""

    source: str
    indent: int  # columns; those of a list that it stands in
    apart: bool  # an empty line stands before it


@dataclass(frozen=True, slots=True)
class Fence:
    """The line that opens or closes a block of code."""

    line: str
    apart: bool


@dataclass(frozen=True, slots=True)
class Code:
    """A line of code, and those before it."""

    line: str
    before: tuple[str, ...]
    language: str
    apart: bool = False


Block = Text | Fence | Code


class Blocks:
    """Takes lines, hands out blocks."""

    def __init__(self) -> None:
        self._pending: list[str] = []
        self._blank = False  # the last line was empty
        self._first = True
        self._parted = False  # a heading or code came last
        self._listing = False  # a list came last, so that indented text may belong to it
        self._fence: str | None = None
        self._language = ""
        self._code: list[str] = []

    def push(self, line: str) -> tuple[list[Block], bool]:
        """Take a whole line, without its end: what it finishes, and whether it is part of what is pending."""
        if self._fence is not None:
            return [self._code_line(line)], False
        if not line.strip():
            done = self._end()
            self._blank = True
            return done, False
        if match := FENCE.match(line):
            done = self._end()
            self._fence, self._language, self._code = match[1], match[2].strip(), []
            return [*done, Fence(line, self._apart())], False
        if HEADING.match(line):
            done = self._end()
            self._parted = True
            self._pending = [line]
            done += self._end()
            self._parted = True
            return done, False
        done = self._end() if ITEM.match(line) else []
        self._pending.append(line)
        return done, True

    def finish(self, rest: str) -> list[Block]:
        """What is left, with `rest`, a line that did not end."""
        done: list[Block] = self.push(rest)[0] if rest else []
        return done + self._end()

    def _code_line(self, line: str) -> Block:
        assert self._fence is not None
        stripped = line.strip()
        if len(stripped) >= len(self._fence) and not stripped.strip(self._fence[0]):
            self._fence, self._parted = None, True
            return Fence(line, False)
        before = tuple(self._code[-CONTEXT_LINES:])
        self._code.append(line)
        return Code(line, before, self._language)

    def _end(self) -> list[Block]:
        """The pending block, finished."""
        if not self._pending:
            return []
        lines, self._pending = self._pending, []
        is_item = ITEM.match(lines[0]) is not None
        indent = min(len(line) - len(line.lstrip(" ")) for line in lines)
        if indent and not (is_item or self._listing):
            indent = 0  # in no list: four blanks make code, fewer make nothing
        self._listing = is_item or (self._listing and indent > 0)
        return [Text("\n".join(line[indent:] for line in lines), indent, self._apart())]

    def take_gap(self) -> bool:
        """Whether an empty line stands between what is finished and what comes now; it is not told again."""
        return not (self._first or self._pending or self._fence) and self._apart()

    def _apart(self) -> bool:
        apart = (self._blank or self._parted) and not self._first
        self._blank = self._parted = self._first = False
        return apart
