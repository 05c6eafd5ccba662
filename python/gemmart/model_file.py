"""What a model file says: its record, its vocabulary, its advice."""

from __future__ import annotations

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from gemmart import _core
from gemmart.pooling import FILE_POOLINGS
from gemmart.progress import Progress, watch
from gemmart.results import ModelInfo
from gemmart.sources import ModelSource
from gemmart.tokenizer import Vocabulary

FINGERPRINT_BYTES = 4096
"""Of each tensor."""
SMALL_DIM = 1024
"""Width of the residual stream up to which a model is computed precisely unless told otherwise: on SmolLM2-135M (576)
and Gemma 3 270M (640), 8-bit activations change 7 of 132 and 3 of 272 greedy choices, precise ones none, and their work
is small."""


class ModelFile:
    """A model file, its headers read."""

    def __init__(self, source: ModelSource) -> None:
        self.source = source
        self.path = source.path
        self.facts = _core.ModelFacts(*source.parts)
        self.gguf = _core.Gguf(*source.parts)
        self.small = self.facts.info()["dim"] <= SMALL_DIM

    def fingerprint(self) -> str:
        """A hash that tells models apart: of the metadata, the table of tensors and the beginning of each tensor."""
        digest = hashlib.sha256()
        for key in self.gguf.keys():  # noqa: SIM118  it is no mapping
            value = _value(self.gguf, key)
            parts = value if isinstance(value, tuple) else (value,)
            digest.update(key.encode())
            for part in parts:
                digest.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        for name, dtype, shape, offset, n_bytes in self.gguf.tensors():
            digest.update(repr((name, dtype, shape, n_bytes)).encode())
            digest.update(self.gguf.read(offset, min(n_bytes, FINGERPRINT_BYTES)))
        return digest.hexdigest()

    def vocabulary(self) -> Vocabulary:
        return read_vocabulary(self.gguf, str(self.path))

    def check_weights(self, n_threads: int, progress: Progress) -> None:
        """Raises NumericError naming a weight that is NaN or infinite."""
        status = _core.Loading()
        with ThreadPoolExecutor(1, "gemmart-check") as thread:
            began = time.monotonic()
            checking = thread.submit(_core.check_weights, self.facts, n_threads=n_threads, loading=status)
            try:
                watch(checking, status, began, "checking weights", progress)
            except BaseException:
                status.cancel()
                raise
        checking.result()


def describe(gguf: _core.Gguf, facts: _core.ModelFacts, source: ModelSource) -> ModelInfo:
    """The record of a model file."""
    info = facts.info()
    formats: dict[str, int] = {}
    n_parameters = 0
    for _, dtype, shape, _, n_bytes in gguf.tensors():
        formats[dtype] = formats.get(dtype, 0) + n_bytes
        n_parameters += int(np.prod(shape, dtype=np.int64))

    def text(key: str) -> str | None:
        return str(gguf.get(key)) if key in gguf and gguf.type_of(key) == "str" else None

    return ModelInfo(
        name=text("general.name") or source.name,
        path=source.path,
        family=info["family"],
        n_layers=len(info["layers"]),
        dim=info["dim"],
        n_vocab=info["n_vocab"],
        n_ctx_train=info["n_ctx_train"],
        n_parameters=n_parameters,
        file_bytes=source.length,
        formats=formats,
        license=text("general.license"),
        chat_template=text("tokenizer.chat_template"),
    )


def metadata(gguf: _core.Gguf) -> dict[str, Any]:
    """What a file says of itself, but for lists and the chat template."""
    keys = gguf.keys()
    return {key: gguf.get(key) for key in keys if gguf.type_of(key)[-2:] != "[]" and key != "tokenizer.chat_template"}


def read_vocabulary(gguf: _core.Gguf, path: str) -> Vocabulary:
    return Vocabulary.from_gguf(lambda key, default: _value(gguf, key) if key in gguf else default, gguf.strings, path)


def general_sampling(gguf: _core.Gguf) -> dict[str, float]:
    """The file's own sampling advice, `general.sampling.*`."""
    prefix = "general.sampling."
    keys = gguf.keys()
    return {key.removeprefix(prefix): _value(gguf, key) for key in keys if key.startswith(prefix)}


def own_pooling(gguf: _core.Gguf) -> str:
    """How the file says that embeddings are pooled, or "mean"; a name that is no pooling where we do not have it."""
    key = f"{gguf.get('general.architecture')}.pooling_type"
    kind = gguf.get(key) if key in gguf else 0
    return (FILE_POOLINGS.get(kind) if isinstance(kind, int) else None) or f"pooling_type {kind}"


def _value(gguf: _core.Gguf, key: str) -> Any:
    """The value of a key, of any type."""
    return gguf.strings(key) if gguf.type_of(key) == "str[]" else gguf.get(key)
