"""The two ways of holding weights, packed in memory and mapped in the file: the same bits, what each takes of the
memory, which one is chosen, and what happens while they are loaded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import gemmart
from conftest import Tiny, logits_alone, open_context
from gemmart import _core, errors, memory
from gemmart import progress as progress_module
from gemmart.engine import LOGIT_BYTES
from gemmart.results import SPARE_BYTES
from tiny import FORMATS

IDS = list(range(2, 27))  # column groups of 8, 8, 8 and 1


def assert_equal_bits(path: Path, **mapped: int) -> None:
    """In both ways: a prompt, then a token, with activations of one term and of two."""
    for precise in (False, True):
        rows = []
        for weights in ({}, {"mapped": True, **mapped}):
            context = open_context(path, precise=precise, **weights)
            seq = context.kv.new_sequence()
            for ids in (IDS, [7]):
                context.forward(np.array(ids, np.int32), [(seq, len(ids))], range(len(ids)))
                rows.append(context.logits())
        np.testing.assert_array_equal(rows[2], rows[0])
        np.testing.assert_array_equal(rows[3], rows[1])


@pytest.mark.parametrize("quant", FORMATS)
def test_mapped_weights_give_the_same_bits(quant: str, tiny: Tiny, isa: str) -> None:
    assert_equal_bits(tiny("gemma2", quant))


def test_mapped_weights_at_an_odd_offset(tiny: Tiny, tmp_path: Path) -> None:
    for quant in ("F32", "BF16", "Q6_K", "IQ2_S"):
        image = tiny("gemma2", quant).read_bytes()
        (tmp_path / "m.bin").write_bytes(b"x" * 1001 + image + b"y" * 77)
        model = _core.Model(
            _core.ModelFacts((tmp_path / "m.bin", 1001, len(image))),
            n_threads=2, n_batch=512, precise=False, mapped=True,
        )  # fmt: skip
        context = _core.Context(model, n_kv_tokens=512, n_sequences=1, kv_type="f32")
        expected = logits_alone(open_context(tiny("gemma2", quant)), IDS)
        np.testing.assert_array_equal(logits_alone(context, IDS), expected)


@pytest.mark.parametrize("quant", ["F32", "Q8_0"])
def test_panels_that_do_not_fit_together(quant: str, tiny: Tiny) -> None:
    """A thread packs half a MiB at a time. A panel of `down` takes 768 KiB in F32; in Q8_0 two of six fit."""
    assert_equal_bits(tiny("gemma2", quant, ffn_dim=12288))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_matrices_that_leave_the_cache(share: float, tiny: Tiny) -> None:
    path = tiny("gemma2", "Q6_K", n_layers=9, ffn_dim=2048)
    assert_equal_bits(path, cache_bytes=int(share * path.stat().st_size))
    mapped = {}
    for n_bytes in (int(share * path.stat().st_size), 2**40):
        context = open_context(path, mapped=True, cache_bytes=n_bytes)
        for _ in range(2):
            logits_alone(context, IDS)
        mapped[n_bytes] = mapped_bytes(path)
        del context
    few, all_of_them = mapped.values()
    assert all_of_them > 0.9 * path.stat().st_size
    assert few < (share + 0.2) * all_of_them


def mapped_bytes(path: Path) -> int:
    """Bytes of the file that stand in this process's mappings of it."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


def test_the_way_that_is_asked_for(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "own.gguf"  # nobody else has mapped it
    path.write_bytes(tiny("gemma2", "Q4_K").read_bytes())
    for mmap in (False, True):
        plan = gemmart.plan(path, mmap=mmap)
        assert plan.mmap is mmap
        with gemmart.load(path, mmap=mmap) as model:
            assert model.plan.mmap is mmap
            model.generate(IDS, max_tokens=2)
            assert (mapped_bytes(path) > 0) is mmap
    packed, mapped = gemmart.plan(path, threads=3), gemmart.plan(path, threads=3, mmap=True)
    assert not packed.mmap
    assert (packed.mapped_bytes, mapped.mapped_bytes) == (0, packed.weight_bytes)
    assert 0.9 * path.stat().st_size < packed.weight_bytes <= 1.1 * path.stat().st_size
    assert mapped.weight_bytes == 3 * (512 << 10)  # room for some panels, a thread
    assert (mapped.buffer_bytes, mapped.kv_bytes) == (packed.buffer_bytes, packed.kv_bytes)


def test_packed_where_it_fits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    path = tiny("gemma2", "Q4_K", n_vocab=40_000, n_ctx=4096)  # 5.8 MB of matrices
    plan = gemmart.plan(path, mmap=False)
    assert plan.ctx == 4096
    shorter = gemmart.plan(path, mmap=False, ctx=2048)

    def available(n_bytes: int) -> None:
        caplog.clear()
        monkeypatch.setattr(memory, "available_memory", lambda: n_bytes)

    available(plan.total_bytes + SPARE_BYTES)
    assert (gemmart.plan(path).mmap, gemmart.plan(path).ctx) == (False, 4096)
    assert not caplog.text
    available(plan.total_bytes + SPARE_BYTES - 1)
    assert gemmart.plan(path, ctx=4096).mmap
    assert (gemmart.plan(path).mmap, gemmart.plan(path).ctx) == (False, 2048)
    available(shorter.total_bytes + SPARE_BYTES - 1)
    with gemmart.load(path) as model:
        assert (model.plan.mmap, model.plan.ctx) == (True, 4096)
    assert caplog.text.count("weights: they stay in the file, which is slower") == 1
    available(shorter.total_bytes - 1)
    with pytest.raises(errors.OutOfMemory, match="mmap=True"):
        gemmart.load(path, mmap=False)
    assert gemmart.plan(path).mmap
    available(1 << 20)
    with pytest.raises(errors.OutOfMemory):
        gemmart.load(path)


def test_a_plan_has_the_logits(tiny: Tiny) -> None:
    path = tiny("gemma2", "Q8_0", n_vocab=40_000)
    without = gemmart.plan(path, batch=1).buffer_bytes - 4 * 40_000
    few, many = (gemmart.plan(path, batch=n).buffer_bytes for n in (100, 60_000))
    assert few >= 99 * (without - (1 << 20)) // 100 + 100 * 4 * 40_000
    facts = _core.ModelFacts(str(path))
    states = 4 * facts.info()["dim"] * 60_000
    need = facts.memory_need(n_threads=1, n_batch=60_000, n_kv_tokens=512, n_sequences=1, kv_type="f16")
    assert 0.9 * LOGIT_BYTES < many - need["buffers"] - states <= LOGIT_BYTES + (64 << 20)


TRUNCATE = """
import os, sys, threading
import gemmart
path, seconds = sys.argv[1], float(sys.argv[2])
with gemmart.load(path, mmap=True) as model:
    ids = list(range(2, 500))
    model.logits(ids)
    threading.Timer(seconds, os.truncate, (path, 4096)).start()
    for i in range(10_000):
        try:
            model.logits(ids)
        except gemmart.ModelChanged as error:
            print(error)
            break
    try:
        model.logits(ids)
    except gemmart.ModelChanged:
        print("still")
"""


@pytest.mark.parametrize("seconds", [0.01, 0.04, 0.07])
def test_a_mapped_file_that_is_truncated_while_it_is_read(seconds: float, tiny: Tiny, tmp_path: Path) -> None:
    """In a process of its own, which SIGBUS would end; nearly all of its time is inside a pass, and so comes the cut."""
    path = shutil.copy(tiny("gemma2", "Q4_K"), tmp_path / "m.gguf")
    run = subprocess.run([sys.executable, "-c", TRUNCATE, path, str(seconds)], capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode() == f"{path}: was changed after it was opened; load it again\nstill\n"


FOREIGN = """
import mmap, os, signal, sys
import gemmart
with gemmart.load(sys.argv[1], mmap=True):
    if sys.argv[2] == "sent":
        os.kill(os.getpid(), signal.SIGBUS)
    with open(sys.argv[3], "w+b") as file:
        file.truncate(8192)
        mapping = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        print(mapping[5000])
"""


@pytest.mark.parametrize("kind", ["sent", "another mapping"])
def test_other_bus_errors_still_end_the_process(kind: str, tiny: Tiny, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FOREIGN, tiny("gemma2", "Q4_K"), kind, tmp_path / "other"]
    run = subprocess.run(command, capture_output=True, timeout=60)
    assert (run.returncode, run.stdout) == (-signal.SIGBUS, b"")


def test_progress_of_a_load(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("gemma2", "Q4_K")
    calls: list[tuple[str, int, int | None]] = []
    with gemmart.load(path, progress=lambda *call: calls.append(call)):
        assert calls == []  # it was quick
    monkeypatch.setattr(progress_module, "SILENT_SECONDS", -1)
    monkeypatch.setattr(progress_module, "PROGRESS_SECONDS", 1e-4)
    with gemmart.load(path, progress=lambda *call: calls.append(call)) as model:
        n_bytes = model.plan.weight_bytes
    assert {(what, total) for what, _, total in calls[1:]} <= {("loading", n_bytes), ("loading", 0)}
    done = [done for _, done, _ in calls]
    assert done == sorted(done)
    assert calls[-1] == ("loading", n_bytes, n_bytes)


def test_a_load_that_is_cancelled(tiny: Tiny) -> None:
    loading = _core.Loading()
    loading.cancel()
    facts = _core.ModelFacts(str(tiny("gemma2", "Q4_K")))
    with pytest.raises(errors.Cancelled):
        _core.Model(facts, n_threads=2, n_batch=8, precise=False, loading=loading)
    assert loading.done == 0 < loading.total


def test_ctrl_c_while_weights_are_read(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """load() ends when the thread that reads has ended: one that goes on while the interpreter ends would abort it."""
    cancelled, ended = threading.Event(), []

    class Loading(_core.Loading):
        def cancel(self) -> None:
            cancelled.set()

    def slow(*_: object, **__: object) -> None:
        assert cancelled.wait(30)
        time.sleep(0.2)
        ended.append(True)
        raise errors.Cancelled("the load was cancelled")

    monkeypatch.setattr(_core, "Loading", Loading)
    monkeypatch.setattr(_core, "Model", slow)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        gemmart.load(tiny("gemma2", "Q4_K"))
    assert ended == [True]
