"""The progress line, on a real pseudo-terminal."""

from __future__ import annotations

import io
import os

import pytest

from gemmart import progress


def drawn(monkeypatch: pytest.MonkeyPatch, term: str = "xterm") -> str:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(progress, "REDRAW_SECONDS", 0.0)
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        line = progress.TerminalProgress(terminal)
        line("fetching m", 1, None)
        line("fetching m", 1, 4)
        line("a" * 50, 2, 4)
        line("fetching m", 4, 4)
        line.erase()
        terminal.write("end")
        terminal.flush()
        text = b""
        while not text.endswith(b"end"):  # a terminal hands on what is written when it finds time
            text += os.read(leader, 4096)
    os.close(leader)
    return text.decode()


def test_one_line_that_erases_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    erase = "\r\x1b[K"
    assert drawn(monkeypatch) == f"{erase}fetching m …{erase}fetching m 25 %{erase}{'a' * 19}{erase}end"


def test_silent_where_no_line_can_be_erased(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, term="dumb") == "end"
    pipe = io.StringIO()
    progress.TerminalProgress(pipe)("fetching m", 1, 2)
    assert pipe.getvalue() == ""
