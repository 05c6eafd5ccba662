"""The measurements of `gemmart bench`: their shape and what they count, never how fast."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

import program
from gemmart import _core, bench
from gemmart.errors import DeviceError, InvalidRequest
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
