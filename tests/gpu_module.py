"""The GPU module for tests: compiled for the emulator (csrc/emulator), or by nvcc where there is a device.

Objects and modules are kept in a folder of the system's temporary one, under a hash of all that goes into them, for
a week after their last use.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import cffi
import numpy as np
import pytest

from gemmart.gpu import sources

os.environ.setdefault("GEMMART_EMULATED_STREAMS", "late")  # so that a forgotten wait shows

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
CORE = [CSRC / name for name in sources.CORE]
EMULATED = {  # device: what is defined
    "emulated": [],
    "emulated-64": ["-DGEMMART_EMULATED_WAVE=64"],
    "emulated-plain": ["-DGEMMART_EMULATED_PLAIN_TILES=1"],
}
# GEMMART_TEST_DEVICES=emulated,emulated-64,emulated-plain,cuda runs the tests on all of them.
DEVICES = os.environ.get("GEMMART_TEST_DEVICES", "emulated,cuda").split(",")
GNU = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-gnu-unique",  # or two modules in a process would share what is static in templates
    "-fsanitize=alignment,bounds",  # a GPU has no misaligned loads
    "-fsanitize-undefined-trap-on-error",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
]
NVCC = ["-std=c++20", "-O3", "-arch=native", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class GpuModule:
    """An opened module: `lib` has the functions of executor_abi.h and kernel_abi.h, `ffi` their types."""

    def __init__(self, path: Path, declarations: str) -> None:
        self.path = path
        self.ffi = cffi.FFI()
        self.ffi.cdef(declarations)
        self.lib: Any = self.ffi.dlopen(str(path), self.ffi.RTLD_LAZY)

    def check(self, status: int) -> None:
        """Raise what the module says of a status that is not 0."""
        if status != 0:
            raise RuntimeError(f"status {status}: {self.ffi.string(self.lib.gemmart_last_error()).decode()}")

    def pointer(self, array: np.ndarray | None) -> Any:
        """To an array's numbers, of their type (NULL for None). The caller keeps the array."""
        if array is None:
            return self.ffi.NULL
        assert array.flags.c_contiguous
        kind = {"float32": "float", "float64": "double", "bool": "uint8_t"}.get(
            array.dtype.name, f"{array.dtype.name}_t"
        )
        return self.ffi.cast(f"{kind} *", array.ctypes.data)


def declarations(*headers: Path) -> str:
    """Of headers in plain C: all but the lines that begin with # and the braces of extern "C"."""
    text = "\n".join(header.read_text() for header in headers)
    text = re.sub(r"#ifdef __cplusplus.*?#endif", "", text, flags=re.DOTALL)
    return "\n".join(line for line in text.splitlines() if not line.startswith("#"))


def build_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"gemmart-gpu-modules-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def forget_old() -> None:
    """Remove what no run of the last week used."""
    for file in build_folder().iterdir():
        with suppress(FileNotFoundError):  # another run is at it
            if file.stat().st_mtime < time.time() - 7 * 86400:
                file.unlink()


def in_cache(name: str, command: Sequence[str]) -> Path:
    """The file that `command -o FILE` makes, if it is not there yet. `name` says all that it is made of."""
    made = build_folder() / name
    if not made.exists():
        partial = made.with_suffix(f".{os.getpid()}.partial")
        done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True, cwd=ROOT)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)
        partial.rename(made)
    made.touch()
    return made


def digest(*parts: str | bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part.encode() if isinstance(part, str) else part)
        sha.update(b"\0")
    return sha.hexdigest()[:20]


def compiled(source: Path, command: Sequence[str], key: str) -> Path:
    """The object that `command` makes of `source`. Which headers go into it is known from the last time."""
    command = [*command, str(source.relative_to(ROOT))]
    headers_file = build_folder() / f"{source.stem}-{digest(key, *command, source.read_bytes())}.headers"

    def name() -> str:
        headers = headers_file.read_text().split("\n") if headers_file.exists() else []
        contents = [(ROOT / h).read_bytes() if (ROOT / h).exists() else b"" for h in headers]
        return f"{source.stem}-{digest(key, *command, *headers, *contents)}.o"

    if headers_file.exists() and (build_folder() / name()).exists():
        headers_file.touch()
        return in_cache(name(), command)
    found = subprocess.run([*command, "-MM"], capture_output=True, text=True, cwd=ROOT)
    if found.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{found.stderr}", pytrace=False)
    partial = headers_file.with_suffix(f".{os.getpid()}.partial")
    partial.write_text("\n".join(found.stdout.replace("\\\n", " ").split()[1:]))
    partial.rename(headers_file)
    return in_cache(name(), [*command, "-c"])


def build(compiler: Sequence[str], sources: Sequence[Path], name: str, for_kernels: Sequence[str] = ()) -> Path:
    """A shared library of `sources`, each compiled with `compiler` (program and flags), *.cu `for_kernels` too."""
    forget_old()
    key = subprocess.run([compiler[0], "--version"], capture_output=True, text=True).stdout
    if "-march=native" in compiler:
        key += "".join(re.findall(r"^flags.*", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)[:1])

    def object_of(source: Path) -> str:
        kernels = source.suffix == ".cu"
        language = "cu" if kernels and compiler[0] == "nvcc" else "c++"
        command = [*compiler, *(for_kernels if kernels else ()), "-I", "csrc", "-x", language]
        return str(compiled(source, command, key))

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(object_of, sources))
    return in_cache(f"{name}-{digest(key, *objects)}.so", [compiler[0], "-shared", "-Wl,-z,defs", *objects])


def build_emulated(device: str, sources: Sequence[Path], name: str) -> Path:
    """`sources` and the emulator."""
    emulator = sorted((CSRC / "emulator").glob("*.cpp"))
    return build(["g++", *GNU, "-DGEMMART_EMULATED=1"], [*sources, *emulator], name, EMULATED[device])


def module_sources() -> list[Path]:
    return [*(s for s in sorted((CSRC / "cuda").glob("*.cu")) if s.name != "cublas.cu"), *CORE]


@cache
def emulated(device: str = "emulated") -> GpuModule:
    return open_module(build_emulated(device, module_sources(), device))


@cache
def cuda() -> GpuModule:
    """Built by nvcc for the device that is there."""
    if reason := why_no_cuda():
        pytest.skip(reason)
    return open_module(build(["nvcc", *NVCC], module_sources(), "cuda"))


def why_no_cuda() -> str:
    """Why kernels cannot run on a GPU here; empty if they can."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1)"
    n = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(n)) != 0 or n.value == 0:
        return "no NVIDIA device"
    return "" if shutil.which("nvcc") else "no nvcc"


def open_module(path: Path) -> GpuModule:
    return GpuModule(path, declarations(CSRC / "executor_abi.h", CSRC / "cuda" / "kernel_abi.h"))


@pytest.fixture(params=[pytest.param(d, marks=pytest.mark.gpu) if d == "cuda" else d for d in DEVICES])
def gpu_module(request: pytest.FixtureRequest) -> GpuModule:
    """The module on each device; on "cuda" skipped with the reason where there is none."""
    return cuda() if request.param == "cuda" else emulated(request.param)
