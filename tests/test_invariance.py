"""A sequence's logits are the same bits alone or in company.

Random batches grow random sequences: fresh ones, ones that begin with a cached prefix, forks; in chunks of any length,
trimmed and continued, in pages that others gave back, on one to three threads. Each row of logits must equal the one that
the same tokens give in a context of their own, computed in one go on one thread.

GEMMART_BATCHES says how many batches to try in all (default 288).
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from conftest import ISAS, KV_TYPES, Tiny, logits_alone, open_context
from gemmart import _core
from gemmart.errors import InvalidRequest, OutOfMemory

FAMILIES = {"gemma2": 12, "gemma3": 40, "llama": 0}  # and their windows; llama has none
N_BATCHES = int(os.environ.get("GEMMART_BATCHES", "288"))
PER_CASE = -(-N_BATCHES // (len(FAMILIES) * len(ISAS) * len(KV_TYPES) * 2))
N_BATCH, LONGEST, N_VOCAB = 160, 130, 512
PAGE = _core.KV_PAGE_TOKENS


@dataclass
class Sequence:
    id: int
    ids: list[int]
    rows: dict[int, np.ndarray] = field(default_factory=dict)  # by position: what the core gave


class Company:
    """Sequences on one context, and a second context where each is computed alone."""

    def __init__(self, path: Path, kv_type: str, precise: bool, rng: np.random.Generator) -> None:
        self.rng = rng
        self.context = open_context(
            path,
            kv_type=kv_type,
            precise=precise,
            n_threads=int(rng.integers(1, 4)),
            n_batch=N_BATCH,
            n_kv_tokens=int(rng.choice([8, 24, 64])) * PAGE,
            n_sequences=int(rng.integers(1, 9)),
        )
        self.alone = open_context(path, kv_type=kv_type, precise=precise, n_threads=1, n_batch=LONGEST)
        self.stems = rng.integers(0, N_VOCAB, (3, LONGEST)).tolist()
        self.open: list[Sequence] = []
        self.n_rows = 0

    @property
    def kv(self) -> _core.KvCache:
        return self.context.kv

    def length(self) -> int:
        """Often at the edge of a page."""
        edges = [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1]
        return int(self.rng.choice(edges) if self.rng.random() < 0.4 else self.rng.integers(1, 80))

    def begin(self) -> Sequence:
        ids = [*self.stems[self.rng.integers(3)][: self.length()], int(self.rng.integers(N_VOCAB))]
        if self.rng.random() < 0.5:
            sequence = Sequence(self.kv.new_sequence(), [])
        else:
            seq, length = self.kv.match_prefix(np.array(ids, np.int32), 0)
            sequence = Sequence(seq, ids[:length])
        self.open.append(sequence)
        return sequence

    def fork(self) -> None:
        origin = self.rng.choice(np.array(self.open, object))
        upto = int(self.rng.integers(0, len(origin.ids) + 1))
        with suppress(InvalidRequest):  # what its windowed layers saw there is given back
            self.open.append(Sequence(self.kv.fork(origin.id, upto), origin.ids[:upto]))

    def trim(self) -> None:
        sequence = self.rng.choice(np.array(self.open, object))
        self.check(sequence)
        length = self.kv.trim(sequence.id, int(self.rng.integers(0, len(sequence.ids) + 1)))
        del sequence.ids[length:]

    def end(self) -> None:
        sequence = self.open.pop(self.rng.integers(len(self.open)))
        self.check(sequence)
        self.kv.free(sequence.id)

    def check(self, sequence: Sequence) -> None:
        if sequence.rows:
            expected = logits_alone(self.alone, sequence.ids)
            for position, row in sequence.rows.items():
                np.testing.assert_array_equal(row, expected[position], err_msg=f"position {position}")
            self.n_rows += len(sequence.rows)
        sequence.rows = {}

    def choose_runs(self) -> list[tuple[Sequence, list[int]]]:
        """Some sequences and the tokens that each of them takes next, as far as the batch holds them."""
        room, runs = N_BATCH, []
        chosen = [s for s in self.open if len(s.ids) < LONGEST and self.rng.random() < 0.8]
        self.rng.shuffle(chosen)
        longest = self.rng.choice([1, 4, 60])  # only decoding, prompts in small pieces, in large ones
        for sequence in chosen[:32]:
            at = len(sequence.ids)
            n = 1 if self.rng.random() < 0.5 else int(self.rng.integers(1, longest + 1))
            n = min(n, room, LONGEST - at)
            if n:
                stem = self.stems[self.rng.integers(3)]
                runs.append((sequence, stem[at : at + n] if self.rng.random() < 0.7 else stem[:n]))
                room -= n
        return runs

    def run(self, runs: list[tuple[Sequence, list[int]]]) -> bool:
        tokens = np.array([token for _, ids in runs for token in ids], np.int32)
        wanted = np.flatnonzero(self.rng.random(len(tokens)) < 0.7)
        try:
            finite = self.context.forward(tokens, [(s.id, len(ids)) for s, ids in runs], wanted)
        except OutOfMemory:
            return False
        assert all(finite)
        rows = dict(zip(wanted.tolist(), self.context.logits(), strict=True))
        row = 0
        for sequence, ids in runs:
            for _ in ids:
                if row in rows:
                    sequence.rows[len(sequence.ids)] = rows[row]
                sequence.ids.append(int(tokens[row]))
                row += 1
        return True

    def step(self) -> None:
        """Change who is there, then one batch."""
        for _ in range(self.rng.choice([1, 4, 12, 40])):
            self.begin()
        for change in (self.fork, self.trim, self.end):
            if self.open and self.rng.random() < 0.6:
                change()
        while True:
            runs = self.choose_runs()
            if not runs:
                self.begin()
            elif self.run(runs):
                return
            else:
                self.end()


@pytest.mark.parametrize("precise", [False, True], ids=["one term", "two terms"])
@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_alone_and_in_company(family: str, kv_type: str, precise: bool, isa: str, tiny: Tiny) -> None:
    case = [*family.encode(), *kv_type.encode(), precise]
    quant = "Q4_1" if precise or kv_type == "f32" else "F16"
    path = tiny(family, quant, n_layers=6 if family == "gemma3" else 2, window=FAMILIES[family] or 12)
    company = Company(path, kv_type, precise, np.random.default_rng(case))
    for _ in range(PER_CASE):
        company.step()
    while company.open:
        company.end()
    assert company.n_rows > 0
    stats = company.kv.stats()
    for group in ("global", "windowed"):
        assert stats[group]["n_free"] + stats[group]["n_cached"] == stats[group]["n_pages"]


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [12, 300])
def test_beyond_a_range_of_attention(kv_type: str, window: int, isa: str, tiny: Tiny) -> None:
    """Attention adds ranges of 256 positions: of few tokens each is an item of work of its own."""
    path = tiny("gemma2", "F16", n_layers=2, window=window)  # float activations show every bit
    ids = np.random.default_rng(5).integers(0, N_VOCAB, 602).astype(np.int32)
    alone = open_context(path, kv_type=kv_type, n_threads=1, n_batch=len(ids), n_kv_tokens=640)
    expected = logits_alone(alone, ids)
    context = open_context(path, kv_type=kv_type, n_kv_tokens=1280, n_sequences=2)
    other = context.kv.new_sequence()
    context.forward(ids[:300], [(other, 300)], [])
    seq, at = context.kv.new_sequence(), 0
    for n in [200, 55, 1, 1, 8, 9, 237, 1, 1, 88, 1]:
        # A token of the other sequence goes along.
        context.forward(np.append(ids[at : at + n], ids[:1]), [(seq, n), (other, 1)], range(n))
        np.testing.assert_array_equal(context.logits(), expected[at : at + n], err_msg=f"{n} tokens at {at}")
        at += n
    assert at == len(ids)


def test_cached_pages_are_taken(tiny: Tiny) -> None:
    """Or the above would compare nothing with nothing."""
    context = open_context(tiny("gemma2"), n_sequences=2)
    ids = np.arange(100, dtype=np.int32)
    logits_alone(context, ids)
    seq, length = context.kv.match_prefix(ids, 0)
    assert length == 96
    context.forward(ids[96:], [(seq, 4)], [3])
    np.testing.assert_array_equal(context.row(0), logits_alone(open_context(tiny("gemma2")), ids)[99])
