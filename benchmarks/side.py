"""One side of a comparison, in its own process: `python side.py gemmart|llama_cpp|limits OPTIONS`, with the interpreter
that has that package.

OPTIONS is a JSON object: model, threads, n_tokens (most of a sequence), n_sequences, depth, the range of `tokens` and
the seed that fill it, and what only one side knows (precise; flash). Jobs come as JSON lines on stdin, answers go as
JSON lines to stdout; the first line says what was loaded. Jobs:

{"prompts": [[id, …], …], "decode": [[id, …], …], "logits": PATH}
    Reads each prompt in a sequence of its own, then feeds decode[i], a token a sequence, in one step each, and takes
    the likeliest token of every row at every step. With a depth there are no prompts, and each sequence begins with
    `depth` tokens. Saves the first sequence's logits after the prompt and after the last step, float32 [2, n_vocab]
    (with a depth [1, n_vocab]). Answers {"prefill_s", "decode_s", "chosen"}.
{"limits": n_bytes}
    limits only, which loads no model: bytes a second of reading n_bytes from memory of the weights' kind, and
    multiplications a second: {"bandwidth", "int8", "float"}.

`side.py start OPTIONS`, with "start": TEXT, prints one token that llama-cpp-python continues the text with, and ends.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

BATCH = 512


class Side(Protocol):
    about: dict[str, Any]

    def open(self, n: int) -> None: ...  # n empty sequences, 0 to n - 1
    def read(self, sequence: int, tokens: list[int]) -> None: ...  # appends; logits of the last token
    def step(self, tokens: list[int]) -> list[int]: ...  # one token for each sequence; the likeliest next ones
    def rewind(self, length: int) -> None: ...  # all sequences
    def logits(self) -> np.ndarray: ...  # of the first row of the last read or step


class Limits:
    """What the model file announces, and what the machine can do."""

    def __init__(self, options: dict[str, Any]) -> None:
        from gemmart import _core, bench

        self._kernels, self._threads = _core.kernels, options["threads"]
        gguf = _core.Gguf(options["model"])
        self.about = {
            "isa": _core.kernels.running_isa(),
            "info": _core.ModelFacts(options["model"]).info(),
            "weight_bytes": bench.weight_bytes_per_token(gguf),
            "tensors": [[name, kind, list(shape)] for name, kind, shape, _, _ in gguf.tensors()],
        }

    def measure(self, n_bytes: int) -> dict[str, float]:
        peaks = {numbers: self._kernels.multiply_peak("", numbers, self._threads) for numbers in ("int8", "float")}
        return {"bandwidth": self._kernels.read_bandwidth(n_bytes, self._threads), **peaks}


class Gemmart:
    def __init__(self, options: dict[str, Any]) -> None:
        from gemmart import _core
        from gemmart.model_file import SMALL_DIM

        facts = _core.ModelFacts(options["model"])
        precise = facts.info()["dim"] <= SMALL_DIM if options["precise"] is None else options["precise"]
        model = _core.Model(facts, n_threads=options["threads"], n_batch=BATCH, precise=precise)
        n_sequences = options["n_sequences"]
        pages = -(-options["n_tokens"] // _core.KV_PAGE_TOKENS) + 1
        self._context = _core.Context(
            model, n_kv_tokens=n_sequences * pages * _core.KV_PAGE_TOKENS, n_sequences=n_sequences, kv_type="f16"
        )
        self._sequences: list[int] = []
        self.about = {"version": _core.version, "isa": model.isa, "precise": precise, "n_batch": BATCH}

    def open(self, n: int) -> None:
        for sequence in self._sequences:
            self._context.kv.free(sequence)
        self._context.kv.drop_cached()
        self._sequences = [self._context.kv.new_sequence() for _ in range(n)]

    def read(self, sequence: int, tokens: list[int]) -> None:
        for i in range(0, len(tokens), BATCH):
            part = np.array(tokens[i : i + BATCH], np.int32)
            last = [len(part) - 1] if i + BATCH >= len(tokens) else []
            self._context.forward(part, [(self._sequences[sequence], len(part))], last)

    def step(self, tokens: list[int]) -> list[int]:
        rows = range(len(tokens))
        self._context.forward(np.array(tokens, np.int32), [(sequence, 1) for sequence in self._sequences], rows)
        return [int(self._context.select(row, 1)[0][0]) for row in rows]

    def rewind(self, length: int) -> None:
        for sequence in self._sequences:
            if self._context.kv.trim(sequence, length) != length:
                raise RuntimeError(f"a sequence cannot be taken back to {length} tokens")

    def logits(self) -> np.ndarray:
        return self._context.row(0)


class LlamaCpp:
    """llama.cpp's own interface, without what Llama() adds to it a token."""

    def __init__(self, options: dict[str, Any]) -> None:
        import ctypes

        import llama_cpp as api

        self._api = api
        self._quiet = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        model = api.llama_model_load_from_file(options["model"].encode(), api.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp does not load the file")
        n_sequences = options["n_sequences"]
        p = api.llama_context_default_params()
        p.n_ctx = n_sequences * (-(-options["n_tokens"] // 256) * 256)
        p.n_batch, p.n_ubatch = max(BATCH, 2048), BATCH
        p.n_seq_max = n_sequences
        p.n_threads = p.n_threads_batch = options["threads"]
        p.flash_attn_type = (
            api.LLAMA_FLASH_ATTN_TYPE_ENABLED if options["flash"] else api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
        p.no_perf = True
        self._context = api.llama_init_from_model(model, p)
        if not self._context:
            raise RuntimeError("llama.cpp does not make a context")
        self._memory = api.llama_get_memory(self._context)
        self._n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
        self._batch = api.llama_batch_init(p.n_batch, 0, 1)
        self._n_batch = p.n_batch
        self._lengths: list[int] = []
        self._row = 0
        self.about = {
            "version": api.__version__,
            "system_info": api.llama_print_system_info().decode().strip(),
            "flash": options["flash"],
            "n_batch": p.n_batch,
            "n_ubatch": p.n_ubatch,
        }

    def open(self, n: int) -> None:
        self._api.llama_memory_clear(self._memory, False)
        self._lengths = [0] * n

    def _decode(self, rows: list[tuple[int, int, bool]]) -> None:
        """Rows of (sequence, token, whether it wants logits)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (sequence, token, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, self._lengths[sequence], wants
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            self._lengths[sequence] += 1
        if code := self._api.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {code}")

    def _logits(self, row: int) -> np.ndarray:
        return np.ctypeslib.as_array(self._api.llama_get_logits_ith(self._context, row), (self._n_vocab,))

    def read(self, sequence: int, tokens: list[int]) -> None:
        for i in range(0, len(tokens), self._n_batch):
            part = tokens[i : i + self._n_batch]
            last = i + len(part) == len(tokens)
            self._decode([(sequence, token, last and j == len(part) - 1) for j, token in enumerate(part)])
            self._row = len(part) - 1
        self._api.llama_synchronize(self._context)

    def step(self, tokens: list[int]) -> list[int]:
        self._decode([(sequence, token, True) for sequence, token in enumerate(tokens)])
        self._row = 0
        return [int(self._logits(row).argmax()) for row in range(len(tokens))]

    def rewind(self, length: int) -> None:
        for sequence in range(len(self._lengths)):
            if not self._api.llama_memory_seq_rm(self._memory, sequence, length, -1):
                raise RuntimeError(f"a sequence cannot be taken back to {length} tokens")
            self._lengths[sequence] = length

    def logits(self) -> np.ndarray:
        return self._logits(self._row).copy()


def fill(side: Side, options: dict[str, Any]) -> None:
    """Reads `depth` tokens, the same on each side, in each sequence."""
    rng = np.random.default_rng(options["seed"])
    side.open(options["n_sequences"])
    for sequence in range(options["n_sequences"]):
        side.read(sequence, rng.integers(*options["tokens"], options["depth"]).tolist())


def run(side: Side, depth: int, prompts: list[list[int]], decode: list[list[int]], logits: str) -> dict[str, Any]:
    if not depth:
        side.open(len(prompts))
    rows = []
    began = time.perf_counter()
    for sequence, prompt in enumerate(prompts):
        side.read(sequence, prompt)
        if sequence == 0:
            rows.append(side.logits())
    read = time.perf_counter()
    chosen = [side.step(tokens) for tokens in decode]
    decoded = time.perf_counter()
    np.save(logits, np.stack([*rows, side.logits()]))
    if depth:
        side.rewind(depth)
    return {"prefill_s": read - began if prompts else None, "decode_s": decoded - read, "chosen": chosen}


def start(options: dict[str, Any]) -> None:
    """What a small program with llama-cpp-python does for its first token."""
    import llama_cpp

    threads = options["threads"]
    model = llama_cpp.Llama(options["model"], n_threads=threads, n_threads_batch=threads, verbose=False)
    for token in model.generate(model.tokenize(options["start"].encode()), temp=0):
        print(model.detokenize([token]).decode(errors="replace"), flush=True)
        break


def main() -> None:
    name, options = sys.argv[1], json.loads(sys.argv[2])
    if name == "start":
        start(options)
        return
    answer: Callable[[dict[str, Any]], dict[str, Any]]
    if name == "limits":
        limits = Limits(options)
        about = limits.about

        def answer(job: dict[str, Any]) -> dict[str, Any]:
            return limits.measure(job["limits"])
    else:
        side: Side = Gemmart(options) if name == "gemmart" else LlamaCpp(options)
        about, depth = side.about, options["depth"]
        if depth:
            fill(side, options)

        def answer(job: dict[str, Any]) -> dict[str, Any]:
            return run(side, depth, **job)

    print(json.dumps(about), flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
