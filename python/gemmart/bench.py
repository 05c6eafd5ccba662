"""How fast a model runs here, next to what the memory of this machine can give."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import gemmart
from gemmart import _core, sources
from gemmart.doctor import cpu_name
from gemmart.errors import InvalidRequest
from gemmart.progress import Progress
from gemmart.sampling import Sampling
from gemmart.terminal import table

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
    offline: bool,
    progress: Progress,
    notice: Callable[[str], None],
) -> dict[str, Any]:
    """Load `ref`; read `prompt` tokens and generate `decode` ones after the first, `repeat` times each. Medians.

    Raises InvalidRequest where the model's context is too short for that.
    """
    source = sources.resolve(ref, offline=offline, progress=progress, notice=notice)
    place = (str(source.path), source.offset, source.length)
    ctx = max(prompt, decode + 1) + 1
    trained = _core.ModelFacts(*place).info()["n_ctx_train"]
    if ctx > trained:
        raise InvalidRequest(
            f"--prompt {prompt}, --decode {decode}: need a context of {ctx} tokens, but {source.name} has {trained}"
        )
    began = time.perf_counter()
    with gemmart.load(
        ref,
        ctx=ctx,
        threads=threads,
        batch=batch,
        kv_type=kv_type,
        precise=precise,
        lookup=False,  # each token is computed
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
        threads, isa, precise = model.plan.threads, model.isa, model.precise

    token_bytes = weight_bytes_per_token(_core.Gguf(*place))
    least, most = BANDWIDTH_BYTES
    bandwidth = _core.kernels.read_bandwidth(min(max(token_bytes, least), most), threads)
    read_rate = median(decodes) * token_bytes
    return {
        "model": source.name,
        "cpu": cpu_name(),
        "isa": isa,
        "precise": precise,
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
            ("prefill", f"{found['prefill_tokens_per_s']:.1f} tokens/s ({found['prompt_tokens']} tokens)"),
            ("decode", f"{found['decode_tokens_per_s']:.1f} tokens/s ({found['decode_tokens']} tokens)"),
            (
                "weights read",
                f"{found['read_gb_per_s']:.2f} GB/s, {100 * found['bandwidth_share']:.0f} % of the "
                f"{found['bandwidth_gb_per_s']:.2f} GB/s that plain reading reaches",
            ),
            ("load", f"{found['load_s']:.2f} s, to the first token {found['first_token_s']:.2f} s"),
            ("peak memory", f"{found['peak_mib']:.0f} MiB"),
        ]
    )


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
