"""Every failure is an exception of ours that says what, where and what to do; none ends the process."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import gemmart
from conftest import Tiny, open_context, require_no_gpu
from edit import edit
from gemmart import _core, errors
from gemmart.machine import available_memory

# The published contract: class, its bases outside of ours, exit code, HTTP status.
CONTRACT = [
    (errors.GemmartError, Exception, 70, 500),
    (errors.ModelNotFound, FileNotFoundError, 3, 404),
    (errors.ModelFormatError, ValueError, 3, 500),
    (errors.TruncatedModel, errors.ModelFormatError, 3, 500),
    (errors.UnsupportedModel, ValueError, 4, 500),
    (errors.ModelChanged, ValueError, 3, 503),
    (errors.NumericError, RuntimeError, 3, 500),
    (errors.TemplateError, ValueError, 5, 400),
    (errors.TemplateLimit, errors.TemplateError, 5, 400),
    (errors.DownloadError, OSError, 6, 500),
    (errors.DiskFull, errors.DownloadError, 6, 500),
    (errors.ChecksumError, errors.DownloadError, 7, 500),
    (errors.DeviceError, RuntimeError, 9, 503),
    (errors.BuildError, RuntimeError, 8, 500),
    (errors.OutOfMemory, MemoryError, 10, 503),
    (errors.InvalidRequest, ValueError, 2, 400),
    (errors.ContextOverflow, errors.InvalidRequest, 11, 400),
    (errors.ConstraintError, errors.InvalidRequest, 11, 400),
    (errors.Cancelled, errors.GemmartError, 130, 500),
    (errors.InternalError, RuntimeError, 70, 500),
]


@pytest.mark.parametrize(
    ("error", "base", "exit_code", "status"), CONTRACT, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_contract(error: type[errors.GemmartError], base: type[Exception], exit_code: int, status: int) -> None:
    assert issubclass(error, errors.GemmartError)
    assert issubclass(error, base)
    assert (error.exit_code, error.http_status) == (exit_code, status)
    assert error.__doc__


def test_codes_of_http() -> None:
    codes = {error.__name__: error.http_code for error, *_ in CONTRACT if error.http_status != 500}
    assert codes == {
        "ModelNotFound": "model_not_found",
        "ModelChanged": "model_changed",
        "TemplateError": "template_error",
        "TemplateLimit": "template_error",
        "DeviceError": "device_error",
        "OutOfMemory": "out_of_memory",
        "InvalidRequest": "invalid_value",
        "ContextOverflow": "context_length_exceeded",
        "ConstraintError": "invalid_schema",
    }
    assert errors.NumericError.http_code == "numeric_error"
    assert errors.InternalError.http_code == "internal_error"


def test_contract_is_complete() -> None:
    assert {row[0] for row in CONTRACT} == {v for v in vars(errors).values() if isinstance(v, type)}


@pytest.mark.parametrize(
    "error",
    [
        errors.ContextOverflow(7, 5),
        errors.Cancelled("stopped", "half"),
        errors.BuildError("x", "y"),
        errors.DiskFull("x"),
    ],
)
def test_errors_travel_between_processes(error: errors.GemmartError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert (str(copy), vars(copy)) == (str(error), vars(error))


# Each exception class of the core, raised through the border.


def not_found(tiny: Tiny, folder: Path) -> None:
    _core.ModelFacts(str(folder / "nothing.gguf"))


def broken(tiny: Tiny, folder: Path) -> None:
    (folder / "m.gguf").write_bytes(b"no model, " * 10)
    _core.ModelFacts(str(folder / "m.gguf"))


def cut(tiny: Tiny, folder: Path) -> None:
    (folder / "m.gguf").write_bytes(tiny("gemma2").read_bytes()[:-1])
    _core.ModelFacts(str(folder / "m.gguf"))


def unsupported(tiny: Tiny, folder: Path) -> None:
    _core.ModelFacts(str(edit(tiny("gemma2"), folder / "m.gguf", keys={"general.architecture": "bert"})))


def changed(tiny: Tiny, folder: Path) -> None:
    path = folder / "m.gguf"
    path.write_bytes(tiny("gemma2").read_bytes())
    file = _core.Gguf(str(path))
    os.truncate(path, 10)
    file.check_unchanged()


def device(tiny: Tiny, folder: Path) -> None:
    _core.kernels.running_isa("z80")


def no_room(tiny: Tiny, folder: Path) -> None:
    context = open_context(tiny("gemma2"), n_kv_tokens=32)
    context.forward(np.zeros(33, np.int32), [(context.kv.new_sequence(), 33)], [])


def too_large(tiny: Tiny, folder: Path) -> None:  # std::bad_alloc
    _core.KvCache(layers=[(1, 8, 50)], kv_type="f32", n_tokens=1000, n_sequences=2**31 - 1, slack=64)


def mistake(tiny: Tiny, folder: Path) -> None:  # std::invalid_argument
    open_context(tiny("gemma2"), n_threads=0)


@pytest.mark.parametrize(
    ("fail", "error", "message"),
    [
        (not_found, errors.ModelNotFound, "nothing.gguf"),
        (broken, errors.ModelFormatError, "not a GGUF file"),
        (cut, errors.TruncatedModel, "ends inside tensor"),
        (unsupported, errors.UnsupportedModel, "general.architecture is bert"),
        (changed, errors.ModelChanged, "was changed after it was opened"),
        (device, errors.DeviceError, "z80 is unknown; this build knows scalar"),
        (no_room, errors.OutOfMemory, "no room for 33 more tokens"),
        (too_large, errors.OutOfMemory, "out of memory"),
        (mistake, errors.InvalidRequest, "n_threads is 0, expected 1 to 1024"),
    ],
)
def test_core_errors(
    fail: Callable, error: type[errors.GemmartError], message: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as raised:
        fail(tiny, tmp_path)
    assert raised.type is error


def test_nothing_changes_where_memory_lacks(tiny: Tiny) -> None:
    context = open_context(tiny("gemma2"), n_kv_tokens=64)
    seq = context.kv.new_sequence()
    context.forward(np.zeros(10, np.int32), [(seq, 10)], [9])
    before = context.row(0)
    for _ in range(2):
        with pytest.raises(errors.OutOfMemory):
            context.forward(np.zeros(60, np.int32), [(seq, 60)], [59])
        assert context.kv.length(seq) == 10
        np.testing.assert_array_equal(context.row(0), before)
    context.forward(np.zeros(54, np.int32), [(seq, 54)], [])


# What load() says of machines.


@pytest.mark.parametrize(
    "options", [{"gpu": "nvidia"}, {"gpu": "amd"}, {"ngl": 10}, {"ngl": "all"}, {"device": "cuda:0"}]
)
def test_gpus_asked_for_by_name(options: dict, tiny: Tiny) -> None:
    require_no_gpu()
    for call in (gemmart.load, gemmart.plan):
        with pytest.raises(errors.DeviceError, match=r"no NVIDIA driver|no AMD driver"):
            call(tiny("gemma2", "Q8_0"), **options)


@pytest.mark.parametrize(
    "options", [{"gpu": "intel"}, {"ngl": -1}, {"ngl": "some"}, {"ngl": True}, {"gpu": "none", "ngl": 3}]
)
def test_options_of_gpus_that_are_wrong(options: dict, tiny: Tiny) -> None:
    with pytest.raises(errors.InvalidRequest):
        gemmart.load(tiny("gemma2", "Q8_0"), **options)


@pytest.mark.parametrize("options", [{"gpu": "none"}, {"gpu": "auto", "ngl": 0}, {"device": "cpu"}])
def test_no_gpu_asked_for(options: dict, tiny: Tiny) -> None:
    with gemmart.load(tiny("gemma2", "Q8_0"), **options) as model:
        assert model.ctx == 512


def test_isa_that_does_not_exist(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GEMMART_ISA", "avx9000")
    for call in (gemmart.devices, lambda: gemmart.load(tiny("gemma2", "Q8_0"))):
        with pytest.raises(errors.DeviceError, match="GEMMART_ISA=avx9000 is unknown; this build knows scalar, avx2"):
            call()


def test_isa_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [(name, why) for name, _, usable, why in _core.kernels.isas() if not usable]
    if not others:
        pytest.skip("this machine can use every instruction set that the build has")
    for name, why in others:
        assert why
        monkeypatch.setenv("GEMMART_ISA", name)
        with pytest.raises(errors.DeviceError, match=f"GEMMART_ISA={name} cannot be used: {why}"):
            gemmart.devices()


@pytest.fixture(scope="module")
def long_context(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose keys and values of its trained length are 2 TiB in F32."""
    path = tiny("gemma2", "Q8_0", n_layers=16, n_kv_heads=4, head_dim=256)
    return edit(path, tmp_path_factory.mktemp("long") / "m.gguf", keys={"gemma2.context_length": 1 << 24})


def test_memory_that_is_not_there(long_context: Path) -> None:
    plan = gemmart.plan(long_context, ctx=1 << 24, kv_type="f32")
    assert plan.kv_bytes > 1 << 40
    assert not plan.fits
    with pytest.raises(errors.OutOfMemory, match=r"16777216 tokens of context .* are available; choose") as raised:
        gemmart.load(long_context, ctx=1 << 24, kv_type="f32")
    numbers = (f"{round(n / 2**20)}" for n in (plan.total_bytes, plan.kv_bytes, plan.weight_bytes))
    for part in (str(long_context), *numbers):
        assert part in str(raised.value)
    with pytest.raises(errors.InvalidRequest, match="ctx × parallel: 16777216 × 128 tokens"):
        gemmart.plan(long_context, parallel=128)


def test_ctx_left_open_fits(
    long_context: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half as long, until it fits; said in the log. Memory stays as it is meanwhile, whatever else runs."""
    n_bytes = available_memory()
    monkeypatch.setattr("gemmart.memory.available_memory", lambda: n_bytes)
    plan = gemmart.plan(long_context, kv_type="f32")
    assert plan.fits
    assert plan.ctx < 1 << 24
    assert not gemmart.plan(long_context, ctx=2 * plan.ctx, kv_type="f32").fits
    assert f"ctx: {plan.ctx} instead of the trained {1 << 24} tokens" in caplog.text


def test_threads_that_cannot_be_started(tiny: Tiny) -> None:
    """In a process of its own, whose address space has no place for 1,024 stacks."""
    code = f"""
import os, resource
from gemmart import _core
from gemmart.errors import OutOfMemory
facts = _core.ModelFacts({str(tiny("gemma2"))!r})
used = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGESIZE")
resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20),) * 2)
try:
    _core.Model(facts, n_threads=1024, n_batch=8, precise=False)
except OutOfMemory as error:
    print(error)
_core.Model(facts, n_threads=2, n_batch=8, precise=False)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 1024 threads could be started" in done.stdout


@pytest.mark.parametrize("name", ["folder", "missing.gguf", "empty.gguf", "page.gguf"])
def test_paths_that_are_no_models(name: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.gguf").write_bytes(b"")
    (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html><html>" + b" " * 100)
    expected = {"missing.gguf": errors.ModelNotFound, "folder": errors.ModelNotFound}.get(name, errors.ModelFormatError)
    with pytest.raises(expected, match=name):
        gemmart.load(tmp_path / name, offline=True)


def test_no_vocabulary(tiny: Tiny) -> None:
    with pytest.raises(errors.ModelFormatError, match=r"tokenizer\.ggml"):
        gemmart.load(tiny("gemma2", "Q8_0", vocabulary=False))
