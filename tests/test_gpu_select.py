"""The GPU module's choice of candidates against the core's own (csrc/select.cpp): the same ids, the same bits; and the
soft cap of logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from conftest import Tiny, open_context
from gemmart import _core
from gpu_module import GpuModule

N_VOCAB = 512
Row = NDArray[np.float32]


@pytest.fixture(scope="module")
def context(tiny: Tiny) -> _core.Context:
    context = open_context(tiny("gemma2", vocabulary=False))
    context.forward(np.array([5, 9, 200], np.int32), [(context.kv.new_sequence(), 3)], [0, 1, 2])
    return context


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def select(module: GpuModule, row: Row, k: int, **given: Any) -> tuple[NDArray[np.int32], Row, float]:
    """As _core.Context.select()."""
    test = module.ffi.new("GemmartSelectTest *")
    test.repeat_penalty, test.n_vocab, test.k = 1, len(row), k
    ids, best, after = np.full(k, -7, np.int32), np.full(k, np.nan, np.float32), row.copy()
    for name in ("repeat_penalty", "presence_penalty", "frequency_penalty"):
        setattr(test, name, given.get(name, getattr(test, name)))
    test.n_bias, test.n_recent = len(given.get("bias_ids", ())), len(given.get("recent", ()))
    arrays = {name: given[name] for name in ("bias_ids", "bias", "recent", "mask") if name in given}
    for name, array in (arrays | {"ids": ids, "best": best, "logits": after}).items():
        setattr(test, name, module.pointer(array))
    module.check(module.lib.gemmart_kernel_select(test))
    np.testing.assert_array_equal(after.view(np.int32), row.view(np.int32))
    return ids[: test.n_found], best[: test.n_found], test.logsumexp


def bits(x: Row) -> NDArray[np.int32]:
    return x.view(np.int32)


def packed(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    words = np.zeros(-(-len(allowed) // 32) * 32, bool)
    words[: len(allowed)] = allowed
    return np.packbits(words, bitorder="little").view(np.int32)


def compare(module: GpuModule, context: _core.Context, output: int, k: int, **given: Any) -> None:
    ids, best, logsumexp = select(module, context.row(output), k, **given)
    wanted = context.select(output, k, **given)
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_array_equal(bits(best), bits(wanted[1]))
    assert logsumexp == pytest.approx(wanted[2], abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 64, 100, N_VOCAB - 1, N_VOCAB])
def test_plain(gpu_module: GpuModule, context: _core.Context, k: int) -> None:
    for output in range(3):
        compare(gpu_module, context, output, k)


def test_adjusted(gpu_module: GpuModule, context: _core.Context, rng: np.random.Generator) -> None:
    for _ in range(60):
        n_bias = rng.integers(0, 20)
        compare(
            gpu_module,
            context,
            int(rng.integers(3)),
            int(rng.integers(1, N_VOCAB + 1)),
            # Ids that are there more than once add up in order.
            bias_ids=rng.integers(0, rng.choice([5, N_VOCAB]), n_bias).astype(np.int32),
            bias=rng.choice([-100, -3.7, 0, 0.1, 5.5, 100, -np.inf], n_bias).astype(np.float32),
            recent=rng.integers(0, rng.choice([3, N_VOCAB]), rng.integers(0, 30)).astype(np.int32),
            repeat_penalty=float(rng.choice([1, 0.5, 1.3])),
            presence_penalty=float(rng.choice([0, -1.1, 0.7])),
            frequency_penalty=float(rng.choice([0, -0.3, 0.4])),
        )


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5, 0.98, 1])
def test_masked(gpu_module: GpuModule, context: _core.Context, rng: np.random.Generator, share: float) -> None:
    for _ in range(8):
        allowed = rng.random(N_VOCAB) < share
        allowed[rng.integers(N_VOCAB)] = True
        compare(
            gpu_module,
            context,
            int(rng.integers(3)),
            int(rng.choice([1, 2, 40, N_VOCAB])),
            bias_ids=rng.integers(0, N_VOCAB, 1).astype(np.int32),
            bias=np.array([100], np.float32),
            recent=rng.integers(0, N_VOCAB, 10).astype(np.int32),
            repeat_penalty=1.3,
            mask=packed(allowed),
        )


def test_a_mask_of_nothing(gpu_module: GpuModule, context: _core.Context) -> None:
    ids, best, logsumexp = select(gpu_module, context.row(0), 5, mask=np.zeros(16, np.int32))
    assert (len(ids), len(best), logsumexp) == (0, 0, -np.inf)


@pytest.mark.parametrize("n_vocab", [1, 33, 2047, 2048, 2049, 9000])
def test_any_size(gpu_module: GpuModule, rng: np.random.Generator, n_vocab: int) -> None:
    """Ties everywhere, zeros of both signs among them; against a stable sort."""
    row = (rng.integers(-40, 40, n_vocab) / 4).astype(np.float32)
    row[rng.random(n_vocab) < 0.3] *= np.float32(-0.0)
    order = np.argsort(-row, kind="stable")
    for k in sorted({1, 40, 1000, 1024, 1025, 5000, n_vocab}):
        if k <= n_vocab:
            ids, best, logsumexp = select(gpu_module, row, k)
            np.testing.assert_array_equal(ids, order[:k])
            np.testing.assert_array_equal(bits(best), bits(row[order[:k]]))
            assert logsumexp == pytest.approx(np.log(np.exp(row.astype(np.float64)).sum()), abs=1e-5)


def test_many_recent_tokens(gpu_module: GpuModule, context: _core.Context, rng: np.random.Generator) -> None:
    recent = rng.integers(0, 40, 3000).astype(np.int32)
    compare(gpu_module, context, 1, 20, recent=recent, repeat_penalty=1.1, frequency_penalty=0.01)


def test_logsumexp_of_far_logits(gpu_module: GpuModule, rng: np.random.Generator) -> None:
    for scale in (0.1, 5, 60):
        row = (rng.standard_normal(3000) * scale + 1000).astype(np.float32)
        row[7] = -np.inf
        wanted = np.log(np.exp(row.astype(np.float64) - row.max()).sum()) + row.max()
        assert select(gpu_module, row, 1)[2] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("n_cols", [1, 31, 2048, 2049, 5000])
@pytest.mark.parametrize("cap", [0, 30])
def test_cap(gpu_module: GpuModule, rng: np.random.Generator, n_cols: int, cap: float) -> None:
    before = (rng.standard_normal((5, n_cols)) * 40).astype(np.float32)
    for row, fault in ((1, np.nan), (2, np.inf), (3, -np.inf)):
        before[row, rng.integers(n_cols)] = fault
    logits, finite = before.copy(), np.full(5, 9, np.uint8)
    gpu_module.check(
        gpu_module.lib.gemmart_kernel_cap(5, n_cols, cap, gpu_module.pointer(logits), gpu_module.pointer(finite))
    )
    assert finite.tolist() == [1, 0, 0, 0, 1]
    sound = [0, 4]
    wanted = cap * np.tanh(before[sound].astype(np.float64) / cap) if cap else before[sound]
    np.testing.assert_allclose(logits[sound], wanted, rtol=0, atol=3e-7 * cap)
