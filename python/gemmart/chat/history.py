"""What was typed, kept between runs in a file that only its owner can read."""

from __future__ import annotations

import os
from pathlib import Path

MAX_BYTES = 1 << 20
"""A longer history loses its older half."""
LLAMAFILE = Path(".llamafile_history")
IMPORTED = "# read from ~/.llamafile_history\n"


def history_path() -> Path:
    from platformdirs import user_state_path

    return user_state_path("gemmart") / "history"


def prepare(path: Path) -> None:
    """Make sure that the file exists, is its owner's alone and not too long. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.fchmod(file, 0o600)
        size = os.fstat(file).st_size
        if size > MAX_BYTES:
            data = os.pread(file, MAX_BYTES // 2, size - MAX_BYTES // 2)
            start = data.find(b"\n# ") + 1  # an entry's first line
            shorter = path.with_name(f"{path.name}.{os.getpid()}")
            with open(os.open(shorter, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
                out.write(data[start:])
            shorter.replace(path)
    finally:
        os.close(file)


def import_llamafile(path: Path) -> int | None:
    """Take the lines of an old ~/.llamafile_history in, before what is there; returns how many, or None where that was
    done before. Raises OSError."""
    prepare(path)
    present = path.read_bytes()
    if present.startswith(IMPORTED.encode()):
        return None
    lines = (Path.home() / LLAMAFILE).read_bytes().decode(errors="replace").splitlines()
    entries = [line for line in lines if line.strip()]
    text = IMPORTED + "".join(f"\n# llamafile\n+{entry}\n" for entry in entries)
    merged = path.with_name(f"{path.name}.{os.getpid()}")
    with open(os.open(merged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as out:
        out.write(text.encode(errors="replace") + present)
    merged.replace(path)
    return len(entries)


def entries(path: Path) -> list[str]:
    """What was typed, oldest first. Raises OSError."""
    found: list[str] = []
    joined = False
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        if line.startswith("+"):
            found[len(found) - joined :] = ["\n".join([*(found[-1:] if joined else []), line[1:]])]
        joined = line.startswith("+")
    return found
