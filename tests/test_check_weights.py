"""check_weights finds what is no number in any tensor, and names it; mlock keeps weights in memory, or says why not."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants

import gemmart
import program
from conftest import Tiny
from gemmart import _core, errors, memory
from gemmart import progress as progress_module
from program import failure
from tiny import FORMATS, SCALE_BYTES

# Where else a block has a half that scales it.
SCALES = {"F16": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "TQ1_0": (52,)}
SCALES |= {"TQ2_0": (64,), **SCALE_BYTES}
SIZES = {name: (size, n_bytes) for name, _, size, n_bytes in _core.formats()}


def damaged(path: Path, to: Path, name: str, block: int, at: int, data: bytes) -> tuple[int, int]:
    """A copy of a model in which bytes of a tensor's block are others; returns (row, column) of the first weight that is
    no number, by the independent decoder."""
    shutil.copy(path, to)
    tensor = next(tensor for tensor in _core.Gguf(to).tensors() if tensor[0] == name)
    _, kind, shape, offset, n_bytes = tensor
    size = SIZES[kind][1]
    begin = (block % (n_bytes // size)) * size + at % size
    with to.open("r+b") as file:
        file.seek(offset + begin)
        file.write(data)
    raw = next(t for t in gguf.GGUFReader(to).tensors if t.name == name)
    with np.errstate(all="ignore"):
        weights = quants.dequantize(raw.data, raw.tensor_type).reshape(shape)
    row, column = np.argwhere(~np.isfinite(weights))[0]
    return int(row), int(column)


@pytest.mark.parametrize("quant", [name for name in FORMATS if name in SCALES])
def test_a_scale_that_is_no_number(quant: str, tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("gemma2", quant)
    with gemmart.load(path, check_weights=True):
        pass
    for at in SCALES[quant]:
        for block in (0, -1):
            for value in (np.nan, np.inf, -np.inf):
                data = np.float16(value).tobytes()
                row, column = damaged(path, tmp_path / "m.gguf", "blk.2.ffn_up.weight", block, at, data)
                with pytest.raises(errors.NumericError) as caught:
                    gemmart.load(tmp_path / "m.gguf", check_weights=True)
                where = f"{tmp_path / 'm.gguf'}: tensor blk.2.ffn_up.weight: row {row}, column {column} is "
                assert str(caught.value).startswith(where)


@pytest.mark.parametrize(
    ("quant", "at", "data"),
    [
        ("F32", 0, np.float32("nan").tobytes()),
        ("BF16", 0, b"\x80\x7f"),
        ("IQ1_M", -8, b"\x00\xf0" * 4),
    ],
)
def test_scales_of_other_kinds(quant: str, at: int, data: bytes, tiny: Tiny, tmp_path: Path) -> None:
    for block in (0, -1):
        row, column = damaged(tiny("gemma2", quant), tmp_path / "m.gguf", "token_embd.weight", block, at, data)
        with pytest.raises(errors.NumericError, match=f"tensor token_embd.weight: row {row}, column {column} is "):
            gemmart.load(tmp_path / "m.gguf", check_weights=True)


def test_the_first_one_is_named(tiny: Tiny, tmp_path: Path) -> None:
    """Of many, with any number of threads; in tensors longer than a piece of the work."""
    path, file = tmp_path / "m.gguf", tmp_path / "n.gguf"
    damaged(
        tiny("gemma2", "F32", n_vocab=4096), file, "token_embd.weight", 3000 * 96 + 5, 0, np.float32("inf").tobytes()
    )
    damaged(file, path, "blk.3.ffn_down.weight", 0, 0, np.float32("nan").tobytes())
    order = [name for name, *_ in _core.Gguf(path).tensors()]
    assert order.index("token_embd.weight") < order.index("blk.3.ffn_down.weight")
    facts = _core.ModelFacts(str(path))
    for n_threads in (1, 2, 7):
        with pytest.raises(errors.NumericError, match=r"token_embd\.weight: row 3000, column 5 is inf"):
            _core.check_weights(facts, n_threads=n_threads, loading=_core.Loading())
    with pytest.raises(errors.InvalidRequest, match="n_threads is 0"):
        _core.check_weights(facts, n_threads=0, loading=_core.Loading())


def test_a_draft_model_is_checked_too(tiny: Tiny, tmp_path: Path) -> None:
    data = np.float16(np.nan).tobytes()
    damaged(tiny("gemma2", "Q8_0"), tmp_path / "m.gguf", "blk.0.attn_q.weight", 0, 0, data)
    with pytest.raises(errors.NumericError, match=r"blk\.0\.attn_q\.weight: row 0, column 0"):
        gemmart.load(tiny("gemma2"), draft=tmp_path / "m.gguf", check_weights=True)


def test_progress_and_cancelling(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress_module, "SILENT_SECONDS", -1)
    calls: list[tuple[str, int, int | None]] = []
    path = tiny("gemma2", "F32")
    with gemmart.load(path, check_weights=True, progress=lambda *call: calls.append(call)):
        pass
    n_bytes = sum(n_bytes for *_, n_bytes in _core.Gguf(path).tensors())
    assert ("checking weights", n_bytes, n_bytes) in calls
    loading = _core.Loading()
    loading.cancel()
    with pytest.raises(errors.Cancelled):
        _core.check_weights(_core.ModelFacts(str(path)), n_threads=2, loading=loading)


def test_the_flag(tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    damaged(tiny("gemma2", "Q8_0"), path, "blk.1.attn_k.weight", 0, 0, np.float16(np.nan).tobytes())
    for flag in ("--check-weights", "--check-tensors"):
        error = failure(program.run("run", path, "hello", flag, home=tmp_path), 3)
        assert "tensor blk.1.attn_k.weight: row 0, column 0 is nan" in error
        assert "fetch it anew" in error
    assert program.run("perplexity", path, "-", flag, home=tmp_path, stdin="word").returncode == 3


# mlock


def locked_bytes() -> int:
    """Of this process."""
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmLck:")[2].split()[0])


@pytest.fixture
def may_lock() -> None:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and soft != resource.RLIM_INFINITY and soft < 64 << 20:
        pytest.skip(f"this process may lock {soft} bytes in memory")


@pytest.mark.usefixtures("may_lock")
@pytest.mark.parametrize("mmap", [None, False, True])
def test_weights_are_locked(mmap: bool | None, tiny: Tiny, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"x" * 1001 + tiny("gemma2", "Q4_K").read_bytes())  # no page begins where a tensor does
    file = _core.ModelFacts((str(path), 1001, path.stat().st_size - 1001))
    before = locked_bytes()
    model = _core.Model(file, n_threads=1, n_batch=8, precise=False, mapped=bool(mmap), locked=True)
    matrices = sum(
        n_bytes for _, _, shape, _, n_bytes in _core.Gguf(str(tiny("gemma2", "Q4_K"))).tensors() if len(shape) == 2
    )
    assert locked_bytes() - before >= 0.98 * matrices
    del model
    assert locked_bytes() == before
    with gemmart.load(tiny("gemma2", "Q4_K"), mmap=mmap, mlock=True) as loaded:
        assert loaded.plan.mlock
        assert loaded.plan.mmap is bool(mmap)
        assert locked_bytes() - before >= 0.98 * matrices
        answer = loaded.generate([5, 6, 7], max_tokens=4, seed=1).tokens
    with gemmart.load(tiny("gemma2", "Q4_K"), mmap=mmap) as loaded:
        assert loaded.generate([5, 6, 7], max_tokens=4, seed=1).tokens == answer
        assert locked_bytes() == before


def test_locked_weights_must_fit(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny("gemma2", "Q4_K", n_vocab=40_000)
    packed, mapped = gemmart.plan(path, mlock=True), gemmart.plan(path, mmap=True, mlock=True)
    assert packed.total_bytes == gemmart.plan(path).total_bytes
    assert mapped.total_bytes == gemmart.plan(path, mmap=True).total_bytes + mapped.mapped_bytes
    for plan, mmap in ((packed, None), (mapped, True)):
        monkeypatch.setattr(memory, "available_memory", lambda plan=plan: plan.total_bytes - 1)
        with pytest.raises(errors.OutOfMemory, match="no mlock, or a smaller file"):
            gemmart.load(path, ctx=plan.ctx, mmap=mmap, mlock=True)
        assert gemmart.plan(path, mmap=mmap, ctx=plan.ctx).mmap is (mmap is None) or mmap


@pytest.mark.usefixtures("may_lock")
def test_a_load_that_locks_can_be_cancelled(tiny: Tiny) -> None:
    facts = _core.ModelFacts(str(tiny("gemma2", "Q4_K")))
    for mapped in (False, True):
        loading = _core.Loading()
        loading.cancel()
        before = locked_bytes()
        with pytest.raises(errors.Cancelled):
            _core.Model(facts, n_threads=2, n_batch=8, precise=False, mapped=mapped, locked=True, loading=loading)
        assert locked_bytes() == before


@pytest.mark.parametrize("flags", [(), ("--mmap",)])
def test_a_limit_that_forbids_it(flags: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    command = [*program.COMMAND, "run", str(tiny("gemma2", "Q4_K")), "hello", "--mlock", *flags]
    if os.geteuid() == 0:  # the limit holds for others only
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may lock as much as it likes, and there is no setpriv to give that up")
        command = [setpriv, "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock", *command]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -l 64; exec "$@"', "sh", *command],
        env=program.environment(tmp_path), capture_output=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    error = failure(done, 10)
    assert "this process may lock 64 KiB. Raise the limit (ulimit -l unlimited as root" in error


def test_plan_tells_it(tiny: Tiny, tmp_path: Path) -> None:
    done = program.run("plan", tiny("gemma2"), "--mlock", "--mmap", "--json", home=tmp_path)
    assert json.loads(done.stdout)["mlock"]
    assert b"locked in memory" in program.run("plan", tiny("gemma2"), "--mlock", home=tmp_path).stdout
