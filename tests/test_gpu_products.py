"""Weights on the device, products of few rows, norms and gates, against the gguf package and NumPy in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cffi
import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from gemmart import _core
from gpu_module import CSRC, GpuModule, build_emulated

Floats = NDArray[np.float32]

SOURCE = Path(__file__).with_name("gpu_products.cu")
DECLARATIONS = """
const char* products_failure();
int products_decode(uint32_t id, int n_rows, int n_cols, void* bytes, int rows_at_once, float* out, size_t* n_bytes);
int products_multiply(int n_products, uint32_t* ids, int32_t* n_rows, int n_cols, void** bytes, int n, int terms, float* x,
                      int ld_out, float** outs);
int products_norm(int n_residual, int n, int dim, float* residual, int32_t* chosen, float* proj, float* norm,
                  float* states);
int products_convert(int n_x, int n, int n_cols, float* x, int32_t* chosen, float* out);
"""

FORMATS = {name: (block_size, block_bytes) for name, _, block_size, block_bytes in _core.formats()}
FLOATS = ("F32", "F16", "BF16")
# What makes a block's quants zero where weight = scale · quant - offset: rounded apart from the products.
OFFSETS = {"Q4_1": slice(4, 20), "Q5_1": slice(4, 24), "Q2_K": slice(16, 80)}
OFFSETS |= {"Q4_K": slice(16, 144), "Q5_K": slice(16, 176)}
INTEGERS = (*OFFSETS, "Q4_0", "Q5_0", "Q8_0", "Q3_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
# Byte offsets of the halves that scale a block, where it is not one at the front.
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
SCALES |= {"Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}

every_format = pytest.mark.parametrize("name", FORMATS)


def kind_of(name: str) -> gguf.GGMLQuantizationType:
    return getattr(gguf.GGMLQuantizationType, name)


def random_weights(name: str, rng: np.random.Generator, n_rows: int, n_cols: int) -> NDArray[np.uint8]:
    """Bytes [n_rows, row bytes] of any bits, with scales of a model's size and of both signs."""
    block_size, block_bytes = FORMATS[name]
    if name in FLOATS:
        values = rng.standard_normal((n_rows, n_cols)).astype(np.float32)
        return gguf.quants.quantize(values, kind_of(name)).view(np.uint8).reshape(n_rows, -1)
    n = n_rows * n_cols // block_size
    blocks = rng.integers(0, 256, (n, block_bytes), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, n) * rng.choice([-1, 1], n)
    halves = scales.astype(np.float16)
    if name == "MXFP4":
        blocks[:, 0] = 127 + np.round(np.log2(np.abs(scales)))
    elif name == "IQ1_M":  # four bits of the half on top of each of the last four 16-bit numbers
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (halves.view(np.uint16) >> 4 * i & 15) << 4
    else:
        for offset in SCALES.get(name, (0,)):
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n_rows, -1)


def decoded(name: str, weights: NDArray[np.uint8]) -> NDArray[np.float64]:
    return gguf.quants.dequantize(weights, kind_of(name)).astype(np.float64)


def offsets(name: str, weights: NDArray[np.uint8]) -> NDArray[np.float64] | float:
    if name not in OFFSETS:
        return 0.0
    blocks = weights.reshape(-1, FORMATS[name][1]).copy()
    blocks[:, OFFSETS[name]] = 0
    return decoded(name, blocks.reshape(weights.shape))


def multiply(module: GpuModule, name: str, weights: NDArray[np.uint8], x: Floats, terms: int = 1) -> Floats:
    """x · wᵀ, all rows of x FEW ones."""
    out = np.empty((len(x), len(weights)), np.float32)
    seconds = np.zeros(1)
    module.check(
        module.lib.gemmart_kernel_multiply(
            kind_of(name).value, len(weights), x.shape[1], module.ffi.from_buffer(weights), len(x), len(x), terms, 1,
            module.pointer(x), module.pointer(out), 1, module.pointer(seconds),
        )
    )  # fmt: skip
    return out


def norm(
    module: GpuModule,
    residual: Floats,
    weight: Floats,
    *,
    proj: Floats | None = None,
    post: Floats | None = None,
    n_few: int | None = None,
    terms: int = 1,
    eps: float = 1e-6,
) -> tuple[Floats, Floats, Floats]:
    """The residual stream afterwards, its norm, and what the rows' forms say of that."""
    after = residual.copy()
    states, rounded = np.full_like(residual, np.nan), np.full_like(residual, np.nan)
    n, dim = residual.shape
    module.check(
        module.lib.gemmart_kernel_norm(
            n, n if n_few is None else n_few, dim, eps, module.pointer(after), module.pointer(proj),
            module.pointer(post), module.pointer(weight), terms, module.pointer(states), module.pointer(rounded),
        )
    )  # fmt: skip
    return after, states, rounded


def gate(
    module: GpuModule, gates: Floats, ups: Floats, *, silu: bool = False, n_few: int | None = None, terms: int = 1
) -> Floats:
    rounded = np.full_like(gates, np.nan)
    n, n_cols = gates.shape
    module.check(
        module.lib.gemmart_kernel_gate(
            silu, n, n if n_few is None else n_few, n_cols, module.pointer(gates), module.pointer(ups), terms,
            module.pointer(rounded),
        )
    )  # fmt: skip
    return rounded


def rounded_rows(module: GpuModule, x: Floats, terms: int) -> NDArray[np.float64]:
    """What few rows say of x: SiLU(32) is 32 in float32."""
    return gate(module, np.full_like(x, 32), x / 32, silu=True, terms=terms).astype(np.float64)


def normal(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def check_products(
    module: GpuModule, name: str, weights: NDArray[np.uint8], x: Floats, tolerance: float = 3e-7
) -> None:
    w, offset = decoded(name, weights), offsets(name, weights)
    for terms in (1, 2) if name in INTEGERS else (1,):
        seen = rounded_rows(module, x, terms) if name in INTEGERS else x.astype(np.float64)
        error = np.abs(multiply(module, name, weights, x, terms) - seen @ w.T)
        bound = np.abs(seen) @ (tolerance * (np.abs(w) + np.abs(offset))).T
        assert (error <= bound).all()  # false for a NaN


def exact_rows(x: Floats, terms: int) -> NDArray[np.float64]:
    """The rule of rounding: d = the largest |x| of 32 / 127, v = round(x / d); with two terms 256 v + round(256 rest)."""
    groups = x.reshape(len(x), -1, 32)
    coarse = np.abs(groups).max(axis=2, keepdims=True) / np.float32(127)
    inverse = np.where(coarse > 0, 1 / np.where(coarse > 0, coarse, 1), 0).astype(np.float32)
    v = np.rint(groups * inverse).astype(np.float64)
    if terms == 2:
        rest = (groups - coarse.astype(np.float64) * v).astype(np.float32)
        v = 256 * v + np.clip(np.rint(rest * (256 * inverse)), -127, 127)
        coarse = coarse / np.float32(256)
    return (coarse * v.astype(np.float32)).reshape(x.shape).astype(np.float64)


@every_format
def test_products_against_float64(gpu_module: GpuModule, name: str, rng: np.random.Generator) -> None:
    """Odd panels and panels that end early, one unit of columns and several, one row to eight."""
    block_size = FORMATS[name][0]
    shapes = [(33, 32, 1), (7, 64, 2), (64, 256, 3), (97, 768, 8), (513, 256, 1), (32, 2304, 4), (3, 4864, 8)]
    for n_rows, n_cols, n in shapes:
        if n_cols % block_size == 0:
            check_products(gpu_module, name, random_weights(name, rng, n_rows, n_cols), normal(rng, n, n_cols))


@every_format
@pytest.mark.parametrize("bits", [0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF])
def test_extremes(gpu_module: GpuModule, name: str, bits: int, rng: np.random.Generator) -> None:
    """All weights at one end of their range, times rows that are at the end of theirs."""
    n_rows, n_cols = 33, 512
    block_size, block_bytes = FORMATS[name]
    if name in FLOATS:
        value = {0x00: 0, 0x0F: 6e-8, 0x7F: 65504, 0x80: -0.0, 0xF0: -65504, 0xFF: -6e-8}[bits]
        full = np.full((n_rows, n_cols), value, np.float32)
        weights = gguf.quants.quantize(full, kind_of(name)).view(np.uint8).reshape(n_rows, -1)
    else:
        weights = np.full((n_rows * n_cols // block_size, block_bytes), bits, np.uint8)
        scaled = random_weights(name, rng, n_rows, n_cols).reshape(-1, block_bytes)
        for offset in (0,) if name == "MXFP4" else SCALES.get(name, (0,)):
            width = 1 if name == "MXFP4" else 2
            weights[:, offset : offset + width] = scaled[:, offset : offset + width]
        if name == "IQ1_M":
            weights[:, 48:56] = scaled[:, 48:56]
        weights = weights.reshape(n_rows, -1)
    x = np.ones((6, n_cols), np.float32)
    x[1] = -1
    x[2, ::2] = -1
    x[3] = 0
    x[4, 100] = 1e6
    x[5] = rng.choice([-3, 3], n_cols)
    check_products(gpu_module, name, weights, x, 2e-6)  # equal numbers are rounded to one side


@every_format
def test_same_bits_alone_and_in_company(gpu_module: GpuModule, name: str, rng: np.random.Generator) -> None:
    weights, x = random_weights(name, rng, 40, 1280), normal(rng, 16, 1280)
    for terms in (1, 2) if name in INTEGERS else (1,):
        alone = np.concatenate([multiply(gpu_module, name, weights, row[None], terms) for row in x])
        assert np.isfinite(alone).all()
        for n in (2, 3, 4, 7, 8, 9, 16):
            assert (multiply(gpu_module, name, weights, x[:n], terms) == alone[:n]).all(), n
        assert (multiply(gpu_module, name, weights[:33], x[:2], terms) == alone[:2, :33]).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q6_K", "BF16", "IQ2_XS"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_shows(gpu_module: GpuModule, name: str, wrong: float, rng: np.random.Generator) -> None:
    x = normal(rng, 3, 512)
    x[1, 300] = wrong
    out = multiply(gpu_module, name, random_weights(name, rng, 40, 512), x)
    assert np.isfinite(out[[0, 2]]).all()
    assert not np.isfinite(out[1]).any()


@pytest.mark.parametrize("terms", [1, 2])
def test_rounding(gpu_module: GpuModule, terms: int, rng: np.random.Generator) -> None:
    """Few rows by the rule, halves to even; small and large ones, none, and what float32 can hold only just."""
    x = normal(rng, 6, 1056) * np.float32([[1], [1e-30], [1e30], [0], [1], [1]])
    x[4] = rng.integers(-254, 255, 1056) / 2  # many of them between two numbers
    x[4, ::32] = 127
    x[5, :32] = 1e-44
    x[5, 32:64] = 3e38 * np.linspace(-1, 1, 32, dtype=np.float32)
    expected = exact_rows(x, terms)
    expected[5, :32] = 0
    assert (rounded_rows(gpu_module, x, terms) == expected).all()
    assert (np.abs(expected - x) <= np.abs(x).max(axis=1, keepdims=True) / 127 / 256 ** (terms - 1)).all()


@pytest.mark.parametrize("terms", [1, 2])
def test_rounding_of_many_rows(gpu_module: GpuModule, terms: int, rng: np.random.Generator) -> None:
    gates, ups = np.full((5, 96), 32, np.float32), normal(rng, 5, 96)
    seen = gate(gpu_module, gates, ups, silu=True, n_few=2, terms=terms)
    assert (seen[:2] == exact_rows(gates[:2] * ups[:2], terms)).all()
    error = np.abs(seen[2:] / (gates * ups)[2:] - 1).max()
    assert 2.0 ** (-8 * terms - 2) < error <= 2.0 ** (-8 * terms)


@pytest.mark.parametrize("silu", [False, True])
def test_gate_against_float64(gpu_module: GpuModule, silu: bool) -> None:
    """Each number fills a group of 32, so that rounding to bytes leaves it as it is."""
    x = np.concatenate([np.linspace(-14, 14, 397), np.geomspace(1e-6, 1, 50), [0, -100, 100, 1e4, -1e4]])
    x = x.astype(np.float32)
    gates, ups = np.repeat(x, 32)[None], np.full((1, 32 * len(x)), -1.5, np.float32)
    got = gate(gpu_module, gates, ups, silu=silu, terms=2)[0, ::32]
    wide = x.astype(np.float64)
    tanh = np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3))
    expected = -1.5 * (wide / (1 + np.exp(-np.maximum(wide, -700))) if silu else wide / 2 * (1 + tanh))
    assert (np.abs(got - expected) <= 1e-6 * np.abs(1.5 * wide)).all()


@pytest.mark.parametrize("dim", [32, 96, 2304, 4640])
@pytest.mark.parametrize("with_proj", [False, True])
@pytest.mark.parametrize("with_post", [False, True])
def test_norm_against_float64(
    gpu_module: GpuModule, dim: int, with_proj: bool, with_post: bool, rng: np.random.Generator
) -> None:
    if with_post and not with_proj:
        return
    residual, proj, eps = normal(rng, 5, dim), 3 * normal(rng, 5, dim), 1e-2
    weight, post = normal(rng, dim), normal(rng, dim)
    residual[4] *= 1e-3  # eps counts

    def normed(x: NDArray[np.float64], w: Floats) -> NDArray[np.float64]:
        return x / np.sqrt((x**2).mean(axis=1, keepdims=True) + eps) * w

    stream, added = residual.astype(np.float64), proj.astype(np.float64)
    if with_proj:
        stream = stream + (normed(added, post) if with_post else added)
    expected = normed(stream, weight)
    options = {"proj": proj if with_proj else None, "post": post if with_post else None, "eps": eps}
    for terms in (1, 2):
        after, states, rounded = norm(gpu_module, residual, weight, n_few=3, terms=terms, **options)
        assert (np.abs(after - stream) <= 1e-6 * (np.abs(residual) + np.abs(stream) + np.abs(stream - residual))).all()
        assert (np.abs(states - expected) <= 2e-6 * (np.abs(expected) + np.abs(weight))).all()
        assert (rounded[:3] == exact_rows(states[:3], terms)).all()
        assert np.abs(rounded[3:] / states[3:] - 1).max() <= 2.0 ** (-8 * terms)
        for i in range(5):  # the same bits alone
            mine = {"proj": proj[i : i + 1] if with_proj else None, "post": options["post"], "eps": eps}
            alone = norm(gpu_module, residual[i : i + 1], weight, n_few=int(i < 3), terms=terms, **mine)
            assert all((a == b[i]).all() for a, b in zip(alone, (after, states, rounded), strict=True))


# ---- what kernel_abi.h does not reach, under the emulator


class Products:
    def __init__(self, device: str) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(DECLARATIONS)
        names = ("weights", "rows", "gemv", "gemv_simple", "gemv_k", "gemv_floats", "gemv_blocks")
        sources = [SOURCE, CSRC / "tensor.cpp", *(CSRC / "cuda" / f"{name}.cu" for name in names)]
        self.lib: Any = self.ffi.dlopen(str(build_emulated(device, sources, f"products-{device}")))

    def pointer(self, array: np.ndarray | None) -> Any:
        kinds = {"float32": "float *", "int32": "int32_t *", "uint32": "uint32_t *", "uint64": "size_t *"}
        return self.ffi.NULL if array is None else self.ffi.cast(kinds[array.dtype.name], array.ctypes.data)

    def run(self, name: str, *arguments: Any) -> None:
        passed = [self.pointer(a) if a is None or isinstance(a, np.ndarray) else a for a in arguments]
        status = getattr(self.lib, f"products_{name}")(*passed)
        assert status == 0, self.ffi.string(self.lib.products_failure()).decode()

    def decode(self, name: str, weights: NDArray[np.uint8], n_cols: int, rows_at_once: int) -> tuple[Floats, int]:
        out = np.full(((len(weights) + 31) // 32 * 32, n_cols), np.nan, np.float32)
        n_bytes = np.zeros(1, np.uint64)
        raw = self.ffi.from_buffer(weights)
        self.run("decode", kind_of(name).value, len(weights), n_cols, raw, rows_at_once, out, n_bytes)
        return out, int(n_bytes[0])

    def multiply(
        self, matrices: list[tuple[str, NDArray[np.uint8]]], x: Floats, terms: int, ld_out: int
    ) -> list[Floats]:
        outs = [np.full((len(x), ld_out), np.nan, np.float32) for _ in matrices]
        ids = np.array([kind_of(name).value for name, _ in matrices], np.uint32)
        n_rows = np.array([len(weights) for _, weights in matrices], np.int32)
        raws = [self.ffi.cast("void *", weights.ctypes.data) for _, weights in matrices]
        self.run(
            "multiply", len(matrices), ids, n_rows, x.shape[1], self.ffi.new("void *[]", raws), len(x), terms, x,
            ld_out, self.ffi.new("float *[]", [self.pointer(out) for out in outs]),
        )  # fmt: skip
        return outs


@pytest.fixture(scope="module", params=["emulated", "emulated-64"])
def products(request: pytest.FixtureRequest) -> Products:
    return Products(request.param)


@every_format
def test_packed_weights_decode_to_the_file_s(products: Products, name: str, rng: np.random.Generator) -> None:
    """Packed at once or in parts; rows that fill up a panel are zeros, and nothing is added but these."""
    block_size, block_bytes = FORMATS[name]
    for n_rows, n_cols in [(70, 288), (33, 512)]:
        if n_cols % block_size != 0:
            continue
        weights = random_weights(name, rng, n_rows, n_cols)
        got, n_bytes = products.decode(name, weights, n_cols, n_rows)
        expected = decoded(name, weights)
        assert (np.abs(got[:n_rows] - expected) <= 3e-7 * (np.abs(expected) + np.abs(offsets(name, weights)))).all()
        assert (got[n_rows:] == 0).all()
        assert (products.decode(name, weights, n_cols, 32)[0] == got).all()
        padded = (n_rows + 31) // 32 * 32 * ((n_cols + 255) // 256 * 256)
        assert n_bytes == padded // block_size * block_bytes


@pytest.mark.parametrize("n", [1, 9])
def test_products_together(products: Products, n: int, rng: np.random.Generator) -> None:
    """Several at once have the bits of each alone, formats mixed or not; nothing is written beside them."""
    names = ["Q4_K", "Q4_K", "Q6_K", "Q4_K", "BF16", "Q4_K", "Q4_K", "IQ3_S", "Q4_0"]
    matrices = [(name, random_weights(name, rng, 30 + 9 * i, 768)) for i, name in enumerate(names)]
    x = normal(rng, n, 768)
    for terms in (1, 2):
        together = products.multiply(matrices, x, terms, 110)
        for matrix, out in zip(matrices, together, strict=True):
            alone = products.multiply([matrix], x, terms, 110)[0]
            n_rows = len(matrix[1])
            assert np.isfinite(out[:, :n_rows]).all()
            assert (out[:, :n_rows] == alone[:, :n_rows]).all()
            assert np.isnan(out[:, n_rows:]).all()


def test_chosen_rows(products: Products, rng: np.random.Generator) -> None:
    residual, proj, chosen = normal(rng, 7, 64), normal(rng, 3, 64), np.array([5, 0, 6], np.int32)
    expected = residual.copy()
    expected[chosen] += proj
    after, states = residual.copy(), np.full((3, 64), np.nan, np.float32)
    products.run("norm", 7, 3, 64, after, chosen, proj, None, states)
    assert (after == expected).all()
    assert np.isnan(states).all()

    after = residual.copy()
    products.run("norm", 7, 3, 64, after, chosen, proj, np.ones(64, np.float32), states)
    wide = expected[chosen].astype(np.float64)
    assert (after == expected).all()
    assert np.allclose(states, wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + 1e-6), rtol=1e-6)

    out = np.full((3, 64), np.nan, np.float32)
    products.run("convert", 7, 3, 64, residual, chosen, out)
    assert (out == residual[chosen]).all()
