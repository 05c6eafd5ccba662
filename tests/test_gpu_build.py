"""GPU modules by the real compilers: every source compiles, and what comes of it is opened.

GEMMART_TEST_ARCHS="sm_80,sm_90a gfx90a": the modules to build."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gemmart import _core
from gemmart.errors import BuildError
from gemmart.gpu import compilers, drivers, modules, probe, recompile

MODULES = os.environ.get("GEMMART_TEST_ARCHS", "sm_90a").split()


@pytest.mark.parametrize("archs", MODULES)
def test_every_source_compiles(archs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vendor = "amd" if archs.startswith("gfx") else "nvidia"
    try:
        compiler = compilers.find(compilers.backend_of(vendor))
        compilers.find_host(compiler.backend)
    except BuildError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = recompile.build(archs=tuple(archs.split(",")))
    found = probe.probe(path)
    assert (found.problem, found.abi, found.version) == ("", probe.abi_version(), _core.version)
    assert (found.backend, found.archs) == (compiler.backend.name, tuple(archs.split(",")))
    assert found.compiler.startswith("nvcc" if vendor == "nvidia" else "clang")
    assert found.gemm == ("tinyblas" if compilers.find_blas(compiler) is None else compilers.find_blas(compiler).name)
    if not drivers.find(vendor).gpus:
        assert found.no_devices
        assert _core.GpuModule(str(path)).build()["backend"] == compiler.backend.name
    arch = archs.split(",")[0].rstrip("a")
    assert modules.find(compiler.backend.name, probe.abi_version(), "sm_90" if "sm" in arch else archs, "") == path
