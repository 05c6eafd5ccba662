"""The real program, run as a user runs it, on tiny models."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import gemmart

COMMAND = [sys.executable, "-m", "gemmart"]
# Byte tokens of the SPM vocabulary that tiny.py writes: <0x00> is the eighth token.
FIRST_BYTE_TOKEN = 7


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment for the program: folders under `home`, no colour, no line editing, no display."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("GEMMART_", "HF_", "PYTHON", "XDG_", "DISPLAY", "WAYLAND_"))
    }
    package = str(Path(gemmart.__path__[0]).resolve().parent)
    return kept | {"HOME": str(home), "TERM": "dumb", "PYTHONPATH": package} | more


def run(
    *arguments: str | Path, home: Path, stdin: str | bytes = "", **environ: str
) -> subprocess.CompletedProcess[bytes]:
    """Run it to its end; stdin is a pipe that holds what is given."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        env=environment(home, **environ),
        capture_output=True,
        timeout=120,
    )


def failure(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """The error of a run that failed with `code`: one line on stderr, nothing on stdout."""
    error = done.stderr.decode()
    assert done.returncode == code, error
    assert done.stdout == b""
    assert error.startswith("gemmart: error: ")
    assert error.count("\n") == 1, error
    return error


def without_template(model: Path, path: Path) -> Path:
    """A copy of a model as a base model: its file's chat template goes by a name that nobody looks for."""
    path.write_bytes(model.read_bytes().replace(b"tokenizer.chat_template", b"tokenizer.nope_template"))
    return path


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `folder`, where one may be mounted; else the test is skipped."""
    if os.geteuid() != 0:
        pytest.skip("a small disk can only be mounted by root")
    folder.mkdir(exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("a small disk cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
