"""The folder where fetched models are kept: its place, its lock, free space, hashes and what a full disk means."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from platformdirs import user_cache_path

from gemmart.errors import DiskFull, DownloadError
from gemmart.progress import Progress

CHUNK = 1 << 20  # bytes


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
    except DownloadError:
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
    with (folder / ".lock").open("a") as file:
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


def sync_folder(folder: Path) -> None:
    """Make the entries of a folder last over a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
