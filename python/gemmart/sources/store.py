"""The folder where fetched models are kept: its place, its lock, free space, checksums and what a full disk means."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from platformdirs import user_cache_path

from gemmart.errors import ChecksumError, DiskFull, DownloadError, GemmartError
from gemmart.progress import Progress

CHUNK = 1 << 20  # bytes
LOCK = ".lock"


def models_folder() -> Path:
    """The user's folder of fetched models; it need not exist yet."""
    return user_cache_path("gemmart") / "models"


def require_space(folder: Path, needed: int) -> None:
    """Raise DiskFull unless `needed` bytes are free where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(f"{folder}: {needed:,} bytes are needed and {free:,} are free; remove something and try again")


@contextmanager
def writing(folder: Path, needed: int | None = None) -> Iterator[None]:
    """Turn what the system says about writing in `folder` into DiskFull or DownloadError."""
    try:
        yield
    except GemmartError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(folder, needed) from error
        raise DownloadError(f"{folder}: cannot keep the model there: {error}") from error


def disk_full(folder: Path, needed: int | None) -> DiskFull:
    """The error for a disk that filled up while writing in `folder`."""
    while not folder.exists():
        folder = folder.parent
    wanted = f"{needed:,} bytes are needed and " if needed is not None else ""
    return DiskFull(
        f"{folder}: the disk is full: {wanted}{shutil.disk_usage(folder).free:,} are free; nothing was kept"
    )


@contextmanager
def locked(folder: Path, waiting: Callable[[], None]) -> Iterator[bool]:
    """Hold the lock of `folder` among processes, calling `waiting` if another holds it. Yields whether it is held: on a
    file system without locks it is not, and then the callers' unique temporary names must do."""
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True  # closing the file gives the lock back


def sha256_of(path: Path, progress: Progress) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    total = path.stat().st_size
    done = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            done += len(chunk)
            progress(f"checking {path.name}", done, total)
    return digest.hexdigest()


def verify(path: Path, sha256: str, progress: Progress, *, again: bool = False) -> None:
    """Compare a file with its SHA-256, unless a note says that this was done and the file has not changed since.

    `again`: in any case. Raises ChecksumError."""
    if not again and _noted(path) == (_stamp(path), sha256):
        return
    found = sha256_of(path, progress)
    if found != sha256:
        raise ChecksumError(f"{path}: its SHA-256 is {found}, but {sha256} is on record")
    note(path, sha256)


def verify_fetched(path: Path, sha256: str | None, progress: Progress, notice: Callable[[str], None]) -> None:
    """Compare a file that was fetched with this sum, or else the one that it had then; a wrong one is removed. Tells
    `notice` where there is none. Raises ChecksumError."""
    expected = sha256 or sum_on_record(path)
    if expected is None:
        notice(f"{path}: nobody gives a SHA-256 for it, so its sum is not compared")
        return
    try:
        verify(path, expected, progress, again=True)
    except ChecksumError as error:
        forget(path)
        raise ChecksumError(f"{error}; removed") from None


def note(path: Path, sha256: str) -> None:
    """Remember that a file, as it is now, has this SHA-256."""
    with suppress(OSError):  # without a note it is checked again next time
        _note_file(path).parent.mkdir(parents=True, exist_ok=True)
        _note_file(path).write_text(f"{_stamp(path)} {sha256}")


def sum_on_record(path: Path) -> str | None:
    """The SHA-256 that a file has by its name in a cache, or had when it was fetched."""
    blob = path.readlink() if path.is_symlink() else path
    match = re.fullmatch(r"(?:sha256-)?([0-9a-f]{64})", blob.name)
    return match[1] if match else _noted(path)[1]


def forget(path: Path) -> None:
    """Remove a file that was fetched, and the note of its sum."""
    note_file = _note_file(path)
    path.unlink(missing_ok=True)
    note_file.unlink(missing_ok=True)


def _noted(path: Path) -> tuple[str, str | None]:
    """What is noted of a file: when it was changed last, its SHA-256."""
    try:
        stamp, _, sha256 = _note_file(path).read_text().rpartition(" ")
    except (OSError, UnicodeDecodeError):
        return "", None
    return stamp, sha256 if re.fullmatch(r"[0-9a-f]{64}", sha256) else None


def _note_file(path: Path) -> Path:
    return models_folder() / "verified" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder last over a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
