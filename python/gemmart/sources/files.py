"""A model on this machine: found by path, recognised by its first bytes; its parts are used without joining them."""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gemmart.errors import GemmartError, ModelFormatError, ModelNotFound, TruncatedModel
from gemmart.progress import Progress
from gemmart.sources import archives, names
from gemmart.sources.parts import Part, Parts

# First bytes of what is often found where a model is expected.
IMPOSTORS = [
    (re.compile(rb"\s*<(!doctype html|html|head)", re.IGNORECASE), "an HTML page; fetch the file itself, not its page"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer, not the model; fetch it with `git lfs pull`"),
    (re.compile(rb".{8}\{\s*\"", re.DOTALL), "a safetensors file; convert it to GGUF first"),
    (re.compile(rb"\x1f\x8b"), "compressed with gzip; unpack it first"),
]
ARCHIVE_STARTS = (b"PK\3\4", b"MZ", b"jartsr")  # of a ZIP archive, and of the program in front of a llamafile


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where the bytes of a model lie: one GGUF file in these parts, in order, or the files of a split model."""

    parts: tuple[Part, ...]
    name: str  # the file's name without .gguf, and without what marks a part
    origin: str  # the reference that it came from, in full
    entry: str | None = None  # its name in the archive whose file `path` is

    @property
    def path(self) -> Path:
        """The file that holds its first byte."""
        return self.parts[0].path

    @property
    def length(self) -> int:
        """Bytes, in all parts."""
        return sum(part.length for part in self.parts)


def from_path(path: Path, origin: str | None = None) -> ModelSource:
    """The model at `path`: a GGUF file or an archive of any name, one part of either, ARCHIVE@ENTRY, or a folder that
    holds exactly one model."""
    path = path.absolute()
    found, entry = _files(path)
    origin = origin or str(path)
    whole = [_part(file) for file in found]
    try:
        with Parts(whole) as data:
            head = data.read(0, 64)
            if head[:4] == b"GGUF" and entry is None:
                return ModelSource(tuple(whole), names.title(found[0].name), origin)
            if not archives.is_archive(data):
                raise _not_gguf(data.name, head)
            inside, parts = archives.find(data, entry)
        with Parts(parts) as model:
            if (head := model.read(0, 64))[:4] != b"GGUF":
                raise _not_gguf(f"{data.name}@{inside.name}", head)
        return ModelSource(parts, names.title(inside.name), origin, inside.name)
    except OSError as error:
        if isinstance(error, GemmartError):
            raise
        raise ModelNotFound(f"{path}: cannot be read: {error}") from error


def packed_arguments(source: ModelSource) -> list[str]:
    """The arguments that the archive of a model carries in its entry .args, one a line; `...` is the place of those
    that were typed. None where the model is in no archive, or the archive has no such entry.

    They are untrusted text. Raises ModelFormatError where the entry is broken."""
    if source.entry is None:
        return []
    with Parts([_part(file) for file in _files(source.path)[0]]) as archive:
        return archives.arguments(archive)


def check(source: ModelSource, progress: Progress) -> None:
    """Compare a model in an archive with the archive's CRC-32. Raises ModelFormatError."""
    if source.entry is not None:
        with Parts([_part(file) for file in _files(source.path)[0]]) as archive:
            archives.check(archive, source.entry, progress)


def _files(path: Path) -> tuple[list[Path], str | None]:
    """The files that `path` stands for, in order, and the entry that it names. Raises ModelNotFound."""
    if found := _at(path):
        return found, None
    for at in reversed([match.start() for match in re.finditer("@", str(path))]):
        archive, entry = Path(str(path)[:at]), str(path)[at + 1 :]
        if archive.name and entry and not archive.is_dir() and (found := _at(archive)):
            return found, entry
    raise ModelNotFound(f"{path}: no such file; {nearby(path)}")


def _at(path: Path) -> list[Path]:
    """The files of the model at a path: it, or those of which it is one, or its slices, or what is in the folder there;
    empty where there is nothing."""
    if (mode := _exists(path)) is not None:
        return _only_model(path) if stat.S_ISDIR(mode) else _with_siblings(path)
    first = path.with_name(path.name + ".cat0")
    return [] if _exists(first) is None else _with_siblings(first)


def _exists(path: Path) -> int | None:
    """The mode of a file; None where there is none. Raises ModelNotFound where that cannot be told."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # a loop of links, no permission, a NUL in the name
        raise ModelNotFound(f"{path}: cannot be read: {error}") from error


def _with_siblings(path: Path) -> list[Path]:
    """All files of the model of which `path` is one."""
    if not names.is_part(path.name):
        return [path]
    try:
        return [path.parent / name for name in names.parts(path.name, _listdir(path.parent))]
    except ModelNotFound as error:
        raise ModelNotFound(f"{path.parent / str(error)}") from None


def _part(path: Path) -> Part:
    """The whole of a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise ModelNotFound(f"{path}: cannot be read: {error}") from error
    if not stat.S_ISREG(status.st_mode):
        raise ModelFormatError(f"{path}: not a regular file")
    if status.st_size == 0:
        raise TruncatedModel(f"{path}: 0 bytes; a GGUF file starts with the 4 bytes GGUF")
    return Part(path, 0, status.st_size)


def nearby(path: Path) -> str:
    """What exists near a path that does not: for an error message."""
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    models = names.models(_listdir(folder))
    return f"in {folder} there is {_listing(models)}" if models else f"no .gguf file in {folder} either"


def _only_model(folder: Path) -> list[Path]:
    models = names.models(_listdir(folder))
    if not models:
        raise ModelNotFound(f"{folder}: a folder without a .gguf file")
    if len(models) > 1:
        raise ModelNotFound(f"{folder}: a folder with several models; name one of them: {_listing(models)}")
    return _with_siblings(folder / next(iter(models)))


def _listdir(folder: Path) -> list[str]:
    try:
        return [entry.name for entry in folder.iterdir() if entry.is_file()]
    except PermissionError:
        return []


def _listing(models: Iterable[str], limit: int = 10) -> str:
    listed = list(models)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more


def _not_gguf(what: str, head: bytes) -> ModelFormatError:
    if len(head) < 4:
        return TruncatedModel(f"{what}: {len(head)} bytes; a GGUF file starts with the 4 bytes GGUF")
    for pattern, kind in IMPOSTORS:
        if pattern.match(head):
            return ModelFormatError(f"{what}: not a GGUF file but {kind}")
    if head.startswith(ARCHIVE_STARTS):
        return TruncatedModel(
            f"{what}: no end record of a ZIP archive: truncated, or one of several .cat parts of which the last "
            "is missing"
        )
    return ModelFormatError(f"{what}: not a GGUF file: it starts with {head[:4]!r}, expected b'GGUF'")
