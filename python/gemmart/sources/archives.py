"""A GGUF file inside a ZIP archive, as a .llamafile is: where its bytes lie. Nothing is unpacked.

All numbers are little-endian, and positions count from the first byte, whatever program stands in front. Read are: the
end record in the last 65,557 bytes, or the ZIP64 one where it defers to that (llamafile's packer always defers); the
index; the local header of the entry, whose length differs from that in the index. What lies behind the end record does
not matter. An archive is untrusted: each number is checked before it is used.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from gemmart.errors import ModelFormatError, ModelNotFound
from gemmart.progress import Progress
from gemmart.sources import names
from gemmart.sources.parts import Part, Parts

LOCAL, INDEX, END, END64, LOCATOR64 = b"PK\3\4", b"PK\1\2", b"PK\5\6", b"PK\6\6", b"PK\6\7"
LOCAL_BYTES, INDEX_BYTES, END_BYTES, END64_BYTES, LOCATOR64_BYTES = 30, 46, 22, 56, 20
DEFER = 0xFFFFFFFF
DEFER_COUNT = 0xFFFF
ZIP64_FIELD = 1
STORED, DEFLATED = 0, 8
ENCRYPTED = 1  # a flag

MAX_INDEX = 16 << 20  # bytes
MAX_ARGUMENTS = 64 << 10  # bytes
ARGUMENTS = ".args"


@dataclass(frozen=True, slots=True)
class Entry:
    """What the index says of a file in the archive; sizes in bytes."""

    name: str
    raw_name: bytes
    method: int
    flags: int
    crc: int
    packed_size: int
    size: int
    header: int  # the position of its local header


def find(archive: Parts, wanted: str | None) -> tuple[Entry, tuple[Part, ...]]:
    """The model in an archive: its entry `wanted`, or the only one that is a .gguf file, and where its bytes lie.

    Raises ModelNotFound where there is no such entry, or several; ModelFormatError for a broken archive or a compressed
    entry."""
    entries, end = _index(archive)
    there = [entry for entry in entries if entry.name.lower().endswith(".gguf")]
    if wanted is not None:
        found = [entry for entry in entries if entry.name == wanted]
    else:
        found = [entry for entry in there if names.is_model(entry.name)]
    if len(found) != 1:
        reason = "no .gguf file in it" if not there else "no such entry" if not found else "several models in it"
        hint = f"; name one as {archive.name}@ENTRY: {', '.join(entry.name for entry in there[:20])}" if there else ""
        where = archive.name if wanted is None else f"{archive.name}@{wanted}"
        raise ModelNotFound(f"{where}: {reason}{hint}")
    return found[0], _stored(archive, found[0], end)


def is_archive(archive: Parts) -> bool:
    """Whether there is an end record."""
    return next(_end_records(archive), None) is not None


def arguments(archive: Parts) -> list[str]:
    """The lines of the entry .args, which llamafile's packer leaves there; none where there is no such entry."""
    entries, end = _index(archive)
    found = [entry for entry in entries if entry.name == ARGUMENTS]
    if not found:
        return []
    entry = found[-1]
    where = f"{archive.name}@{ARGUMENTS}"
    if max(entry.size, entry.packed_size) > MAX_ARGUMENTS:
        raise ModelFormatError(f"{where}: {max(entry.size, entry.packed_size):,} bytes, limit {MAX_ARGUMENTS:,}")
    data = archive.read(_data(archive, entry, end), entry.packed_size)
    if entry.method == DEFLATED:
        inflate = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            data = inflate.decompress(data, MAX_ARGUMENTS)
        except zlib.error as error:
            raise ModelFormatError(f"{where}: damaged: {error}") from None
    elif entry.method != STORED:
        raise ModelFormatError(f"{where}: compressed with method {entry.method}, which is not read")
    if len(data) != entry.size or zlib.crc32(data) != entry.crc:
        raise ModelFormatError(f"{where}: damaged: its size or CRC-32 is not that of the index")
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ModelFormatError(f"{where}: not UTF-8") from None
    if "\0" in text:
        raise ModelFormatError(f"{where}: has a NUL")
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def check(archive: Parts, wanted: str | None, progress: Progress) -> None:
    """Read the model in an archive and compare it with the CRC-32 of the index. Raises ModelFormatError."""
    entry, parts = find(archive, wanted)
    crc = done = 0
    with Parts(parts) as data:
        for chunk in data.chunks():
            crc = zlib.crc32(chunk, crc)
            done += len(chunk)
            progress(f"checking {entry.name}", done, entry.size)
    if crc != entry.crc:
        raise ModelFormatError(f"{archive.name}@{entry.name}: its CRC-32 is {crc:08x}, the index says {entry.crc:08x}")


def _stored(archive: Parts, entry: Entry, end: int) -> tuple[Part, ...]:
    """Where the bytes of an entry lie."""
    where = f"{archive.name}@{entry.name}"
    if entry.flags & ENCRYPTED:
        raise ModelFormatError(f"{where}: encrypted; unpack it first")
    if entry.method != STORED or entry.packed_size != entry.size:
        raise ModelFormatError(f"{where}: compressed; unpack it first")
    if entry.size == 0:
        raise ModelFormatError(f"{where}: is empty")
    return archive.within(_data(archive, entry, end), entry.size)


def _data(archive: Parts, entry: Entry, end: int) -> int:
    """The position of an entry's data, which ends before `end`, where the index begins."""
    where = f"{archive.name}@{entry.name}"
    if not entry.name.isprintable():
        raise ModelFormatError(f"{archive.name}: the name of an entry has control characters: {entry.name!r}")
    if entry.header > end - LOCAL_BYTES:
        raise ModelFormatError(f"{where}: its header is at byte {entry.header:,}, but the index begins at {end:,}")
    header = archive.read(entry.header, LOCAL_BYTES)
    if header[:4] != LOCAL:
        raise ModelFormatError(f"{where}: no local header at byte {entry.header:,}")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    position = entry.header + LOCAL_BYTES + name_bytes + extra_bytes
    if position + entry.packed_size > end:
        raise ModelFormatError(
            f"{where}: {entry.packed_size:,} bytes wanted from byte {position:,}, but the index begins at {end:,}"
        )
    if archive.read(entry.header + LOCAL_BYTES, name_bytes) != entry.raw_name:
        raise ModelFormatError(f"{where}: the local header at byte {entry.header:,} has another name")
    return position


def _end_records(archive: Parts) -> Iterator[int]:
    """The positions of what may be the end record, the last one first."""
    start = max(0, archive.size - END_BYTES - 0xFFFF)
    tail = archive.read(start, archive.size - start)
    at = tail.rfind(END, 0, max(0, len(tail) - END_BYTES + len(END)))
    while at >= 0:
        yield start + at
        at = tail.rfind(END, 0, at)


def _index(archive: Parts) -> tuple[list[Entry], int]:
    """The entries of an archive, and where its index begins."""
    count, size, position, before = _place(archive)
    index = archive.read(position + before, size)
    entries: list[Entry] = []
    at = 0
    while at < size:
        entry, at = _entry(archive, index, at, before)
        entries.append(entry)
    if len(entries) != count:
        raise ModelFormatError(f"{archive.name}: {count:,} entries announced, {len(entries):,} in its index")
    return entries, position + before


def _place(archive: Parts) -> tuple[int, int, int, int]:
    """The number of entries, the size and the position of the index, and by how much all positions are too small."""
    refusal = None
    for end_record in _end_records(archive):  # the magic may also stand in the comment of the last one
        try:
            return _place_by(archive, end_record)
        except ModelFormatError as error:
            refusal = refusal or error
    if refusal is None:
        raise ModelFormatError(f"{archive.name}: no end record of a ZIP archive")
    raise refusal


def _place_by(archive: Parts, end_record: int) -> tuple[int, int, int, int]:
    count, size, position = struct.unpack_from("<HII", archive.read(end_record, END_BYTES), 10)
    end = end_record
    if DEFER in (size, position) or count == DEFER_COUNT:
        end, (count, size, position) = _end64(archive, end_record)
    if size > MAX_INDEX:
        raise ModelFormatError(f"{archive.name}: its index has {size:,} bytes, limit {MAX_INDEX:,}")
    if position + size > end:
        raise ModelFormatError(
            f"{archive.name}: {size:,} bytes of index wanted from byte {position:,}, but the end record is at {end:,}"
        )
    # Where a program was put in front of a finished archive, all positions are too small by its length.
    for before in (0, end - size - position):
        if size == 0 or archive.read(position + before, 4) == INDEX:
            return count, size, position, before
    raise ModelFormatError(f"{archive.name}: no index at byte {position:,}")


def _end64(archive: Parts, end_record: int) -> tuple[int, tuple[int, int, int]]:
    """The position of the ZIP64 end record; the number of entries, the size and the position of the index."""
    where = f"{archive.name}: the end record at byte {end_record:,} defers to a ZIP64 one"
    locator_at = end_record - LOCATOR64_BYTES
    locator = archive.read(locator_at, LOCATOR64_BYTES) if locator_at >= 0 else b""
    if locator[:4] != LOCATOR64:
        raise ModelFormatError(f"{where}, but no ZIP64 locator stands before it")
    (position,) = struct.unpack_from("<Q", locator, 8)
    for at in (position, locator_at - END64_BYTES):  # the other, where a program was put in front
        if 0 <= at <= locator_at - END64_BYTES:
            record = archive.read(at, END64_BYTES)
            if record[:4] == END64:
                return at, struct.unpack_from("<QQQ", record, 32)
    raise ModelFormatError(f"{where}, but there is none at byte {position:,}")


def _entry(archive: Parts, index: bytes, at: int, before: int) -> tuple[Entry, int]:
    """The entry at this place of the index, and where the next one begins."""
    if index[at : at + 4] != INDEX or len(index) - at < INDEX_BYTES:
        raise ModelFormatError(f"{archive.name}: no entry at byte {at:,} of its index")
    flags, method = struct.unpack_from("<HH", index, at + 8)
    crc, packed_size, size, *lengths = struct.unpack_from("<IIIHHH", index, at + 16)
    (header,) = struct.unpack_from("<I", index, at + 42)
    name_end = at + INDEX_BYTES + lengths[0]
    next_at = at + INDEX_BYTES + sum(lengths)
    if next_at > len(index):
        raise ModelFormatError(f"{archive.name}: the entry at byte {at:,} of its index is longer than the index")
    raw_name = index[at + INDEX_BYTES : name_end]
    name = raw_name.decode(errors="replace")
    fields = [size, packed_size, header]
    if deferred := [place for place, value in enumerate(fields) if value == DEFER]:
        extra = _extra(index[name_end : name_end + lengths[1]], ZIP64_FIELD)
        if len(extra) < 8 * len(deferred):
            raise ModelFormatError(
                f"{archive.name}@{name}: {8 * len(deferred)} bytes of extra field 1 wanted, {len(extra)} present"
            )
        for place, value in zip(deferred, struct.unpack_from(f"<{len(deferred)}Q", extra), strict=True):
            fields[place] = value
    size, packed_size, header = fields
    return Entry(name, raw_name, method, flags, crc, packed_size, size, header + before), next_at


def _extra(fields: bytes, wanted: int) -> bytes:
    """The extra field of this id; empty where there is none."""
    at = 0
    while at + 4 <= len(fields):
        id, length = struct.unpack_from("<HH", fields, at)
        if id == wanted:
            return fields[at + 4 : at + 4 + length]
        at += 4 + length
    return b""
