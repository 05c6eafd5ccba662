"""Ranges of files that are read as if they stood one after another in one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

CHUNK = 1 << 20  # bytes


class Part(NamedTuple):
    """`length` bytes at `offset` of the file at `path`."""

    path: Path
    offset: int
    length: int


class Parts:
    """Opened for reading; positions count from the first byte of the first part. A context manager."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)
        self.size = sum(part.length for part in parts)
        self.name = str(parts[0].path)
        with ExitStack() as opened:
            self._files = [opened.enter_context(part.path.open("rb")) for part in parts]
            self._opened = opened.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()

    def within(self, position: int, length: int) -> tuple[Part, ...]:
        """Where these bytes lie on disk."""
        return tuple(part for _, part in self._within(position, length))

    def read(self, position: int, length: int) -> bytes:
        """These bytes, or as many as there are."""
        data = b""
        for number, part in self._within(position, length):
            self._files[number].seek(part.offset)
            data += self._files[number].read(part.length)
        return data

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in pieces."""
        for position in range(0, self.size, CHUNK):
            yield self.read(position, CHUNK)

    def _within(self, position: int, length: int) -> Iterator[tuple[int, Part]]:
        for number, part in enumerate(self.parts):
            start, end = max(0, position), min(part.length, position + length)
            if start < end:
                yield number, Part(part.path, part.offset + start, end - start)
            position -= part.length
