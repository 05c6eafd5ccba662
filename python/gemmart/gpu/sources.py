"""The C++ and CUDA sources that a GPU module is built from, which the package carries."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from gemmart.errors import BuildError

CORE = ("tensor.cpp", "kv_layout.cpp")
"""What kernels take from the core."""
PATTERNS = ("*.h", "cuda/*", "hip/*", "formats/*", *CORE)
"""Of csrc; CMakeLists.txt installs the same."""


def folder() -> Path:
    """csrc in the installed package, or in the source tree where gemmart is installed from there. Raises BuildError."""
    here = Path(__file__).resolve()
    for found in (here.parents[1] / "csrc", here.parents[3] / "csrc"):
        if (found / "executor_abi.h").is_file():
            return found
    raise BuildError(f"{here.parents[1]}: the sources of GPU modules are not part of this installation of gemmart")


def files() -> list[Path]:
    """All of them, relative to folder()."""
    root = folder()
    return sorted(path.relative_to(root) for pattern in PATTERNS for path in root.glob(pattern) if path.is_file())


def units() -> list[Path]:
    """Those to compile, relative to folder(), the longest first."""
    root = folder()
    found = [*root.glob("cuda/*.cu"), *(root / name for name in CORE)]
    return [path.relative_to(root) for path in sorted(found, key=lambda path: -path.stat().st_size)]


@cache
def sha256() -> str:
    """Of names and contents, in hexadecimal."""
    digest, root = hashlib.sha256(), folder()
    for path in files():
        data = (root / path).read_bytes()
        digest.update(f"{path.as_posix()} {len(data)}\n".encode() + data)
    return digest.hexdigest()
