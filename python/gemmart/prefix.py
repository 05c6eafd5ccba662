"""Computed keys and values of the beginning of a conversation, taken out of the engine's cache and put back into it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemmart import _core
from gemmart.engine import Engine

PAGE = _core.KV_PAGE_TOKENS


@dataclass(frozen=True, slots=True)
class Part:
    """What one layer has in one page."""

    kv: _core.KvCache
    layer: int
    page: int

    @property
    def n_bytes(self) -> int:
        return self.kv.part_bytes(self.layer)

    def read(self) -> NDArray[np.uint8]:
        return self.kv.read_page(self.layer, self.page)

    def write(self, data: bytes) -> None:
        self.kv.write_page(self.layer, self.page, np.frombuffer(data, np.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class Prefix:
    """Whole pages. `parts`: page by page and in these layer by layer; of the windowed layers only those from page
    `held_from` on, since the window has left the others behind."""

    n_tokens: int
    held_from: int
    parts: list[Part]


@contextmanager
def taken_out(engine: Engine, windows: Sequence[int], ids: Sequence[int], salt: int) -> Iterator[Prefix]:
    """What the cache has of a prefix of `ids`, to be read in the block. windows: of each layer, 0 = unlimited."""

    def take(kv: _core.KvCache) -> tuple[int, Prefix]:
        seq, n = kv.match_prefix(np.array(ids, np.int32), salt)
        held = np.nonzero(kv.pages(seq, "windowed") >= 0)[0]
        engine.lent[seq] = n // PAGE
        return seq, _prefix(kv, windows, seq, int(held[0]) if len(held) else n // PAGE)

    seq, prefix = engine.run(take)
    try:
        yield prefix
    finally:
        engine.run(lambda kv: _free(engine, kv, seq))


@contextmanager
def put_back(engine: Engine, windows: Sequence[int], ids: Sequence[int], salt: int, held_from: int) -> Iterator[Prefix]:
    """Room for the keys and values of `ids`, whole pages, to be written inside of the block; the cache has them
    afterwards, unless the block raises. Raises OutOfMemory."""

    def open_(kv: _core.KvCache) -> tuple[int, Prefix]:
        seq = kv.restore(len(ids), held_from, salt)
        engine.lent[seq] = len(ids) // PAGE
        return seq, _prefix(kv, windows, seq, held_from)

    seq, prefix = engine.run(open_)
    try:
        yield prefix
        engine.run(lambda kv: kv.commit(seq, np.array(ids, np.int32)))
    finally:
        engine.run(lambda kv: _free(engine, kv, seq))


def _prefix(kv: _core.KvCache, windows: Sequence[int], seq: int, held_from: int) -> Prefix:
    pages = kv.pages(seq, "global").tolist(), kv.pages(seq, "windowed").tolist()
    n_pages = max(map(len, pages))
    parts = [
        Part(kv, layer, pages[window > 0][i])
        for i in range(n_pages)
        for layer, window in enumerate(windows)
        if not window or i >= held_from
    ]
    return Prefix(n_pages * PAGE, held_from, parts)


def _free(engine: Engine, kv: _core.KvCache, seq: int) -> None:
    kv.free(seq)
    del engine.lent[seq]
