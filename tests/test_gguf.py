"""The GGUF reader: what it reads, against the `gguf` package; what it refuses, and that messages say what and where."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gemmart import _core
from gemmart.errors import (
    GemmartError,
    InvalidRequest,
    ModelChanged,
    ModelFormatError,
    ModelNotFound,
    TruncatedModel,
    UnsupportedModel,
)

SHARED = Path(os.environ.get("GEMMART_SHARED", Path(__file__).parents[2] / "shared"))

# name: (type id, struct code)
NUMBERS = {
    "u8": (0, "B"),
    "i8": (1, "b"),
    "u16": (2, "H"),
    "i16": (3, "h"),
    "u32": (4, "I"),
    "i32": (5, "i"),
    "f32": (6, "f"),
    "bool": (7, "?"),
    "u64": (10, "Q"),
    "i64": (11, "q"),
    "f64": (12, "d"),
}
STRING, ARRAY = 8, 9
NASTY = [0, 1, 2**8, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63, 2**64 - 1]


class Image(bytearray):
    """The bytes of a GGUF file under construction; `fields` remembers where each number of its structure is."""

    def __init__(self, version: int = 3, n_tensors: int = 0, n_keys: int = 0) -> None:
        super().__init__(b"GGUF")
        self.fields: dict[str, tuple[int, str]] = {}
        self.number("version", "I", version)
        self.number("number of tensors", "Q", n_tensors)
        self.number("number of keys", "Q", n_keys)

    def number(self, field: str, code: str, value: Any) -> None:
        self.fields[field] = (len(self), code)
        self += struct.pack("<" + code, value)

    def string(self, field: str, text: bytes) -> None:
        self.number(f"length of {field}", "Q", len(text))
        self += text

    def key(self, key: str | bytes, type_name: str, value: Any = None) -> Image:
        """`type_name` is that of a number, 'str', or one of these followed by []."""
        name = key if isinstance(key, str) else "?"
        self.string(f"key {name}", key.encode() if isinstance(key, str) else key)
        values = [value]
        if type_name.endswith("[]"):
            type_name, values = type_name[:-2], value
            self.number(f"type of {name}", "I", ARRAY)
            self.number(f"element type of {name}", "I", STRING if type_name == "str" else NUMBERS[type_name][0])
            self.number(f"count of {name}", "Q", len(values))
        else:
            self.number(f"type of {name}", "I", STRING if type_name == "str" else NUMBERS[type_name][0])
        for i, v in enumerate(values):
            if type_name == "str":
                self.string(f"{name}[{i}]", v if isinstance(v, bytes) else v.encode())
            else:
                self += struct.pack("<" + NUMBERS[type_name][1], v)
        return self

    def tensor(self, name: str | bytes, sizes: Iterable[int], type_id: int, offset: int) -> Image:
        """`sizes` in GGUF's order: the contiguous one first."""
        sizes = list(sizes)
        self.string(f"tensor {name!r}", name.encode() if isinstance(name, str) else name)
        self.number(f"n_dims of {name!r}", "I", len(sizes))
        for i, n in enumerate(sizes):
            self.number(f"size {i} of {name!r}", "Q", n)
        self.number(f"type of {name!r}", "I", type_id)
        self.number(f"offset of {name!r}", "Q", offset)
        return self

    def data(self, n: int, alignment: int = 32) -> Image:
        self += bytes(-len(self) % alignment) + bytes(i * 37 % 256 for i in range(n))
        return self


VALUES: dict[str, Any] = {
    "u8": 200,
    "i8": -100,
    "u16": 60_000,
    "i16": -30_000,
    "u32": 4_000_000_000,
    "i32": -2_000_000_000,
    "f32": 0.5,
    "bool": True,
    "u64": 2**64 - 1,
    "i64": -(2**63),
    "f64": 1e-300,
    "str": "Grüße",
    "u8[]": [1, 255],
    "i8[]": [-1],
    "u16[]": [1, 2, 3],
    "i16[]": [-3, 2],
    "u32[]": [],
    "i32[]": [2**31 - 1],
    "f32[]": [1.5, float("inf")],
    "bool[]": [False, True, True],
    "u64[]": [2**63],
    "i64[]": [-5],
    "f64[]": [0.1, 0.2],
    "str[]": ["", "one", "two\0three", "▁"],
}


def sample(version: int = 3) -> Image:
    """A small file with every type of value and three tensors; 96 + 36 + 64 bytes of tensor data."""
    image = Image(version, n_tensors=3, n_keys=len(VALUES) + 1)
    image.key("general.alignment", "u32", 32)
    for type_name, value in VALUES.items():
        image.key(f"test.{type_name}", type_name, value)
    image.tensor("a.weight", [8, 3], 0, 0).tensor("b.weight", [32, 1, 2], 2, 96).tensor("c.weight", [32], 1, 160)
    return image


N_DATA = 160 + 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def opened(path: Path, image: bytes, *, offset: int = 0, length: int = 0) -> _core.Gguf:
    path.unlink(missing_ok=True)  # some file systems flush a file that is truncated and written again: 10 × slower
    path.write_bytes(image)
    return _core.Gguf((path, offset, length))


def refused(path: Path, image: bytes, match: str, error: type[Exception] = ModelFormatError) -> None:
    with pytest.raises(error, match=match) as caught:
        opened(path, image)
    assert str(caught.value).startswith(f"{path}: ")


def strings(file: _core.Gguf, key: str) -> list[bytes]:
    blob, offsets = file.strings(key)
    assert offsets[0] == 0
    assert offsets[-1] == len(blob)
    return [bytes(blob[start:end]) for start, end in pairwise(offsets)]


def refusal(path: Path, image: bytes) -> GemmartError | None:
    """The error when everything in the file is looked at; None if there is none. Other exceptions pass through."""
    try:
        look_at_everything(opened(path, image))
    except (ModelFormatError, UnsupportedModel) as error:
        return error
    return None


def look_at_everything(file: _core.Gguf) -> None:
    for key in file.keys():  # noqa: SIM118 -- not a dict
        if file.type_of(key) == "str[]":
            file.strings(key)
        else:
            file.get(key)
    file.tensors()


# What it reads.


@pytest.mark.parametrize("version", [2, 3])
def test_reads_every_type(path: Path, version: int) -> None:
    file = opened(path, sample(version).data(N_DATA))
    assert file.version == version
    assert file.path == str(path)
    assert file.keys() == ["general.alignment", *(f"test.{name}" for name in VALUES)]
    for type_name, value in VALUES.items():
        key = f"test.{type_name}"
        assert key in file
        assert file.type_of(key) == type_name
        if type_name == "str[]":
            assert strings(file, key) == [s.encode() for s in value]
        elif type_name.endswith("[]"):
            np_type = type_name[:-2].replace("bool", "?")
            got = file.get(key)
            assert got.dtype == np.dtype(np_type[0] + str(int(np_type[1:]) // 8) if np_type != "?" else "?")
            assert got.tolist() == value
        else:
            got = file.get(key)
            assert got == value
            assert type(got) is type(value)


@pytest.mark.parametrize("offset", [0, 1, 13, 4095, 4096, 10_001])
@pytest.mark.parametrize("tail", [0, 999])
def test_reads_at_any_offset(path: Path, offset: int, tail: int) -> None:
    image = sample().data(N_DATA)
    container = b"\xa5" * offset + bytes(image) + b"\x5a" * tail
    file = opened(path, container, offset=offset, length=len(image) if tail else 0)
    start = len(image) - N_DATA
    assert file.tensors() == [
        ("a.weight", "F32", (3, 8), start, 96),
        ("b.weight", "Q4_0", (2, 1, 32), start + 96, 36),
        ("c.weight", "F16", (32,), start + 160, 64),
    ]
    assert file.get("test.str") == VALUES["str"]
    assert strings(file, "test.str[]") == [s.encode() for s in VALUES["str[]"]]


def test_window_is_respected(path: Path) -> None:
    image = bytes(sample().data(N_DATA))
    with pytest.raises(TruncatedModel, match=r"ends inside tensor 'c.weight': 64 bytes wanted .* 223 bytes of data"):
        opened(path, image + bytes(1000), length=len(image) - 1)
    with pytest.raises(TruncatedModel, match=f"ends at byte {len(image)}; {len(image)} bytes wanted from byte 1"):
        opened(path, image, offset=1, length=len(image))
    with pytest.raises(TruncatedModel, match=r"18446744073709551615 bytes wanted from byte 1$"):
        opened(path, image, offset=1, length=2**64 - 1)
    with pytest.raises(TruncatedModel, match="from byte 18446744073709551615"):
        opened(path, image, offset=2**64 - 1, length=2**64 - 1)
    with pytest.raises(TruncatedModel, match=f"is empty from byte {len(image)}"):
        opened(path, image, offset=len(image))


def test_reads_what_the_gguf_package_writes(path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_custom_alignment(256)
    writer.add_block_count(3)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_token_list(["<pad>", "ä", "b" * 1000])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_tensor("x.weight", rng.standard_normal((5, 3, 7), np.float32))
    packed = gguf.quantize(rng.standard_normal((4, 64), np.float32), gguf.GGMLQuantizationType.Q5_1)
    writer.add_tensor("y.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q5_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert_agrees_with_gguf(path)


def assert_agrees_with_gguf(path: Path) -> None:
    file, reference = _core.Gguf(path), gguf.GGUFReader(path)
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert file.keys() == list(fields)
    for key, field in fields.items():
        if file.type_of(key) == "str[]":
            assert strings(file, key) == [bytes(field.parts[i]) for i in field.data]
        else:
            assert np.array_equal(file.get(key), field.contents())
    expected = [
        (t.name, t.tensor_type.name, tuple(int(n) for n in reversed(t.shape)), t.data_offset, t.n_bytes)
        for t in reference.tensors
    ]
    assert file.tensors() == expected


def test_agrees_with_gguf_on_shared_models() -> None:
    paths = sorted(SHARED.glob("models/*/*.gguf"))
    if not paths:
        pytest.skip(f"no models under {SHARED}")
    for path in paths:
        assert_agrees_with_gguf(path)


def test_reads_a_real_vocabulary() -> None:
    path = SHARED / "tokenizer" / "gemma-2-vocab.gguf"
    if not path.exists():
        pytest.skip(f"{path} is absent")
    file = _core.Gguf(path)
    tokens = strings(file, "tokenizer.ggml.tokens")
    assert len(tokens) == len(file.get("tokenizer.ggml.scores")) == 256_000
    assert tokens[:4] == [b"<pad>", b"<eos>", b"<bos>", b"<unk>"]
    assert tokens[file.get("tokenizer.ggml.eot_token_id")] == b"<end_of_turn>"
    assert file.tensors() == []


def test_arrays_outlive_the_file(path: Path) -> None:
    file = opened(path, sample().data(N_DATA))
    numbers, (blob, offsets) = file.get("test.f64[]"), file.strings("test.str[]")
    del file
    path.write_bytes(b"")
    assert numbers.tolist() == VALUES["f64[]"]
    assert bytes(blob) == "".join(VALUES["str[]"]).encode()
    assert offsets[-1] == len(blob)


def test_text_that_is_not_utf8(path: Path) -> None:
    image = Image(n_keys=2).key("a", "str", b"\xff\xfeok").key("b", "str[]", [b"\xc3", b"ok"])
    file = opened(path, image)
    assert file.get("a") == "\ufffd\ufffdok"
    assert strings(file, "b") == [b"\xc3", b"ok"]


def test_paths_of_any_bytes(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/\xffmodel.gguf")
    Path(name).write_bytes(sample().data(N_DATA))
    assert _core.Gguf(name).path == name
    assert _core.Gguf(os.fsencode(name)).path == name


def test_notices_a_changed_file(path: Path) -> None:
    image = sample().data(N_DATA)
    file = opened(path, image)
    file.check_unchanged()
    os.utime(path, ns=(0, 1))
    with pytest.raises(ModelChanged, match="was changed after it was opened"):
        file.check_unchanged()
    file = opened(path, image)
    os.truncate(path, len(image) + 1)
    with pytest.raises(ModelChanged):
        file.check_unchanged()
    file = opened(path, image)
    path.unlink()
    file.check_unchanged()
    assert file.get("test.u8") == 200


# What it refuses.


def test_cut_at_every_byte(path: Path) -> None:
    image = bytes(sample().data(N_DATA))
    for n in range(len(image)):
        with pytest.raises(TruncatedModel, match=r"wanted.*present|is empty"):
            opened(path, image[:n])
    opened(path, image)


def test_every_number_of_the_structure(path: Path) -> None:
    """Each length, count, type and offset × hostile values: read, or refused with the field named."""
    image = sample().data(N_DATA)
    n_refused = 0
    for field, (at, code) in image.fields.items():
        value = struct.unpack_from("<" + code, image, at)[0]
        for nasty in {*NASTY, value - 1, value + 1} - {value}:
            if not 0 <= nasty < 1 << 8 * struct.calcsize(code):
                continue
            mutant = bytearray(image)
            struct.pack_into("<" + code, mutant, at, nasty)
            error = refusal(path, mutant)
            if error:
                n_refused += 1
                assert str(error).startswith(f"{path}: ")
            if nasty >= 2**31:  # no such length, count, type, size or offset can be right
                assert error, f"{field} = {nasty} was accepted"
                # The field itself is named, with where it is; a key or tensor whose name has no length has no name.
                of = field.split()[-1].partition("[")[0].strip("'")
                assert of in str(error) or f"at byte {at} " in str(error), (field, nasty)
    assert n_refused > 800


def test_random_mutations(path: Path) -> None:
    """Flipped, overwritten, removed and doubled bytes: only our own errors, never another exception."""
    rng = random.Random(0)
    image = bytes(sample().data(N_DATA))
    n_refused = 0
    for _ in range(2000):
        mutant = bytearray(image)
        for _ in range(rng.choice([1, 1, 2, 5, 20])):
            at = rng.randrange(len(mutant))
            n = rng.choice([1, 2, 4, 8, 30])
            change = rng.randrange(4)
            if change == 0:
                mutant[at] ^= 1 << rng.randrange(8)
            elif change == 1:
                mutant[at : at + n] = rng.choice([b"\x00", b"\xff", rng.randbytes(1)]) * n
            elif change == 2:
                del mutant[at : at + n]
            else:
                mutant[at:at] = mutant[at : at + n]
        error = refusal(path, mutant)
        if error:
            n_refused += 1
            assert str(error).startswith(f"{path}: ")
    assert 500 < n_refused < 2000


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"<!DOCTYPE html><html>", "HTML"),
        (b"\xef\xbb\xbf \n<html lang=en>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:", "Git LFS pointer"),
        (struct.pack("<Q", 300) + b'{"__metadata__":', "safetensors"),
        (b"PK\x03\x04\x14\x00", "ZIP"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"tjgg\x03\x00\x00\x00", "older format"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<III", 1, 0, 0), "version at byte 4 is 1; 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version at byte 4 is 4; 2 and 3 are read"),
        (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version at byte 4 is 0; 2 and 3 are read"),
        (b"ggufx", "not a GGUF file$"),
        (b"GGUX", "not a GGUF file$"),
        (b"", "is empty"),
        (b"GGU", "ends inside the magic: 4 bytes wanted, 3 bytes present"),
    ],
)
def test_wrong_kinds_of_files(path: Path, head: bytes, what: str) -> None:
    refused(path, head, what)


def test_what_is_no_file_never_blocks(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="is a folder"):
        _core.Gguf(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", "/dev/zero", "/dev/null"):
        with pytest.raises(ModelFormatError, match="is not a regular file"):
            _core.Gguf(path)
    os.symlink(tmp_path / "loop", tmp_path / "loop")
    for path in (tmp_path / "loop", tmp_path / "missing", tmp_path / "fifo" / "x", tmp_path / ("x" * 5000), "", "a\0b"):
        with pytest.raises(ModelNotFound):
            _core.Gguf(path)


def one_key(key: str | bytes, type_name: str, value: Any) -> Image:
    return Image(n_keys=1).key(key, type_name, value)


def test_keys(path: Path) -> None:
    refused(path, one_key("", "str", ""), "a key at byte 24 is empty")
    refused(path, one_key(b"caf\xe9", "u8", 1), "a key at byte 24 is not printable ASCII")
    refused(path, one_key("a\nb", "u8", 1), "is not printable ASCII")
    assert opened(path, one_key("k" * 65_535, "u8", 1)).keys() == ["k" * 65_535]
    refused(path, one_key("k" * 65_536, "u8", 1), "a key at byte 24 announces 65536 bytes, limit 65535")
    twice = Image(n_keys=3).key("a", "u8", 1).key("b", "u8", 1).key("a", "str", "")
    refused(path, twice, "key 'a' comes twice")
    with pytest.raises(ModelFormatError, match=r"'k{100}…' is missing"):
        opened(path, one_key("a", "u8", 1)).get("k" * 1000)


def test_value_types(path: Path) -> None:
    for type_id in (13, 255, 2**32 - 1):
        image = one_key("a", "u8", 1)
        struct.pack_into("<I", image, image.fields["type of a"][0], type_id)
        refused(path, image, f"the type of key 'a' at byte 33 is {type_id}, which is none")
        image = one_key("a", "u8[]", [1])
        struct.pack_into("<I", image, image.fields["element type of a"][0], type_id)
        refused(path, image, f"the element type of key 'a' at byte 37 is {type_id}, which is none")
    nested = one_key("a", "u8[]", [0] * 64)
    struct.pack_into("<I", nested, nested.fields["element type of a"][0], ARRAY)
    refused(path, nested, "nested arrays are not read")
    for type_name, value in (("u8", 2), ("u8[]", [0, 1, 2])):
        image = one_key("a", type_name, value)
        field = "type of a" if type_name == "u8" else "element type of a"
        struct.pack_into("<I", image, image.fields[field][0], NUMBERS["bool"][0])
        refused(path, image, "the value of key 'a' .*neither 0 nor 1")


def test_getters_name_key_and_types(path: Path) -> None:
    file = opened(path, sample().data(N_DATA))
    assert "nope" not in file
    for missing in (file.get, file.strings, file.type_of):
        with pytest.raises(ModelFormatError, match="key 'nope' is missing"):
            missing("nope")
    with pytest.raises(ModelFormatError, match=r"key 'test.u8' is u8, expected str\[\]"):
        file.strings("test.u8")
    with pytest.raises(ModelFormatError, match=r"key 'test.str' is str, expected str\[\]"):
        file.strings("test.str")
    with pytest.raises(InvalidRequest, match=r"'test.str\[\]' is an array of strings; use strings"):
        file.get("test.str[]")


def test_limit_of_keys(path: Path) -> None:
    def image(n: int) -> Image:
        image = Image(n_keys=n)
        for i in range(n):
            image += struct.pack("<Q5sIB", 5, b"%05d" % i, 0, 7)
        return image

    assert len(opened(path, image(65_536)).keys()) == 65_536
    refused(path, image(65_537), "number of keys at byte 16 announces 65537 keys, limit 65536")


def test_counts_are_bounded_by_the_file(path: Path) -> None:
    """Nothing is reserved for what the file cannot hold."""
    image = Image(n_tensors=262_144)
    refused(path, image, "number of tensors: 262144 tensors wanted at byte 16, 8 bytes present", TruncatedModel)
    image = Image(n_keys=65_536)
    refused(path, image, "number of keys: 65536 keys wanted at byte 24, 0 bytes present", TruncatedModel)
    image = one_key("a", "u64[]", [])
    struct.pack_into("<Q", image, image.fields["count of a"][0], 2**26)
    refused(path, image, "value of key 'a': 67108864 values wanted at byte 49, 0 bytes present", TruncatedModel)


def test_limit_of_tensors(path: Path) -> None:
    def image(n: int) -> bytes:
        table = b"".join(struct.pack("<Q6sIQIQ", 6, b"%06d" % i, 1, 1, 0, 32 * i) for i in range(n))
        head = bytes(Image(n_tensors=n)) + table
        return head + bytes(-len(head) % 32 + 32 * n)

    assert len(opened(path, image(262_144)).tensors()) == 262_144
    refused(path, image(262_145), "number of tensors at byte 8 announces 262145 tensors, limit 262144")


@pytest.mark.parametrize("type_name", ["str", "u8[]"])
def test_limit_of_lengths(path: Path, type_name: str) -> None:
    """64 MiB of string, 2^26 elements: in a sparse file."""
    image = one_key("a", type_name, "" if type_name == "str" else [])
    at = image.fields["length of a[0]" if type_name == "str" else "count of a"][0]
    unit = "bytes" if type_name == "str" else "values"
    for n in (2**26, 2**26 + 1):
        struct.pack_into("<Q", image, at, n)
        path.write_bytes(image)
        os.truncate(path, len(image) + n)
        if n == 2**26:
            assert len(_core.Gguf(path).get("a")) == n
        else:
            with pytest.raises(ModelFormatError, match=f"value of key 'a' at byte {at} announces {n} {unit}, limit"):
                _core.Gguf(path)


@pytest.mark.parametrize("alignment", [8, 16, 32, 65_536])
def test_alignment(path: Path, alignment: int) -> None:
    image = Image(n_tensors=2, n_keys=1).key("general.alignment", "u32", alignment)
    image.tensor("a", [1], 0, 0).tensor("b", [1], 0, alignment).data(alignment + 4, alignment)
    first, second = opened(path, image).tensors()
    assert first[3] % alignment == 0
    assert second[3] - first[3] == alignment
    struct.pack_into("<Q", image, image.fields["offset of 'b'"][0], alignment - 4)
    refused(path, image, f"the offset of tensor 'b' at byte .* is {alignment - 4}, no multiple of the alignment")


@pytest.mark.parametrize("alignment", [0, 1, 4, 24, 65_535, 131_072, 2**31])
def test_wrong_alignment(path: Path, alignment: int) -> None:
    match = f"key 'general.alignment' is {alignment}, expected a power of two, 8 to 65536"
    refused(path, one_key("general.alignment", "u32", alignment), match)


def test_alignment_of_wrong_type(path: Path) -> None:
    refused(path, one_key("general.alignment", "str", "32"), "key 'general.alignment' is str, expected an integer")
    refused(path, one_key("general.alignment", "u32[]", [32]), r"is u32\[\], expected an integer")
    refused(path, one_key("general.alignment", "f32", 32.0), "is f32, expected an integer")
    refused(path, one_key("general.alignment", "i32", -32), "is -32, expected at least 0")


def one_tensor(name: str | bytes = "a", sizes: Iterable[int] = (32,), type_id: int = 0, offset: int = 0) -> Image:
    return Image(n_tensors=1).tensor(name, sizes, type_id, offset).data(4096)


def test_tensor_names(path: Path) -> None:
    assert opened(path, one_tensor("n" * 64)).tensors()[0][0] == "n" * 64
    refused(path, one_tensor("n" * 65), "a tensor name at byte 24 announces 65 bytes, limit 64")
    refused(path, one_tensor(""), "a tensor name at byte 24 is empty")
    refused(path, one_tensor(b"\xff"), "is not printable ASCII")
    twice = Image(n_tensors=2).tensor("a", [8], 0, 0).tensor("a", [8], 0, 32).data(64)
    refused(path, twice, "tensor 'a' comes twice")


def test_tensor_shapes(path: Path) -> None:
    assert opened(path, one_tensor(sizes=[2, 3, 4, 5])).tensors()[0][2:] == ((5, 4, 3, 2), 96, 480)
    refused(path, one_tensor(sizes=[]), "dimensions of tensor 'a' at byte 33 are 0; 1 to 4")
    refused(path, one_tensor(sizes=[1] * 5), "dimensions of tensor 'a' at byte 33 are 5; 1 to 4")
    refused(path, one_tensor(sizes=[4, 0]), "dimensions of tensor 'a' .* have size 0")
    for sizes in ([2**63], [2**32, 2**32], [2**62, 2], [3, 2**62, 3], [2**64 - 1]):
        refused(path, one_tensor(sizes=sizes), "dimensions of tensor 'a' .* have size .* product at most")
    refused(path, one_tensor(sizes=[2**62]), r"tensor 'a' .* is F32, shape \[4611686018427387904\]: more than")
    refused(path, one_tensor(sizes=[2**60]), "ends inside tensor 'a': 4611686018427387904 bytes wanted", TruncatedModel)
    refused(path, one_tensor(sizes=[16, 2], type_id=2), r"is Q4_0, stored in blocks of 32, but its shape is \[2, 16\]")


def test_tensor_types(path: Path) -> None:
    known = {type_id: (name, size, n_bytes) for name, type_id, size, n_bytes in _core.formats()}
    for type_id in [*range(64), 2**31, 2**32 - 1]:
        image = one_tensor(sizes=[256], type_id=type_id)
        if type_id in known:
            name, size, n_bytes = known[type_id]
            assert opened(path, image).tensors()[0][1::3] == (name, 256 // size * n_bytes)
        else:
            refused(path, image, f"type of tensor 'a' at byte .* is {type_id}, a storage format", UnsupportedModel)


def test_tensors_lie_apart_and_in_the_file(path: Path) -> None:
    def two(first: int, second: int, n_data: int) -> Image:
        return Image(n_tensors=2).tensor("a", [16], 0, first).tensor("b", [16], 0, second).data(n_data)

    for first, second in ((0, 64), (64, 0), (0, 128)):
        assert len(opened(path, two(first, second, max(first, second) + 64)).tensors()) == 2
    for first, second in ((0, 32), (32, 0), (0, 0)):
        refused(
            path, two(first, second, 200), "tensor '[ab]' at byte 128 overlaps tensor|tensor '[ab]' .* overlaps tensor"
        )
    refused(path, two(0, 64, 127), "ends inside tensor 'b': 64 bytes wanted at offset 64 .* 127 bytes", TruncatedModel)
    for offset in (2**62, 2**63, 2**64 - 32):
        refused(
            path, two(0, offset, 200), f"ends inside tensor 'b': 64 bytes wanted at offset {offset}", TruncatedModel
        )
    no_data = Image(n_tensors=1).tensor("a", [16], 0, 0)
    refused(path, no_data, "ends inside tensor 'a'.* 0 bytes of data present", TruncatedModel)
