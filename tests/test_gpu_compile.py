"""Every source of a GPU module compiles for each kind of GPU, as far as the compilers are installed. It takes minutes:
pytest -m slow."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from gemmart.errors import BuildError
from gemmart.gpu import compilers, sources

ARCHS = ("sm_90a", "gfx90a", "gfx1030")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("unit", sources.units(), ids=str)
def test_a_source_compiles(unit: Path, arch: str, tmp_path: Path) -> None:
    backend = compilers.CUDA if arch.startswith("sm_") else compilers.HIP
    try:
        compiler = compilers.find(backend)
    except BuildError as error:
        pytest.skip(str(error))
    command = compilers.compile_command(
        str(compiler.path), backend, [arch], [], [str(sources.folder())], compilers.find_host(backend)
    )
    verbose = ["-Xptxas=-v"] if backend is compilers.CUDA else []
    source = sources.folder() / unit
    done = subprocess.run(
        [*command, *verbose, *compilers.source_arguments(backend, source), "-o", str(tmp_path / "unit.o")],
        env=compilers.environment(str(tmp_path)) | {"HIP_PLATFORM": "amd"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    if unit.stem.startswith("gemm"):  # 128 sums a thread, which must not leave their registers
        assert set(re.findall(r"(\d+) bytes spill", done.stderr)) <= {"0"}
