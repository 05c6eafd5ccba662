"""Safetensors files: 8 bytes with the length of a header, the header in JSON, then the tensors without gaps.

Read here and not with the `safetensors` package, whose NumPy interface knows no bfloat16. Data is read, not mapped, so
that a file cut short in the meantime is an error and no signal.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import numpy.typing as npt

from gemmart.convert.folder import ModelFolder, parse_object, regular_file, shown
from gemmart.errors import ModelChanged, ModelFormatError, ModelNotFound, TruncatedModel, UnsupportedModel

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the format's own library."""

INDEX = "model.safetensors.index.json"
STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
"""The types that weights may have here, as NumPy reads them: bfloat16 as its bits."""

BYTES = {"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}  # fmt: skip
BYTES |= {name: dtype.itemsize for name, dtype in STORED.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file; nothing of it is in memory."""

    name: str
    path: Path
    dtype: str  # as the format names it
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file

    def __str__(self) -> str:
        return f"{self.path}: tensor {self.name}"

    def rows(self, begin: int, end: int) -> npt.NDArray[Any]:
        """Rows [begin, end) of a matrix, or elements of a vector, in a type of STORED."""
        dtype = STORED[self.dtype]
        width = prod(self.shape[1:])
        wanted = (end - begin) * width * dtype.itemsize
        try:
            with self.path.open("rb") as file:
                data = os.pread(file.fileno(), wanted, self.offset + begin * width * dtype.itemsize)
        except OSError as error:
            raise ModelFormatError(f"{self}: cannot be read: {error.strerror}") from error
        if len(data) < wanted:
            raise ModelChanged(f"{self.path}: was cut short while it was read")
        return np.frombuffer(data, dtype).reshape(end - begin, *self.shape[1:])


def read_checkpoint(folder: ModelFolder) -> dict[str, StoredTensor]:
    """All tensors of a model folder, by name: those of the files that its index lists, of model.safetensors, or of
    all *.safetensors."""
    if folder.has(INDEX):
        weight_map = folder.json(INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelFormatError(f"{folder.path / INDEX}: weight_map is missing")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
                raise ModelFormatError(
                    f"{folder.path / INDEX}: {tensor} is in {shown(name)}, expected a .safetensors file of this folder"
                )
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if not folder.has(name)]
        if missing:
            raise ModelNotFound(f"{folder.path}: {missing[0]} is missing, which {INDEX} lists; fetch all its parts")
    elif folder.has("model.safetensors"):
        weight_map, names = None, ["model.safetensors"]
    else:
        weight_map, names = None, sorted(path.name for path in folder.path.glob("*.safetensors"))
    if not names:
        pickles = sorted(path.name for end in ("bin", "pt", "pth") for path in folder.path.glob(f"*.{end}"))
        if pickles:
            raise UnsupportedModel(
                f"{folder.path}: its weights are in {pickles[0]}, a pickle, and reading one may run any program in it; "
                "save the model as safetensors first"
            )
        raise ModelNotFound(f"{folder.path}: no *.safetensors file there")

    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_header(folder.path / name):
            if tensor.name in tensors:
                raise ModelFormatError(f"{tensor}: is in {tensors[tensor.name].path.name}, too")
            tensors[tensor.name] = tensor
    for tensor_name, name in (weight_map or {}).items():
        if tensor_name not in tensors:
            raise ModelFormatError(f"{folder.path / name}: tensor {tensor_name} is missing, which {INDEX} lists there")
    return tensors


def read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, in its order. Raises TruncatedModel, ModelFormatError."""
    size = regular_file(path).stat().st_size
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) == 8 and length <= min(size - 8, LARGEST_HEADER):
                header = file.read(length)
    except OSError as error:
        raise ModelFormatError(f"{path}: cannot be read: {error.strerror}") from error
    if len(start) < 8:
        raise TruncatedModel(f"{path}: has {size} bytes, too few for a safetensors file")
    if length > LARGEST_HEADER:
        what = "a Git LFS pointer" if start == b"version " else "no safetensors file"
        raise ModelFormatError(f"{path}: is {what}: its header would have {length:,} bytes, limit {LARGEST_HEADER:,}")
    if length > size - 8:
        raise TruncatedModel(f"{path}: its header has {length:,} bytes, but {size - 8:,} are there")

    begin_of_data = 8 + length
    spans: list[tuple[int, int, str]] = []
    tensors = []
    for name, entry in parse_object(header, path).items():
        if name == "__metadata__":
            continue
        where = f"{path}: tensor {name[:200]}"
        fields = entry if isinstance(entry, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in BYTES:
            raise ModelFormatError(f"{where}: dtype is {shown(dtype)}, expected {', '.join(STORED)}")
        if not _are_counts(shape) or len(shape) > 8:
            raise ModelFormatError(f"{where}: shape is {shown(shape)}, expected at most 8 whole numbers")
        if not _are_counts(offsets) or len(offsets) != 2:
            raise ModelFormatError(f"{where}: data_offsets is {shown(offsets)}, expected two whole numbers")
        begin, end = offsets
        if end - begin != prod(shape) * BYTES[dtype]:
            raise ModelFormatError(
                f"{where}: has {end - begin:,} bytes, expected {prod(shape) * BYTES[dtype]:,} for {dtype} {shape}"
            )
        if begin_of_data + end > size:
            raise TruncatedModel(f"{where}: ends at byte {begin_of_data + end:,}, but the file has {size:,}")
        spans.append((begin, end, name))
        tensors.append(StoredTensor(name, path, dtype, tuple(shape), begin_of_data + begin))
    spans.sort()
    for (_, end, _), (begin, _, name) in pairwise([(0, 0, ""), *spans]):
        if begin != end:
            raise ModelFormatError(f"{path}: tensor {name[:200]}: begins at {begin:,}, expected {end:,}")
    if begin_of_data + (spans[-1][1] if spans else 0) != size:
        raise ModelFormatError(f"{path}: has {size - begin_of_data:,} bytes of data, but its tensors end before")
    return tensors


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    """Whether it is a list of whole numbers that could be sizes."""
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 48 for value in values)
