"""Products of MANY rows on a device, against float64 over the numbers that they are made of, and against themselves.

`gpu_module` is the emulator, which runs every thread of a block on the CPU: shapes are small.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

from gemmart import _core
from gpu_module import CORE, CSRC, GpuModule, build_emulated, open_module

FORMATS = {name: (type_id, size, n_bytes) for name, type_id, size, n_bytes in _core.formats()}
FLOATS = ("F32", "F16", "BF16")
# Where the halves that scale a block stand, if not in its first bytes.
SCALES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2)}
SCALES |= {"Q6_K": (208,), "TQ1_0": (52,), "TQ2_0": (64,)}

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

every_format = pytest.mark.parametrize("name", FORMATS)
both_precisions = pytest.mark.parametrize("terms", [1, 2])


def weights(name: str, rng: np.random.Generator, n_rows: int, n_cols: int) -> Bytes:
    """[n_rows, row bytes] of any bits, with scales of a model's size and of both signs."""
    _, size, n_bytes = FORMATS[name]
    if name in FLOATS:
        values = rng.standard_normal((n_rows, n_cols)).astype(np.float32)
        return quants.quantize(values, gguf.GGMLQuantizationType[name]).view(np.uint8).reshape(n_rows, -1)
    n = n_rows * n_cols // size
    blocks = rng.integers(0, 256, (n, n_bytes), dtype=np.uint8)
    scales = rng.uniform(0.001, 0.02, n) * rng.choice([-1, 1], n)
    halves = scales.astype(np.float16).view(np.uint16)
    if name == "MXFP4":
        blocks[:, 0] = 127 + np.round(np.log2(np.abs(scales)))
    elif name == "IQ1_M":  # four bits of the half on top of each of the last four 16-bit numbers
        for i in range(4):
            blocks[:, 49 + 2 * i] = blocks[:, 49 + 2 * i] & 15 | (halves >> 4 * i & 15) << 4
    else:
        for offset in SCALES.get(name, (0,)):
            blocks[:, offset : offset + 2] = halves.view(np.uint8).reshape(-1, 2)
    return blocks.reshape(n_rows, -1)


def inputs(rng: np.random.Generator, n: int, n_cols: int) -> Floats:
    return rng.standard_normal((n, n_cols)).astype(np.float32)


def to_bf16(values: Floats) -> Floats:
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def terms_of(values: Floats, terms: int) -> list[NDArray[np.float64]]:
    hi = to_bf16(values)
    return [hi.astype(np.float64), to_bf16(values - hi).astype(np.float64)][:terms]


def multiply(
    module: GpuModule, name: str, w: Bytes, x: Floats, terms: int = 1, n_few: int = 0, own_gemm: bool = False
) -> Floats:
    """x [n, n_cols] · wᵀ; what is not written is NaN."""
    out = np.zeros((len(x), len(w)), np.float32)
    seconds = module.ffi.new("double *")
    status = module.lib.gemmart_kernel_multiply(
        FORMATS[name][0], len(w), x.shape[1], module.pointer(w), len(x), n_few, terms, own_gemm,
        module.pointer(x), module.pointer(out), 1, seconds,
    )  # fmt: skip
    module.check(status)
    return out


def check(module: GpuModule, name: str, w: Bytes, x: Floats, terms: int) -> None:
    """Against the sum in float64 of what is multiplied: activations, and weights but for BF16, in bf16 terms."""
    decoded = quants.dequantize(w, gguf.GGMLQuantizationType[name])
    w_terms = terms_of(decoded, 2 if terms == 2 or name in ("F32", "F16") else 1)
    x_terms = terms_of(x, terms)
    products = [x_terms[i] @ w_terms[j].T for i in range(len(x_terms)) for j in range(len(w_terms)) if i + j < 2]
    error = np.abs(multiply(module, name, w, x, terms) - sum(products))
    sizes = np.abs(x).astype(np.float64) @ np.abs(decoded).astype(np.float64).T
    assert (error <= 1e-6 * sizes).all(), f"{name}: {np.max(error / sizes)}"  # false for a NaN
    if terms == 2:  # and what the two terms are for
        exact = x.astype(np.float64) @ decoded.astype(np.float64).T
        error = np.abs(multiply(module, name, w, x, terms) - exact)
        assert (error <= 2.0**-16 * sizes).all(), f"{name}: {np.max(error / sizes)}"


@every_format
@both_precisions
def test_against_float64(gpu_module: GpuModule, name: str, terms: int, rng: np.random.Generator) -> None:
    check(gpu_module, name, weights(name, rng, 96, 256), inputs(rng, 40, 256), terms)


@pytest.mark.parametrize("name", ["Q4_K", "BF16", "F16", "IQ2_XS"])
@both_precisions
@pytest.mark.parametrize("n", [20, 48, 130])  # the small, the middle and the large shape of a block
def test_shapes_of_blocks(gpu_module: GpuModule, name: str, terms: int, n: int, rng: np.random.Generator) -> None:
    check(gpu_module, name, weights(name, rng, 160, 512), inputs(rng, n, 512), terms)


@pytest.mark.parametrize("name", ["Q8_0", "BF16", "F32"])
@pytest.mark.parametrize("n_cols", [32, 64, 96, 288])
def test_column_counts(gpu_module: GpuModule, name: str, n_cols: int, rng: np.random.Generator) -> None:
    for n in (9, 33, 70):
        check(gpu_module, name, weights(name, rng, 130, n_cols), inputs(rng, n, n_cols), 1)


@pytest.mark.parametrize("name", ["Q4_0", "BF16"])
@pytest.mark.parametrize("n_rows", [1, 31, 33, 97, 129])
def test_row_counts(gpu_module: GpuModule, name: str, n_rows: int, rng: np.random.Generator) -> None:
    for n in (1, 32, 33, 65):
        check(gpu_module, name, weights(name, rng, n_rows, 64), inputs(rng, n, 64), 1)


@pytest.mark.parametrize("name", ["Q6_K", "BF16", "F16", "IQ3_S"])
@both_precisions
def test_a_row_has_the_same_bits_in_any_company(
    gpu_module: GpuModule, name: str, terms: int, rng: np.random.Generator
) -> None:
    """Alone, in blocks of each shape, behind FEW rows, and beside rows that are not finite."""
    w, x = weights(name, rng, 100, 256), inputs(rng, 130, 256)
    row = 10
    alone = multiply(gpu_module, name, w, x[row : row + 1], terms)[0]
    assert np.isfinite(alone).all()
    for n in (16, 40, 130):
        assert (multiply(gpu_module, name, w, x[:n], terms)[row] == alone).all()
    assert (multiply(gpu_module, name, w, x[:40], terms, n_few=row)[row] == alone).all()
    spoilt = x[:40].copy()
    spoilt[row - 1], spoilt[row + 1] = np.nan, np.inf
    assert (multiply(gpu_module, name, w, spoilt, terms)[row] == alone).all()


def test_few_and_many_rows_in_one_call(gpu_module: GpuModule, rng: np.random.Generator) -> None:
    w, x = weights("Q5_K", rng, 70, 256), inputs(rng, 21, 256)
    both = multiply(gpu_module, "Q5_K", w, x, n_few=5)
    assert (both[:5] == multiply(gpu_module, "Q5_K", w, x[:5], n_few=5)).all()
    assert (both[5:] == multiply(gpu_module, "Q5_K", w, x[5:])).all()


def test_large_and_small_numbers(gpu_module: GpuModule, rng: np.random.Generator) -> None:
    """Weights at the ends of half precision, denormal ones included."""
    values = rng.choice([6e-8, 6e-5, 1, 65504], (40, 64)) * rng.choice([-1, 1], (40, 64))
    w = values.astype(np.float16).view(np.uint8).reshape(40, -1)
    check(gpu_module, "F16", w, inputs(rng, 12, 64), 1)


# ---- With a library


@pytest.fixture(scope="module")
def blas_module() -> GpuModule:
    """The emulator's module with a few lines in the place of cuBLAS."""
    sources = [s for s in sorted((CSRC / "cuda").glob("*.cu")) if s.name not in ("gemm.cu", "cublas.cu")]
    stand_in = Path(__file__).with_name("gpu_blas.cu")
    return open_module(build_emulated("emulated", [*sources, stand_in, *CORE], "emulated-blas"))


@every_format
@both_precisions
def test_decoded_for_a_library(blas_module: GpuModule, name: str, terms: int, rng: np.random.Generator) -> None:
    check(blas_module, name, weights(name, rng, 70, 512), inputs(rng, 9, 512), terms)


def test_slices_of_a_matrix(blas_module: GpuModule, rng: np.random.Generator) -> None:
    """A matrix of which the scratch holds 128 rows."""
    n_cols = 2**18
    w = np.tile(weights("Q4_0", rng, 8, n_cols), (17, 1))
    got = multiply(blas_module, "Q4_0", w, inputs(rng, 1, n_cols))
    assert (got == np.tile(got[:, :8], 17)).all()
    check(blas_module, "Q4_0", w[-8:], inputs(rng, 1, n_cols), 1)


def test_a_library_is_used_where_it_may_be(blas_module: GpuModule, rng: np.random.Generator) -> None:
    """It adds in another order than our own kernels, which are the emulator's."""
    w, x = weights("BF16", rng, 70, 512), inputs(rng, 9, 512)
    library = multiply(blas_module, "BF16", w, x)
    own = multiply(blas_module, "BF16", w, x, own_gemm=True)
    assert (library != own).any()
    assert np.allclose(library, own, atol=1e-4)
