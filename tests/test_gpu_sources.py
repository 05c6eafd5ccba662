"""The sources of GPU modules: what is compiled is what is installed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gemmart
from gemmart import _core
from gemmart.gpu import sources

ROOT = Path(__file__).resolve().parents[1]


def test_cmake_has_the_same_list() -> None:
    text = (ROOT / "CMakeLists.txt").read_text()
    (patterns,) = re.findall(r"file\(GLOB MODULE_SOURCES [^\n]*\n([^)]*)\)", text)
    assert patterns.split() == [f"csrc/{pattern}" for pattern in sources.PATTERNS]
    (library,) = re.findall(r"add_library\(_cuda MODULE \$\{CUDA_SOURCES\} ([^)]*)\)", text)
    assert library.split() == [f"csrc/{name}" for name in sources.CORE]


def test_what_is_installed_is_in_the_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = Path(_core.__file__).with_name("csrc")
    if not installed.is_dir() or installed.parent != Path(gemmart.__file__).parent:
        pytest.skip("gemmart is used from its source tree")
    assert sources.folder() == installed
    found = sorted(path.relative_to(installed) for path in installed.rglob("*") if path.is_file())
    assert sources.files() == found
    monkeypatch.setattr(sources, "folder", lambda: ROOT / "csrc")
    assert sources.files() == found
    assert [path for path in found if (installed / path).read_bytes() != (ROOT / "csrc" / path).read_bytes()] == []
