"""Writing a model's file with its weights in other storage formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from gemmart import _core, sources
from gemmart.errors import InvalidRequest, ModelFormatError
from gemmart.machine import usable_cores
from gemmart.mixtures import FLOATS, Facts, format_for, mixture_named
from gemmart.new_file import check_target, new_file
from gemmart.progress import Progress, no_progress
from gemmart.sampling import check_number
from gemmart.sources import ModelSource, store
from gemmart.terminal import mib, table

if TYPE_CHECKING:
    from gemmart.imatrix import Imatrix

SLICE_WEIGHTS = 1 << 25
"""Weights that are converted at once: what a conversion holds in memory."""
WRITTEN_ANEW = ("general.architecture", "general.file_type", "general.quantization_version")


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """What a tensor becomes."""

    name: str
    shape: tuple[int, ...]
    format: str
    n_bytes: int
    new_format: str
    new_bytes: int

    @property
    def changes(self) -> bool:
        return self.new_format != self.format


@dataclass(frozen=True, slots=True)
class QuantizePlan:
    """What a model's file becomes."""

    source: ModelSource
    mixture: str
    tensors: tuple[TensorPlan, ...]

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def new_bytes(self) -> int:
        return sum(tensor.new_bytes for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Of the new file, over all tensors."""
        return 8 * self.new_bytes / max(1, sum(prod(tensor.shape) for tensor in self.tensors))


def quantize(
    ref: str | Path,
    out: str | Path,
    mixture: str,
    *,
    imatrix: Imatrix | None = None,
    output_type: str | None = None,
    embedding_type: str | None = None,
    leave_output: bool = False,
    allow_requantize: bool = False,
    force: bool = False,
    threads: int | None = None,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> QuantizePlan:
    """Write the model `ref` to the file `out` with its matrices in the formats of `mixture`, such as "Q4_K_M".

    imatrix: how much each column of each matrix matters (gemmart.imatrix). output_type, embedding_type: formats of the
    output matrix and of the token embedding. leave_output: the output matrix stays as it is. allow_requantize: weights
    that are quantised already are quantised again, which loses more than quantising the originals. force: a file `out`
    is replaced. threads: None for the physical cores that may be used. offline, progress, notice: as for load().

    The file appears when it is whole: after an error there is what was there before. Raises InvalidRequest,
    ModelNotFound, ModelFormatError (for weights that are not finite too), DiskFull, DownloadError."""
    notice = notice or no_notice
    plan = make_plan(
        sources.resolve(str(ref), offline=offline, progress=progress, notice=notice),
        mixture,
        imatrix=imatrix,
        output_type=output_type,
        embedding_type=embedding_type,
        leave_output=leave_output,
        allow_requantize=allow_requantize,
    )
    if threads is not None:
        check_number("threads", threads, int, 1, 1024)
    if imatrix is None and plan.mixture == "Q2_K_S":
        notice("Q2_K_S without an importance matrix loses much; `gemmart imatrix` makes one")
    target = check_target(out, force=force, source=plan.source.path)
    store.require_space(target.parent, plan.new_bytes)
    file = open_gguf(plan.source)
    with new_file(target, force=force, n_bytes=plan.new_bytes) as path:
        writer = GGUFWriter(path, str(file.get("general.architecture")))
        try:
            write_head(writer, file, plan, imatrix, notice)
            write_tensors(writer, file, plan, imatrix, threads or usable_cores(), progress or no_progress)
        finally:
            writer.close()
        file.check_unchanged()
    return plan


def make_plan(
    source: ModelSource,
    mixture: str,
    *,
    imatrix: Imatrix | None = None,
    output_type: str | None = None,
    embedding_type: str | None = None,
    leave_output: bool = False,
    allow_requantize: bool = False,
) -> QuantizePlan:
    """What quantize() with these options would make of a file, from its headers alone. Raises as that does."""
    name, rules = mixture_named(mixture)
    output_type, embedding_type = (
        check_format("output_type", output_type),
        check_format("embedding_type", embedding_type),
    )
    file = open_gguf(source)
    facts = facts_of(file, has_imatrix=imatrix is not None)
    sizes = {format: (size, n_bytes) for format, _, size, n_bytes in _core.formats()}
    tensors = []
    for tensor, format, shape, _, n_bytes in file.tensors():
        is_output = tensor == ("token_embd.weight" if facts.tied_output else "output.weight")
        new_format = format_for(
            rules, facts, tensor, shape, output_type=output_type, embedding_type=embedding_type
        ) or ("F32" if len(shape) == 1 else format)
        if leave_output and is_output:
            new_format = format
        if new_format != format and format not in FLOATS and not allow_requantize:
            raise InvalidRequest(
                f"{source.path}: {tensor} is {format} already and would become {new_format}; quantise the original "
                "float model, or allow it with --allow-requantize, which loses more"
            )
        if imatrix is not None and tensor in imatrix.squares and imatrix.squares[tensor].size != shape[-1]:
            raise InvalidRequest(
                f"imatrix: {tensor} has {imatrix.squares[tensor].size} columns there and {shape[-1]} in the model: "
                "it is another model's"
            )
        size, block_bytes = sizes[new_format]
        tensors.append(TensorPlan(tensor, shape, format, n_bytes, new_format, prod(shape) // size * block_bytes))
    return QuantizePlan(source, name, tuple(tensors))


def facts_of(file: _core.Gguf, *, has_imatrix: bool) -> Facts:
    """What the rules of mixtures ask. Raises ModelFormatError for a file without an architecture."""
    if "general.architecture" not in file:
        raise ModelFormatError(f"{file.path}: general.architecture is missing: it is not a model")
    family = str(file.get("general.architecture"))
    names = {name for name, *_ in file.tensors()}

    def number(key: str, default: int) -> int:
        found = file.get(f"{family}.{key}") if f"{family}.{key}" in file else default
        return int(np.max(found))  # some have one for each layer

    heads = number("attention.head_count", 1)
    return Facts(
        family=family,
        n_layers=number("block_count", 0),
        group=heads // max(1, number("attention.head_count_kv", heads)),
        tied_output="output.weight" not in names,
        has_imatrix=has_imatrix,
    )


def open_gguf(source: ModelSource) -> _core.Gguf:
    return _core.Gguf(*source.parts)


def check_format(option: str, name: str | None) -> str | None:
    """The name of a format that can be written, in its own case."""
    if name is None or name.upper() in _core.quantizable():
        return name and name.upper()
    raise InvalidRequest(f"{option}: {name!r} is none of {', '.join(_core.quantizable())}")


def write_head(
    writer: GGUFWriter, file: _core.Gguf, plan: QuantizePlan, imatrix: Imatrix | None, notice: Callable[[str], None]
) -> None:
    """Everything but the tensors' data."""
    copy_metadata(file, writer, notice)
    writer.add_file_type(mixture_named(plan.mixture)[1].file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if imatrix is not None:
        writer.add_string("quantize.imatrix.file", imatrix.name)
        writer.add_string("quantize.imatrix.dataset", ", ".join(imatrix.datasets))
        writer.add_uint32("quantize.imatrix.entries_count", len(imatrix.squares))
        writer.add_uint32("quantize.imatrix.chunks_count", imatrix.n_chunks)
    for tensor in plan.tensors:
        kind = GGMLQuantizationType[tensor.new_format]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.new_bytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def copy_metadata(file: _core.Gguf, writer: GGUFWriter, notice: Callable[[str], None]) -> None:
    """All keys of a file but those that quantising writes anew, in their types."""
    kinds = {
        "u8": GGUFValueType.UINT8,
        "i8": GGUFValueType.INT8,
        "u16": GGUFValueType.UINT16,
        "i16": GGUFValueType.INT16,
        "u32": GGUFValueType.UINT32,
        "i32": GGUFValueType.INT32,
        "u64": GGUFValueType.UINT64,
        "i64": GGUFValueType.INT64,
        "f32": GGUFValueType.FLOAT32,
        "f64": GGUFValueType.FLOAT64,
        "bool": GGUFValueType.BOOL,
        "str": GGUFValueType.STRING,
    }
    for key in file.keys():  # noqa: SIM118  not a mapping
        if key in WRITTEN_ANEW or key.startswith("quantize.imatrix."):
            continue
        name, array, _ = file.type_of(key).partition("[]")
        if key == "general.alignment":
            writer.add_custom_alignment(file.get(key))
        elif not array:
            writer.add_key_value(key, file.get_bytes(key) if name == "str" else file.get(key), kinds[name])
        else:
            values = strings(file, key) if name == "str" else file.get(key).tolist()
            if values:
                writer.add_key_value(key, values, GGUFValueType.ARRAY, kinds[name])
            else:
                notice(f"{file.path}: {key} is an empty array, which is left out")


def strings(file: _core.Gguf, key: str) -> list[bytes]:
    """An array of strings, as the file has them."""
    blob, offsets = file.strings(key)
    data, at = blob.tobytes(), offsets.tolist()
    return [data[begin:end] for begin, end in pairwise(at)]


def write_tensors(
    writer: GGUFWriter,
    file: _core.Gguf,
    plan: QuantizePlan,
    imatrix: Imatrix | None,
    threads: int,
    progress: Progress,
) -> None:
    total = sum(prod(tensor.shape) for tensor in plan.tensors)
    done = 0
    progress("quantising", 0, total)
    for tensor in plan.tensors:
        importance = imatrix.importance(tensor.name) if imatrix is not None else None

        def slices(
            tensor: TensorPlan = tensor, importance: NDArray[np.float32] | None = importance
        ) -> Iterator[NDArray[np.uint8]]:
            nonlocal done
            n_cols = tensor.shape[-1]
            n_rows = prod(tensor.shape[:-1])
            step = max(1, SLICE_WEIGHTS // n_cols)
            for first in range(0, n_rows, step):
                n = min(step, n_rows - first)
                yield _core.quantize_tensor(
                    file,
                    tensor.name,
                    tensor.new_format,
                    first_row=first,
                    n_rows=n,
                    importance=importance,
                    n_threads=threads,
                )
                done += n * n_cols
                progress("quantising", done, total)

        writer.write_tensor_data(cast("NDArray[np.uint8]", TensorData(tensor.new_bytes, slices())))


@dataclass(frozen=True, slots=True)
class TensorData:
    """A tensor's bytes for GGUFWriter, which asks no more of an array: made as they are written."""

    nbytes: int
    slices: Iterator[NDArray[np.uint8]]

    def tofile(self, file: IO[bytes]) -> None:
        for part in self.slices:
            file.write(part.data)


def no_notice(text: str) -> None:
    """A notice that tells nobody."""


def as_json(plan: QuantizePlan) -> dict[str, Any]:
    return {
        "model": plan.source.name,
        "type": plan.mixture,
        "bytes": plan.n_bytes,
        "new_bytes": plan.new_bytes,
        "bits_per_weight": plan.bits_per_weight,
        "tensors": [asdict(tensor) for tensor in plan.tensors],
    }


def as_text(plan: QuantizePlan) -> str:
    """A line a tensor, then the sum."""
    rows = [
        (
            tensor.name,
            f"{' × '.join(map(str, tensor.shape)):>16}  {tensor.format:>7} → {tensor.new_format:7} "
            f"{mib(tensor.new_bytes):>14}",
        )
        for tensor in plan.tensors
    ]
    total = f"{mib(plan.n_bytes)} → {mib(plan.new_bytes)}, {plan.bits_per_weight:.2f} bits a weight"
    return table([*rows, ("", ""), (plan.mixture, total)])
