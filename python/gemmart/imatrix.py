"""Importance matrices: for each column of a model's matrices, the mean square of what it is multiplied with.

An error in a weight changes the result by that error times the input, so the mean square of a column's inputs is what
the square of an error in that column costs. The files are those of llama.cpp.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from gemmart import _core, show, sources
from gemmart.errors import GemmartError, InvalidRequest, ModelFormatError, NumericError
from gemmart.memory import check_fits, make_plan
from gemmart.model_file import SMALL_DIM
from gemmart.new_file import check_target, new_file
from gemmart.perplexity import cut
from gemmart.progress import Progress, no_progress
from gemmart.quantize import strings
from gemmart.sampling import check_number

SUMS, COUNTS = ".in_sum2", ".counts"


@dataclass(frozen=True, slots=True)
class Imatrix:
    """Sums of squared inputs by tensor, float64 [n_cols], and over how many tokens they are."""

    name: str  # of the file, or of the model
    squares: Mapping[str, NDArray[np.float64]]
    counts: Mapping[str, int]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int  # tokens

    def importance(self, name: str) -> NDArray[np.float32] | None:
        """The mean squares of a tensor's inputs, float32 [n_cols]; None where they were not measured."""
        if not self.counts.get(name):
            return None
        return (self.squares[name] / self.counts[name]).astype(np.float32)


def collect(
    ref: str | Path,
    text: str,
    *,
    dataset: str = "text",
    n_ctx: int = 512,
    n_chunks: int | None = None,
    threads: int | None = None,
    mmap: bool | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Imatrix:
    """Run a text through the model `ref`, in chunks of n_ctx tokens, and measure the inputs of its layers' matrices;
    those of the output matrix and the embedding are not measured.

    dataset: the text's name. n_chunks: how many chunks at most; None: all that the text has. The others are those of
    load(). Raises as that does, and InvalidRequest where the text has not n_ctx tokens."""
    progress = progress or no_progress
    source = sources.resolve(str(ref), offline=offline, progress=progress, notice=notice)
    facts = _core.ModelFacts(*source.parts)
    info = facts.info()
    check_number("n_ctx", n_ctx, int, 4, info["n_ctx_train"])
    if n_chunks is not None:
        check_number("n_chunks", n_chunks, int, 1, 2**31 - 1)
    batch = min(n_ctx, _core.KV_CHUNK)
    plan = make_plan(facts, ctx=n_ctx, parallel=1, batch=batch, threads=threads, kv_type="f16", mmap=mmap)
    check_fits(plan, source.name)
    chunks = cut(show.tokenizer(source).encode, text, n_ctx)[:n_chunks]
    progress("loading", 0, None)
    model = _core.Model(
        facts,
        n_threads=plan.threads,
        n_batch=batch,
        precise=info["dim"] <= SMALL_DIM,
        mapped=plan.mmap,
        cache_bytes=plan.cache_bytes,
    )
    context = _core.Context(model, n_kv_tokens=n_ctx, n_sequences=1, kv_type="f16")
    model.sum_input_squares(True)
    for i, chunk in enumerate(chunks):
        progress("measuring inputs", i, len(chunks))
        sequence = context.kv.new_sequence()
        for start in range(0, n_ctx, batch):
            part = np.array(chunk[start : start + batch], np.int32)
            context.forward(part, [(sequence, len(part))], [])
        context.kv.free(sequence)
    progress("measuring inputs", len(chunks), len(chunks))
    found = model.input_squares()
    for name, (squares, _) in found.items():
        if not np.isfinite(squares).all():
            raise NumericError(f"{source.path}: the inputs of {name} are not finite")
    return Imatrix(
        source.name,
        {name: squares for name, (squares, _) in found.items()},
        {name: n_rows for name, (_, n_rows) in found.items()},
        (dataset,),
        len(chunks),
        n_ctx,
    )


def write(imatrix: Imatrix, out: str | Path, *, force: bool = False) -> None:
    """A GGUF file as llama.cpp has them. Raises InvalidRequest (it exists and there is no `force`), DiskFull."""
    target = check_target(out, force=force)
    with new_file(target, force=force) as path:
        writer = GGUFWriter(path, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", imatrix.datasets)
        writer.add_uint32("imatrix.chunk_count", imatrix.n_chunks)
        writer.add_uint32("imatrix.chunk_size", imatrix.chunk_size)
        for name in sorted(imatrix.squares):
            writer.add_tensor(name + SUMS, imatrix.squares[name].astype(np.float32))
            writer.add_tensor(name + COUNTS, np.array([imatrix.counts[name]], np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read(path: str | Path) -> Imatrix:
    """A file of `write` or llama.cpp; its older format too. Raises InvalidRequest where it cannot be read,
    ModelFormatError where it is none."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        return _read_gguf(path) if is_gguf else _read_dat(path)
    except GemmartError:
        raise
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be read: {error.strerror}") from error


def _read_gguf(path: Path) -> Imatrix:
    file = _core.Gguf(path)
    tensors = {name: shape for name, _, shape, _, _ in file.tensors()}

    def values(name: str) -> NDArray[np.float64]:
        n_rows = prod(tensors[name][:-1])
        data = _core.quantize_tensor(file, name, "F32", first_row=0, n_rows=n_rows)
        return data.view(np.float32).astype(np.float64)

    squares, counts = {}, {}
    for name in tensors:
        if name.endswith(SUMS):
            tensor = name.removesuffix(SUMS)
            if tensor + COUNTS not in tensors:
                raise ModelFormatError(f"{path}: {name} has no {tensor}{COUNTS} beside it")
            squares[tensor] = values(name).sum(axis=0)  # several matrices of a tensor are experts
            counts[tensor] = int(values(tensor + COUNTS).sum())
    if not squares:
        raise ModelFormatError(f"{path}: is no importance matrix: it has no tensor *{SUMS}")

    def number(key: str) -> int:
        return int(file.get(key)) if key in file else 0

    names = strings(file, "imatrix.datasets") if "imatrix.datasets" in file else []
    datasets = tuple(name.decode("utf-8", "replace") for name in names)
    return Imatrix(path.name, squares, counts, datasets, number("imatrix.chunk_count"), number("imatrix.chunk_size"))


def _read_dat(path: Path) -> Imatrix:
    """n i32, n × (name, calls i32, n_values i32, values f32: means × calls), then, if there, chunks i32, dataset; a
    string: length i32, bytes."""
    data, at = path.read_bytes(), 0

    def take(format: str) -> int:
        nonlocal at
        (value,) = struct.unpack_from("<" + format, data, at)
        at += struct.calcsize(format)
        return int(value)

    def raw(n: int) -> bytes:
        nonlocal at
        if n < 0 or n > len(data) - at:
            raise struct.error
        at += n
        return data[at - n : at]

    squares, counts = {}, {}
    try:
        for _ in range(take("i")):
            name = raw(take("i")).decode()
            calls = take("i")
            squares[name] = np.frombuffer(raw(4 * take("i")), "<f4").astype(np.float64)
            counts[name] = max(calls, 1)
        n_chunks = take("i") if at < len(data) else 0
        dataset = raw(take("i")).decode("utf-8", "replace") if at < len(data) else ""
    except (struct.error, UnicodeDecodeError):
        raise ModelFormatError(f"{path}: is no importance matrix, or is cut off at byte {at}") from None
    if not squares:
        raise ModelFormatError(f"{path}: is no importance matrix: it has no tensor")
    return Imatrix(path.name, squares, counts, (dataset,) if dataset else (), n_chunks, 0)
