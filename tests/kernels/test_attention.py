"""Attention over pages, on every usable ISA, against a float64 softmax of the same rounded keys and values. Slots that
were not stored hold NaN, and pages that no row sees are null."""

from functools import partial

import numpy as np
import pytest

from gemmart._core import kernels

KV_TYPES = ["f32", "f16", "bf16", "q8_0"]
# Against the largest value. Queries may be rounded for keys of 8 bits, to 1/254 of the error that these have.
TOLERANCE = {"f32": 2e-6, "f16": 2e-6, "bf16": 2e-6, "q8_0": 1e-4}
EDGES = [0, 1, 2, 30, 31, 32, 33, 62, 63, 64, 65, 95, 96, 98]


@pytest.fixture(params=[name for name, _, usable, _ in kernels.isas() if usable])
def isa(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def rounded(kv_type, x):
    """What the cache holds of x [n_pos, head_dim], in float64."""
    if kv_type == "f32":
        return x.astype(np.float64)
    if kv_type == "f16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float64)
    if kv_type == "bf16":
        fraction, exponent = np.frexp(x.astype(np.float64))
        return np.ldexp(np.rint(fraction * 256) / 256, exponent)
    blocks = x.reshape(len(x), -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    q = np.rint(blocks * (np.float32(127) / largest))
    return (q * (largest / np.float32(127)).astype(np.float64)).reshape(x.shape)


def reference(kv_type, keys, values, queries, positions, window=0, softcap=0.0):
    keys, values = rounded(kv_type, keys), rounded(kv_type, values)
    out = np.empty(queries.shape)
    for r, last in enumerate(positions):
        first = max(0, last - window + 1) if window else 0
        scores = keys[first : last + 1] @ queries[r].astype(np.float64)
        if softcap:
            scores = softcap * np.tanh(scores / softcap)
        weights = np.exp(scores - scores.max())
        out[r] = weights @ values[first : last + 1] / weights.sum()
    return out


def assert_close(actual, wanted, values, tolerance=2e-6):
    """Outputs are means of values: the error is measured against the largest of them. A NaN fails."""
    error = np.abs(actual - wanted).max() / np.abs(values).max()
    assert error <= tolerance, f"error {error}"


def same_bits(a, b):
    return np.array_equal(a.view(np.int32), b.view(np.int32))


def make(rng, n_pos, head_dim, n_rows, spread=3.0):
    """Queries such that scores have about this standard deviation."""
    queries = normal(rng, n_rows, head_dim) * np.float32(spread / np.sqrt(head_dim))
    return normal(rng, n_pos, head_dim), normal(rng, n_pos, head_dim), queries


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_matches_float64(isa, rng, kv_type, head_dim):
    keys, values, queries = make(rng, 99, head_dim, len(EDGES))
    for softcap in (0.0, 2.0, 50.0):
        for window in (0, 1, 31, 32, 33, 100):
            out = kernels.attention(isa, kv_type, keys, values, queries, EDGES, window=window, softcap=softcap)
            wanted = reference(kv_type, keys, values, queries, EDGES, window, softcap)
            assert_close(out, wanted, values, TOLERANCE[kv_type])


def test_rounding_of_queries_is_little_beside_that_of_keys(isa, rng):
    keys, values, queries = make(rng, 99, 256, len(EDGES))
    exact, stored = (reference(kv_type, keys, values, queries, EDGES) for kv_type in ("f32", "q8_0"))
    out = kernels.attention(isa, "q8_0", keys, values, queries, EDGES)
    assert np.linalg.norm(out - stored) < 0.01 * np.linalg.norm(stored - exact)


@pytest.mark.parametrize("kv_type", KV_TYPES[:3])
@pytest.mark.parametrize("head_dim", [2, 6, 14, 16, 18, 30, 34, 48, 62, 80, 100])
def test_any_even_head_dim(isa, rng, kv_type, head_dim):
    keys, values, queries = make(rng, 99, head_dim, len(EDGES))
    for window in (0, 33):
        out = kernels.attention(isa, kv_type, keys, values, queries, EDGES, window=window, softcap=50)
        assert_close(out, reference(kv_type, keys, values, queries, EDGES, window, 50), values)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_long_sequences(isa, rng, kv_type):
    keys, values, queries = make(rng, 1500, 64, 9)
    positions = [1499, 1498, 1024, 1023, 700, 699, 300, 20, 1499]
    for window in (0, 100, 1024):
        out = kernels.attention(isa, kv_type, keys, values, queries, positions, window=window)
        assert_close(out, reference(kv_type, keys, values, queries, positions, window), values, TOLERANCE[kv_type])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [0, 1, 40])
def test_rows_do_not_depend_on_their_neighbours(isa, rng, kv_type, window):
    head_dim = 64 if kv_type == "q8_0" else 72
    keys, values, queries = make(rng, 200, head_dim, 40)
    mixed, sorted_pairs = rng.integers(0, 200, 40), np.repeat(np.arange(50, 70), 2)

    def attend(rows, positions):
        return kernels.attention(isa, kv_type, keys, values, queries[rows], positions[rows], window=window, softcap=50)

    for positions in (mixed, sorted_pairs):
        whole = attend(np.arange(40), positions)
        for n_rows in range(1, 40):
            assert same_bits(attend(np.arange(n_rows), positions), whole[:n_rows]), n_rows
            assert same_bits(attend(np.arange(n_rows, 40), positions), whole[n_rows:]), n_rows
        order = rng.permutation(40)
        assert same_bits(attend(order, positions), whole[order])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [0, 40, 256, 300])
def test_ranges_apart_or_together(isa, rng, kv_type, window):
    """Ranges of positions that are computed by themselves and merged give the bits of one call over all of them."""
    keys, values, queries = make(rng, 1100, 64, 20)
    positions = [*rng.integers(0, 1100, 14), 0, 255, 256, 511, 512, 1099]
    attend = partial(kernels.attention, isa, kv_type, keys, values, queries, positions, window=window, softcap=50)
    whole = attend()
    assert same_bits(attend(split=True), whole)
    assert_close(whole, reference(kv_type, keys, values, queries, positions, window, 50), values, TOLERANCE[kv_type])


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_rows_do_not_depend_on_later_positions(isa, rng, kv_type):
    keys, values, queries = make(rng, 80, 32, 8)
    positions = [0, 5, 31, 32, 33, 40, 47, 48]
    whole = kernels.attention(isa, kv_type, keys, values, queries, positions)
    assert same_bits(kernels.attention(isa, kv_type, keys[:49], values[:49], queries, positions), whole)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_faults_reach_those_rows_that_see_them(isa, rng, kv_type, bad, where):
    keys, values, queries = make(rng, 90, 64, 29)
    queries[:, 7] = np.sign(bad) if np.isinf(bad) else 1  # an infinite score, not one of weight 0
    positions = np.array([3, *range(36, 60), 63, 64, 80, 89])
    for window in (0, 10):
        sound = kernels.attention(isa, kv_type, keys, values, queries, positions, window=window)
        broken = {"keys": keys.copy(), "values": values.copy()}
        broken[where][38, 7] = bad
        out = kernels.attention(isa, kv_type, **broken, queries=queries, positions=positions, window=window)
        sees = (positions >= 38) & ((positions - window < 38) if window else True)
        assert same_bits(out[~sees], sound[~sees])
        assert not np.isfinite(out[sees]).all(1).any()


def test_a_fault_in_a_query_reaches_its_row_alone(isa, rng):
    keys, values, queries = make(rng, 50, 64, 8)
    sound = kernels.attention(isa, "f16", keys, values, queries, [49] * 8)
    queries[3, 0] = np.nan
    out = kernels.attention(isa, "f16", keys, values, queries, [49] * 8)
    assert np.isnan(out[3]).all()
    assert same_bits(np.delete(out, 3, 0), np.delete(sound, 3, 0))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_one_visible_position_gives_its_value(isa, rng, kv_type):
    keys, values, queries = make(rng, 70, 64, 70)
    values = rounded(kv_type, values).astype(np.float32)
    out = kernels.attention(isa, kv_type, keys, values, queries, range(70), window=1)
    np.testing.assert_array_equal(out, rounded(kv_type, values).astype(np.float32))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_scores_far_apart(isa, rng, kv_type):
    keys, values, queries = make(rng, 99, 64, len(EDGES), spread=1000.0)
    out = kernels.attention(isa, kv_type, keys, values, queries, EDGES)
    # Scores of thousands are known to 1e-3 at best.
    assert_close(out, reference(kv_type, keys, values, queries, EDGES), values, tolerance=2e-3)
    capped = kernels.attention(isa, kv_type, keys, values, queries, EDGES, softcap=5)
    assert_close(capped, reference(kv_type, keys, values, queries, EDGES, softcap=5), values, tolerance=2e-3)


def test_rounding_to_16_bits(isa):
    """Through window 1, which gives the stored value itself: ties, denormals, the largest numbers, overflow."""
    ties = np.float32([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65519, 65520, 6e-8, 2.9e-8, 6e-5, 3.39e38])
    values = np.resize(np.concatenate([ties, -ties, [0]]), (1, 64)).astype(np.float32)
    zeros = np.zeros_like(values)
    for kv_type in ("f32", "f16", "bf16"):
        out = kernels.attention(isa, kv_type, zeros, values, zeros, [0], window=1)
        np.testing.assert_array_equal(out, rounded(kv_type, values).astype(np.float32), err_msg=kv_type)


def test_a_block_of_zeros_in_q8_0(isa, rng):
    keys, values, queries = make(rng, 40, 64, 4)
    keys[:, :32] = 0
    values[:, 32:] = 0
    keys[5, 40:] = 1e-42
    out = kernels.attention(isa, "q8_0", keys, values, queries, [0, 5, 31, 39])
    assert np.isfinite(out).all()
    np.testing.assert_array_equal(out[:, 32:], 0)
