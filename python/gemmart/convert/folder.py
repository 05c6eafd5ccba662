"""A Hugging Face model folder: its JSON files, read as what they are, data from strangers."""

from __future__ import annotations

import json
import math
import stat
from pathlib import Path
from typing import Any

from gemmart.errors import ModelFormatError, ModelNotFound, UnsupportedModel

LARGEST_JSON = 256 << 20
"""Bytes; the tokenizer.json of Gemma 3 has 33 MB."""

Object = dict[str, Any]


class ModelFolder:
    """The folder `path`. Raises ModelNotFound where there is none."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).expanduser()
        if not self.path.exists():
            raise ModelNotFound(f"{self.path}: there is no such folder")
        if not self.path.is_dir():
            raise ModelFormatError(
                f"{self.path}: is no folder; expected a Hugging Face model folder, with config.json and *.safetensors"
            )

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def bytes_of(self, name: str, limit: int) -> bytes:
        """The content of a file of at most `limit` bytes."""
        path = regular_file(self.path / name)
        if path.stat().st_size > limit:
            raise ModelFormatError(f"{path}: has {path.stat().st_size:,} bytes, limit {limit:,}")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ModelFormatError(f"{path}: cannot be read: {error.strerror}") from error

    def json(self, name: str) -> Object:
        """The JSON object in a file. Raises ModelNotFound where it is missing."""
        return parse_object(self.bytes_of(name, LARGEST_JSON), self.path / name)

    def optional_json(self, name: str) -> Object:
        """The JSON object in a file, empty where the file is missing."""
        return self.json(name) if self.has(name) else {}


def regular_file(path: Path) -> Path:
    """`path`, if it is a file or a link to one, so that reading it ends."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ModelNotFound(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(mode):
        raise ModelFormatError(f"{path}: is no regular file")
    return path


def parse_object(data: bytes, source: Path) -> Object:
    """A JSON object; a name that comes twice is refused."""

    def once(pairs: list[tuple[str, Any]]) -> Object:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
            raise ModelFormatError(f"{source}: {twice[:80]!r} comes twice in one object")
        return found

    try:
        value = json.loads(data, object_pairs_hook=once)
    except ModelFormatError:
        raise
    except RecursionError:
        raise ModelFormatError(f"{source}: is nested too deeply") from None
    except ValueError as error:  # also of UTF-8
        raise ModelFormatError(f"{source}: is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise ModelFormatError(f"{source}: holds {type(value).__name__}, expected a JSON object")
    return value


class Config:
    """Values of config.json, checked as they are asked for. `source` is told in errors; `defaults` stand for what the
    file leaves out: those of the family's class in transformers."""

    def __init__(self, values: Object, source: str, defaults: Object) -> None:
        self._values = defaults | {name: value for name, value in values.items() if value is not None}
        self.source = source

    def get(self, name: str) -> Any:
        return self._values.get(name)

    def count(self, name: str, limit: int) -> int:
        """A whole number from 1 to `limit`."""
        value = self._required(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
            raise ModelFormatError(f"{self.source}: {name} is {shown(value)}, expected 1 to {limit}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """A finite number from `low` to `high`."""
        return number(self._required(name), f"{self.source}: {name}", low, high)

    def expect(self, name: str, *allowed: Any) -> None:
        """UnsupportedModel unless the value is one of `allowed`; missing is None."""
        if self.get(name) not in allowed:
            wanted = " or ".join(map(shown, allowed))
            raise UnsupportedModel(f"{self.source}: {name} is {shown(self.get(name))}; supported is {wanted}")

    def _required(self, name: str) -> Any:
        if name not in self._values:
            raise ModelFormatError(f"{self.source}: {name} is missing")
        return self._values[name]


def number(value: Any, what: str, low: float, high: float) -> float:
    """`value` as a number from `low` to `high`; `what` names it in the error."""
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high and math.isfinite(value):
        return float(value)
    raise ModelFormatError(f"{what} is {shown(value)}, expected {low:g} to {high:g}")


def shown(value: Any) -> str:
    """A value for a message, cut."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
