"""Matrix products of every format on every ISA, against float64 and, bit by bit, against themselves."""

import gguf
import numpy as np
import pytest

from gemmart import _core

FORMATS = {name: (block_size, block_bytes) for name, _, block_size, block_bytes in _core.formats()}
FLOATS = ("F32", "F16", "BF16")
# Bytes of a block that hold quants, and what makes them the unsigned zero of the integer kernels.
QUANTS = {"Q4_0": (slice(2, 18), 0), "Q4_1": (slice(4, 20), 0), "Q5_0": (slice(2, 22), 0), "Q8_0": (slice(2, 34), 0x80)}
QUANTS |= {"Q5_1": (slice(4, 24), 0), "Q2_K": (slice(16, 80), 0), "Q3_K": (slice(0, 96), 0)}
QUANTS |= {"Q4_K": (slice(16, 144), 0), "Q5_K": (slice(16, 176), 0), "Q6_K": (slice(0, 192), 0)}
QUANTS |= {"TQ1_0": (slice(0, 52), 0), "TQ2_0": (slice(0, 64), 0), "MXFP4": (slice(1, 17), 0xFF)}
# Levels, around a zero that no bits stand for.
QUANTS |= dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"))
# Byte offsets of the halves that scale a block, where it is not one at the front.
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
SCALES |= {"Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}

every_isa = pytest.mark.parametrize("isa", [name for name, _, usable, _ in _core.kernels.isas() if usable])
every_matrix = pytest.mark.parametrize(
    ("name", "packed"),
    [pytest.param(name, False, id=f"{name}-rows") for name in FORMATS]
    + [pytest.param(name, True, id=f"{name}-packed") for name in (*FLOATS, *QUANTS)],
)


@pytest.fixture
def rng(name):
    return np.random.default_rng(sum(name.encode()))


def with_scales(name, blocks, scales):
    """Blocks [n, block bytes] of random or uniform bits whose scales become `scales` [n]."""
    halves = np.asarray(scales, np.float16)
    if name == "MXFP4":
        blocks[:, 0] = 127 + np.round(np.log2(np.abs(scales)))
    elif name == "IQ1_M":  # four bits of the half on top of each of the last four 16-bit numbers
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (halves.view(np.uint16) >> 4 * i & 15) << 4
    else:
        for offset in SCALES.get(name, (0,)):
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks


def random_weights(name, rng, n_rows, n_cols):
    """Bytes [n_rows, row bytes] of any bits, with scales of a model's size and of both signs."""
    block_size, block_bytes = FORMATS[name]
    if name in FLOATS:
        return as_bytes(name, rng.standard_normal((n_rows, n_cols)))
    n = n_rows * n_cols // block_size
    blocks = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
    return with_scales(name, blocks, rng.uniform(0.001, 0.02, n) * rng.choice([-1, 1], n)).reshape(n_rows, -1)


def as_bytes(name, values):
    kind = getattr(gguf.GGMLQuantizationType, name)
    return gguf.quants.quantize(values.astype(np.float32), kind).view(np.uint8).reshape(len(values), -1)


def decoded(name, weights):
    return gguf.quants.dequantize(weights, getattr(gguf.GGMLQuantizationType, name)).astype(np.float64)


def product(isa, name, weights, x, **options):
    """The product [n_tokens, n_rows]; nothing may be written beside it."""
    out = _core.kernels.matmul(isa, name, weights, x, **options)
    assert np.isnan(out[:, len(weights) :]).all()
    return out[:, : len(weights)]


def check(isa, name, weights, x, packed):
    for two_terms in (False, True) if packed and name in QUANTS else (False,):
        check_terms(isa, name, weights, x, packed, two_terms)


def check_terms(isa, name, weights, x, packed, two_terms):
    """Against the sum in float64 over the numbers that the kernel is given."""
    w = decoded(name, weights)
    seen = x.astype(np.float64)
    offset = np.zeros_like(w)  # weight = scale * unsigned - offset: parts that are rounded apart
    if packed and name in QUANTS:
        rounded = _core.kernels.quantize(isa, x, two_terms=two_terms)
        v = 256 * rounded["q"].astype(int) + rounded["q_low"] if two_terms else rounded["q"]
        seen = v * np.repeat(rounded["d"].astype(np.float64), 32, axis=1)
        if QUANTS[name]:
            quants, zero = QUANTS[name]
            blocks = weights.reshape(-1, FORMATS[name][1]).copy()
            blocks[:, quants] = zero
            offset = decoded(name, blocks.reshape(weights.shape))
    error = np.abs(product(isa, name, weights, x, packed=packed, two_terms=two_terms) - seen @ w.T)
    assert (error <= np.abs(seen) @ (1e-5 * np.abs(w) + 1e-6 * np.abs(offset)).T).all()  # false for a NaN


def test_every_format_with_panels_is_tested_packed():
    assert {name for name in FORMATS if _core.kernels.has_panels(name)} == {*FLOATS, *QUANTS}


@every_isa
@every_matrix
def test_against_float64(isa, name, packed, rng):
    check(isa, name, random_weights(name, rng, 33, 768), rng.standard_normal((9, 768)).astype(np.float32), packed)


@every_isa
@every_matrix
def test_column_counts(isa, name, packed, rng):
    for n_cols in (32, 64, 224, 256, 512, 1056, 2304):
        if n_cols % FORMATS[name][0] == 0:
            weights = random_weights(name, rng, 17, n_cols)
            check(isa, name, weights, rng.standard_normal((3, n_cols)).astype(np.float32), packed)


@every_isa
@every_matrix
@pytest.mark.parametrize("bits", [0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF])
def test_extremes(isa, name, packed, bits, rng):
    """Largest, smallest and equal weights in one row of blocks, one of which is scaled far beyond the others, times
    activations that are all at the end of their range."""
    block_size, block_bytes = FORMATS[name]
    n_rows, n_cols = 18, 512
    if name in FLOATS:
        value = {0x00: 0, 0x0F: 6e-8, 0x7F: 65504, 0x80: -0.0, 0xF0: -65504, 0xFF: -6e-8}[bits]
        weights = as_bytes(name, np.full((n_rows, n_cols), value))
    else:
        n = n_rows * n_cols // block_size
        scales = np.full(n, 0.01)
        scales[n // 2] = 60000
        weights = with_scales(name, np.full((n, block_bytes), bits, np.uint8), scales).reshape(n_rows, -1)
    x = np.ones((6, n_cols), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    x[3] = 0
    x[4, 100] = 1e6
    x[5] = rng.choice([-3, 3], n_cols)
    check(isa, name, weights, x, packed)


@every_isa
@every_matrix
@pytest.mark.parametrize("two_terms", [False, True])
def test_token_counts_give_the_same_bits(isa, name, packed, two_terms, rng):
    weights = random_weights(name, rng, 70, 1280)  # five panels: the tiles of several and of one
    x = rng.standard_normal((72, 1280)).astype(np.float32)
    options = {"packed": packed, "two_terms": two_terms}
    alone = np.concatenate([product(isa, name, weights, row[None], **options) for row in x])
    assert np.isfinite(alone).all()
    for n_tokens in (*range(2, 21), 40, 72):
        np.testing.assert_array_equal(product(isa, name, weights, x[:n_tokens], **options), alone[:n_tokens])


@every_isa
@every_matrix
@pytest.mark.parametrize(("n_tokens", "n_cols"), [(300, 1280), (70, 4864)])
def test_more_than_scratch_holds_at_a_time(isa, name, packed, n_tokens, n_cols, rng):
    weights = random_weights(name, rng, 17, n_cols)
    x = rng.standard_normal((n_tokens, n_cols)).astype(np.float32)
    check(isa, name, weights, x, packed)
    together = product(isa, name, weights, x, packed=packed)
    for i in (0, 17, n_tokens - 1):
        np.testing.assert_array_equal(product(isa, name, weights, x[i : i + 1], packed=packed)[0], together[i])


@every_isa
@every_matrix
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 33, 64])
def test_row_counts_give_the_same_bits(isa, name, packed, n_rows, rng):
    weights = random_weights(name, rng, 250, 256)
    x = rng.standard_normal((11, 256)).astype(np.float32)  # groups of 8, 2 and 1
    whole = product(isa, name, weights, x, packed=packed)
    assert np.isfinite(whole).all()
    np.testing.assert_array_equal(product(isa, name, weights[:n_rows], x, packed=packed), whole[:, :n_rows])


@every_isa
@every_matrix
@pytest.mark.parametrize("panels", [(0, 0), (0, 1), (1, 6), (3, 7), (6, 7)])
def test_only_the_rows_of_the_panels_are_written(isa, name, packed, panels, rng):
    weights = random_weights(name, rng, 107, 512)
    x = rng.standard_normal((13, 512)).astype(np.float32)
    expected = np.full((13, 107), np.nan, np.float32)
    rows = slice(16 * panels[0], 16 * panels[1])
    expected[:, rows] = product(isa, name, weights, x, packed=packed)[:, rows]
    assert np.isfinite(expected[:, rows]).all()
    np.testing.assert_array_equal(product(isa, name, weights, x, packed=packed, panels=list(panels)), expected)


@every_isa
@every_matrix
@pytest.mark.parametrize("fault", [np.nan, np.inf])
def test_a_fault_reaches_its_own_column_alone(isa, name, packed, fault, rng):
    weights = random_weights(name, rng, 20, 512)
    x = rng.standard_normal((5, 512)).astype(np.float32)
    sound = product(isa, name, weights, x, packed=packed)
    x[2, 300] = fault
    faulty = product(isa, name, weights, x, packed=packed)
    others = [0, 1, 3, 4]
    np.testing.assert_array_equal(faulty[others], sound[others])
    if decoded(name, weights)[:, 300].all() or (packed and name in QUANTS):
        assert not np.isfinite(faulty[2]).any()


@every_isa
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("n_tokens", [1, 2, 4, 9])
def test_float_panels_have_the_bits_of_rows(isa, name, n_tokens, rng):
    weights = random_weights(name, rng, 83, 1056)
    x = rng.standard_normal((n_tokens, 1056)).astype(np.float32)
    np.testing.assert_array_equal(
        product(isa, name, weights, x, packed=True), product(isa, name, weights, x, packed=False)
    )
