"""What kernels are written in: lanes, tiles, copies, numbers under the emulator, and its reports of mistakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import cffi
import gguf
import numpy as np
import pytest

from gpu_module import CSRC, EMULATED, build_emulated

SOURCE = Path(__file__).with_name("gpu_shims.cu")
HALF_AT_BARRIER, HALF_SHUFFLES, DIFFERENT_MEETINGS, NO_WAIT, NOTHING, BEHIND, NULL, MISALIGNED, INDEX = range(9)
DEVICE_ERROR, OUT_OF_MEMORY = 1, 2  # executor_abi.h
DECLARATIONS = """
const char* shims_failure();
int shims_tile_n();
int shims_tile_lanes();
int shims_lanes(float* x, int threads, float* out);
int shims_tiles(int half, float* a, float* b, int transposed, float* c, int n_waves);
int shims_copies(uint32_t* x, uint32_t* out, int threads, int n, int forget_to_wait);
int shims_reverse(float* x, float* out, int threads, int forget_barrier);
int shims_wrong(int wrong, float* out, int threads, size_t shared_bytes);
int shims_numbers(float* x, int n, float* out, int* a, int* dots);
int shims_graph(float* x, int n, int n_launches);
int shims_streams(float x, float* asked, float* waited);
int shims_decode(uint8_t* block, float* out);
int shims_allocate(size_t bytes, size_t* n_free, size_t* total);
int shims_device(int device, char* name, int* n, size_t* shared_limit);
"""


class Shims:
    def __init__(self, device: str) -> None:
        self.ffi = cffi.FFI()
        self.ffi.cdef(DECLARATIONS)
        self.lib: Any = self.ffi.dlopen(str(build_emulated(device, [SOURCE], f"shims-{device}")))

    def call(self, name: str, *arguments: Any) -> int:
        """Arrays are passed as pointers to their numbers."""
        kinds = {"float32": "float *", "int32": "int *", "uint32": "uint32_t *", "uint8": "uint8_t *"}
        passed = [
            self.ffi.cast(kinds[a.dtype.name], a.ctypes.data) if isinstance(a, np.ndarray) else a for a in arguments
        ]
        return getattr(self.lib, f"shims_{name}")(*passed)

    def run(self, name: str, *arguments: Any) -> None:
        assert self.call(name, *arguments) == 0, self.failure()

    def failure(self) -> str:
        return self.ffi.string(self.lib.shims_failure()).decode()


@pytest.fixture(scope="module", params=EMULATED)
def shims(request: pytest.FixtureRequest) -> Shims:
    return Shims(request.param)


@pytest.fixture(params=range(4))
def seed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("GEMMART_EMULATED_SEED", str(request.param))
    return request.param


def bfloat16(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)


def test_lanes(shims: Shims, seed: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal(96).astype(np.float32)
    out = np.full((3, 6, 32), np.nan, np.float32)
    shims.run("lanes", x, 96, out)
    for v, got in zip(x.reshape(3, 32), out, strict=True):
        lanes = np.arange(32)
        np.testing.assert_array_equal(got[0], np.full(32, v[5]))
        np.testing.assert_array_equal(got[1], v[lanes ^ 3])
        np.testing.assert_array_equal(got[2], v[np.where(lanes + 7 < 32, lanes + 7, lanes)])
        np.testing.assert_allclose(got[3], v.sum(dtype=np.float64), rtol=1e-5, atol=1e-5)
        assert len(set(got[3].tolist())) == 1  # the same bits for all
        np.testing.assert_array_equal(got[4], np.full(32, v.max()))
        np.testing.assert_allclose(got[5], v.sum(dtype=np.float64), rtol=1e-7)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("half", [0, 1])
def test_tiles(shims: Shims, half: int, transposed: int, rng: np.random.Generator) -> None:
    n = shims.lib.shims_tile_n()
    assert (n, shims.lib.shims_tile_lanes()) in {(8, 32), (16, 64), (16, 32)}
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, n), (2, 16, n)))
    round_to = (
        (lambda x: x.astype(np.float16).astype(np.float64)) if half else (lambda x: bfloat16(x).astype(np.float64))
    )
    want = c + round_to(a) @ round_to(b)
    given = np.ascontiguousarray(b if transposed else b.T)
    shims.run("tiles", half, a, given, transposed, c, 2)
    np.testing.assert_allclose(c, want, rtol=0, atol=2e-6 * 16)


def test_copies_arrive_when_they_are_waited_for(shims: Shims, seed: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, (5, 64, 4), dtype=np.uint32)
    out = np.zeros_like(x)
    shims.run("copies", x, out, 64, 5, 0)
    np.testing.assert_array_equal(out, x)


def test_a_forgotten_wait_shows(shims: Shims, rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, (5, 64, 4), dtype=np.uint32)
    wrong = 0
    for _ in range(20):
        out = np.zeros_like(x)
        shims.run("copies", x, out, 64, 5, 1)
        wrong += not np.array_equal(out, x)
    assert wrong >= 3  # in about every second block copies arrive late


@pytest.mark.parametrize("threads", [32, 128, 256])
def test_barriers(shims: Shims, seed: int, threads: int, rng: np.random.Generator) -> None:
    x = rng.standard_normal(threads).astype(np.float32)
    out = np.zeros_like(x)
    shims.run("reverse", x, out, threads, 0)
    np.testing.assert_array_equal(out, x[::-1])
    shims.run("reverse", x, out, threads, 1)
    assert not np.array_equal(out, x[::-1])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (HALF_AT_BARRIER, r"of 64, 32 ended, 32 are in __syncthreads \(.*\.so\+0x"),
        (HALF_SHUFFLES, r"48 ended, 16 are in shuffle \("),
        (DIFFERENT_MEETINGS, r"0 ended, 48 are in __syncthreads \(.*\), 16 are in shuffle \("),
        (NO_WAIT, r"a thread ended without wait_for_previous\(\)"),
        (BEHIND, r"touches 0x[0-9a-f]+, \d+ bytes behind the end of 256, .*\.so\+0x.* \(thread .* of block 0,0,0\)"),
        (NULL, r"by a null pointer"),
        (MISALIGNED, r"not aligned"),
        (INDEX, r"outside of an array"),
    ],
)
def test_mistakes_are_errors_of_the_launch(shims: Shims, seed: int, wrong: int, said: str) -> None:
    out = np.zeros(64, np.float32)
    assert shims.call("wrong", wrong, out, 64, 0) == DEVICE_ERROR
    assert re.search(said, shims.failure()), shims.failure()
    shims.run("wrong", NOTHING, out, 64, 0)  # nothing is left of it
    np.testing.assert_array_equal(out, np.arange(64))


@pytest.mark.parametrize(
    ("threads", "shared_bytes", "said"),
    [(2048, 0, "invalid configuration"), (64, 300_000, "invalid argument")],
)
def test_launches_beyond_the_device_are_refused(shims: Shims, threads: int, shared_bytes: int, said: str) -> None:
    assert shims.call("wrong", NOTHING, np.zeros(threads, np.float32), threads, shared_bytes) == DEVICE_ERROR
    assert said in shims.failure()


def test_numbers(shims: Shims, rng: np.random.Generator) -> None:
    edges = [
        0,
        -0.0,
        1,
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        1 + 3 * 2**-11,
        65504,
        65519,
        65520,
        2**-14,
        2**-24,
        2**-25,
        2**-26,
        3 * 2**-25,
        1e-7,
        1e38,
        np.inf,
    ]
    x = np.concatenate([edges, rng.standard_normal(1000) * 20, np.exp(rng.uniform(-20, 4, 1000))]).astype(np.float32)
    a = rng.integers(-(2**31), 2**31, x.size).astype(np.int32)
    out, dots = np.zeros((6, x.size), np.float32), np.zeros((2, x.size), np.int32)
    shims.run("numbers", x, x.size, out, a, dots)
    with np.errstate(over="ignore"):
        half = x.astype(np.float16).astype(np.float32)
    for row, want in zip(out, (bfloat16(x), half, bfloat16(x), half), strict=False):
        np.testing.assert_array_equal(row, want)
    finite = np.isfinite(x) & (np.abs(x) < 80)
    v = x[finite].astype(np.float64)
    assert np.all(np.abs(out[4][finite] / np.exp(v) - 1) <= 2**-22 + np.abs(v) * 2**-23)
    assert np.all(np.abs(out[5][finite] - np.tanh(v)) <= 2**-21)
    signed, unsigned, other = (
        a.view(np.int8).reshape(-1, 4),
        a.view(np.uint8).reshape(-1, 4),
        a[::-1].copy().view(np.int8).reshape(-1, 4),
    )
    for got, bytes_of_a in zip(dots, (signed, unsigned), strict=True):
        np.testing.assert_array_equal(got, (bytes_of_a.astype(np.int64) * other).sum(1) + np.arange(x.size))


def test_a_graph_is_captured_and_replayed(shims: Shims) -> None:
    x = np.zeros(96, np.float32)
    shims.run("graph", x, 96, 3)
    np.testing.assert_array_equal(x, np.full(96, 3))


@pytest.mark.parametrize(("streams", "asked"), [("late", 5), ("", 6)])
def test_work_is_late_where_nobody_waits(
    shims: Shims, streams: str, asked: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMART_EMULATED_STREAMS", streams)
    seen = np.zeros(2, np.float32)
    shims.run("streams", 5, seen[:1], seen[1:])
    np.testing.assert_array_equal(seen, [asked, 6])


def test_formats_decode_in_kernels(shims: Shims, rng: np.random.Generator) -> None:
    block = rng.integers(0, 256, 144, dtype=np.uint8)
    block[1] &= 0x3F  # finite scales
    block[3] &= 0x3F
    out = np.zeros(256, np.float32)
    shims.run("decode", block, out)
    np.testing.assert_array_equal(out, gguf.quants.dequantize(block, gguf.GGMLQuantizationType.Q4_K))


def test_memory_is_counted_and_ends(shims: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMART_EMULATED_MEMORY", "1000000")
    free, total = shims.ffi.new("size_t *"), shims.ffi.new("size_t *")
    shims.run("allocate", 600_000, free, total)
    assert (free[0], total[0]) == (400_000, 1_000_000)
    assert shims.call("allocate", 1_000_001, free, total) == OUT_OF_MEMORY
    assert shims.failure() == "1000001 bytes for a test: out of memory"
    shims.run("allocate", 1_000_000, free, total)


def test_devices(shims: Shims, monkeypatch: pytest.MonkeyPatch) -> None:
    name, n, limit = shims.ffi.new("char[32]"), shims.ffi.new("int *"), shims.ffi.new("size_t *")
    shims.run("device", 0, name, n, limit)
    assert (shims.ffi.string(name), n[0], limit[0]) == (b"emulated", 1, 227 * 1024)
    monkeypatch.setenv("GEMMART_EMULATED_DEVICES", "2")
    shims.run("device", 1, name, n, limit)
    assert n[0] == 2
    for devices, said in (("0", "no device is detected"), ("-1", "there is no driver")):
        monkeypatch.setenv("GEMMART_EMULATED_DEVICES", devices)
        assert shims.call("device", 0, name, n, limit) == DEVICE_ERROR
        assert said in shims.failure()


def compile_for(program: str, *flags: str) -> None:
    if not shutil.which(program):
        pytest.skip(f"no {program}")
    command = [program, "-std=c++20", "-O2", *flags, "-I", str(CSRC), "-c", str(SOURCE), "-o", os.devnull]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HIP_PLATFORM": "amd"})
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr


@pytest.mark.parametrize("arch", ["sm_75", "sm_90a"])
def test_compiles_for_nvidia(arch: str) -> None:
    compile_for("nvcc", f"-arch={arch}", "-fmad=false", "-x", "cu")


@pytest.mark.parametrize(("arch", "wave"), [("gfx90a", 64), ("gfx1030", 32)])
def test_compiles_for_amd(arch: str, wave: int) -> None:
    compile_for(
        "hipcc",
        f"--offload-arch={arch}",
        f"-DGEMMART_WAVE={wave}",
        "-ffp-contract=off",
        "-Wno-unused-result",
        "-x",
        "hip",
    )
