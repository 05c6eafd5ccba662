"""The C++ core: the border as a contract. Shapes, dtypes and errors are in each docstring of the module itself."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

version: str
KV_PAGE_TOKENS: int
KV_SLACK: int
KV_CHUNK: int

# Files (module_gguf.cpp)

def formats() -> list[tuple[str, int, int, int]]: ...  # name, GGUF type id, weights a block, bytes a block
def decode(format_name: str, data: Any) -> NDArray[np.float32]: ...

StrPath = str | bytes | os.PathLike[str]
Part = StrPath | tuple[StrPath, int, int]  # (path, offset, length); length 0: all to the end

class Gguf:
    def __init__(self, *parts: Part) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def version(self) -> int: ...
    def __contains__(self, key: str) -> bool: ...
    def keys(self) -> list[str]: ...
    def type_of(self, key: str) -> str: ...
    def get(self, key: str) -> Any: ...
    def get_bytes(self, key: str) -> bytes: ...
    def strings(self, key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]: ...
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]: ...  # name, format, shape, offset, bytes
    def read(self, offset: int, n: int) -> bytes: ...
    def check_unchanged(self) -> None: ...

# Keys and values (module_kv.cpp)

def kv_head_layout(kv_type: str, head_dim: int) -> dict[str, int]: ...

class KvCache:
    def __init__(
        self, *, layers: Sequence[tuple[int, int, int]], kv_type: str, n_tokens: int, n_sequences: int, slack: int
    ) -> None: ...
    def new_sequence(self) -> int: ...
    def fork(self, seq: int, upto: int) -> int: ...
    def trim(self, seq: int, upto: int) -> int: ...
    def match_prefix(self, ids: NDArray[np.int32], salt: int = 0) -> tuple[int, int]: ...  # sequence, length
    def restore(self, n: int, held_from: int, salt: int) -> int: ...
    def free(self, seq: int) -> None: ...
    def reserve(self, seq: int, n: int) -> None: ...
    def commit(self, seq: int, ids: NDArray[np.int32]) -> None: ...
    def can_hold(self, seqs: Sequence[int], counts: Sequence[int]) -> bool: ...
    def drop_cached(self) -> None: ...
    def length(self, seq: int) -> int: ...
    def is_open(self, seq: int) -> bool: ...
    def pages(self, seq: int, group: str) -> NDArray[np.int32]: ...  # group: global or windowed
    def part_bytes(self, layer: int) -> int: ...
    def read_page(self, layer: int, page: int) -> NDArray[np.uint8]: ...  # [part_bytes(layer)]
    def write_page(self, layer: int, page: int, data: NDArray[np.uint8]) -> None: ...
    def stats(self) -> dict[str, Any]: ...  # global, windowed: {n_pages, n_free, n_cached, page_bytes}; n_sequences

# Models (module_model.cpp)

class ModelFacts:
    def __init__(self, *parts: Part) -> None: ...
    def info(self) -> dict[str, Any]: ...
    def memory_need(
        self,
        *,
        n_threads: int,
        n_batch: int,
        n_kv_tokens: int,
        n_sequences: int,
        kv_type: str,
        n_gpu_layers: int = 0,
        gpu_head: bool = False,
    ) -> dict[str, int]: ...  # packed_weights, mapped_weights, buffers, kv
    def gpu_need(
        self,
        module: GpuModule,
        *,
        n_layers: int,
        head: bool,
        n_batch: int,
        n_kv_tokens: int,
        n_sequences: int,
        kv_type: str,
        n_behind: int = 0,
    ) -> dict[str, int]: ...  # weights, buffers, kv

class GpuModule:
    def __init__(self, path: str) -> None: ...
    @property
    def path(self) -> str: ...
    def build(self) -> dict[str, str]: ...  # backend, version, compiler, archs, gemm
    def devices(self) -> list[dict[str, Any]]: ...

class Loading:
    def __init__(self) -> None: ...
    @property
    def done(self) -> int: ...  # bytes
    @property
    def total(self) -> int: ...
    def cancel(self) -> None: ...

def check_weights(facts: ModelFacts, *, n_threads: int, loading: Loading) -> None: ...

class Model:
    def __init__(
        self,
        facts: ModelFacts,
        *,
        n_threads: int,
        n_batch: int,
        precise: bool,
        mapped: bool = False,
        cache_bytes: int = 2**64 - 1,
        locked: bool = False,
        gpu: Sequence[tuple[GpuModule, int, int]] = (),
        gpu_head: bool = False,
        own_gemm: bool = False,
        loading: Loading | None = None,
    ) -> None: ...
    @property
    def isa(self) -> str: ...
    def time_phases(self, on: bool) -> None: ...
    def phase_times(self) -> dict[str, float]: ...  # seconds by phase
    def sum_input_squares(self, on: bool) -> None: ...
    def input_squares(self) -> dict[str, tuple[NDArray[np.float64], int]]: ...  # sums [n_cols] and rows by tensor

class Context:
    def __init__(self, model: Model, *, n_kv_tokens: int, n_sequences: int, kv_type: str) -> None: ...
    def forward(
        self,
        tokens: NDArray[np.int32],
        runs: Sequence[tuple[int, int]],
        outputs: Sequence[int],
        hidden: Sequence[int] = (),
    ) -> list[bool]: ...
    def logits(self) -> NDArray[np.float32]: ...  # [n_outputs, n_vocab]
    def hidden(self) -> NDArray[np.float32]: ...  # [n_hidden, dim]
    def row(self, output: int) -> NDArray[np.float32]: ...  # [n_vocab]
    def select(
        self,
        output: int,
        k: int,
        *,
        bias_ids: NDArray[np.int32] = ...,
        bias: NDArray[np.float32] = ...,
        recent: NDArray[np.int32] = ...,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        mask: NDArray[np.int32] = ...,
    ) -> tuple[NDArray[np.int32], NDArray[np.float32], float]: ...  # ids, logits, logsumexp
    @property
    def kv(self) -> KvCache: ...

# Writing formats (module_quantize.cpp)

def quantizable() -> list[str]: ...
def quantize(
    format_name: str, x: NDArray[np.float32], *, importance: NDArray[np.float32] | None = None, n_threads: int = 1
) -> NDArray[np.uint8]: ...  # [n_rows, n_cols] -> [n_rows, bytes of a row]
def quantize_tensor(
    file: Gguf,
    name: str,
    format_name: str,
    *,
    first_row: int,
    n_rows: int,
    importance: NDArray[np.float32] | None = None,
    n_threads: int = 1,
) -> NDArray[np.uint8]: ...

# Kernels (module_kernels.cpp): a submodule; isa "" is the best one, or GEMMART_ISA

class kernels:
    class Bench:
        def __init__(self, isa: str, *, n_threads: int, n_bytes: int) -> None: ...
        def matmul(self, format: str, n_tokens: int) -> tuple[float, float, float]: ...  # seconds, bytes, products
        def attention(self, kv_type: str, n_tokens: int) -> tuple[float, float, float]: ...
        def vectors(self) -> list[tuple[str, float]]: ...  # name, numbers a second

    @staticmethod
    def isas() -> list[tuple[str, bool, bool, str]]: ...  # name, built, usable, why not; weakest first
    @staticmethod
    def running_isa(isa: str = "") -> str: ...
    @staticmethod
    def read_bandwidth(n_bytes: int, n_threads: int) -> float: ...  # bytes a second
    @staticmethod
    def multiply_peak(isa: str, numbers: str, n_threads: int) -> float: ...  # numbers: int8 or float; a second
    @staticmethod
    def has_panels(format: str) -> bool: ...
    @staticmethod
    def matmul(
        isa: str,
        format: str,
        weights: NDArray[np.uint8],
        x: NDArray[np.float32],
        *,
        packed: bool = True,
        two_terms: bool = False,
        panels: Sequence[int] = (),
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def quantize(isa: str, x: NDArray[np.float32], *, two_terms: bool = False) -> dict[str, NDArray[Any]]: ...
    @staticmethod
    def rms_norm(isa: str, x: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float32]: ...
    @staticmethod
    def add(isa: str, x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]: ...
    @staticmethod
    def scale(isa: str, x: NDArray[np.float32], s: float) -> NDArray[np.float32]: ...
    @staticmethod
    def gate(isa: str, act: str, gate: NDArray[np.float32], up: NDArray[np.float32]) -> NDArray[np.float32]: ...
    @staticmethod
    def softcap(isa: str, x: NDArray[np.float32], cap: float) -> NDArray[np.float32]: ...
    @staticmethod
    def all_finite(isa: str, x: NDArray[np.float32]) -> bool: ...
    @staticmethod
    def find_above(isa: str, x: NDArray[np.float32], begin: int, limit: float) -> int: ...
    @staticmethod
    def sum_exp(isa: str, x: NDArray[np.float32], from_: float) -> float: ...
    @staticmethod
    def rope(
        isa: str, x: NDArray[np.float32], cosines: NDArray[np.float32], sines: NDArray[np.float32], neox: bool
    ) -> NDArray[np.float32]: ...
    @staticmethod
    def attention(
        isa: str,
        kv_type: str,
        keys: NDArray[np.float32],
        values: NDArray[np.float32],
        queries: NDArray[np.float32],
        positions: Sequence[int],
        *,
        window: int = 0,
        softcap: float = 0.0,
        split: bool = False,
    ) -> NDArray[np.float32]: ...
