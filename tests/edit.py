"""GGUF files with something changed, for tests of what the core makes of them.

edit(path, to, keys={"gemma2.block_count": 3, "general.license": None}, tensors={"output_norm.weight": None})
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

Value = str | int | float | list[int] | None


def edit(
    path: Path,
    to: Path,
    *,
    keys: Mapping[str, Value] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
) -> Path:
    """Copy a GGUF file to `to`, with keys and tensors replaced, added, or left out (None). Returns `to`.

    A replaced key keeps its type where the value has one that fits; otherwise, or if new, it is a string, bool, uint32, float32 or an array
    of int32. A replaced tensor of float32 is F32; one of bytes keeps its format."""
    keys, tensors = dict(keys or {}), dict(tensors or {})
    reader = GGUFReader(path)
    writer = GGUFWriter(to, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = keys.pop(name, field.contents())
        if value is not None:
            kinds = field.types if type(value) is type(field.contents()) else None
            add(writer, name, value, kinds)
    if architecture := keys.pop("general.architecture", None):
        writer.add_key_value("general.architecture", architecture, GGUFValueType.STRING)
    for name, value in keys.items():
        add(writer, name, value, None)
    for tensor in reader.tensors:
        data = tensors.pop(tensor.name, tensor.data)
        if data is not None:
            writer.add_tensor(tensor.name, data, raw_dtype=None if data.dtype == np.float32 else tensor.tensor_type)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return to


def add(writer: GGUFWriter, name: str, value: Value, kinds: list[GGUFValueType] | None) -> None:
    if kinds is None:
        if isinstance(value, list):
            kinds = [GGUFValueType.ARRAY, GGUFValueType.INT32]
        else:
            names = {str: "STRING", bool: "BOOL", int: "UINT32", float: "FLOAT32"}
            kinds = [GGUFValueType[names[type(value)]]]
    writer.add_key_value(name, value, kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
