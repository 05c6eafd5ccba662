"""benchmarks/compare_llama_cpp.py: its arithmetic on made-up samples, and a run in which the other side fails."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny import write_tiny

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import compare_llama_cpp as compare  # noqa: E402

SETTINGS = {"prompt": 100, "decode": 10, "depth": 0, "parallel": 1}
WORK = {"body": 1000, "head": 500, "numbers": "int8", "weight_bytes": 900, "layers": []}
LIMITS = {"bandwidth": 1e4, "int8": 1e6, "float": 1e5}


def runs(*seconds: tuple[float | None, float]) -> list[dict]:
    return [{"prefill_s": prefill, "decode_s": decode, "limits": LIMITS} for prefill, decode in seconds]


def test_speeds() -> None:
    found = compare.speeds(runs((1.0, 2.0), (2.0, 4.0), (0.5, 1.0)), WORK, SETTINGS)
    assert found["prefill"] == {"median": 100, "min": 50, "max": 200, "rounds": [100, 50, 200]}
    assert found["decode"] == {"median": 5, "min": 2.5, "max": 10, "rounds": [5, 2.5, 10]}
    # 5 times 900 bytes a second; 100 tokens through the layers and one through the head in a second
    assert found["decode_bandwidth_share"]["median"] == pytest.approx(0.45)
    assert found["decode_peak_share"]["median"] == pytest.approx(5 * 1500 / 1e6)
    assert found["prefill_peak_share"]["median"] == pytest.approx((100 * 1000 + 500) / 1e6)
    floats = compare.speeds(runs((1.0, 2.0)), WORK | {"numbers": "float"}, SETTINGS)
    assert floats["decode_peak_share"]["median"] == pytest.approx(5 * 1500 / 1e5)


def test_speeds_of_sequences_together_and_at_a_depth() -> None:
    layers = [{"n_kv_heads": 2, "head_dim": 8, "window": 0}, {"n_kv_heads": 2, "head_dim": 8, "window": 16}]
    found = compare.speeds(
        runs((None, 2.0)), WORK | {"layers": layers}, SETTINGS | {"depth": 200, "parallel": 4, "decode": 1}
    )
    assert "prefill" not in found
    assert found["decode"]["median"] == 4 / 2
    bytes_a_step = 900 + 4 * (201 + 16) * 2 * 8 * 2 * 2  # keys and values in 16 bits
    assert found["decode_bandwidth_share"]["median"] == pytest.approx(bytes_a_step / 2 / 1e4)


def test_each_run_is_held_against_the_limits_of_its_time() -> None:
    samples = runs((1.0, 2.0), (1.0, 2.0))
    samples[1]["limits"] = LIMITS | {"bandwidth": 2e4}
    assert compare.speeds(samples, WORK, SETTINGS)["decode_bandwidth_share"]["rounds"] == pytest.approx([0.45, 0.225])


def test_ratios_are_of_medians() -> None:
    ours = compare.speeds(runs((1.0, 2.0), (1.0, 4.0), (1.0, 8.0)), WORK, SETTINGS)
    theirs = compare.speeds(runs((3.0, 4.0), (2.0, 4.0), (9.0, 16.0)), WORK, SETTINGS)
    assert compare.ratios(ours, theirs) == pytest.approx({"prefill": 3, "decode": 1})


@pytest.mark.parametrize("tied", [True, False])
def test_multiplications(tied: bool) -> None:
    tensors = [("token_embd.weight", "Q6_K", [100, 8]), ("blk.0.up", "Q4_K", [32, 8]), ("blk.0.norm", "F32", [8])]
    if not tied:
        tensors.append(("output.weight", "Q6_K", [90, 8]))
    assert compare.multiplications(tensors) == {"body": 256, "head": 800 if tied else 720, "numbers": "int8"}
    tensors.append(("blk.0.down", "BF16", [8, 64]))
    assert compare.multiplications(tensors)["numbers"] == "float"


def test_agreement() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 2, 1000))
    assert compare.agreement(a, a, [[1], [2]], [[1], [3]]) == {"correlation": pytest.approx(1), "same_choices": 0.5}
    assert compare.agreement(a, np.stack([a[0], b[1]]), [[1]], [[1]])["correlation"] < 0.2  # the worst row counts


def test_logits_that_differ_are_seen() -> None:
    for rounds, same in (([1, 0.99, 0.1], True), ([1, 0.1, 0.1], False), ([float("nan")] * 3, False)):
        logits = {"correlation": compare.spread(rounds)}
        assert compare.same_logits({"logits": logits}) == same
    assert compare.same_logits({})  # not compared


def test_a_crash_is_told_as_such() -> None:
    assert compare.failure(-11, "loading\nsome last words\n") == "crashed with SIGSEGV: some last words"
    assert compare.failure(3, "") == "ended with status 3"


@pytest.mark.parametrize("extra", [(), ("--depth", "50"), ("--parallel", "3"), ("--start",)])
def test_a_side_that_fails_does_not_end_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, extra: tuple[str, ...]
) -> None:
    model = write_tiny(tmp_path / "m.gguf", "gemma2", "Q4_K", n_ctx=256)
    peer = tmp_path / "python"
    peer.write_text("#!/bin/sh\nkill -SEGV $$\n")
    peer.chmod(0o755)
    out = tmp_path / "out.json"
    flags = ("--prompt", "40", "--decode", "4", "--rounds", "2", "--json", out, "--peer-python", peer, *extra)
    monkeypatch.setattr(sys, "argv", ["compare_llama_cpp.py", str(model), *map(str, flags)])
    monkeypatch.setattr(compare, "BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    assert compare.main() == 0
    assert "llama_cpp: crashed with SIGSEGV" in capsys.readouterr().out
    saved = json.loads(out.read_text())
    assert {"date", "cpu", "huge_pages", "versions", "command"} <= set(saved)
    (found,) = saved["results"]
    assert found["llama_cpp"]["failure"].startswith("crashed with SIGSEGV")
    if "--start" in extra:
        assert 0 < found["gemmart"]["first_token_s"]["median"] <= found["gemmart"]["end_s"]["max"]
        assert found["gemmart"]["peak_mib"]["median"] > 10
        return
    assert len(found["gemmart"]["decode"]["rounds"]) == 2
    assert ("prefill" in found["gemmart"]) == ("--depth" not in extra)
    assert found["limits"]["bandwidth"]["min"] > 0
    assert "ratios" not in found
