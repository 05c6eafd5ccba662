"""The compilers of GPU modules: where they are, what they can do, and how they are called."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gemmart.errors import BuildError
from gemmart.gpu.commands import CommandError, Commands

PLAIN = re.compile(r"[\w/.,+@%=: -]+", re.ASCII)
"""Paths that mean the same to a shell: nvcc and hipcc hand theirs to one."""
ANSWER_SECONDS = 30.0
"""How long a compiler may take to say what it is; a load that nobody asked a GPU for waits for it."""
KEPT = re.compile(r"PATH|HOME|LD_LIBRARY_PATH|HIP_CLANG_PATH|HIP_DEVICE_LIB_PATH|DEVICE_LIB_PATH|ROCM_PATH|HIP_PATH")

Place = tuple[str, Path | None]


@dataclass(frozen=True, slots=True)
class Backend:
    """A kind of GPU module. `places`: where its compiler is looked for, in this order, as it is told, and the file that
    is there, if any; None: it is built by tests alone."""

    name: str
    vendor: str | None  # as --gpu says it
    compiler: str
    version: str  # a pattern of what its --version prints: major, minor, the rest
    oldest: tuple[int, int]  # that knows C++20
    install: str  # how the compiler is had
    places: Callable[[], Iterator[Place]] | None


@dataclass(frozen=True, slots=True)
class Blas:
    """A library that may multiply many rows."""

    name: str
    include: Path
    library: Path


@dataclass(frozen=True, slots=True)
class Compiler:
    backend: Backend
    path: Path
    version: tuple[int, int]
    about: str  # name and full version
    top: Path  # the folder that holds its bin, include and lib


def environment(temporary: str) -> dict[str, str]:
    """What compilers see of this process's variables: no flags, no secrets."""
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    return kept | {"LC_ALL": "C", "TMPDIR": temporary, "HIP_PLATFORM": "amd"}


def find(backend: Backend) -> Compiler:
    """Raises BuildError that tells where it looked, or what is wrong with what it found."""
    assert backend.places is not None
    looked = list(backend.places())
    path = next((path.absolute() for _, path in looked if path and path.is_file() and os.access(path, os.X_OK)), None)
    if path is None:
        places = ", ".join(where for where, _ in looked)
        raise BuildError(f"{backend.compiler} is not found; it was looked for in {places}; {backend.install}")
    text = _output(path, "--version")
    found = re.search(backend.version, text)
    if not found:
        raise BuildError(f"{path} --version does not say which {backend.compiler} it is", text)
    version = int(found[1]), int(found[2])
    about = f"{backend.compiler} {found[1]}.{found[2]}{found[3]}"
    if version < backend.oldest:
        oldest = ".".join(map(str, backend.oldest))
        raise BuildError(f"{path} is {about}, and {oldest} or newer is needed; {backend.install}")
    return Compiler(backend, path, version, about, _top(backend, path))


def _top(backend: Backend, path: Path) -> Path:
    """The folder that holds bin, include and lib. An nvcc without its profile beside it is a script that calls one."""
    real = path.resolve()
    if backend is CUDA and not real.with_name("nvcc.profile").exists():
        told = re.search("TOP=(.*)", _output(path, "--dryrun", "-c", "x.cu"))
        if told:
            return Path(told[1]).resolve()
    return real.parents[1]


def _output(path: Path, *arguments: str) -> str:
    """What a compiler says. Raises BuildError."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            return Commands(Path(folder), environment(folder), ANSWER_SECONDS).run([str(path), *arguments])
        except CommandError as error:
            raise BuildError(f"{path} {' '.join(arguments)} {error.how}", error.output) from None


def find_host(backend: Backend) -> Path | None:
    """The C++ compiler that nvcc calls; hipcc brings its own. Raises BuildError."""
    if backend is not CUDA:
        return None
    wanted = os.environ.get("NVCC_CCBIN") or "g++"
    path = shutil.which(wanted)
    if path is None:
        raise BuildError(
            f"{wanted} is not found, which nvcc needs; install g++ (Debian: apt install g++), or let "
            "NVCC_CCBIN name another C++ compiler"
        )
    return _plain(Path(path).absolute())


def _plain(path: Path) -> Path:
    """Raises BuildError for a path that a shell would not take for one."""
    if not PLAIN.fullmatch(str(path)):
        raise BuildError(f"{path}: compilers hand this path to a shell, to which it means something else")
    return path


def find_blas(compiler: Compiler) -> Blas | None:
    """cuBLAS or hipBLAS, of this compiler's version."""
    if compiler.backend is CUDA:
        header, library = "cublas_v2.h", f"libcublas.so.{compiler.version[0]}"
    else:
        header, library = "hipblas/hipblas.h", "libhipblas.so"
    tops = [compiler.top, *_wheel_folders()]
    include = _first(tops, ("include", "targets/*/include"), header)
    found = _first([*tops, Path("/usr")], ("lib64", "lib", "targets/*/lib", "lib/*-linux-gnu"), library)
    if include is None or found is None or not PLAIN.fullmatch(f"{include}{found}"):
        return None
    return Blas("cublas" if compiler.backend is CUDA else "hipblas", include, found / library)


def _first(tops: Sequence[Path], folders: Sequence[str], name: str) -> Path | None:
    """The first of these folders that holds `name`."""
    found = (folder for top in tops for pattern in folders for folder in sorted(top.glob(pattern)))
    return next((folder for folder in found if (folder / name).is_file()), None)


def known_archs(compiler: Compiler) -> list[str] | None:
    """What it compiles for: sm_… and, as PTX, compute_…; None where it does not tell."""
    if compiler.backend is not CUDA:
        return None
    return (_output(compiler.path, "--list-gpu-arch") + _output(compiler.path, "--list-gpu-code")).split()


def arch_for(compiler: Compiler, gpu_arch: str) -> str:
    """What to compile for a GPU. Raises BuildError where the compiler knows neither it nor an older one."""
    known = known_archs(compiler)
    if known is None:
        return gpu_arch
    if gpu_arch == "sm_90" and gpu_arch in known:
        return "sm_90a"  # with the instructions of this generation alone
    if gpu_arch in known:
        return gpu_arch
    older = [arch for arch in known if arch.startswith("compute_") and _number(arch) <= _number(gpu_arch)]
    if not older:
        raise BuildError(f"{compiler.about} at {compiler.path} does not know {gpu_arch}; it knows {', '.join(known)}")
    return max(older, key=_number)  # PTX, which the driver translates


def check_archs(compiler: Compiler, archs: Sequence[str]) -> None:
    """Raises BuildError for what the compiler does not know."""
    known = known_archs(compiler)
    for arch in archs:
        if known is not None and arch.rstrip("af") not in known:
            raise BuildError(f"{compiler.about} at {compiler.path} does not know {arch}; it knows {', '.join(known)}")


def covers(archs: Sequence[str], gpu_arch: str) -> bool:
    """Whether code for these runs on such a GPU."""
    if not gpu_arch.startswith("sm_"):
        return gpu_arch in archs
    wanted = _number(gpu_arch)
    for arch in archs:
        number = _number(arch)
        if arch.startswith("compute_") and number <= wanted:
            return True
        if number == wanted or (not arch.endswith(("a", "f")) and number // 10 == wanted // 10 and number <= wanted):
            return True
    return False


def _number(arch: str) -> int:
    digits = re.search(r"_(\d+)", arch)
    return int(digits[1]) if digits else 0


# Command lines; paths are relative to the folder of the build, whose own path is plain.


def compile_command(
    program: str,
    backend: Backend,
    archs: Sequence[str],
    defines: Sequence[str],
    includes: Sequence[str],
    host: Path | None,
) -> list[str]:
    """All but source_arguments() and -o."""
    common = [program, "-std=c++20", "-O3", *(f"-D{name}" for name in defines), *(f"-I{path}" for path in includes)]
    if backend is HIP:
        flags = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wno-unused-result"]
        return [*common, *flags, f"-DGEMMART_WAVE={_wave(archs)}", *_offload(archs), "-c"]
    host_flags = "-Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off"
    return [*common, "-fmad=false", host_flags, *_gencode(archs), *_ccbin(host), "-c"]


def source_arguments(backend: Backend, path: Path) -> list[str]:
    """What stands for a source: hipcc takes all of them for HIP, and those of the core are C++."""
    if backend is HIP:
        return ["-x", "hip" if path.suffix == ".cu" else "c++", str(path)]
    return [str(path)]


def link_command(
    program: str, compiler: Compiler, archs: Sequence[str], blas: Blas | None, host: Path | None
) -> list[str]:
    """All but the objects and -o."""
    libraries = [str(blas.library), f"-rpath={blas.library.parent}"] if blas else []
    if compiler.backend is HIP:
        libraries.append(f"-rpath={_plain(compiler.top / 'lib')}")
    options = [part for name in libraries for part in ("-Xlinker", name)]
    if compiler.backend is HIP:
        return [program, "-shared", "-fPIC", *_offload(archs), *options]
    return [program, "-shared", "-cudart=static", *_gencode(archs), *_ccbin(host), *options]


def _wave(archs: Sequence[str]) -> int:
    """Lanes of a wave, which the host's code counts with. Raises BuildError where they are not the same for all."""
    waves = {64 if arch.startswith("gfx9") else 32 for arch in archs}
    if len(waves) > 1:
        raise BuildError(f"{', '.join(archs)}: GPUs with waves of 64 lanes and of 32 need modules of their own")
    return waves.pop()


def _offload(archs: Sequence[str]) -> list[str]:
    return [f"--offload-arch={arch}" for arch in archs]


def _gencode(archs: Sequence[str]) -> list[str]:
    return [f"-gencode=arch=compute_{arch.partition('_')[2]},code={arch}" for arch in archs]


def _ccbin(host: Path | None) -> list[str]:
    return ["-ccbin", str(host)] if host else []


# Where compilers are


def _wheel_folders() -> Iterator[Path]:
    """Folders of NVIDIA's wheels that hold bin, include or lib."""
    for folder in dict.fromkeys(filter(None, sys.path)):
        yield from sorted(Path(folder, "nvidia").glob("*"), reverse=True)


def _nvcc_places() -> Iterator[Place]:
    yield from _named_by("CUDA_HOME", "CUDA_PATH", name="nvcc")
    yield "PATH", _on_path("nvcc")
    yield "/usr/local/cuda", Path("/usr/local/cuda/bin/nvcc")
    yield "what cuda-pathfinder finds", _pathfinder()
    yield "NVIDIA's wheels", next((path for top in _wheel_folders() if (path := top / "bin/nvcc").is_file()), None)


def _hipcc_places() -> Iterator[Place]:
    yield from _named_by("HIP_PATH", "ROCM_PATH", name="hipcc")
    yield "PATH", _on_path("hipcc")
    yield "/opt/rocm", Path("/opt/rocm/bin/hipcc")


def _named_by(*variables: str, name: str) -> Iterator[Place]:
    for variable in variables:
        value = os.environ.get(variable)
        yield f"{variable} ({value or 'not set'})", Path(value, "bin", name) if value else None


def _on_path(name: str) -> Path | None:
    found = shutil.which(name)
    return Path(found) if found else None


def _pathfinder() -> Path | None:
    """By NVIDIA's own search, which knows conda too."""
    try:
        from cuda.pathfinder import find_nvidia_binary_utility
    except ImportError:
        return None
    found = find_nvidia_binary_utility("nvcc")
    return Path(found) if found else None


CUDA = Backend(
    name="cuda",
    vendor="nvidia",
    compiler="nvcc",
    version=r"release (\d+)\.(\d+), V\d+\.\d+(\S*)",
    oldest=(12, 0),
    install="pip install 'gemmart[cuda]' brings it, and NVIDIA's CUDA Toolkit does",
    places=_nvcc_places,
)
HIP = Backend(
    name="hip",
    vendor="amd",
    compiler="hipcc",
    version=r"HIP version: (\d+)\.(\d+)(\S*)",
    oldest=(5, 0),
    install="AMD's ROCm brings it (Debian: apt install hipcc)",
    places=_hipcc_places,
)
# The same sources on the CPU, for tests: tests/gpu_module.py builds it.
EMULATED = Backend("emulated", None, "g++", "", (0, 0), "", None)
BACKENDS = {backend.name: backend for backend in (CUDA, HIP, EMULATED)}


def backend_of(vendor: str) -> Backend:
    return next(backend for backend in BACKENDS.values() if backend.vendor == vendor)
