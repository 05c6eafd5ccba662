"""Models in ZIP archives, .llamafile and .zip, used where they lie: against zipfile and the zip program, in the exact
layout of llamafile's packer, unaligned, and hostile."""

from __future__ import annotations

import io
import random
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import gemmart
from conftest import Tiny, logits_alone
from gemmart import _core
from gemmart.errors import ModelFormatError, ModelNotFound, TruncatedModel
from gemmart.sources import ModelSource, packed_arguments, resolve

MODEL = b"GGUF" + random.Random(1).randbytes(3000)
PROGRAM = b"MZqFpD='\n\n" + b"# a program\n" * 400
ALL_BITS = 0xFFFFFFFF


def data_of(source: ModelSource) -> bytes:
    """The bytes that a source stands for, read without the code under test."""
    data = b""
    for path, offset, length in source.parts:
        with path.open("rb") as file:
            file.seek(offset)
            data += file.read(length)
    return data


@dataclass
class Packed:
    """An archive written by hand: what is in each field can be set, and llamafile's packer's layout is the default.

    That is: a program in front; data aligned to 65,536 by padding in the local extra field, which is therefore not that
    of the index; ZIP64 fields; FFFFFFFF in the end record, with a ZIP64 one before it."""

    entries: dict[str, bytes]
    program: bytes = PROGRAM
    alignment: int = 65_536
    method: int = 0
    flags: int = 0
    crc: int | None = None
    packed_size: int | None = None
    size: int | None = None
    extra: Callable[[int, int, int], bytes] | None = None  # of the index, from size, packed size and position
    local: dict[str, object] = field(default_factory=dict)  # magic, name
    position: int | None = None  # of the local header
    end: dict[str, int] = field(default_factory=dict)  # count, size, position of the ZIP64 end record; at; locator
    comment: bytes = b""
    tail: bytes = b""

    def write(self, path: Path) -> Path:
        out, index = io.BytesIO(), b""
        out.write(self.program)
        for name, data in self.entries.items():
            raw = name.encode("utf-8", "surrogateescape")
            position = out.tell()
            before_data = position + 30 + len(raw) + 20
            out.write(struct.pack("<4s5H3I2H", self.local.get("magic", b"PK\3\4"), 45, self.flags, self.method, 0, 0,
                                  zlib.crc32(data), ALL_BITS, ALL_BITS, len(raw), 20 + -before_data % self.alignment))  # fmt: skip
            out.write(self.local.get("name", raw))
            out.write(struct.pack("<2H2Q", 1, 16, len(data), len(data)))
            out.write(bytes(-before_data % self.alignment))
            out.write(data)
            size = len(data) if self.size is None else self.size
            packed = len(data) if self.packed_size is None else self.packed_size
            if self.position is not None:
                position = self.position
            make = self.extra or (lambda *numbers: struct.pack("<2H3Q", 1, 24, *numbers))
            extra = make(size, packed, position)
            crc = zlib.crc32(data) if self.crc is None else self.crc
            index += struct.pack("<4s6H3I5H2I", b"PK\1\2", 45, 45, self.flags, self.method, 0, 0, crc, ALL_BITS,
                                 ALL_BITS, len(raw), len(extra), 0, 0, 0, 0, ALL_BITS)  # fmt: skip
            index += raw + extra
        at = out.tell()
        out.write(index)
        end64 = out.tell()
        counts = [self.end.get("count", len(self.entries))] * 2
        out.write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 45, 45, 0, 0, *counts, self.end.get("size", len(index)),
                              self.end.get("position", at)))  # fmt: skip
        locator = b"PK\6\7" if self.end.get("locator", 1) else b"\0\0\0\0"
        out.write(struct.pack("<4sIQI", locator, 0, self.end.get("at", end64), 1))
        out.write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, ALL_BITS, ALL_BITS, len(self.comment)))
        out.write(self.comment + self.tail)
        path.write_bytes(out.getvalue())
        return path


def test_the_layout_of_llamafiles_packer(tmp_path: Path) -> None:
    path = Packed({".args": b"-m\nm.gguf\n...\n", "m.gguf": MODEL}).write(tmp_path / "m.llamafile")
    with zipfile.ZipFile(path) as archive:  # the layout is right
        assert archive.read("m.gguf") == MODEL
    source = resolve(str(path))
    assert data_of(source) == MODEL
    assert source.parts[0].offset % 65_536 == 0
    assert (source.name, source.entry, source.origin, source.length) == ("m", "m.gguf", str(path), len(MODEL))


def zipped(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED, **options: bool) -> Path:
    with zipfile.ZipFile(path, "a", method) as archive:
        for name, data in entries.items():
            with archive.open(name, "w", **options) as file:
                file.write(data)
    return path


def test_archives_of_the_zip_program(tmp_path: Path) -> None:
    if shutil.which("zip") is None:
        pytest.skip("the zip program is not here")
    (tmp_path / "m.gguf").write_bytes(MODEL)
    (tmp_path / ".args").write_text("-c\n512\n")
    subprocess.run(["zip", "-q", "-0", "plain.zip", ".args", "m.gguf"], cwd=tmp_path, check=True)
    subprocess.run(["zip", "-q", "-0", "-fz", "zip64.zip", ".args", "m.gguf"], cwd=tmp_path, check=True)
    subprocess.run(["zip", "-q", "deflated.zip", ".args"], cwd=tmp_path, check=True)
    subprocess.run(["zip", "-q", "-0", "deflated.zip", "m.gguf"], cwd=tmp_path, check=True)
    (tmp_path / "joined.llamafile").write_bytes(PROGRAM + (tmp_path / "plain.zip").read_bytes())
    shutil.copy(tmp_path / "joined.llamafile", tmp_path / "mended.llamafile")
    subprocess.run(["zip", "-q", "-A", "mended.llamafile"], cwd=tmp_path, check=True)
    (tmp_path / "joined64.llamafile").write_bytes(PROGRAM + (tmp_path / "zip64.zip").read_bytes())
    for name in (
        "plain.zip",
        "zip64.zip",
        "joined.llamafile",
        "mended.llamafile",
        "joined64.llamafile",
        "deflated.zip",
    ):
        source = resolve(str(tmp_path / name))
        assert data_of(source) == MODEL, name
        assert packed_arguments(source) == ["-c", "512"]


def test_archives_of_zipfile(tmp_path: Path) -> None:
    (tmp_path / "appended.llamafile").write_bytes(PROGRAM)
    paths = [
        zipped(tmp_path / "plain.zip", {"sub/M.GGUF": MODEL, "notes.txt": b"x"}),
        zipped(tmp_path / "zip64.zip", {"sub/M.GGUF": MODEL}, force_zip64=True),
        zipped(tmp_path / "appended.llamafile", {"sub/M.GGUF": MODEL}),
        zipped(tmp_path / "no ending", {"sub/M.GGUF": MODEL}),
    ]
    for path in paths:
        source = resolve(str(path))
        assert data_of(source) == MODEL
        assert (source.name, source.entry) == ("M", "sub/M.GGUF")
    with zipfile.ZipFile(paths[0], "a") as archive:
        archive.comment = b"PK\5\6" * 30
    assert data_of(resolve(str(paths[0]))) == MODEL
    with paths[0].open("ab") as file:
        file.write(b"trailing bytes")
    assert data_of(resolve(str(paths[0]))) == MODEL


def test_one_of_several_entries(tmp_path: Path) -> None:
    other = b"GGUF" + bytes(100)
    path = zipped(tmp_path / "two.zip", {"a.gguf": MODEL, "sub/b@1.gguf": other})
    with pytest.raises(ModelNotFound, match=r"two\.zip: several models in it; .*: a\.gguf, sub/b@1\.gguf"):
        resolve(str(path))
    assert data_of(resolve(f"{path}@a.gguf")) == MODEL
    assert data_of(resolve(f"{path}@sub/b@1.gguf")) == other
    with pytest.raises(ModelNotFound, match=r"two\.zip@c\.gguf: no such entry; .*: a\.gguf"):
        resolve(f"{path}@c.gguf")
    with pytest.raises(ModelNotFound, match=r"no such file"):
        resolve(f"{tmp_path}/three.zip@c.gguf")
    folder = tmp_path / "two.zip@a.gguf"  # a path goes before an entry
    folder.write_bytes(other)
    assert data_of(resolve(str(folder))) == other
    assert data_of(resolve(str(zipped(tmp_path / "at@home.zip", {"m.gguf": MODEL})))) == MODEL
    vision = zipped(tmp_path / "vision.llamafile", {"llava.Q4_K.gguf": MODEL, "llava-mmproj.gguf": other})
    assert data_of(resolve(str(vision))) == MODEL
    with pytest.raises(ModelNotFound, match=r"no \.gguf file in it"):
        resolve(str(zipped(tmp_path / "none.zip", {"a.txt": b"x"})))
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ModelNotFound, match=r"no \.gguf file in it"):
        resolve(str(tmp_path / "empty.zip"))


def test_compressed_entries_must_be_unpacked_first(tmp_path: Path) -> None:
    path = zipped(tmp_path / "m.zip", {"m.gguf": MODEL}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ModelFormatError, match=r"m\.zip@m\.gguf: compressed; unpack it first") as caught:
        resolve(str(path))
    assert caught.value.exit_code == 3


def test_without_an_end_record(tmp_path: Path) -> None:
    whole = Packed({"m.gguf": MODEL}).write(tmp_path / "whole.llamafile").read_bytes()
    path = tmp_path / "m.llamafile"
    for end in (len(whole) - 1, len(whole) - 22, len(whole) - 60, 68_600, 5000, 64):
        path.write_bytes(whole[:end])
        with pytest.raises(TruncatedModel, match=r"truncated, or one of several \.cat parts"):
            resolve(str(path))


BROKEN = {
    "an index that lies behind its end": ({"end": {"position": 1 << 40}}, "bytes of index wanted from byte"),
    "an index at 2^64": ({"end": {"position": (1 << 64) - 1}}, "bytes of index wanted from byte"),
    "an index of 2^63 bytes": ({"end": {"size": 1 << 63}}, "limit 16,777,216"),
    "an index that is too short": ({"end": {"size": 60}}, "no entry at byte|longer than the index"),
    "2^40 entries": ({"end": {"count": 1 << 40}}, "1,099,511,627,776 entries announced, 1 in"),
    "a ZIP64 end record elsewhere": ({"end": {"at": 1 << 62}}, None),  # the one before the locator is taken
    "no locator": ({"end": {"locator": 0}}, "no ZIP64 locator"),
    "a header behind the end": ({"position": 1 << 50}, "the index begins at"),
    "a header at 2^64": ({"position": (1 << 64) - 1}, "the index begins at"),
    "a header elsewhere": ({"position": 7}, "no local header at byte 7"),
    "another magic": ({"local": {"magic": b"PK\3\5"}}, "no local header"),
    "another name": ({"local": {"name": b"n.gguf"}}, "another name"),
    "more than is there": ({"size": 1 << 40, "packed_size": 1 << 40}, "the index begins at"),
    "almost 2^64 bytes": ({"size": (1 << 64) - 8, "packed_size": (1 << 64) - 8}, "the index begins at"),
    "sizes that differ": ({"size": 5000}, "compressed"),
    "another method": ({"method": 93}, "compressed"),
    "encrypted": ({"flags": 1}, "encrypted"),
    "no extra field": ({"extra": lambda *_: b""}, "24 bytes of extra field 1 wanted, 0 present"),
    "a short extra field": ({"extra": lambda n, *_: struct.pack("<2HQ", 1, 8, n)}, "24 bytes .* 8 present"),
    "an extra field that runs over": ({"extra": lambda *n: struct.pack("<2H", 1, 24)}, "24 bytes .* 0 present"),
    "an endless extra field": ({"extra": lambda *n: struct.pack("<2H", 2, 0) * 9}, "24 bytes .* 0 present"),
    "bytes behind the end": ({"tail": b"x" * 3000}, None),
    "a comment": ({"comment": b"c" * 65_535}, None),
    "a comment and too many bytes behind it": ({"comment": b"c" * 60_000, "tail": b"t" * 6000}, "end record"),
    "a second extra field": ({"extra": lambda *n: struct.pack("<2HQ2H3Q", 9, 8, 0, 1, 24, *n)}, None),
    "unaligned": ({"alignment": 1}, None),
    "an odd program": ({"program": PROGRAM + b"x" * 77, "alignment": 1}, None),
    "another sum": ({"crc": 5}, None),  # a model of 50 GB is not summed unless it is asked for
}


@pytest.mark.parametrize("what", BROKEN)
def test_archives_that_are_not_right(what: str, tmp_path: Path) -> None:
    settings, reason = BROKEN[what]
    path = Packed({"m.gguf": MODEL}, **settings).write(tmp_path / "m.llamafile")
    if reason is None:
        assert data_of(resolve(str(path))) == MODEL
    else:
        with pytest.raises(ModelFormatError, match=reason) as caught:
            resolve(str(path))
        assert str(path) in str(caught.value)


def test_entries_of_hostile_names(tmp_path: Path) -> None:
    twice = Packed({"m.gguf": MODEL, "M.gguf": MODEL}).write(tmp_path / "twice.zip")
    twice.write_bytes(twice.read_bytes().replace(b"M.gguf", b"m.gguf"))
    for ref in (str(twice), f"{twice}@m.gguf"):
        with pytest.raises(ModelNotFound, match="several models in it"):
            resolve(ref)
    for name in ("\33[2J.gguf", "a\0b.gguf", "a\nb.gguf"):
        path = Packed({name: MODEL}).write(tmp_path / "m.zip")
        with pytest.raises(ModelFormatError, match="control characters"):
            resolve(str(path))
    outside = Packed({"../../etc/m.gguf": MODEL}).write(
        tmp_path / "outside.zip"
    )  # nothing is written, so nothing escapes
    assert resolve(str(outside)).name == "m"
    many = Packed({f"{i}.txt": b"" for i in range(65_536)} | {"m.gguf": MODEL}, alignment=1).write(
        tmp_path / "many.zip"
    )
    assert data_of(resolve(str(many))) == MODEL


def test_no_cut_and_no_flipped_bit_of_an_archive_does_harm(tmp_path: Path) -> None:
    """What is changed in what describes the model: another error of ours, or the very same bytes."""
    good = Packed({"m.gguf": MODEL}, program=PROGRAM[:100], alignment=64).write(tmp_path / "m.zip").read_bytes()
    start, rng, refused = good.index(MODEL), random.Random(2), 0
    fields = [*range(100, start), *range(start + len(MODEL), len(good))]
    path = tmp_path / "n.zip"
    for at in fields:
        for value in {good[at] ^ 1 << rng.randrange(8), 0, 0xFF, rng.randrange(256)} - {good[at]}:
            path.write_bytes(good[:at] + bytes([value]) + good[at + 1 :])
            try:
                assert data_of(resolve(str(path))) == MODEL
            except (ModelFormatError, ModelNotFound):
                refused += 1
    assert refused > len(fields)
    for end in range(start + len(MODEL), len(good)):
        path.write_bytes(good[:end])
        with pytest.raises(ModelFormatError):
            resolve(str(path))


def test_positions_beyond_four_gigabytes(tmp_path: Path) -> None:
    """A sparse file: three models' lengths of zeros in front, which the disk does not hold."""
    path = tmp_path / "big.llamafile"
    with path.open("wb") as file:
        file.truncate(5 << 30)
    zipped(path, {"m.gguf": MODEL})
    source = resolve(str(path))
    assert source.parts[0].offset > 5 << 30
    assert data_of(source) == MODEL
    assert path.stat().st_blocks * 512 < 1 << 20


def test_packed_arguments(tmp_path: Path) -> None:
    def arguments(data: bytes, **settings: object) -> list[str]:
        path = Packed({"m.gguf": MODEL, ".args": data}, **settings).write(tmp_path / "m.llamafile")
        return packed_arguments(resolve(f"{path}@m.gguf"))

    assert arguments(b"-m\r\nm.gguf\r\n\r\n--temp\n0\n...\n") == ["-m", "m.gguf", "--temp", "0", "..."]
    assert arguments("--system\nGrüße aus Köln".encode()) == ["--system", "Grüße aus Köln"]
    assert arguments(b"") == []
    for data, reason in [(b"\xff\xfe", "not UTF-8"), (b"a\0b", "NUL"), (b"a\n" * 40_000, "limit 65,536")]:
        with pytest.raises(ModelFormatError, match=rf"m\.llamafile@\.args: .*{reason}"):
            arguments(data)
    with pytest.raises(ModelFormatError, match="CRC-32"):
        arguments(b"-c\n1\n", crc=1)
    deflated = zipped(tmp_path / "deflated.zip", {".args": b"-c\n512\n" * 50}, zipfile.ZIP_DEFLATED)
    zipped(deflated, {"m.gguf": MODEL})
    assert packed_arguments(resolve(str(deflated))) == ["-c", "512"] * 50
    bomb = zipped(tmp_path / "bomb.zip", {".args": bytes(100 << 20)}, zipfile.ZIP_DEFLATED)
    zipped(bomb, {"m.gguf": MODEL})
    with pytest.raises(ModelFormatError, match="limit 65,536"):
        packed_arguments(resolve(str(bomb)))
    (tmp_path / "m.gguf").write_bytes(MODEL)
    assert packed_arguments(resolve(str(tmp_path / "m.gguf"))) == []


# ---- models that run where they lie


@pytest.mark.parametrize("quant", ["F32", "BF16", "Q6_K", "IQ2_S"])
@pytest.mark.parametrize("skew", [1, 4])
def test_the_same_bits_wherever_the_model_lies(quant: str, skew: int, tiny: Tiny, isa: str, tmp_path: Path) -> None:
    """Packed and mapped, aligned to 64 and by no more than a byte."""
    plain = tiny("gemma2", quant)
    path = Packed({"m.gguf": plain.read_bytes()}, program=PROGRAM + bytes(skew), alignment=1).write(tmp_path / "m.zip")
    rows = []
    for parts in ([plain], resolve(str(path)).parts):
        for mapped in (False, True):
            model = _core.Model(_core.ModelFacts(*parts), n_threads=2, n_batch=64, precise=False, mapped=mapped)
            context = _core.Context(model, n_kv_tokens=64, n_sequences=1, kv_type="f32")
            rows.append(logits_alone(context, range(2, 27)))
    for row in rows[1:]:
        np.testing.assert_array_equal(row, rows[0])


def test_the_same_text_from_an_archive(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("gemma2", "Q4_K")
    path = Packed({"m.gguf": plain.read_bytes()}).write(tmp_path / "m.llamafile")
    for mmap in (False, True):
        with gemmart.load(plain, mmap=mmap) as one, gemmart.load(path, mmap=mmap) as other:
            assert (
                other.generate("hello", max_tokens=20, seed=1).tokens
                == one.generate("hello", max_tokens=20, seed=1).tokens
            )
            assert other.plan.weight_bytes == one.plan.weight_bytes
            assert other.info.file_bytes == plain.stat().st_size


CHANGE = """
import sys, gemmart
with gemmart.load(sys.argv[1], mmap=True) as model:
    model.logits([2, 3, 4])
    with open(sys.argv[1], "r+b") as file:
        file.truncate(70_000)
    try:
        model.logits([2, 3, 4])
    except gemmart.ModelChanged as error:
        print(error)
"""


def test_an_archive_that_is_truncated_while_it_is_used(tiny: Tiny, tmp_path: Path) -> None:
    path = Packed({"m.gguf": tiny("gemma2", "Q4_K").read_bytes()}).write(tmp_path / "m.llamafile")
    run = subprocess.run([sys.executable, "-c", CHANGE, path], capture_output=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout.decode() == f"{path}: was changed after it was opened; load it again\n"
