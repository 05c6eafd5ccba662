"""Element-wise kernels of every usable ISA against float64 NumPy. The module checks red zones behind every result."""

import numpy as np
import pytest

from gemmart._core import kernels

LENGTHS = [*range(1, 71), 128, 1000, 2304, 4099]
EXTREMES = np.array(
    [0.0, -0.0, 1e-45, -1e-40, 1e-38, 1e-20, -1e-4, 0.5, 1.0, -1.0, 9.0, -20.0, 88.0, -89.0, 104.0, -1e4, 1e20, -3e38],
    np.float32,
)


@pytest.fixture(params=[name for name, _, usable, _ in kernels.isas() if usable])
def isa(request):
    return request.param


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.mark.parametrize(("name", "usable", "why_not"), [(name, *rest) for name, _, *rest in kernels.isas()])
def test_the_isa_that_was_asked_for_runs(name, usable, why_not):
    if not usable:
        pytest.skip(f"{name}: {why_not}")
    assert kernels.running_isa(name) == name


def normal(rng, *shape):
    return rng.standard_normal(shape, np.float32)


def same_bits(a, b):
    return np.array_equal(a.view(np.int32), b.view(np.int32))


def assert_within(actual, wanted, bound):
    """|actual - wanted| <= bound everywhere; a NaN fails."""
    error = np.abs(actual.astype(np.float64) - wanted)
    assert (error <= bound).all(), f"worst {np.nanmax(error / bound)} of the bound, {np.isnan(error).sum()} NaN"


def logistic_product(x, u):
    """x / (1 + exp(-u)) in float64 without overflow."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-u))


def gate_reference(act, gate, up):
    x, y = gate.astype(np.float64), up.astype(np.float64)
    u = 2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3) if act == "gelu" else x
    return logistic_product(x, u) * y


@pytest.mark.parametrize("n", LENGTHS)
def test_rms_norm_matches_float64(isa, rng, n):
    for x in (normal(rng, n), normal(rng, n) * 1e15, normal(rng, n) * 1e-40, np.zeros(n, np.float32)):
        weight = normal(rng, n)
        wanted = x * weight.astype(np.float64) / np.sqrt(np.mean(x.astype(np.float64) ** 2) + np.float32(1e-6))
        assert_within(kernels.rms_norm(isa, x, weight, 1e-6), wanted, 1e-6 * np.abs(wanted) + 1e-44)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 70])
def test_rms_norm_passes_faults_on(isa, rng, n, bad):
    for at in {0, n // 2, n - 1}:
        x = normal(rng, n)
        x[at] = bad
        assert np.isnan(kernels.rms_norm(isa, x, np.ones(n, np.float32), 1e-6)[at])


@pytest.mark.parametrize("n", LENGTHS)
def test_add_and_scale_are_exact(isa, rng, n):
    x, y = normal(rng, n), normal(rng, n) * 1e-3
    x[:: len(EXTREMES)] = rng.choice(EXTREMES, len(x[:: len(EXTREMES)]))
    assert same_bits(kernels.add(isa, x, y), x + y)
    assert same_bits(kernels.scale(isa, x, 0.3), x * np.float32(0.3))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_add_scale_and_gate_pass_faults_on(isa, rng, bad):
    for at in (0, 16, 36):
        x, ones = normal(rng, 37), np.ones(37, np.float32)
        x[at] = bad
        for out in (
            kernels.add(isa, x, ones),
            kernels.add(isa, ones, x),
            kernels.scale(isa, x, 2),
            kernels.gate(isa, "gelu", x, ones),
            kernels.gate(isa, "silu", x, ones),
            kernels.gate(isa, "gelu", ones, x),
        ):
            assert not np.isfinite(out[at])
            assert np.isfinite(np.delete(out, at)).all()


@pytest.mark.parametrize("act", ["gelu", "silu"])
@pytest.mark.parametrize("n", LENGTHS)
def test_gate_matches_float64(isa, rng, act, n):
    gate, up = normal(rng, n) * 5, normal(rng, n)
    wanted = gate_reference(act, gate, up)
    # The exponent u is rounded, so that the tail is known to about |u| units in the last place.
    assert_within(kernels.gate(isa, act, gate, up), wanted, 1e-6 * (1 + gate**2) * np.abs(wanted) + 1e-35)


@pytest.mark.parametrize("act", ["gelu", "silu"])
def test_gate_over_its_whole_range(isa, act):
    gate = np.concatenate([np.linspace(-110, 110, 100_001, dtype=np.float32), EXTREMES])
    up = np.ones_like(gate)
    wanted = gate_reference(act, gate, up)
    out = kernels.gate(isa, act, gate, up)
    assert_within(out, wanted, 3e-7 * np.abs(gate).clip(1e-38))
    assert same_bits(out[gate > 20], gate[gate > 20])


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
def test_softcap_over_its_whole_range(isa, cap):
    x = np.concatenate([np.linspace(-12, 12, 200_001, dtype=np.float32) * np.float32(cap), EXTREMES])
    out = kernels.softcap(isa, x, cap)
    assert_within(out, cap * np.tanh(x.astype(np.float64) / cap), 3e-7 * cap)
    near = np.abs(x) < cap
    assert_within(out[near], cap * np.tanh(x[near].astype(np.float64) / cap), 1e-6 * np.abs(x[near]) + 1e-45 * cap)
    assert same_bits(kernels.softcap(isa, -x, cap), -out)


def test_softcap_at_infinity_and_nan(isa):
    for n in (3, 35):
        x = np.resize(np.array([np.inf, -np.inf, np.nan], np.float32), n)
        np.testing.assert_array_equal(kernels.softcap(isa, x, 30), np.resize(np.float32([30, -30, np.nan]), n))


@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("head_dim", [*range(2, 71, 2), 80, 96, 128, 256])
def test_rope_matches_float64(isa, rng, neox, head_dim):
    x, angles = normal(rng, head_dim), rng.uniform(-np.pi, np.pi, head_dim // 2)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    pairs = x.astype(np.float64)
    pairs = pairs.reshape(2, -1) if neox else pairs.reshape(-1, 2).T
    turned = np.stack([pairs[0] * cosines - pairs[1] * sines, pairs[1] * cosines + pairs[0] * sines])
    wanted = turned.reshape(-1) if neox else turned.T.reshape(-1)
    size = np.abs(pairs).sum(0)
    bound = 2e-7 * (np.tile(size, 2) if neox else np.repeat(size, 2))
    assert_within(kernels.rope(isa, x, cosines, sines, neox), wanted, bound)


def test_results_do_not_depend_on_place(isa, rng):
    x, y = normal(rng, 70) * 8, normal(rng, 70)
    calls = {
        "add": lambda x, y: kernels.add(isa, x, y),
        "scale": lambda x, y: kernels.scale(isa, x, 1.7),
        "gelu": lambda x, y: kernels.gate(isa, "gelu", x, y),
        "silu": lambda x, y: kernels.gate(isa, "silu", x, y),
        "softcap": lambda x, y: kernels.softcap(isa, x, 10),
    }
    for name, call in calls.items():
        whole = call(x, y)
        for begin in range(0, 70, 3):
            for end in range(begin + 1, 71):
                assert same_bits(call(x[begin:end], y[begin:end]), whole[begin:end]), (name, begin, end)


def activations(rng, n_tokens, n_cols):
    """Blocks of all sizes that a model can meet, and of some that it should not."""
    x = normal(rng, n_tokens, n_cols // 32, 32)
    x *= 10.0 ** rng.integers(-6, 6, (n_tokens, n_cols // 32, 1)).astype(np.float32)
    blocks = x.reshape(-1, 32)
    special = rng.permutation(len(blocks))[: len(blocks) // 2]
    for block, which in zip(special, np.resize(np.arange(7), len(special)), strict=True):
        if which == 0:
            blocks[block] = 0
        elif which == 1:
            blocks[block] = 1
        elif which == 2:
            blocks[block] *= np.float32(1e-44)
        elif which == 3:
            blocks[block] = np.resize(np.float32([3.4e38, -3.4e38]), 32)
        elif which == 4:
            blocks[block] = 0
            blocks[block, rng.integers(32)] = -1e-37
        elif which == 5:
            blocks[block] = np.arange(32) - 127  # integers: d is 1
        else:
            blocks[block] = np.arange(32) + 0.5  # ties, with the next line
            blocks[block, 0] = 127
    return x.reshape(n_tokens, n_cols)


def four_bits(d):
    """Normal numbers rounded up to a significand of four bits."""
    short = ((d.view(np.uint32) + np.uint32(0xFFFFF)) & np.uint32(0xFFF00000)).view(np.float32)
    return np.where(d >= np.finfo(np.float32).tiny, short, d)


@pytest.mark.parametrize("two_terms", [False, True])
@pytest.mark.parametrize("n_tokens", range(1, 18))
def test_quantize_is_its_definition(isa, rng, n_tokens, two_terms):
    n_cols = 32 * 45
    x = activations(rng, n_tokens, n_cols)
    out = kernels.quantize(isa, x, two_terms=two_terms)
    assert same_bits(out["x"], x)
    blocks = x.reshape(n_tokens, -1, 32)
    coarse = four_bits(np.abs(blocks).max(-1) / np.float32(127))
    d = coarse / np.float32(256) if two_terms else coarse
    assert same_bits(out["d"], d)
    usable = d >= np.finfo(np.float32).tiny
    parts = (1 + out["significand"] / 8) * 2.0 ** out["exponent"]
    np.testing.assert_array_equal(parts[usable], d[usable])
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        q = np.rint(blocks * (np.float32(1) / coarse)[..., None])
    q = np.where(usable[..., None], q, 0).astype(np.int64)
    np.testing.assert_array_equal(out["q"].reshape(blocks.shape), q)
    assert np.abs(q).max() == 127
    v = q
    if two_terms:
        low = out["q_low"].reshape(blocks.shape).astype(np.int64)
        assert low.min() == -127
        assert low.max() == 127
        v = 256 * q + low
    largest_error = 1.0001 if two_terms else 0.50001  # two terms: where 127.5 and more of the second one are cut
    assert (
        np.abs(blocks - d[..., None].astype(np.float64) * v) <= np.where(usable, d * largest_error, 2e-36)[..., None]
    ).all()
    assert same_bits(out["ds32"], d * v.sum(-1).astype(np.float32))
    np.testing.assert_array_equal(out["s32"], -v.sum(-1))
    assert same_bits(
        out["ds16"], (d[..., None] * v.reshape(n_tokens, -1, 2, 16).sum(-1)).astype(np.float32).reshape(n_tokens, -1)
    )


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_quantize_passes_faults_on(isa, rng, bad):
    for at in (0, 5, 31):
        x = normal(rng, 11, 96)
        x[6, 32 + at] = bad
        out = kernels.quantize(isa, x)
        faulty = np.zeros((11, 3), bool)
        faulty[6, 1] = True
        for name in ("d", "ds32", "ds16"):
            finite = np.isfinite(out[name].reshape(11, 3, -1)).all(-1)
            np.testing.assert_array_equal(finite, ~faulty, err_msg=name)


def test_quantize_does_not_depend_on_the_batch(isa, rng):
    x = activations(rng, 16, 64)
    whole = kernels.quantize(isa, x)
    for n_tokens in range(1, 16):
        for name, part in kernels.quantize(isa, x[:n_tokens]).items():
            np.testing.assert_array_equal(part, whole[name][:n_tokens], err_msg=name)
