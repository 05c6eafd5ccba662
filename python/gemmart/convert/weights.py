"""Weights from the type they are stored in to the type that is asked for, a few MiB at a time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from gemmart.convert.families import Tensor
from gemmart.errors import NumericError
from gemmart.progress import Progress

if TYPE_CHECKING:
    from gguf import GGUFWriter

Array = npt.NDArray[Any]
TYPES = ("bf16", "f16", "f32")
DTYPES: dict[str, np.dtype[Any]] = {
    "bf16": np.dtype("<u2"),
    "f16": np.dtype("<f2"),
    "f32": np.dtype("<f4"),
}  # bfloat16 as its bits
CHUNK = 1 << 20
"""Elements computed at once; a head's rows and a vector stay together."""


def stored_type(tensors: Iterable[Tensor]) -> str:
    """The one of TYPES that loses nothing: the type of all matrices, or f32 where they have several."""
    found = {tensor.source.dtype for tensor in tensors if len(tensor.shape) > 1}
    return found.pop().lower() if len(found) == 1 else "f32"


def type_of(tensor: Tensor, matrices: str) -> str:
    """Vectors stay in float32, as readers expect."""
    return matrices if len(tensor.shape) > 1 else "f32"


def announce_tensors(writer: GGUFWriter, tensors: Iterable[Tensor], matrices: str) -> None:
    """Tell the writer names, shapes and types, before it writes the file's head."""
    from gguf import GGMLQuantizationType

    for tensor in tensors:
        name = type_of(tensor, matrices)
        n_bytes = prod(tensor.shape) * DTYPES[name].itemsize
        writer.add_tensor_info(
            tensor.name, tensor.shape, DTYPES[name], n_bytes, raw_dtype=GGMLQuantizationType[name.upper()]
        )


def write_tensors(writer: GGUFWriter, tensors: Sequence[Tensor], matrices: str, progress: Progress) -> None:
    """Write the data of `tensors`, which the writer already knows, with matrices in the type `matrices`."""
    assert writer.fout is not None
    file = writer.fout[0]
    total = sum(prod(tensor.shape) for tensor in tensors)
    done = 0
    for tensor in tensors:
        writer.write_padding(file, file.tell())
        n_rows, width = tensor.shape[0], prod(tensor.shape[1:])
        group = tensor.head_dim or (1 if len(tensor.shape) > 1 else n_rows)
        step = max(CHUNK // width // group, 1) * group
        for begin in range(0, n_rows, step):
            rows = tensor.source.rows(begin, min(begin + step, n_rows))
            file.write(converted(rows, tensor, type_of(tensor, matrices)).data)
            done += rows.size
            progress(f"converting {tensor.name}", done, total)
    writer.write_padding(file, file.tell())


def converted(rows: Array, tensor: Tensor, wanted: str) -> Array:
    """Rows as they are stored, as the file has them: in order, plus one, in the type `wanted` (one of TYPES), rounded
    to nearest, ties to even. Raises NumericError for NaN, infinity, and what the type cannot hold."""
    if tensor.head_dim:
        rows = _neighbours(rows, tensor.head_dim)
    is_bits = rows.dtype == DTYPES["bf16"]
    if rows.dtype == DTYPES[wanted] and not tensor.plus_one:
        _require_finite(rows, tensor, "stored")
        return rows
    values = (rows.astype("<u4") << 16).view("<f4") if is_bits else rows.astype("<f4")
    _require_finite(values, tensor, "stored")
    if tensor.plus_one:
        values = values + np.float32(1)
    if wanted == "f32":
        return values
    if wanted == "bf16":
        result = bfloat16_bits(values)
    else:
        with np.errstate(over="ignore"):
            result = values.astype("<f2")
    _require_finite(result, tensor, wanted)
    return result


def bfloat16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Finite float32 as bfloat16: the upper half of the bits, rounded to nearest, ties to even."""
    bits = values.view("<u4")
    rounded: npt.NDArray[np.uint32] = bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)
    return (rounded >> 16).astype(np.uint16)


def _neighbours(rows: Array, head_dim: int) -> Array:
    """Rows i and i + head_dim / 2 of each head, which rope turns together, become rows 2i and 2i + 1."""
    width = rows.shape[1]
    return np.ascontiguousarray(rows.reshape(-1, 2, head_dim // 2, width).swapaxes(1, 2)).reshape(-1, width)


def _require_finite(values: Array, tensor: Tensor, what: str) -> None:
    finite = (values & 0x7F80) != 0x7F80 if values.dtype == DTYPES["bf16"] else np.isfinite(values)
    if finite.all():
        return
    if what == "stored":
        raise NumericError(f"{tensor.source}: holds NaN or infinity; the model file is damaged")
    raise NumericError(f"{tensor.source}: holds values too large for {what}; ask for bf16 or f32")
