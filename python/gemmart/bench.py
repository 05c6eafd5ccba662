"""How fast a model runs here, next to what the memory of this machine can give."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import gemmart
from gemmart import _core, sources
from gemmart.doctor import cpu_name
from gemmart.errors import InvalidRequest
from gemmart.memory import check_fits, make_plan
from gemmart.model_file import SMALL_DIM
from gemmart.progress import Progress
from gemmart.sampling import Sampling
from gemmart.terminal import on_gpus, table

TOP_K = 64
"""Candidates that sampling with the usual settings asks for."""
GREEDY = Sampling(temperature=0)
BANDWIDTH_BYTES = (1 << 20, 1 << 30)
"""Least and most bytes that the measurement of the read bandwidth reads at a pass."""


def measure(
    ref: str | None,
    *,
    prompt: int,
    decode: int,
    repeat: int,
    threads: int | None,
    batch: int,
    kv_type: str,
    precise: bool | None,
    mmap: bool | None,
    gpu: str,
    ngl: str | int,
    device: str | None,
    split: Sequence[float] | None,
    offline: bool,
    progress: Progress,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Load `ref`; read `prompt` tokens and generate `decode` ones after the first, `repeat` times each. Medians.

    Raises InvalidRequest where the model's context is too short for that.
    """
    source = sources.resolve(ref, offline=offline, progress=progress, notice=notice)
    ctx = max(prompt, decode + 1) + 1
    _check_context(_core.ModelFacts(*source.parts), ctx, source.name, prompt, decode)
    began = time.perf_counter()
    with gemmart.load(
        ref,
        ctx=ctx,
        threads=threads,
        batch=batch,
        kv_type=kv_type,
        precise=precise,
        lookup=False,  # each token is computed
        mmap=mmap,
        gpu=gpu,
        ngl=ngl,
        device=device,
        split=split,
        offline=True,  # it was fetched above, so that load_s is loading alone
        progress=progress,
        notice=notice,
    ) as model:
        load_s = time.perf_counter() - began
        prompts = _Prompts(model.info.n_vocab)
        model.generate(prompts(1), GREEDY, max_tokens=1, ignore_eos=True)
        first_token_s = time.perf_counter() - began

        prefills, decodes = [], []
        for i in range(repeat):
            progress("measuring", 2 * i, 2 * repeat)
            read = model.generate(prompts(prompt), GREEDY, max_tokens=1, ignore_eos=True)
            prefills.append(read.timings.prompt_tokens_per_s(read.usage))
            progress("measuring", 2 * i + 1, 2 * repeat)
            written = model.generate(prompts(1), GREEDY, max_tokens=decode + 1, ignore_eos=True)
            decodes.append(written.timings.tokens_per_s(written.usage))
        progress("measuring", 2 * repeat, 2 * repeat)
        peak_mib = _peak_mib()
        on_gpu = on_gpus(model.plan) or None
        threads, isa, precise, mmap = model.plan.threads, model.isa, model.precise, model.plan.mmap

    token_bytes = weight_bytes_per_token(_core.Gguf(*source.parts))
    least, most = BANDWIDTH_BYTES
    bandwidth = _core.kernels.read_bandwidth(min(max(token_bytes, least), most), threads)
    read_rate = median(decodes) * token_bytes
    return {
        "model": source.name,
        "cpu": cpu_name(),
        "isa": isa,
        "gpu": on_gpu,
        "precise": precise,
        "mmap": mmap,
        "threads": threads,
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "repeat": repeat,
        "prefill_tokens_per_s": median(prefills),
        "decode_tokens_per_s": median(decodes),
        "weight_bytes_per_token": token_bytes,
        "read_gb_per_s": read_rate / 1e9,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "bandwidth_share": read_rate / bandwidth,
        "load_s": load_s,
        "first_token_s": first_token_s,
        "peak_mib": peak_mib,
    }


def phases(
    ref: str | None,
    *,
    prompt: int,
    decode: int,
    repeat: int,
    threads: int | None,
    batch: int,
    kv_type: str,
    precise: bool | None,
    mmap: bool | None,
    offline: bool,
    progress: Progress,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Where the time goes while `prompt` tokens are read and `decode` ones generated after them, `repeat` times:
    milliseconds a token by phase of the core, medians. "select" is the choice of candidates, "rest" what is neither.

    Raises InvalidRequest where the model's context is too short for that.
    """
    source = sources.resolve(ref, offline=offline, progress=progress, notice=notice)
    facts = _core.ModelFacts(*source.parts)
    _check_context(facts, prompt + decode, source.name, prompt, decode)
    plan = make_plan(facts, ctx=prompt + decode, parallel=1, batch=batch, threads=threads, kv_type=kv_type, mmap=mmap)
    check_fits(plan, source.name)
    info = facts.info()
    precise = info["dim"] <= SMALL_DIM if precise is None else precise
    model = _core.Model(
        facts,
        n_threads=plan.threads,
        n_batch=batch,
        precise=precise,
        mapped=plan.mmap,
        cache_bytes=plan.cache_bytes,
    )
    prompts = _Prompts(info["n_vocab"])

    def run(steps: list[list[int]], n_answers: int) -> dict[str, float]:
        """Milliseconds a token by phase of forward passes with these tokens; the last ones choose a token."""
        model.time_phases(True)
        selecting = 0.0
        began = time.perf_counter()
        for i, step in enumerate(steps):
            answers = i >= len(steps) - n_answers
            context.forward(np.array(step, np.int32), [(sequence, len(step))], [len(step) - 1] if answers else [])
            computed = time.perf_counter()
            if answers:
                context.select(0, TOP_K)
            selecting += time.perf_counter() - computed
        seconds = time.perf_counter() - began
        found = model.phase_times() | {"select": selecting}
        found["rest"] = seconds - sum(found.values())
        return {name: 1000 * value / sum(map(len, steps)) for name, value in found.items()}

    prefills, decodes = [], []
    for i in range(repeat + 1):  # the first round warms up
        progress("measuring", i, repeat + 1)
        context = _core.Context(model, n_kv_tokens=prompt + decode, n_sequences=1, kv_type=kv_type)
        sequence = context.kv.new_sequence()
        tokens = prompts(prompt + decode)
        prefills.append(run([tokens[j : min(j + batch, prompt)] for j in range(0, prompt, batch)], 1))
        decodes.append(run([[token] for token in tokens[prompt:]], decode))
    progress("measuring", repeat + 1, repeat + 1)
    return {
        "model": source.name,
        "cpu": cpu_name(),
        "isa": model.isa,
        "precise": precise,
        "threads": plan.threads,
        "prompt_tokens": prompt,
        "decode_tokens": decode,
        "repeat": repeat,
        "prefill_ms_per_token": _medians(prefills[1:]),
        "decode_ms_per_token": _medians(decodes[1:]),
    }


def weight_bytes_per_token(file: _core.Gguf) -> int:
    """Bytes of the matrices that a forward pass of one token reads whole; so not of an embedding that is not the output
    matrix too."""
    matrices = {name: n_bytes for name, _, shape, _, n_bytes in file.tensors() if len(shape) == 2}
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]
    return sum(matrices.values())


def as_text(found: dict[str, Any]) -> str:
    return table(
        [
            ("model", found["model"]),
            ("cpu", f"{found['cpu']}, {found['isa']}, threads: {found['threads']}"),
            *([("gpu", found["gpu"])] if found["gpu"] else []),
            ("prefill", f"{found['prefill_tokens_per_s']:.1f} tokens/s ({found['prompt_tokens']} tokens)"),
            ("decode", f"{found['decode_tokens_per_s']:.1f} tokens/s ({found['decode_tokens']} tokens)"),
            (
                "weights read",
                f"{found['read_gb_per_s']:.2f} GB/s"
                if found["gpu"]
                else f"{found['read_gb_per_s']:.2f} GB/s, {100 * found['bandwidth_share']:.0f} % of the "
                f"{found['bandwidth_gb_per_s']:.2f} GB/s that plain reading of this machine's memory reaches",
            ),
            ("load", f"{found['load_s']:.2f} s, to the first token {found['first_token_s']:.2f} s"),
            ("peak memory", f"{found['peak_mib']:.0f} MiB"),
        ]
    )


def phases_as_text(found: dict[str, Any]) -> str:
    rows = [("model", found["model"]), ("cpu", f"{found['cpu']}, {found['isa']}, threads: {found['threads']}")]
    for part in ("prefill", "decode"):
        times: dict[str, float] = found[f"{part}_ms_per_token"]
        total = sum(times.values())
        count = found["prompt_tokens" if part == "prefill" else "decode_tokens"]
        rows += [("", ""), (part, f"{total:8.3f} ms a token ({count} tokens)")]
        rows += [(f"  {name}", f"{ms:8.3f} {100 * ms / total:5.1f} %") for name, ms in times.items()]
    return table(rows)


def _check_context(facts: _core.ModelFacts, needed: int, name: str, prompt: int, decode: int) -> None:
    trained = facts.info()["n_ctx_train"]
    if needed > trained:
        raise InvalidRequest(
            f"--prompt {prompt}, --decode {decode}: need a context of {needed} tokens, but {name} has {trained}"
        )


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(times[name] for times in rounds) for name in rounds[0]}


class _Prompts:
    """Prompts of a given length, each beginning differently, so that none is in the prefix cache."""

    def __init__(self, n_vocab: int) -> None:
        self._n_vocab = n_vocab
        self._made = 0

    def __call__(self, n_tokens: int) -> list[int]:
        self._made += 1
        return [(self._made + 7 * i) % self._n_vocab for i in range(n_tokens)]


def _peak_mib() -> float:
    """The most memory that this process has held so far, MiB."""
    status = Path("/proc/self/status").read_text()  # getrusage would begin with the peak of the parent process
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024
