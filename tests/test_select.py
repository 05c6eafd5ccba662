"""The core's choice of candidates against NumPy: adjust(), then a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray

from conftest import ISAS, Tiny, open_context
from edit import edit
from gemmart import _core
from gemmart.errors import InvalidRequest
from gemmart.sampling import Settings, adjust

N_VOCAB = 512


@pytest.fixture(scope="module", params=ISAS)
def context(request: pytest.FixtureRequest, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> _core.Context:
    """Of each instruction set: three rows of logits of a model whose token i + 256 has the embedding of token i, so
    that each logit is there twice."""
    path = tiny("gemma2", vocabulary=False)
    embedding = next(t.data for t in GGUFReader(path).tensors if t.name == "token_embd.weight").copy()
    embedding[256:] = embedding[:256]
    path = edit(path, tmp_path_factory.mktemp("ties") / "m.gguf", tensors={"token_embd.weight": embedding})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GEMMART_ISA", request.param)
        context = open_context(path)
    context.forward(np.array([5, 9, 200], np.int32), [(context.kv.new_sequence(), 3)], [0, 1, 2])
    return context


def packed(allowed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """A mask as the core takes it."""
    bits = np.zeros(-(-len(allowed) // 32) * 32, bool)
    bits[: len(allowed)] = allowed
    return np.packbits(bits, bitorder="little").view(np.int32)


def check(
    context: _core.Context,
    output: int,
    k: int,
    settings: Settings,
    recent: list[int],
    allowed: NDArray[np.bool_] | None = None,
) -> None:
    bias = settings.logit_bias
    ids, logits, logsumexp = context.select(
        output,
        k,
        bias_ids=np.array(list(bias), np.int32),
        bias=np.array(list(bias.values()), np.float32),
        recent=np.array(recent, np.int32),
        repeat_penalty=settings.repeat_penalty,
        presence_penalty=settings.presence_penalty,
        frequency_penalty=settings.frequency_penalty,
        **({} if allowed is None else {"mask": packed(allowed)}),
    )
    row = adjust(context.row(output), settings, recent, allowed)
    order = np.argsort(-row, kind="stable")[: k if allowed is None else min(k, allowed.sum())]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(logits, row[order])
    assert ids.dtype == np.int32
    assert logits.dtype == np.float32
    assert logsumexp == pytest.approx(np.log(np.exp(row.astype(np.float64)).sum()), abs=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3, 64, N_VOCAB - 1, N_VOCAB, 10 * N_VOCAB])
def test_plain(context: _core.Context, k: int) -> None:
    for output in range(3):
        assert np.unique(context.row(output)).size <= N_VOCAB // 2  # ties everywhere
        check(context, output, k, Settings(), [])


def test_adjusted(context: _core.Context, rng: np.random.Generator) -> None:
    for _ in range(300):
        ids = rng.choice(N_VOCAB, rng.integers(0, 20), replace=False)
        settings = Settings(
            logit_bias={
                int(i): float(b) for i, b in zip(ids, rng.choice([-100, -3.7, 0, 5.5, 100], len(ids)), strict=True)
            },
            repeat_penalty=float(rng.choice([1, 0.5, 1.3])),
            presence_penalty=float(rng.choice([0, -1.1, 0.7])),
            frequency_penalty=float(rng.choice([0, -0.3, 0.4])),
            repeat_last_n=-1,
        )
        recent = rng.integers(0, rng.choice([3, N_VOCAB]), rng.integers(0, 30)).tolist()
        check(context, int(rng.integers(3)), int(rng.integers(1, N_VOCAB + 1)), settings, recent)


@pytest.mark.parametrize("share", [0.002, 0.05, 0.5, 0.98, 1])
def test_masked(context: _core.Context, rng: np.random.Generator, share: float) -> None:
    for _ in range(60):
        allowed = rng.random(N_VOCAB) < share
        allowed[rng.integers(N_VOCAB)] = True
        settings = Settings(logit_bias={int(rng.integers(N_VOCAB)): 100.0}, repeat_penalty=1.3, repeat_last_n=-1)
        recent = rng.integers(0, N_VOCAB, 10).tolist()
        check(context, int(rng.integers(3)), int(rng.choice([1, 2, 40, N_VOCAB])), settings, recent, allowed)


def test_bits_after_the_last_token_mean_nothing(tiny: Tiny) -> None:
    context = open_context(tiny("llama", n_vocab=500))
    context.forward(np.array([5], np.int32), [(context.kv.new_sequence(), 1)], [0])
    full = np.full(16, -1, np.int32)
    for found, wanted in zip(context.select(0, 600, mask=full), context.select(0, 600), strict=True):
        np.testing.assert_array_equal(found, wanted)
    only = np.zeros(500, bool)
    only[499] = True
    assert context.select(0, 600, mask=packed(only))[0].tolist() == [499]
    beyond = np.zeros(16, np.int32)
    beyond[15] = np.int32(1 << 20)  # token 500
    with pytest.raises(InvalidRequest, match="allows no token"):
        context.select(0, 1, mask=beyond)


def test_a_token_can_be_forbidden(context: _core.Context) -> None:
    best = context.select(0, 1)[0][0]
    none = np.array([-np.inf] * 3, np.float32)
    forbidden = np.array([best, 7, 11], np.int32)
    ids, logits, logsumexp = context.select(
        0, N_VOCAB, bias_ids=forbidden, bias=none, recent=forbidden, repeat_penalty=1.5, frequency_penalty=-2
    )
    assert set(ids[-3:]) == set(forbidden)
    assert ids[-3:].tolist() == sorted(forbidden)
    assert np.isneginf(logits[-3:]).all()
    assert np.isfinite(logits[:-3]).all()
    assert logsumexp == pytest.approx(np.log(np.exp(logits[:-3].astype(np.float64)).sum()), abs=1e-5)


def test_the_row_itself_stays(context: _core.Context) -> None:
    before = context.row(1)
    same, wrong = np.array([3, 3, 8], np.int32), np.array([3, 512, 8], np.int32)
    bias = np.array([9, 0.1, -np.inf], np.float32)
    context.select(1, 5, bias_ids=same, bias=bias, recent=same, repeat_penalty=1.1)
    np.testing.assert_array_equal(context.row(1), before)
    for arguments in ({"bias_ids": wrong, "bias": bias}, {"bias_ids": same, "bias": bias, "recent": wrong}):
        with pytest.raises(InvalidRequest, match="token id 512"):
            context.select(1, 5, **arguments, repeat_penalty=1.1)
        np.testing.assert_array_equal(context.row(1), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"output": 3}, r"output 3 is outside \[0, 3\)"),
        ({"output": -1}, "output -1"),
        ({"bias_ids": [512], "bias": [1.0]}, r"token id 512 is outside \[0, 512\)"),
        ({"bias_ids": [-1], "bias": [1.0]}, "token id -1"),
        ({"bias_ids": [1, 2], "bias": [1.0]}, "bias_ids has 2 elements, bias 1"),
        ({"recent": [4, 600], "repeat_penalty": 1.1}, "token id 600"),
        ({"mask": [1] * 15}, "the mask has 15 words, expected 16 for 512 tokens"),
        ({"mask": [1] * 17}, "the mask has 17 words"),
        ({"mask": [0] * 16}, "the mask allows no token"),
    ],
)
def test_refused(context: _core.Context, arguments: dict, message: str) -> None:
    dtypes = {"bias_ids": np.int32, "recent": np.int32, "mask": np.int32, "bias": np.float32}
    given = {name: np.array(v, dtypes[name]) if name in dtypes else v for name, v in arguments.items()}
    with pytest.raises(InvalidRequest, match=message):
        context.select(given.pop("output", 0), given.pop("k", 1), **given)


LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 33, 127, 128, 129, 1000, 4099)


@pytest.mark.parametrize("n", LENGTHS)
def test_all_finite(isa: str, rng: np.random.Generator, n: int) -> None:
    x = (rng.standard_normal(n) * 3e38).clip(-3.4e38, 3.4e38).astype(np.float32)
    assert _core.kernels.all_finite(isa, x)
    for at in {0, n // 2, n - 1}:
        for fault in (np.nan, -np.nan, np.inf, -np.inf):
            faulty = x.copy()
            faulty[at] = fault
            assert not _core.kernels.all_finite(isa, faulty)


@pytest.mark.parametrize("n", LENGTHS)
def test_find_above(isa: str, rng: np.random.Generator, n: int) -> None:
    x = rng.integers(-9, 0, n).astype(np.float32)
    for limit in (-10, -5, -2, -1, 0):
        for begin in (0, n // 3, n - 1, n):
            above = np.flatnonzero(x[begin:] > limit)
            wanted = begin + above[0] if above.size else n
            assert _core.kernels.find_above(isa, x, begin, limit) == wanted
    assert _core.kernels.find_above(isa, np.full(n, -np.inf, np.float32), 0, -np.inf) == n


@pytest.mark.parametrize("n", LENGTHS)
def test_sum_exp(isa: str, rng: np.random.Generator, n: int) -> None:
    for scale in (0.1, 5, 60):
        x = (rng.standard_normal(n) * scale).astype(np.float32)
        x[n // 2] = -np.inf if n > 1 else 0
        wanted = np.exp(x.astype(np.float64) - x.max()).sum()
        assert _core.kernels.sum_exp(isa, x, x.max()) == pytest.approx(wanted, rel=1e-6)
    equal = np.full(n, 12.5, np.float32)
    assert _core.kernels.sum_exp(isa, equal, 12.5) == n
