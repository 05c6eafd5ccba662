"""Read the metadata of a GGUF file with `struct` alone, so that the tests of words need no compiled core.

The `gguf` package makes an object of each string, half a minute for 262,144 tokens; here they stay bytes.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


class Metadata:
    """`get(key, default)` for scalars, strings and arrays of numbers; `strings(key)`: arrays of strings, (blob,
    offsets)."""

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.pos = 4
        self.values: dict[str, Any] = {}
        _version, _n_tensors, n_kv = self.unpack("I"), self.unpack("Q"), self.unpack("Q")
        for _ in range(n_kv):
            key = self.string().decode()
            self.values[key] = self.value(self.unpack("I"))

    def unpack(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.pos)
        self.pos += struct.calcsize(code)
        return value

    def string(self) -> bytes:
        n = self.unpack("Q")
        self.pos += n
        return self.data[self.pos - n : self.pos]

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.unpack(SCALARS[kind])
        if kind == STRING:
            return self.string().decode()
        item, n = self.unpack("I"), self.unpack("Q")
        if item == STRING:
            parts = [self.string() for _ in range(n)]
            offsets = np.zeros(n + 1, np.int64)
            np.cumsum([len(part) for part in parts], out=offsets[1:])
            return b"".join(parts), offsets
        array = np.frombuffer(self.data, "<" + SCALARS[item], n, self.pos)
        self.pos += array.nbytes
        return array

    def get(self, key: str, default: Any = None) -> Any:
        return self.values.get(key, default)

    def strings(self, key: str) -> Any:
        return self.values[key]
