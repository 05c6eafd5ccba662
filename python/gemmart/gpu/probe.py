"""What a GPU module says of itself and of its devices: asked by a child process, which it may end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemmart.gpu import sources

TIMEOUT = 60.0  # seconds; a first look at many GPUs takes some
# What the libraries of GPUs read; secrets are none of their business.
ENVIRONMENT = re.compile(r"(CUDA|HIP|ROCR|ROCM|HSA|GPU|NVIDIA|LD|XDG|GEMMART_EMULATED)_.*|PATH|HOME|TMPDIR|LANG|TZ")


@dataclass(frozen=True, slots=True)
class ModuleDevice:
    """A device as a module sees it; the fields of GemmartDevice in executor_abi.h."""

    name: str
    arch: str
    total_bytes: int
    free_bytes: int
    n_units: int
    usable: bool
    problem: str  # why not


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of opening a module. Where `problem` is set, the rest is what was learnt before it."""

    problem: str = ""
    abi: int | None = None
    backend: str = ""  # "cuda", "hip" or "emulated"
    version: str = ""  # of gemmart
    compiler: str = ""
    archs: tuple[str, ...] = ()
    gemm: str = ""
    no_devices: str = ""
    """Why there is no device: of a module that is sound."""
    devices: tuple[ModuleDevice, ...] = ()


def header() -> str:
    """executor_abi.h as cffi reads it."""
    text = (sources.folder() / "executor_abi.h").read_text(encoding="utf-8")
    text = re.sub(r"^#ifdef __cplusplus$.*?^#endif$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^#.*$", "", text, flags=re.MULTILINE)


def abi_version() -> int:
    """The version of the border that this gemmart speaks."""
    found = re.search(r"GEMMART_ABI_VERSION = (\d+)", header())
    assert found is not None
    return int(found[1])


def probe(path: Path) -> Probe:
    """Open a module in a child process and ask it."""
    import cffi

    folders = [str(Path(str(cffi.__file__)).parents[1])]
    kept = {name: value for name, value in os.environ.items() if ENVIRONMENT.fullmatch(name)}
    child = Path(__file__).with_name("probe_child.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(child), *folders],
            input=json.dumps({"path": str(path), "header": header(), "abi": abi_version()}).encode(),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return Probe(f"{path}: does not answer within {TIMEOUT:.0f} s")
    try:
        found: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        how = f"by {signal.Signals(-done.returncode).name}" if done.returncode < 0 else f"with code {done.returncode}"
        return Probe(f"{path}: ends the process that opens it, {how}")
    found["devices"] = tuple(ModuleDevice(**device) for device in found.get("devices", ()))
    found["archs"] = tuple(found.get("archs", ()))
    if found.get("problem"):
        found["problem"] = f"{path}: {found['problem']}"
    return Probe(**found)
