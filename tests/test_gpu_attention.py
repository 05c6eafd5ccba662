"""The GPU module's attention, and its keys and values in pages, against NumPy: the bytes of pages as csrc/kv_cache.h
draws them, outputs against a float64 softmax of the same rounded keys and values. Slots that were not stored hold NaN,
and pages that no row sees are -1."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from gpu_module import GpuModule

KV_TYPES = ["f32", "f16", "bf16", "q8_0"]
FEW = 8  # tokens of a segment, kFewTokens of csrc/cuda/kernels.cuh
PAGE = 32
# Against the largest value, by whether a segment has few tokens. Queries may be rounded for keys of 8 bits; tiles have
# two terms, of bf16 where pages are not f16.
TOLERANCE = {
    ("f32", True): 2e-6,
    ("f16", True): 2e-6,
    ("bf16", True): 2e-6,
    ("q8_0", True): 1e-4,
    ("f32", False): 6e-5,
    ("f16", False): 1e-5,
    ("bf16", False): 6e-5,
    ("q8_0", False): 6e-5,
}


def bfloat16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def quantized(x: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[.., head_dim] -> numbers and scales [.., head_dim / 32]"""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    largest = np.abs(blocks).max(-1, keepdims=True)
    numbers = np.rint(blocks * (np.float32(127) / largest)).astype(np.int8)
    return numbers.reshape(x.shape), (largest / np.float32(127))[..., 0]


def stored(kv_type: str, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """What pages hold of x [.., head_dim]."""
    if kv_type == "f32":
        return x.astype(np.float64)
    if kv_type == "f16":
        return x.astype(np.float16).astype(np.float64)
    if kv_type == "bf16":
        return (bfloat16(x).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    numbers, scales = quantized(x)
    return (numbers.reshape(*scales.shape, 32) * scales[..., None].astype(np.float64)).reshape(x.shape)


def page_bytes(kv_type: str, keys: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """keys, values [n <= 32 positions, head_dim] -> a head's part of a page; what is not stored is 0xff."""
    n, head_dim = keys.shape
    n_blocks = -(-head_dim // 32)
    dtype = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "q8_0": np.int8}[kv_type]

    def empty(*shape: int, dtype: type = dtype) -> NDArray[np.generic]:
        return np.full(np.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)

    padded = empty(PAGE, n_blocks * 32)
    if kv_type == "q8_0":
        (k, k_scales), (v, v_scales) = quantized(keys), quantized(values)
        of_keys = empty(head_dim // 4, PAGE, 4)
        of_keys[:, :n] = k.reshape(n, -1, 4).transpose(1, 0, 2)
        padded[:n] = v
        parts = []
        for matrix, scales in ((of_keys, k_scales), (padded.reshape(PAGE, -1, 32).transpose(1, 0, 2), v_scales)):
            of_scales = empty(n_blocks, PAGE, dtype=np.float32)
            of_scales[:, :n] = scales.T
            parts += [matrix, of_scales]
    else:
        k, v = (bfloat16(x) if kv_type == "bf16" else x.astype(dtype) for x in (keys, values))
        of_keys = empty(head_dim, PAGE)
        of_keys[:, :n] = k.T
        padded[:n, :head_dim] = v
        parts = [of_keys, padded.reshape(PAGE, -1, 32).transpose(1, 0, 2)]
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8).ravel() for p in parts])


def rotated(
    x: NDArray[np.float32], positions: NDArray[np.int64], inv_freq: NDArray[np.float64], neox: bool
) -> NDArray[np.float32]:
    """x [n, heads, head_dim], in the order of float operations that the kernels promise"""
    angles = positions[:, None, None] * inv_freq
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    half = x.shape[-1] // 2
    first, second = (slice(0, half), slice(half, None)) if neox else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first], x[..., second]
    out = np.empty_like(x)
    out[..., first], out[..., second] = a * cosines - b * sines, a * sines + b * cosines
    return out


@dataclass
class Layer:
    kv_type: str
    head_dim: int
    n_heads: int = 2
    n_kv_heads: int = 1
    window: int = 0
    softcap: float = 0
    neox: bool = True
    query_scale: float = 1
    norms: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None
    inv_freq: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.inv_freq = 10000.0 ** (-np.arange(self.head_dim // 2) / (self.head_dim // 2))


class Sequence:
    """Keys and values, rotated, of positions [0, start), and q, k, v of n_tokens more, before rope."""

    def __init__(self, rng: np.random.Generator, layer: Layer, start: int, n_tokens: int, spread: float = 3) -> None:
        def normal(n: int, heads: int) -> NDArray[np.float32]:
            return rng.standard_normal((n, heads, layer.head_dim), np.float32)

        self.start, self.n_tokens = start, n_tokens
        self.past_keys, self.past_values = normal(start, layer.n_kv_heads), normal(start, layer.n_kv_heads)
        # Scores have about this standard deviation.
        self.q = normal(n_tokens, layer.n_heads) * np.float32(spread / np.sqrt(layer.head_dim) / layer.query_scale)
        self.k, self.v = normal(n_tokens, layer.n_kv_heads), normal(n_tokens, layer.n_kv_heads)

    @property
    def positions(self) -> NDArray[np.int64]:
        return np.arange(self.start, self.start + self.n_tokens)

    def all_values(self) -> NDArray[np.float32]:
        return np.concatenate([self.past_values, self.v])

    def all_keys(self, layer: Layer) -> NDArray[np.float32]:
        return np.concatenate([self.past_keys, rotated(self.k, self.positions, layer.inv_freq, layer.neox)])

    def wanted(self, layer: Layer) -> NDArray[np.float64]:
        q = rotated(self.q, self.positions, layer.inv_freq, layer.neox) * np.float32(layer.query_scale)
        keys, values = stored(layer.kv_type, self.all_keys(layer)), stored(layer.kv_type, self.all_values())
        out = np.empty(q.shape)
        for i, last in enumerate(self.positions):
            first = max(0, last - layer.window + 1) if layer.window else 0
            for head in range(layer.n_heads):
                kv_head = head * layer.n_kv_heads // layer.n_heads
                scores = keys[first : last + 1, kv_head] @ q[i, head].astype(np.float64)
                if layer.softcap:
                    scores = layer.softcap * np.tanh(scores / layer.softcap)
                weights = np.exp(scores - scores.max())
                out[i, head] = weights @ values[first : last + 1, kv_head] / weights.sum()
        return out


def pages_of(layer: Layer, keys: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """keys, values [n, n_kv_heads, head_dim] -> [pages, bytes]"""
    pages = []
    for p in range(0, len(keys), PAGE):
        heads = zip(keys[p : p + PAGE].swapaxes(0, 1), values[p : p + PAGE].swapaxes(0, 1), strict=True)
        pages.append(np.concatenate([page_bytes(layer.kv_type, *head) for head in heads]))
    return np.array(pages, np.uint8).reshape(len(pages), -1 if pages else 0)


def attend(
    module: GpuModule, layer: Layer, sequences: list[Sequence], order: np.random.Generator | None = None
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.uint8]]]:
    """Outputs and, behind the pass, pages of each sequence. order: of the pages in memory."""
    one = np.ones((1, layer.n_kv_heads, layer.head_dim), np.float32)
    n_bytes = pages_of(layer, one, one).shape[1]
    before = []
    for s in sequences:
        past = pages_of(layer, s.past_keys, s.past_values)
        pages = np.full((-(-(s.start + s.n_tokens) // PAGE), n_bytes), 0xFF, np.uint8)
        if len(past):
            pages[: len(past)] = past
        before.append(pages)
    n_pages = sum(map(len, before)) + 1
    places = np.arange(n_pages, dtype=np.int32) if order is None else order.permutation(n_pages).astype(np.int32)
    kv = np.full((n_pages, n_bytes), 0xFF, np.uint8)
    table = np.full((len(sequences), max(map(len, before)) + 2), -1, np.int32)
    used = 0
    for i, pages in enumerate(before):
        mine = places[used : used + len(pages)]
        used += len(pages)
        kv[mine] = pages
        gone = max(0, sequences[i].start - layer.window + 1) // PAGE if layer.window else 0
        table[i, : len(pages)] = np.where(np.arange(len(pages)) < gone, -1, mine)

    q, k, v = (np.concatenate([getattr(s, name) for s in sequences]) for name in "qkv")
    out = np.full_like(q, np.nan)
    starts, n_tokens = (np.array([getattr(s, n) for s in sequences], np.int32) for n in ("start", "n_tokens"))
    test = module.ffi.new("GemmartAttentionTest *")
    arrays = {"starts": starts, "n_tokens": n_tokens, "pages": table, "inv_freq": layer.inv_freq}
    arrays |= {"q": q, "k": k, "v": v, "kv": kv, "out": out}
    if layer.norms is not None:
        arrays |= {"q_norm": layer.norms[0], "k_norm": layer.norms[1]}
    for name, array in arrays.items():
        setattr(test, name, module.pointer(array))
    test.n_segments, test.max_pages, test.n_pages = len(sequences), table.shape[1], n_pages
    test.n_heads, test.n_kv_heads, test.head_dim = layer.n_heads, layer.n_kv_heads, layer.head_dim
    test.window, test.softcap, test.neox = layer.window, layer.softcap, layer.neox
    test.query_scale, test.eps, test.repeats = layer.query_scale, 1e-6, 1
    test.kv_type = KV_TYPES.index(layer.kv_type)
    module.check(module.lib.gemmart_kernel_attention(test))

    outs = np.split(out, np.cumsum(n_tokens)[:-1])
    used, after = 0, []
    for pages in before:
        after.append(kv[places[used : used + len(pages)]])
        used += len(pages)
    assert (kv[places[used:]] == 0xFF).all()
    return outs, after


def error_of(out: NDArray[np.float32], sequence: Sequence, layer: Layer) -> float:
    """Outputs are means of values: the error is measured against the largest of them."""
    return float(np.abs(out - sequence.wanted(layer)).max() / np.abs(sequence.all_values()).max())


def assert_close(outs: list[NDArray[np.float32]], sequences: list[Sequence], layer: Layer) -> None:
    """A NaN fails."""
    for out, sequence in zip(outs, sequences, strict=True):
        error = error_of(out, sequence, layer)
        assert error <= TOLERANCE[layer.kv_type, sequence.n_tokens <= FEW], (sequence.start, sequence.n_tokens, error)


def same_bits(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return np.array_equal(a.view(np.int32), b.view(np.int32))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(11)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize("head_dim", [16, 32, 80, 96, 256])
def test_keys_and_values_lie_as_on_the_cpu(
    gpu_module: GpuModule, rng: np.random.Generator, kv_type: str, neox: bool, head_dim: int
) -> None:
    if kv_type == "q8_0" and head_dim % 32:
        pytest.skip("q8_0 stores blocks of 32")
    layer = Layer(kv_type, head_dim, n_heads=3, n_kv_heads=3, neox=neox)
    sequences = [Sequence(rng, layer, 30, 3), Sequence(rng, layer, 0, 1), Sequence(rng, layer, 37, 9)]
    _, after = attend(gpu_module, layer, sequences, rng)
    for s, pages in zip(sequences, after, strict=True):
        np.testing.assert_array_equal(pages, pages_of(layer, s.all_keys(layer), s.all_values()))


@pytest.mark.parametrize("head_dim", [32, 256])
def test_norms_of_queries_and_keys(gpu_module: GpuModule, rng: np.random.Generator, head_dim: int) -> None:
    norms = tuple(1 + 0.2 * rng.standard_normal((2, head_dim), np.float32))
    layer = Layer("f32", head_dim, query_scale=3 / head_dim, norms=norms)
    sequences = [Sequence(rng, layer, 10, 4)]
    outs, _ = attend(gpu_module, layer, sequences)
    for s in sequences:  # the reference knows no norms: it gets what they make
        for name, weight in zip("qk", norms, strict=True):
            x = getattr(s, name).astype(np.float64)
            normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight
            setattr(s, name, normed.astype(np.float32))
    assert_close(outs, sequences, layer)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256])
@pytest.mark.parametrize(("n_heads", "n_kv_heads"), [(2, 2), (4, 2), (4, 1), (3, 1)])
def test_matches_float64(
    gpu_module: GpuModule, rng: np.random.Generator, kv_type: str, head_dim: int, n_heads: int, n_kv_heads: int
) -> None:
    if kv_type == "q8_0" and head_dim % 32:
        pytest.skip("q8_0 stores blocks of 32")
    for window, softcap in ((0, 0.0), (33, 50.0), (0, 2.0)):
        layer = Layer(kv_type, head_dim, n_heads, n_kv_heads, window=window, softcap=softcap, query_scale=0.25)
        lengths = [(70, 1), (0, 3), (33, 8), (40, 9), (0, 40)]
        sequences = [Sequence(rng, layer, *length) for length in lengths]
        outs, _ = attend(gpu_module, layer, sequences, rng)
        assert_close(outs, sequences, layer)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("window", [0, 1, 256, 300])
def test_long_sequences(gpu_module: GpuModule, rng: np.random.Generator, kv_type: str, window: int) -> None:
    layer = Layer(kv_type, 32, window=window, softcap=5)
    lengths = [(1099, 1), (511, 3), (255, 2), (256, 1), (0, 1), (700, 20)]
    sequences = [Sequence(rng, layer, *length) for length in lengths]
    outs, _ = attend(gpu_module, layer, sequences, rng)
    assert_close(outs, sequences, layer)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_scores_of_any_size(gpu_module: GpuModule, rng: np.random.Generator, kv_type: str) -> None:
    """Sharp attention, queries far from 1, values far from 1."""
    layer = Layer(kv_type, 64)
    for spread, size in ((30, 1), (0.01, 1000), (1e-4, 1e-4)):
        sequences = [Sequence(rng, layer, *length, spread=spread) for length in ((90, 2), (90, 20))]
        for s in sequences:
            s.past_values *= np.float32(size)
            s.v *= np.float32(size)
        outs, _ = attend(gpu_module, layer, sequences)
        for out, s in zip(outs, sequences, strict=True):
            assert error_of(out, s, layer) <= TOLERANCE[kv_type, s.n_tokens <= FEW] * max(1, spread / 3)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (50, 50.0)])
def test_bits_do_not_depend_on_company(
    gpu_module: GpuModule, rng: np.random.Generator, kv_type: str, window: int, softcap: float
) -> None:
    layer = Layer(kv_type, 64, n_heads=4, n_kv_heads=2, window=window, softcap=softcap)
    lengths = [(300, 1), (0, 1), (100, 8), (31, 5), (33, 9), (70, 70)]
    sequences = [Sequence(rng, layer, *length) for length in lengths]
    together, pages = attend(gpu_module, layer, sequences, rng)
    for sequence, out, mine in zip(sequences, together, pages, strict=True):
        (alone,), (same,) = attend(gpu_module, layer, [sequence])
        assert same_bits(alone, out)
        np.testing.assert_array_equal(same, mine)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_few_tokens_have_the_same_bits_one_by_one(
    gpu_module: GpuModule, rng: np.random.Generator, kv_type: str
) -> None:
    """As when guesses are verified."""
    for n_heads, window in ((1, 0), (2, 40), (4, 0)):
        layer = Layer(kv_type, 96, n_heads=n_heads, window=window)
        whole = Sequence(rng, layer, 250, 8)
        (out,), _ = attend(gpu_module, layer, [whole])
        keys = rotated(whole.k, whole.positions, layer.inv_freq, layer.neox)
        for i in range(8):
            one = Sequence(rng, layer, 250 + i, 1)
            one.past_keys = np.concatenate([whole.past_keys, keys[:i]])
            one.past_values = np.concatenate([whole.past_values, whole.v[:i]])
            one.q, one.k, one.v = whole.q[i : i + 1], whole.k[i : i + 1], whole.v[i : i + 1]
            (alone,), _ = attend(gpu_module, layer, [one], rng)
            assert same_bits(alone[0], out[i])


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["k", "v"])
def test_faults_reach_those_rows_that_see_them(
    gpu_module: GpuModule, rng: np.random.Generator, kv_type: str, bad: float, where: str
) -> None:
    layer = Layer(kv_type, 64, neox=False)
    layer.inv_freq[:] = 1e-9  # so that an infinite key has a score of infinity, not one of weight 0
    sequences = [Sequence(rng, layer, 30, 6), Sequence(rng, layer, 40, 3), Sequence(rng, layer, 20, 12)]
    for s in sequences:
        s.q[..., 6:8] = 1
    sound, _ = attend(gpu_module, layer, sequences)
    for broken in (0, 2):
        getattr(sequences[broken], where)[4, 0, 6] = bad
    outs, _ = attend(gpu_module, layer, sequences)
    assert same_bits(outs[0][:4], sound[0][:4])
    assert same_bits(outs[1], sound[1])
    for out in (outs[0], outs[2]):
        assert not np.isfinite(out[4:]).all(-1).any()
