"""Faults that were found once, each by the smallest case that shows it."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading

import gemmart
from conftest import Tiny


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def engine_threads() -> int:
    return sum(thread.name == "gemmart-engine" for thread in threading.enumerate())


def test_a_program_may_end_while_a_model_computes(tiny: Tiny) -> None:
    """The engine's thread was ended inside the core, which aborted the process."""
    code = (
        "import gemmart, sys\n"
        "model = gemmart.load(sys.argv[1], threads=2)\n"
        "print(len(next(iter(model.stream('hello', ignore_eos=True))).tokens))\n"
    )
    for _ in range(3):
        done = run_python(code, tiny("gemma2", "Q8_0", n_ctx=16384))
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_forgotten_model_ends(tiny: Tiny) -> None:
    before = engine_threads()
    stream = gemmart.load(tiny("gemma2", "Q8_0")).stream("hello", max_tokens=5, ignore_eos=True)
    assert len(stream.result().tokens) == 5  # the stream keeps it
    del stream
    gc.collect()
    assert engine_threads() == before
