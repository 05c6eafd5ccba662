"""KvCache against a model in Python: what each sequence must hold, what each call must answer.

Every position of every layer gets a mark that depends on all tokens up to it, the salt and the layer, as real keys and
values do.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from gemmart import _core
from gemmart.errors import InvalidRequest, OutOfMemory

PAGE = _core.KV_PAGE_TOKENS
GLOBAL, WINDOWED = (1, 8, 0), (2, 8, 50)  # n_kv_heads, head_dim, window
LAYERS = {
    "global": [GLOBAL, GLOBAL],
    "windowed": [WINDOWED],
    "mixed": [WINDOWED, GLOBAL, (1, 16, 70), GLOBAL],
}


@dataclass
class Sequence:
    salt: int
    ids: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    held_from: int = 0  # first position whose windowed page must still be there, a multiple of PAGE


class Harness:
    """A KvCache and what it must hold; each operation does both sides, `check` compares them."""

    def __init__(self, layers: list[tuple[int, int, int]], n_tokens: int, n_sequences: int, slack: int) -> None:
        self.cache = _core.KvCache(
            layers=layers, kv_type="f32", n_tokens=n_tokens, n_sequences=n_sequences, slack=slack
        )
        self.layers, self.slack = layers, slack
        self.window = max(window for _, _, window in layers)
        self.groups = [g for g in ("global", "windowed") if any((w > 0) == (g == "windowed") for _, _, w in layers)]
        self.open: dict[int, Sequence] = {}
        self.stored: set[tuple[int, int]] = set()  # (salt, mark) of the last token of each page that became full

    def marks(self, layer: int, page: int) -> np.ndarray:
        return self.cache.read_page(layer, page)[: 8 * PAGE].view(np.uint64)

    def mark(self, layer: int, page: int, at: slice, marks: list[int]) -> None:
        part = self.cache.read_page(layer, page)
        part[: 8 * PAGE].view(np.uint64)[at] = marks
        self.cache.write_page(layer, page, part)

    def layers_of(self, group: str) -> list[int]:
        return [i for i, (_, _, window) in enumerate(self.layers) if (window > 0) == (group == "windowed")]

    def next_marks(self, s: Sequence, ids: list[int]) -> list[int]:
        mark, out = (s.marks[-1] if s.marks else hash(("start", s.salt))), []
        for token in ids:
            mark = hash((mark, token)) & (2**63 - 1)
            out.append(mark)
        return out

    def seen_from(self, pos: int) -> int:
        """The first position of the page where the window of `pos` begins."""
        return max(0, pos - self.window + 1) // PAGE * PAGE

    def holders(self, group: str) -> dict[int, int]:
        """How many open sequences hold each page."""
        out: dict[int, int] = {}
        for page in itertools.chain.from_iterable(self.cache.pages(seq, group).tolist() for seq in self.open):
            out[page] = out.get(page, 0) + 1
        out.pop(-1, None)
        return out

    # --- operations ---

    def new(self, salt: int = 0) -> int:
        if salt:
            seq, length = self.cache.match_prefix(np.zeros(0, np.int32), salt)
            assert length == 0
        else:
            seq = self.cache.new_sequence()
        self.open[seq] = Sequence(salt)
        return seq

    def pages_needed(self, seq: int, n: int, group: str) -> int:
        length = len(self.open[seq].ids)
        pages = self.cache.pages(seq, group)
        need = max(0, -(-(length + n) // PAGE) - len(pages))
        if n and length % PAGE and self.holders(group)[int(pages[length // PAGE])] > 1:
            need += 1
        return need

    def reserve(self, seq: int, n: int) -> bool:
        """False where there is no room, as the counts say there must not be; nothing changed then."""
        before = self.cache.stats()
        room = all(self.pages_needed(seq, n, g) <= before[g]["n_free"] + before[g]["n_cached"] for g in self.groups)
        assert self.cache.can_hold([seq], [n]) == room
        if room:
            self.cache.reserve(seq, n)
            return True
        pages = {g: self.cache.pages(seq, g).tolist() for g in self.groups}
        with pytest.raises(OutOfMemory, match=f"sequence {seq} "):
            self.cache.reserve(seq, n)
        assert self.cache.stats() == before
        assert {g: self.cache.pages(seq, g).tolist() for g in self.groups} == pages
        return False

    def write_and_commit(self, seq: int, ids: list[int]) -> None:
        s = self.open[seq]
        start, marks = len(s.ids), self.next_marks(s, ids)
        end = start + len(ids)
        for group in self.groups:
            pages, holders = self.cache.pages(seq, group), self.holders(group)
            for i in range(start // PAGE, -(-end // PAGE)) if ids else ():
                assert holders[int(pages[i])] == 1, "a page to be written belongs to this sequence alone"
                a, b = max(start, i * PAGE), min(end, (i + 1) * PAGE)
                for layer in self.layers_of(group):
                    at = slice(a - i * PAGE, b - i * PAGE)
                    self.mark(layer, pages[i], at, [m ^ layer for m in marks[a - start : b - start]])
        self.cache.commit(seq, np.array(ids, np.int32))
        s.ids += ids
        s.marks += marks
        s.held_from = max(s.held_from, self.seen_from(end - self.slack))
        self.stored |= {(s.salt, s.marks[i]) for i in range(PAGE - 1, end, PAGE)}

    def add(self, seq: int, ids: list[int]) -> bool:
        if not self.reserve(seq, len(ids)):
            return False
        self.write_and_commit(seq, ids)
        return True

    def usable(self, s: Sequence, upto: int) -> bool:
        return "windowed" not in self.groups or upto == 0 or s.held_from <= self.seen_from(upto)

    def fork(self, seq: int, upto: int) -> int | None:
        s = self.open[seq]
        if not self.usable(s, upto):
            with pytest.raises(InvalidRequest, match=f"sequence {seq} "):
                self.cache.fork(seq, upto)
            return None
        new = self.cache.fork(seq, upto)
        self.open[new] = Sequence(s.salt, s.ids[:upto], s.marks[:upto], min(s.held_from, -(-upto // PAGE) * PAGE))
        return new

    def trim(self, seq: int, upto: int) -> None:
        s = self.open[seq]
        expected = min(upto, len(s.ids))
        if not self.usable(s, expected):
            expected = 0
        assert self.cache.trim(seq, upto) == expected
        s.ids, s.marks = s.ids[:expected], s.marks[:expected]
        s.held_from = min(s.held_from, -(-expected // PAGE) * PAGE)

    def match(self, ids: list[int], salt: int) -> int:
        seq, length = self.cache.match_prefix(np.array(ids, np.int32), salt)
        assert length % PAGE == 0
        assert length <= max(0, len(ids) - 1)
        s = self.open[seq] = Sequence(salt)
        s.marks, s.ids = self.next_marks(s, ids[:length]), ids[:length]
        s.held_from = self.seen_from(length) if length else 0
        if "windowed" in self.groups:  # what the slack asks for besides is there where it is stored
            given_back = int(np.count_nonzero(self.cache.pages(seq, "windowed") == -1)) * PAGE
            assert given_back <= s.held_from
            s.held_from = given_back
        return seq

    def free(self, seq: int) -> None:
        self.cache.free(seq)
        del self.open[seq]

    # --- comparison ---

    def check(self) -> None:
        stats = self.cache.stats()
        assert stats["n_sequences"] == len(self.open)
        for group in self.groups:
            g = stats[group]
            assert g["n_free"] + g["n_cached"] + len(self.holders(group)) == g["n_pages"]
        for seq, s in self.open.items():
            assert self.cache.is_open(seq)
            assert self.cache.length(seq) == len(s.ids)
            for group in self.groups:
                pages = self.cache.pages(seq, group).tolist()
                assert len(pages) >= -(-len(s.ids) // PAGE)
                for i in range(-(-len(s.ids) // PAGE)):
                    if group == "windowed" and i * PAGE < s.held_from:
                        assert pages[i] == -1
                        continue
                    want = np.array(s.marks[i * PAGE : (i + 1) * PAGE], np.uint64)
                    for layer in self.layers_of(group):
                        got = self.marks(layer, pages[i])[: len(want)]
                        np.testing.assert_array_equal(got, want ^ np.uint64(layer), f"{seq=} {group=} page {i}")

    def close(self) -> None:
        for seq in list(self.open):
            self.free(seq)
        self.check()
        self.cache.drop_cached()
        stats = self.cache.stats()
        for group in ("global", "windowed"):
            assert stats[group]["n_free"] == stats[group]["n_pages"]
            assert stats[group]["n_cached"] == 0


def random_prompt(rng: np.random.Generator, n: int) -> list[int]:
    """Few different tokens at few places, so that prefixes are often shared and often differ late."""
    ids = [7] * n
    for i in rng.integers(0, n, size=rng.integers(0, 3)):
        ids[i] = int(rng.integers(0, 2))
    return ids


def random_batch(h: Harness, rng: np.random.Generator, longest: int) -> bool:
    """Reserves for several sequences, as a forward does, and commits some of it; whether all of it fitted."""
    seqs = [int(s) for s in rng.permutation(list(h.open))[: rng.integers(1, 5)]]
    counts = [int(n) for n in rng.choice([0, 1, 3, PAGE, longest], size=len(seqs))]
    room = h.cache.can_hold(seqs, counts)
    fitted = [h.reserve(seq, n) for seq, n in zip(seqs, counts, strict=True)]
    assert all(fitted) == room
    for seq, n, ok in zip(seqs, counts, fitted, strict=True):
        if ok:
            h.write_and_commit(seq, random_prompt(rng, longest)[: rng.choice([0, n // 2, n])])
    return room


SIZES = [  # n_tokens, n_sequences, slack, longest addition
    pytest.param(400, 1, 8, 90, id="small"),
    pytest.param(500, 3, 40, 150, id="medium"),
    pytest.param(6000, 1, 0, 1500, id="few-windowed-pages"),  # windowed pages run out before global ones do
]


@pytest.mark.parametrize(("n_tokens", "n_sequences", "slack", "longest"), SIZES)
@pytest.mark.parametrize("layers", LAYERS)
def test_random_operations(layers: str, n_tokens: int, n_sequences: int, slack: int, longest: int) -> None:
    rng = np.random.default_rng([n_tokens, len(layers)])
    h = Harness(LAYERS[layers], n_tokens, n_sequences, slack)
    counts = dict.fromkeys(["full", "fork", "no fork", "hit", "evicted"], 0)
    for step in range(1500 if n_tokens < 2000 else 400):
        while len(h.open) > 5:  # so that some grow long
            h.free(int(rng.choice(list(h.open))))
        seq = int(rng.choice(list(h.open))) if h.open else h.new()
        length = len(h.open[seq].ids)
        match rng.choice(["new", "add", "fork", "trim", "free", "match"], p=[0.05, 0.4, 0.13, 0.1, 0.15, 0.17]):
            case "new":
                h.new(salt=int(rng.integers(0, 3)))
            case "add":
                n_cached = sum(h.cache.stats()[g]["n_cached"] for g in h.groups)
                if not random_batch(h, rng, longest):
                    counts["full"] += 1
                    h.free(max(h.open, key=lambda s: len(h.open[s].ids)))
                elif sum(h.cache.stats()[g]["n_cached"] for g in h.groups) < n_cached:
                    counts["evicted"] += 1
            case "fork":
                new = h.fork(seq, int(rng.choice([length, rng.integers(0, length + 1), max(0, length - slack)])))
                counts["fork" if new is not None else "no fork"] += 1
            case "trim":
                h.trim(seq, max(0, length - int(rng.integers(0, 60))))
            case "free":
                h.free(seq)
            case "match":
                new = h.match(random_prompt(rng, longest), salt=int(rng.integers(0, 3)))
                counts["hit"] += bool(h.open[new].ids)
        if step % 5 == 0 or step < 100:
            h.check()
    expected = {"full", "fork", "hit", "evicted"} | ({"no fork"} if "windowed" in h.groups else set())
    assert {k for k, n in counts.items() if n} == expected, counts
    h.close()


@pytest.mark.parametrize("layers", LAYERS)
def test_match_finds_the_longest_stored_prefix(layers: str) -> None:
    """With room for everything, and nothing trimmed, a prefix once computed is found."""
    rng = np.random.default_rng(5)
    h = Harness(LAYERS[layers], 200_000, 100, 16)
    n_hits = 0
    for _ in range(400):
        salt, ids = int(rng.integers(0, 2)), random_prompt(rng, int(rng.integers(1, 200)))
        marks = h.next_marks(Sequence(salt), ids)
        expected = max([n for n in range(PAGE, len(ids), PAGE) if (salt, marks[n - 1]) in h.stored], default=0)
        seq = h.match(ids, salt)
        assert len(h.open[seq].ids) == expected
        n_hits += expected > 0
        assert h.add(seq, ids[expected:])
        if rng.random() < 0.9:
            h.free(seq)
        h.check()
    assert n_hits > 100
    h.close()


def filled(h: Harness, n: int, token: int = 7, chunk: int = 40) -> int:
    seq = h.new()
    for i in range(0, n, chunk):
        assert h.add(seq, [token] * min(chunk, n - i))
    return seq


def test_rewind_within_the_slack_is_exact_and_past_it_starts_over() -> None:
    h = Harness(LAYERS["mixed"], 1000, 2, slack=64)
    seq = filled(h, 400)
    assert h.cache.trim(seq, 336) == 336
    h.free(seq)
    seq = filled(h, 400, token=8)
    assert h.cache.trim(seq, 401) == 400
    with pytest.raises(InvalidRequest, match=r"sequence \d+ of 400 tokens no longer holds .* at 200"):
        h.cache.fork(seq, 200)
    assert h.cache.trim(seq, 200) == 0
    assert h.cache.length(seq) == 0
    assert h.cache.pages(seq, "windowed").size == h.cache.pages(seq, "global").size == 0


def test_global_layers_alone_rewind_anywhere() -> None:
    h = Harness(LAYERS["global"], 1000, 2, slack=0)
    seq = filled(h, 400)
    h.trim(seq, 33)
    h.check()
    assert len(h.open[seq].ids) == 33


def test_salts_do_not_mix() -> None:
    h = Harness(LAYERS["mixed"], 1000, 2, slack=0)
    h.free(filled(h, 100))
    assert h.cache.match_prefix(np.full(100, 7, np.int32), 1)[1] == 0
    assert h.cache.match_prefix(np.full(100, 7, np.int32), 0)[1] == 96


@pytest.mark.parametrize("layers", LAYERS)
def test_forks_do_not_see_each_other(layers: str) -> None:
    h = Harness(LAYERS[layers], 1000, 4, slack=100)
    origin = filled(h, 75)
    forks = [h.fork(origin, 75), h.fork(origin, 70), h.fork(origin, 40)]
    shared = h.cache.pages(origin, h.groups[0])[:2].tolist()
    for token, seq in enumerate([*forks, origin]):
        assert seq is not None
        assert h.cache.pages(seq, h.groups[0])[: len(shared)].tolist() == shared
        assert h.add(seq, [token] * 60)
        h.check()
    h.close()


def test_the_same_prompt_computed_twice_is_kept_once() -> None:
    h = Harness(LAYERS["mixed"], 1000, 2, slack=0)
    a, b = h.new(), h.new()
    for seq in (a, b):
        assert h.reserve(seq, 96)
    for seq in (a, b):
        h.write_and_commit(seq, [7] * 96)
    h.check()
    assert h.cache.pages(a, "global").tolist() == h.cache.pages(b, "global").tolist()
    h.close()


def test_a_sequence_that_fills_the_cache_can_go_on_after_a_trim() -> None:
    """Its last page is also stored as a prefix; there is no other page to copy it to."""
    h = Harness(LAYERS["mixed"], 320, 1, slack=64)
    seq = filled(h, 320)
    assert h.cache.stats()["global"]["n_free"] == h.cache.stats()["global"]["n_cached"] == 0
    h.trim(seq, 300)
    assert h.add(seq, [1] * 20)
    assert not h.add(seq, [1])
    h.check()
    h.close()
    assert h.cache.match_prefix(np.full(320, 7, np.int32))[1] == 0


@pytest.mark.parametrize("window", [0, 1000])
def test_the_prefix_used_longest_ago_goes_first_and_its_end_before_its_start(window: int) -> None:
    h = Harness([(1, 8, window)], 10 * PAGE, 1, slack=0)
    for token in (1, 2):
        h.free(filled(h, 4 * PAGE, token=token))
    h.free(h.match([1] * 200, salt=0))  # so that 2 is the older one
    seq = filled(h, 3 * PAGE, token=3)

    def stored(token: int) -> int:
        seq = h.match([token] * 200, salt=0)
        length = len(h.open[seq].ids)
        h.free(seq)
        return length // PAGE

    assert [stored(1), stored(2)] == [4, 3]
    h.match([2] * (3 * PAGE + 1), salt=0)  # in use: it stays
    assert h.add(seq, [3] * 3 * PAGE)
    assert [stored(1), stored(2)] == [1, 3]


def test_room_is_what_was_asked_for() -> None:
    h = Harness(LAYERS["mixed"], 1000, 3, slack=0)
    for n in (333, 334, 333):
        filled(h, n)
    h.check()
    h.close()


def test_windowed_layers_need_pages_for_the_window_only() -> None:
    slack, chunk = 10, 2048
    h = Harness(LAYERS["mixed"], 50_000, 1, slack)
    stats = h.cache.stats()
    assert stats["global"]["n_pages"] == -(-50_000 // PAGE)
    assert stats["windowed"]["n_pages"] <= (70 + slack + chunk) / PAGE + 3
    seq = h.new()
    for _ in range(6):  # longer than the windowed pages reach
        assert h.add(seq, [7] * chunk)
        held = np.flatnonzero(h.cache.pages(seq, "windowed") >= 0)
        assert held.tolist() == list(
            range(h.seen_from(len(h.open[seq].ids) - slack) // PAGE, len(h.open[seq].ids) // PAGE)
        )
    h.check()
    h.close()


def test_what_was_reserved_and_not_committed_is_given_back() -> None:
    h = Harness(LAYERS["mixed"], 1000, 1, slack=0)
    before = h.cache.stats()
    seq = h.new()
    assert h.reserve(seq, 500)
    h.write_and_commit(seq, [1] * 3)
    assert h.cache.pages(seq, "global").size == h.cache.pages(seq, "windowed").size == 1
    assert h.reserve(seq, 500)
    h.trim(seq, 3)
    with pytest.raises(InvalidRequest, match="1 tokens committed, 0 reserved"):
        h.cache.commit(seq, np.ones(1, np.int32))
    h.free(seq)
    assert h.cache.stats() == before


def test_reserved_memory_is_not_touched() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    cache = _core.KvCache(layers=[(8, 256, 0)] * 16, kv_type="f16", n_tokens=100_000, n_sequences=1, slack=0)
    assert cache.stats()["global"]["n_pages"] * cache.stats()["global"]["page_bytes"] > 10e9
    seq = cache.new_sequence()
    cache.reserve(seq, 90_000)
    assert resident() - before < 50e6


@pytest.mark.parametrize("head_dim", [32, 64, 80, 128, 256])
@pytest.mark.parametrize(("kv_type", "size"), [("f32", 4), ("f16", 2), ("bf16", 2), ("q8_0", 1)])
def test_head_layout(kv_type: str, size: int, head_dim: int) -> None:
    if kv_type == "q8_0" and head_dim % 32:
        with pytest.raises(InvalidRequest, match="head_dim is 80"):
            _core.kv_head_layout(kv_type, head_dim)
        return
    h = _core.kv_head_layout(kv_type, head_dim)
    keys, values = head_dim * PAGE * size, -(-head_dim // 32) * 32 * PAGE * size  # values in whole blocks of 32
    scales = 4 * head_dim // 32 * PAGE if kv_type == "q8_0" else 0
    parts = [h["keys"], h["key_scales"], h["values"], h["value_scales"], h["n_bytes"]]
    assert np.diff(parts).tolist() == [keys, scales, values, scales]
    assert all(offset % 64 == 0 for offset in parts)
    cache = _core.KvCache(layers=[(3, head_dim, 0)], kv_type=kv_type, n_tokens=64, n_sequences=1, slack=0)
    assert cache.part_bytes(0) == cache.stats()["global"]["page_bytes"] == 3 * h["n_bytes"]


def test_layers_do_not_overlap() -> None:
    h = Harness(LAYERS["mixed"], 96, 1, slack=0)
    parts = [(layer, page) for layer in range(4) for page in range(3)]
    for i, part in enumerate(parts):
        h.cache.write_page(*part, np.full(h.cache.part_bytes(part[0]), i, np.uint8))
    assert all((h.cache.read_page(*part) == i).all() for i, part in enumerate(parts))


def test_mistakes_are_named() -> None:
    cache = _core.KvCache(layers=[GLOBAL], kv_type="f16", n_tokens=100, n_sequences=1, slack=0)
    closed = cache.new_sequence()
    cache.free(closed)
    one = np.ones(1, np.int32)
    for call in (
        lambda: cache.free(closed),
        lambda: cache.fork(closed, 0),
        lambda: cache.trim(closed, 0),
        lambda: cache.reserve(closed, 1),
        lambda: cache.commit(closed, one),
        lambda: cache.length(closed),
        lambda: cache.pages(closed, "global"),
        lambda: cache.can_hold([closed], [1]),
    ):
        with pytest.raises(InvalidRequest, match=f"sequence {closed} is not open"):
            call()
    assert not cache.is_open(closed)
    seq = cache.new_sequence()
    assert seq != closed
    with pytest.raises(InvalidRequest, match="cannot be forked at 1"):
        cache.fork(seq, 1)
    with pytest.raises(InvalidRequest, match="cannot be trimmed to -1"):
        cache.trim(seq, -1)
    with pytest.raises(InvalidRequest, match="cannot grow by -1"):
        cache.reserve(seq, -1)
    with pytest.raises(InvalidRequest, match="page 4 is outside"):
        cache.read_page(0, 4)
    with pytest.raises(InvalidRequest, match="layer 1 is outside"):
        cache.read_page(1, 0)
    with pytest.raises(InvalidRequest, match="data has 3 bytes"):
        cache.write_page(0, 0, np.zeros(3, np.uint8))
    good = {"layers": [GLOBAL], "kv_type": "f16", "n_tokens": 100, "n_sequences": 1, "slack": 0}
    for name, value, text in (
        ("layers", [], "at least one layer"),
        ("layers", [(0, 8, 0)], "0 kv heads"),
        ("layers", [(1, 8, -1)], "window of -1"),
        ("layers", [(1, 0, 0)], "head_dim is 0"),
        ("kv_type", "q4_0", "KV type 'q4_0' is unknown"),
        ("n_tokens", 0, "n_tokens is 0"),
        ("n_sequences", 0, "n_sequences is 0"),
        ("slack", -1, "slack is -1"),
    ):
        with pytest.raises(InvalidRequest, match=text):
            _core.KvCache(**{**good, name: value})
    with pytest.raises(OutOfMemory, match="cannot reserve the KV cache"):
        _core.KvCache(**{**good, "layers": [(1 << 20, 1 << 16, 0)] * 8, "n_tokens": 2**31 - 1})


@pytest.mark.parametrize("kind", LAYERS)
def test_restored_pages_are_a_stored_prefix(kind: str) -> None:
    h = Harness(LAYERS[kind], n_tokens=1024, n_sequences=1, slack=16)
    ids = [token % 50 for token in range(8 * PAGE)]
    held_from = h.seen_from(len(ids) - h.slack) // PAGE if "windowed" in h.groups else 0
    seq = h.cache.restore(len(ids), held_from, 7)
    assert h.cache.length(seq) == 0
    s = Sequence(7)
    marks = h.next_marks(s, ids)
    for group in h.groups:
        pages = h.cache.pages(seq, group)
        for i, page in enumerate(pages.tolist()):
            assert (page == -1) == (group == "windowed" and i < held_from)
            for layer in h.layers_of(group) if page != -1 else ():
                h.mark(layer, page, slice(PAGE), [m + layer for m in marks[i * PAGE : (i + 1) * PAGE]])
    h.cache.commit(seq, np.array(ids, np.int32))
    h.cache.free(seq)
    matched, length = h.cache.match_prefix(np.array([*ids, 1], np.int32), 7)
    assert length == len(ids)
    for group in h.groups:
        pages = h.cache.pages(matched, group)
        first = held_from if group == "windowed" else 0
        for i in range(first, len(pages)):
            for layer in h.layers_of(group):
                assert h.marks(layer, pages[i]).tolist() == [m + layer for m in marks[i * PAGE : (i + 1) * PAGE]]
    h.cache.free(matched)
    assert h.cache.match_prefix(np.array([*ids, 1], np.int32), 8)[1] == 0
    # A prefix whose window was not restored is not usable.
    short = h.cache.match_prefix(np.array([*ids[: 3 * PAGE], 1], np.int32), 7)[1]
    assert short == (3 * PAGE if kind == "global" else 0)


def test_restore_refuses_what_does_not_fit() -> None:
    cache = Harness(LAYERS["mixed"], n_tokens=4 * PAGE, n_sequences=1, slack=16).cache
    before = cache.stats()
    for n, held_from in ((0, 0), (PAGE - 1, 0), (-PAGE, 0), (PAGE, -1), (PAGE, 2)):
        with pytest.raises(InvalidRequest):
            cache.restore(n, held_from, 0)
    with pytest.raises(OutOfMemory, match="5 pages"):
        cache.restore(5 * PAGE, 5, 0)
    assert cache.stats() == before
    cache.free(cache.restore(4 * PAGE, 2, 0))  # given up before the commit
    assert cache.stats() == before
