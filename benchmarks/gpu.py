#!/usr/bin/env python3
"""Everything that is to be known of gemmart on a GPU, in one call: built, checked, measured.

    python benchmarks/gpu.py                        all of it, on the first NVIDIA GPU
    python benchmarks/gpu.py --steps measure --models 2b:Q4_K_M --bandwidth 4.3

Steps: build (a module of our own kernels, and one with cuBLAS where it is found), check (the tests under the marker
`gpu`, and those of layers again under compute-sanitizer where it is), measure. Models are synthetic Gemma 2 files,
written to --folder. Measured for each: the load, decoding of one user after a short prompt, prefill of --prompt tokens
with our own kernels and with cuBLAS, and --users that decode with 1,024 tokens of context each; medians of --repeat.
Shares: the bytes of all matrices a token by --bandwidth (TB/s, as the card's memory copies), and the operations of all
layers' matrices a prompt token. A step that would end after --minutes is left out, and said so.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import gemmart
from gemmart import _core, doctor
from gemmart.bench import weight_bytes_per_token
from synthetic import SHAPES, write_synthetic

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", default=["build", "check", "measure"])
    parser.add_argument("--models", nargs="+", default=["2b:Q4_K_M", "9b:Q4_K_M", "9b:BF16", "27b:Q4_K_M"])
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for the models")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--answer", type=int, default=128)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bandwidth", type=float, default=0, help="of the GPU's memory in TB/s")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--json", type=Path, help="where to write everything")
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    found: dict[str, Any] = {"date": str(date.today()), "gpu": doctor.report()["gpu"], "models": {}}
    print(f"{found['date']}, gemmart {gemmart.__version__}: {' '.join(sys.argv)}")
    if "build" in arguments.steps:
        for name, options in (("own", ["--tinyblas"]), ("cuBLAS", [])):
            seconds = run(["gemmart", "compile", *options], ends)
            print(f"build, {name}: {seconds:.0f} s")
    if "check" in arguments.steps:
        check(ends)
    if "measure" in arguments.steps:
        for model in arguments.models:
            size, mixture = model.split(":")
            if time.monotonic() > ends:
                print(f"{model}: left out, --minutes are over")
                continue
            path = write_synthetic(arguments.folder / f"synthetic-{size}-{mixture}.gguf", size, mixture)
            found["models"][model] = measure(path, size, arguments)
            print(line(model, found["models"][model]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


def run(command: list[str], ends: float) -> float:
    began = time.monotonic()
    subprocess.run(command, check=True, timeout=max(1, ends - began), cwd=ROOT)
    return time.monotonic() - began


def check(ends: float) -> None:
    environment = {**os.environ, "GEMMART_TEST_DEVICES": "cuda"}
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    for name, tool in (
        ("tests", []),
        ("memcheck", ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9"]),
        ("racecheck", ["compute-sanitizer", "--tool", "racecheck", "--error-exitcode", "9"]),
    ):
        if tool and not shutil.which(tool[0]):
            print(f"check, {name}: left out, there is no {tool[0]}")
            continue
        command = [*tool, *tests, *(["tests/test_gpu_forward.py", "-k", "specification"] if tool else [])]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=max(1, ends - time.monotonic())
        )
        last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
        print(f"check, {name}: {'passed' if done.returncode == 0 else 'FAILED'}: {last}", flush=True)


def measure(path: Path, size: str, arguments: argparse.Namespace) -> dict[str, Any]:
    facts = _core.ModelFacts(str(path)).info()
    n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim, _ = SHAPES[size]
    per_layer = 2 * dim * head_dim * (n_heads + n_kv_heads) + 3 * dim * ffn_dim
    out: dict[str, Any] = {}
    for tinyblas in (True, False):
        began = time.monotonic()
        with gemmart.load(
            path,
            ngl="all",
            ctx=arguments.prompt + 2 * arguments.answer,
            batch=arguments.prompt,
            parallel=arguments.users,
            lookup=False,
            tinyblas=tinyblas,
        ) as model:
            load_s = time.monotonic() - began
            prompts = Prompts(facts["n_vocab"])
            tokens_per_s = repeated(arguments, partial(prefill, model, prompts, arguments.prompt))
            out["prefill_own" if tinyblas else "prefill_blas"] = {
                "tokens_per_s": tokens_per_s,
                "tflop_per_s": 2e-12 * per_layer * n_layers * tokens_per_s,
            }
            if not tinyblas:
                continue
            decode = repeated(arguments, partial(decoding, model, prompts, min(64, arguments.prompt), arguments.answer))
            n_bytes = weight_bytes_per_token(_core.Gguf(str(path)))
            out |= {
                "load_s": load_s,
                "decode_tokens_per_s": decode,
                "decode_tb_per_s": 1e-12 * n_bytes * decode,
                "bandwidth_share": 1e-12 * n_bytes * decode / arguments.bandwidth if arguments.bandwidth else None,
                "users_tokens_per_s": repeated(arguments, partial(users, model, prompts, arguments)),
            }
    return out


class Prompts:
    """New random tokens each time, so that no prefix is known."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab, self.seed = n_vocab, 0

    def __call__(self, n: int) -> list[int]:
        self.seed += 1
        return np.random.default_rng(self.seed).integers(300, self.n_vocab, n).tolist()


def repeated(arguments: argparse.Namespace, once: Callable[[], float]) -> float:
    once()  # warm
    return median(once() for _ in range(arguments.repeat))


def prefill(model: gemmart.Model, prompts: Prompts, n: int) -> float:
    answer = model.generate(prompts(n), max_tokens=1, ignore_eos=True)
    return answer.timings.prompt_tokens_per_s(answer.usage)


def decoding(model: gemmart.Model, prompts: Prompts, n_prompt: int, n: int) -> float:
    answer = model.generate(prompts(n_prompt), max_tokens=n, ignore_eos=True)
    return answer.timings.tokens_per_s(answer.usage)


def users(model: gemmart.Model, prompts: Prompts, arguments: argparse.Namespace) -> float:
    """Tokens a second of all users together while all of them decode."""
    some = [prompts(min(1024, arguments.prompt)) for _ in range(arguments.users)]
    with ThreadPoolExecutor(arguments.users) as pool:
        answers = list(pool.map(lambda p: model.generate(p, max_tokens=arguments.answer, ignore_eos=True), some))
    return sum(a.timings.tokens_per_s(a.usage) for a in answers)


def line(model: str, found: dict[str, Any]) -> str:
    share = f", {100 * found['bandwidth_share']:.0f} % of the bandwidth" if found["bandwidth_share"] else ""
    own, blas = found["prefill_own"], found["prefill_blas"]
    return (
        f"{model}: load {found['load_s']:.2f} s; decode {found['decode_tokens_per_s']:.1f} tokens/s, "
        f"{found['decode_tb_per_s']:.2f} TB/s{share}; prefill {own['tokens_per_s']:.0f} tokens/s, "
        f"{own['tflop_per_s']:.0f} TFLOP/s, {own['tokens_per_s'] / blas['tokens_per_s']:.2f} x with cuBLAS; "
        f"all users {found['users_tokens_per_s']:.0f} tokens/s"
    )


if __name__ == "__main__":
    main()
