"""Answers in Markdown on an emulated terminal: finished blocks are rendered in the place of their plain text."""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Callable

import pyte
import pytest

from gemmart.chat.markdown import MarkdownWriter

COLOR = re.compile(r"\x1b\[[\d;]*(?:3[0-7]|9[0-7]|4[0-7]|38;[\d;]+)[\d;]*m")


class Terminal:
    """A screen with a history that never cuts lines off."""

    def __init__(self, columns: int, lines: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self._screen = pyte.HistoryScreen(columns, lines, history=100_000)
        self._screen.set_mode(pyte.modes.LNM)
        self._stream = pyte.Stream(self._screen)
        self.raw = ""
        self.size = os.terminal_size((columns, lines))
        monkeypatch.setattr(shutil, "get_terminal_size", lambda *_: self.size)

    def write(self, text: str) -> None:
        self.raw += text
        self._stream.feed(text)

    def resize(self, columns: int, lines: int) -> None:
        self.size = os.terminal_size((columns, lines))
        self._screen.resize(lines, columns)

    def shown(self) -> list[str]:
        """All lines, those scrolled out of sight included, without blanks at their ends."""
        top = ["".join(row[x].data for x in range(self.size.columns)) for row in self._screen.history.top]
        lines = [line.rstrip() for line in (*top, *self._screen.display)]
        while lines and not lines[-1]:
            lines.pop()
        return lines


Open = Callable[..., Terminal]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Open:
    return lambda columns=60, lines=24: Terminal(columns, lines, monkeypatch)


def play(
    terminal: Terminal, text: str, *, seed: int = 0, color: bool = True, between: Callable[[], object] = int
) -> None:
    """Write a text in pieces of a few characters, as a model does, between two lines of ours."""
    terminal.write("before\n")
    writer, rng, at = MarkdownWriter(terminal.write, color=color), random.Random(seed), 0
    while at < len(text):
        n = rng.randint(1, 6)
        writer.write(text[at : at + n])
        between()
        at += n
    writer.finish()
    terminal.write("after\n")


EXAMPLE = """# A title
A **bold** paragraph with `code`,
and a second line; [a link](http://x.y) and 日本語.
Then:
- one
- two with *emphasis*
  - nested

1. First
   ```python
   def f(x):
       return "a"
   ```
   after it
2. Second <b>html</b> ![picture](p.png)

| a | b |
|---|---|
| 1 | 22 |

> quoted

[1]: http://example.com
```
plain
```
The end"""
RENDERED = """before
A title

A bold paragraph with code,
and a second line; a link (http://x.y) and 日本語.
Then:
 • one
 • two with emphasis
   • nested

 1 First
   ```python
   def f(x):
       return "a"
   ```

   after it
 2 Second <b>html</b> !picture (p.png)

 a  b
 ─────
 1  22

▌ quoted

[1]: http://example.com
```
plain
```

The end
after"""


@pytest.mark.parametrize("seed", range(5))
def test_blocks_are_rendered(terminal: Open, seed: int) -> None:
    screen = terminal()
    play(screen, EXAMPLE, seed=seed)
    shown = "\n".join(screen.shown())
    assert shown == RENDERED
    assert COLOR.search(screen.raw)


def test_without_colour(terminal: Open) -> None:
    screen = terminal()
    play(screen, EXAMPLE, color=False)
    assert not COLOR.search(screen.raw)
    assert "\x1b[1m" in screen.raw  # bold is no colour


def test_the_unfinished_tail_is_plain(terminal: Open) -> None:
    screen = terminal()
    writer = MarkdownWriter(screen.write, color=True)
    writer.write("done **now**\n\nnot **yet")
    assert screen.shown() == ["done now", "", "not **yet"]
    writer.write("** there\n")
    assert screen.shown()[-1] == "not **yet** there"
    writer.write("\n")
    assert screen.shown() == ["done now", "", "not yet there"]


def numbered(n_blocks: int, rng: random.Random) -> tuple[str, list[str]]:
    """A text of paragraphs, lists and code of all lengths, and its words, each once."""
    blocks, words = [], []
    for _ in range(n_blocks):
        own = [f"{rng.choice(['w', 'x日本', 'é'])}{len(words) + i}." for i in range(rng.choice([3, 20, 60, 200]))]
        words += own
        if rng.random() < 0.3:
            blocks.append("```python\n" + "\n".join(own) + "\n```")
        else:
            marked = [rng.choice([word, f"**{word}**", f"`{word}`"]) for word in own]
            blocks.append(rng.choice(["", "- ", "1. ", "> ", "  "]) + " ".join(marked))
    return "\n\n".join(blocks), words


def words_shown(lines: list[str]) -> list[str]:
    return re.findall(r"(?:w|x日本|é)\d+\.", re.sub(r"[▌*`]", "", " ".join(lines)))


@pytest.mark.parametrize("size", [(80, 24), (40, 10), (30, 5)])
def test_nothing_is_lost_or_doubled(terminal: Open, size: tuple[int, int]) -> None:
    """Also where a block is taller than the screen."""
    for seed in range(2):
        screen = terminal(*size)
        text, words = numbered(5, random.Random(seed))
        play(screen, text, seed=seed)
        assert words_shown(screen.shown()) == words
        assert [line for line in screen.shown() if line in ("before", "after")] == ["before", "after"]


def test_a_resize_within_a_block_leaves_it_as_it_is(terminal: Open) -> None:
    screen = terminal(60, 20)
    writer = MarkdownWriter(screen.write, color=True)
    writer.write("first **block**\n\nthe **second")
    screen.resize(70, 25)
    writer.write("** block\n\nthe **third** block\n\n")
    writer.finish()
    assert screen.shown() == ["first block", "", "the **second** block", "", "the third block"]


def test_a_resize_there_and_back_counts(terminal: Open) -> None:
    screen = terminal(60, 20)
    writer = MarkdownWriter(screen.write, color=True)
    writer.write("the **first")
    screen.resize(70, 20)
    writer.write("** of")
    screen.resize(60, 20)
    writer.write(" all\n\nthe **second**")
    writer.finish()
    assert screen.shown() == ["the **first** of all", "", "the second"]


@pytest.mark.parametrize("seed", range(5))
def test_resizes_at_any_time_lose_nothing(terminal: Open, seed: int) -> None:
    """The terminal only grows here: an emulator that shrinks cuts off what it shows, before we can help it."""
    screen, rng = terminal(40, 12), random.Random(seed)

    def sometimes() -> None:
        if rng.random() < 0.005:
            screen.resize(screen.size.columns + rng.randint(0, 3), screen.size.lines + rng.randint(0, 1))

    text, words = numbered(5, rng)
    play(screen, text, between=sometimes)
    assert words_shown(screen.shown()) == words


def test_control_characters_are_shown(terminal: Open) -> None:
    screen = terminal()
    play(screen, "a\x1b[2Jb\x07 **c\x1b]0;title\x07**\n\n```\n\x1b[31mred\r\n```\n\x9b1m")
    shown = "\n".join(screen.shown())
    for text in ("a␛[2Jb␇", "c␛]0;title␇", "␛[31mred␍", "<9B>1m"):
        assert text in shown
    assert "\x1b]" not in screen.raw
    assert "\x07" not in screen.raw


def test_tabs_and_wide_characters_break_where_expected(terminal: Open) -> None:
    screen = terminal(20, 10)
    writer = MarkdownWriter(screen.write, color=True)
    writer.write("日本語日本語日本語日本語 a\tb\n")
    writer.write("👩‍👩‍👧‍👦 family 🇫🇷🇫🇷🇫🇷🇫🇷🇫🇷 **x**")
    writer.write("\n\n")
    assert screen.shown()[0] == "日本語日本語日本語日"


@pytest.mark.parametrize(
    "text", ["", "\n", "\n\n\n", "```", "```python", "- ", "#", "***", "|a|\n|-", "   ", "a\n\n\n\n\nb"]
)
def test_odd_ends(terminal: Open, text: str) -> None:
    screen = terminal()
    play(screen, text)
    lines = screen.shown()
    assert lines[0] == "before"
    assert lines[-1] == "after"
    assert len(lines) <= 5
