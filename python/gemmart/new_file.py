"""Files that appear when they are whole."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from gemmart.errors import GemmartError, InvalidRequest
from gemmart.sources import store


def check_target(out: str | Path, *, force: bool, source: Path | None = None) -> Path:
    """Where to write. Raises InvalidRequest where that cannot be, or would lose the file that is read, or another one
    without `force`."""
    target = Path(out).expanduser().absolute()
    if source is not None and target.exists() and target.samefile(source):
        raise InvalidRequest(f"{out}: is the model itself; write to another file")
    if target.is_dir():
        raise InvalidRequest(f"{out}: is a folder; name a file in it")
    if not target.parent.is_dir():
        raise InvalidRequest(f"{out}: there is no folder {target.parent}")
    if target.exists() and not force:
        raise InvalidRequest(f"{out}: exists already; replace it with --force, or write to another file")
    return target


@contextmanager
def replacing(target: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A file beside `target`, which only its owner can read, that becomes `target` if all goes well, and is gone
    otherwise. Raises OSError."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    path = Path(name)
    try:
        with open(handle, "w+b") as file:
            yield path, file
            file.flush()
            os.fsync(handle)
        path.replace(target)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextmanager
def new_file(target: Path, *, force: bool, n_bytes: int | None = None) -> Iterator[Path]:
    """A temporary path beside `target` that becomes `target` if all goes well, and is gone otherwise. Raises DiskFull,
    for `n_bytes` in all, and InvalidRequest for what else the system says about writing."""
    try:
        with replacing(target) as (path, file):
            yield path
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            check_target(target, force=force)  # it may have come to be meanwhile
    except GemmartError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise store.disk_full(target.parent, n_bytes) from error
        raise InvalidRequest(f"{target}: cannot be written: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
