"""An answer in Markdown on a terminal: its unfinished end is plain, and is replaced block by block as they end."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable

from markdown_it import MarkdownIt
from rich.console import Console, RenderableType
from rich.markdown import Heading, Markdown
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text as RichText

from gemmart.chat import blocks
from gemmart.chat.tail import Tail
from gemmart.terminal import SHOWN

CODE_THEME = "ansi_dark"
"""The terminal's own sixteen colours."""
PADDING = re.compile(r"(?: |\x1b\[[0-9;]*m)+$", re.MULTILINE)
"""Blanks up to the edge, which nobody wants to copy."""
EMPTY_LINES = re.compile(r"\A(?:(?:\x1b\[[0-9;]*m)*\n)+|\n(?:(?:\x1b\[[0-9;]*m)*\n?)*\Z")
"""Those around a block."""


class LeftHeading(Heading):
    LEVEL_ALIGN = dict.fromkeys(("h1", "h2", "h3", "h4", "h5", "h6"), "left")


class WholeMarkdown(Markdown):
    """Markdown that leaves nothing out and fetches nothing: HTML, images and definitions of links are text, and a
    line's end ends the line."""

    elements = {**Markdown.elements, "heading_open": LeftHeading}  # noqa: RUF012  as the library has it

    def __init__(self, source: str) -> None:
        super().__init__("", code_theme=CODE_THEME, hyperlinks=False)
        parser = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
        self.parsed = parser.disable(["reference", "image"]).parse(source)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"


class MarkdownWriter:
    """Takes an answer's text as it comes. `write` writes to the terminal; color: whether there is any but plain."""

    def __init__(self, write: Callable[[str], object], *, color: bool) -> None:
        self._write = write
        self._console = Console(
            file=io.StringIO(), force_terminal=True, no_color=not color, highlight=False, markup=False, emoji=False
        )
        self._blocks = blocks.Blocks()
        self._tail = Tail(write)
        self._line = ""  # the one that has not ended

    def write(self, text: str) -> None:
        """More of the answer."""
        *lines, rest = text.translate(SHOWN).split("\n")
        for line in lines:
            self._put(line)
            self._end_line()
        self._put(rest)

    def finish(self) -> None:
        """The end of the answer; the next text stands on a line of its own."""
        line, self._line = self._line, ""
        if not self._replace(self._blocks.finish(line)) and not self._tail.at_line_start:
            self._write("\n")
        self._tail.clear()

    def _put(self, text: str) -> None:
        """Part of a line."""
        if self._tail.empty and text.strip() and self._blocks.take_gap():
            self._write("\n")
        self._line += text
        self._tail.put(text)

    def _end_line(self) -> None:
        line, self._line = self._line, ""
        done, pending = self._blocks.push(line)
        if not done and pending:
            self._tail.put("\n")
        elif self._replace(done):
            self._tail.clear()
            self._tail.put(f"{line}\n" if pending else "")
        else:
            if not self._tail.at_line_start:
                self._write("\n")
            self._tail.clear()
            if pending:
                self._tail.stay()

    def _replace(self, done: list[blocks.Block]) -> bool:
        """Write finished blocks in the place of the tail; False where that stands there for good."""
        erase = self._tail.erase()
        if erase is None:
            return False
        self._write(erase + "".join(map(self._rendered, done)))
        return True

    def _rendered(self, block: blocks.Block) -> str:
        """A block as the terminal is told it, with its last newline."""
        self._console.width = shutil.get_terminal_size().columns
        if isinstance(block, blocks.Text):
            indent = min(block.indent, self._console.width // 2)
            text = self._printed(Padding(WholeMarkdown(block.source), (0, 0, 0, indent)))
            text = EMPTY_LINES.sub("", text) + "\n"
        elif isinstance(block, blocks.Fence):
            text = self._printed(RichText(block.line, style="dim"), soft_wrap=True)
        else:
            text = self._printed(colored(block), soft_wrap=True)
        return "\n" * block.apart + text

    def _printed(self, renderable: RenderableType, *, soft_wrap: bool = False) -> str:
        with self._console.capture() as captured:
            self._console.print(renderable, soft_wrap=soft_wrap)
        return PADDING.sub(lambda match: match[0].replace(" ", ""), captured.get())


def colored(code: blocks.Code) -> RichText:
    """A line of code in the colours that its language gives it."""
    if not code.language:
        return RichText(code.line)
    syntax = Syntax("", code.language.split()[0], theme=CODE_THEME)
    text = syntax.highlight("\n".join((*code.before, code.line)))
    lines = text.split("\n", allow_blank=True)
    return lines[len(code.before)] if len(lines) > len(code.before) else RichText(code.line)
