"""The measurements of `gemmart bench`: their shape and what they count, never how fast."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

import program
from conftest import Tiny
from gemmart import _core, bench, kernel_bench
from gemmart.errors import DeviceError, InvalidRequest
from gemmart.memory import KV_TYPES
from tiny import write_tiny


def test_bench(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf", "gemma2", "Q4_K")
    flags = ("--prompt", "40", "--decode", "6", "--repeat", "2", "--threads", "2")
    found = json.loads(program.run("bench", model, "--json", *flags, home=tmp_path).stdout)
    rates = ("decode_tokens_per_s", "prefill_tokens_per_s", "read_gb_per_s", "bandwidth_gb_per_s", "bandwidth_share")
    for name in (*rates, "load_s", "first_token_s", "peak_mib"):
        assert found[name] > 0, name
    assert found["read_gb_per_s"] == pytest.approx(found["decode_tokens_per_s"] * found["weight_bytes_per_token"] / 1e9)
    assert found["bandwidth_share"] == pytest.approx(found["read_gb_per_s"] / found["bandwidth_gb_per_s"])
    assert found["first_token_s"] > found["load_s"]
    assert (found["prompt_tokens"], found["decode_tokens"], found["threads"]) == (40, 6, 2)
    assert found["isa"] == _core.kernels.running_isa()
    text = program.run("bench", model, *flags, home=tmp_path).stdout.decode()
    for part in ("prefill", "decode", "GB/s", "peak memory"):
        assert part in text


def test_phases(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf", "gemma2", "Q4_K")
    flags = ("--phases", "--prompt", "40", "--decode", "6", "--batch", "16", "--repeat", "2", "--threads", "2")
    found = json.loads(program.run("bench", model, "--json", *flags, home=tmp_path).stdout)
    for part in ("prefill_ms_per_token", "decode_ms_per_token"):
        assert {"embedding", "attention", "down", "head", "select", "rest"} <= set(found[part])
        assert all(ms > 0 for ms in found[part].values())
    text = program.run("bench", model, *flags, home=tmp_path).stdout.decode()
    assert text.count("attention ") >= 2
    assert text.count("ms a token") == 2


def test_kernels() -> None:
    steps = []
    found = kernel_bench.measure(threads=2, n_bytes=1 << 20, progress=lambda *step: steps.append(step))
    formats = [name for name, *_ in _core.formats()]
    assert [(row["format"], row["columns"]) for row in found["matmul"]] == [
        (name, n) for name in formats for n in kernel_bench.COLUMNS
    ]
    assert [(row["format"], row["columns"]) for row in found["attention"]] == [
        (name, n) for name in KV_TYPES for n in kernel_bench.TOKENS
    ]
    for row in found["matmul"] + found["attention"]:
        assert all(row[name] > 0 for name in ("gb_per_s", "g_products_per_s"))
        assert row["bandwidth_share"] == pytest.approx(row["gb_per_s"] / found["bandwidth_gb_per_s"])
        peak = found["peak_g_products_per_s"][row["peak"]]
        assert row["peak_share"] == pytest.approx(row["g_products_per_s"] / peak)
    peaks = {row["format"]: row["peak"] for row in found["matmul"]}
    assert (peaks["Q4_K"], peaks["BF16"], peaks["F32"]) == ("int8", "float", "float")
    assert steps[-1] == ("measuring", steps[-1][2], steps[-1][2])
    text = kernel_bench.as_text(found)
    for name in (*formats, *KV_TYPES, *(row["kernel"] for row in found["vectors"])):
        assert f"\n{name} " in text


@pytest.mark.parametrize("format", ["Q4_K", "BF16", "F32", "TQ1_0"])
def test_what_a_pass_of_a_kernel_counts(format: str) -> None:
    kernels = _core.kernels.Bench("", n_threads=1, n_bytes=1 << 20)
    _, _, n_weights, n_bytes = next(f for f in _core.formats() if f[0] == format)
    for n in (1, 8, 32):
        seconds, read, products = kernels.matmul(format, n)
        assert 0 < seconds < 60
        assert read <= 1 << 20
        assert products == n * read / n_bytes * n_weights
    seconds, read, products = kernels.attention("f16", 2)
    n_positions = read / (2 * 2 * 256)  # of a key and a value in 16 bits
    assert products == 2 * 256 * 2 * (2 * n_positions - 1)


def test_kernels_need_no_model(tmp_path: Path) -> None:
    for extra in (("m.gguf",), ("--phases",), ("-m", "m.gguf")):
        done = program.run("bench", "--kernels", *extra, home=tmp_path)
        assert done.returncode == 2
        assert b"--kernels" in done.stderr


def test_phases_are_timed_where_asked(tmp_path: Path) -> None:
    facts = _core.ModelFacts(str(write_tiny(tmp_path / "m.gguf", "llama")))
    model = _core.Model(facts, n_threads=2, n_batch=8, precise=False)
    context = _core.Context(model, n_kv_tokens=64, n_sequences=1, kv_type="f16")
    sequence = context.kv.new_sequence()

    def forward() -> float:
        began = time.perf_counter()
        context.forward(np.array([5], np.int32), [(sequence, 1)], [0])
        return time.perf_counter() - began

    forward()
    assert model.phase_times() == {}
    model.time_phases(True)
    seconds = forward()
    first = sum(model.phase_times().values())
    assert 0 < first < seconds
    seconds += forward()
    assert first < sum(model.phase_times().values()) < seconds
    assert next(iter(model.phase_times())) == "embedding"
    model.time_phases(False)
    forward()
    assert model.phase_times() == {}


def test_bench_refuses_what_the_context_cannot_hold(tmp_path: Path) -> None:
    model = write_tiny(tmp_path / "m.gguf", "gemma2", n_ctx=64)
    for extra in ((), ("--phases",)):
        done = program.run("bench", model, "--prompt", "64", *extra, home=tmp_path)
        assert done.returncode == 2
        assert b"--prompt 64" in done.stderr


@pytest.mark.parametrize("tied", [True, False])
def test_weights_read_for_a_token(tmp_path: Path, tied: bool) -> None:
    path = write_tiny(tmp_path / "m.gguf", "llama", n_layers=1, dim=96, n_vocab=400, tied=tied)
    # q and output 128 wide, k and v 64, three of the feed-forward net 160, and the output matrix: once, tied or not.
    assert bench.weight_bytes_per_token(_core.Gguf(str(path))) == 4 * 96 * (2 * 128 + 2 * 64 + 3 * 160 + 400)


def test_prompts_are_not_in_the_prefix_cache() -> None:
    prompts = bench._Prompts(512)
    made = [prompts(100) for _ in range(50)]
    assert len({prompt[0] for prompt in made}) == 50
    assert all(len(prompt) == 100 and min(prompt) >= 0 and max(prompt) < 512 for prompt in made)


def test_read_bandwidth() -> None:
    for n_threads in (1, 2):
        assert 1e6 < _core.kernels.read_bandwidth(1 << 20, n_threads) < 1e14
    for n_bytes, n_threads in ((0, 1), (100, 2), (1 << 20, 0), ((1 << 32) + 1, 1)):
        with pytest.raises(InvalidRequest, match="n_"):
            _core.kernels.read_bandwidth(n_bytes, n_threads)


@pytest.mark.parametrize("numbers", ["int8", "float"])
def test_multiply_peak(isa: str, numbers: str) -> None:
    assert 1e6 < _core.kernels.multiply_peak(isa, numbers, 2) < 1e15
    for given in ((isa, "int4", 1), (isa, numbers, 0), ("none", numbers, 1)):
        with pytest.raises((InvalidRequest, DeviceError)):
            _core.kernels.multiply_peak(*given)


def test_beside_an_earlier_measurement_and_as_a_picture(tiny: Tiny, tmp_path: Path) -> None:
    command = ("bench", tiny("gemma2"), "--prompt", "8", "--decode", "4", "--repeat", "1")
    earlier = tmp_path / "earlier.json"
    earlier.write_bytes(program.run(*command, "--json", home=tmp_path).stdout)
    found = json.loads(earlier.read_text())
    earlier.write_text(json.dumps(found | {"peak_mib": found["peak_mib"] / 1000, "threads": 99}))
    done = program.run(*command, "--compare", earlier, home=tmp_path)
    text = done.stdout.decode()
    ratio = next(float(line.split()[-1]) for line in text.splitlines() if line.startswith("peak memory"))
    assert 500 < ratio < 2000
    assert "other threads" in text
    assert "other model" not in text
    earlier.write_text("{}")
    error = program.failure(program.run(*command, "--compare", earlier, home=tmp_path), 2)
    assert "is not what `gemmart bench --json` writes" in error
    picture = tmp_path / "bench.png"
    done = program.run(*command, "--plot", picture, home=tmp_path)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "needs matplotlib" in program.failure(done, 2)
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")
