"""A model file on this machine: found by path, recognised by its first bytes."""

from __future__ import annotations

import re
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gemmart.errors import GemmartError, ModelFormatError, ModelNotFound, TruncatedModel, UnsupportedModel

SPLIT_NAME = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)

# First bytes of what is often found where a model is expected.
IMPOSTORS = [
    (re.compile(rb"\s*<(!doctype html|html|head)", re.IGNORECASE), "an HTML page; fetch the file itself, not its page"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the model; fetch it with `git lfs pull`"),
    (re.compile(rb".{8}\{\s*\"", re.DOTALL), "a safetensors file; convert it to GGUF first"),
    (re.compile(rb"\x1f\x8b"), "compressed with gzip; unpack it first"),
]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the bytes of a model lie: `length` bytes at `offset` of the file at `path`."""

    path: Path
    offset: int  # bytes
    length: int  # bytes
    name: str  # the file's name without .gguf
    origin: str  # the reference that it came from, in full


def is_split(name: str) -> bool:
    """Whether a file of this name is one of several parts."""
    match = SPLIT_NAME.search(name)
    return match is not None and int(match[2]) > 1


def from_path(path: Path, origin: str | None = None) -> ModelSource:
    """The model at `path`: a GGUF file of any name, or a folder that holds exactly one."""
    path = path.absolute()
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            return from_path(_only_model(path), origin)
        if not stat.S_ISREG(status.st_mode):
            raise ModelFormatError(f"{path}: not a regular file")
        with path.open("rb") as file:
            head = file.read(64)
    except GemmartError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise ModelNotFound(f"{path}: no such file; {nearby(path)}") from None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a NUL in the name
        raise ModelNotFound(f"{path}: cannot be read: {error}") from error
    if head[:4] != b"GGUF":
        raise _not_gguf(path, head)
    if is_split(path.name):
        raise UnsupportedModel(
            f"{path}: one part of a split model; join the parts first with `llama-gguf-split --merge`"
        )
    name = path.name.removesuffix(".gguf")
    return ModelSource(path=path, offset=0, length=status.st_size, name=name, origin=origin or str(path))


def nearby(path: Path) -> str:
    """What exists near a path that does not: for an error message."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    models = _models_in(folder)
    return f"in {folder} there is {_listing(models)}" if models else f"no .gguf file in {folder} either"


def _only_model(folder: Path) -> Path:
    models = _models_in(folder)
    if not models:
        raise ModelNotFound(f"{folder}: a folder without a .gguf file")
    if len(models) > 1:
        raise ModelNotFound(f"{folder}: a folder with several models; name one of them: {_listing(models)}")
    return models[0]


def _models_in(folder: Path) -> list[Path]:
    try:
        return sorted(entry for entry in folder.iterdir() if entry.name.lower().endswith(".gguf") and entry.is_file())
    except PermissionError:
        return []


def _listing(models: list[Path], limit: int = 10) -> str:
    more = f" and {len(models) - limit} more" if len(models) > limit else ""
    return ", ".join(model.name for model in models[:limit]) + more


def _not_gguf(path: Path, head: bytes) -> ModelFormatError | UnsupportedModel:
    if len(head) < 4:
        return TruncatedModel(f"{path}: {len(head)} bytes; a GGUF file starts with the 4 bytes GGUF")
    if re.search(r"\.cat\d+$", path.name):
        return UnsupportedModel(f"{path}: one slice of a file; join the slices first with `cat`, in order")
    if zipfile.is_zipfile(path):
        return UnsupportedModel(f"{path}: a ZIP archive (as .llamafile is); unpack the .gguf file in it first")
    for pattern, what in IMPOSTORS:
        if pattern.match(head):
            return ModelFormatError(f"{path}: not a GGUF file but {what}")
    return ModelFormatError(f"{path}: not a GGUF file: it starts with {head[:4]!r}, expected b'GGUF'")
