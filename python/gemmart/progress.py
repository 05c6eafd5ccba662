"""Telling how far a long task is: a callable that any part may call, and one that draws a line on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import time
from concurrent.futures import Future, wait
from typing import Any, Protocol, TextIO

REDRAW_SECONDS = 0.1
SILENT_SECONDS = 1.0
"""How long a task takes before its progress is told, and """
PROGRESS_SECONDS = 0.1
"""how often then."""
ERASE = "\r\x1b[K"


class Progress(Protocol):
    """Called as `progress(what, done, total)`; `done` and `total` in any one unit, `total` None while unknown."""

    def __call__(self, what: str, done: int, total: int | None) -> None: ...


class Counter(Protocol):
    """How far a task is that another thread does."""

    @property
    def done(self) -> int: ...
    @property
    def total(self) -> int: ...


def watch(task: Future[Any], counter: Counter, began: float, what: str, progress: Progress) -> None:
    """Wait for a task, telling how far it is where it takes long; `began`: when, by time.monotonic()."""
    is_running = True
    while is_running:
        is_running = bool(wait([task], PROGRESS_SECONDS).not_done)
        if time.monotonic() - began > SILENT_SECONDS:
            progress(what, counter.done, counter.total)


def no_progress(what: str, done: int, total: int | None) -> None:
    """A Progress that shows nothing."""


class TerminalProgress:
    """One line on a terminal that erases itself when its task is done; nothing at all on a pipe or a dumb terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._draws = stream.isatty() and os.environ.get("TERM") != "dumb"
        self._shown = False
        self._next_draw = 0.0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        if not self._draws:
            return
        if total is not None and done >= total:
            self.erase()
        elif time.monotonic() >= self._next_draw:
            share = f"{100 * done // total} %" if total else "…"
            columns = shutil.get_terminal_size().columns - 1
            self._write(ERASE + f"{what} {share}"[:columns])
            self._shown = True
            self._next_draw = time.monotonic() + REDRAW_SECONDS

    def erase(self) -> None:
        """Remove the line, if there is one, so that other text can follow."""
        if self._shown:
            self._write(ERASE)
            self._shown = False
        self._next_draw = 0.0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def terminal_progress() -> TerminalProgress:
    """A Progress on stderr."""
    return TerminalProgress(sys.stderr)
