"""Models in parts, which are never joined: split ones, written by the gguf package, and slices NAME.cat0, NAME.cat1 …"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import pytest

import gemmart
from conftest import Tiny, logits_alone
from gemmart import _core
from gemmart.errors import GemmartError, ModelFormatError, ModelNotFound, TruncatedModel
from gemmart.sources import resolve
from test_archives import Packed, data_of
from tiny import write_tiny

IDS = range(2, 27)


def split(path: Path, folder: Path, n_files: int, *, no_tensor_first: bool = False) -> list[Path]:
    """The model at `path` in files `folder`/m-0000I-of-0000N.gguf, written by the gguf package."""
    folder.mkdir(exist_ok=True)
    reader = gguf.GGUFReader(path)
    per_file = -(-len(reader.tensors) // (n_files - no_tensor_first))
    writer = gguf.GGUFWriter(
        folder / "m.gguf",
        reader.fields["general.architecture"].contents(),
        split_max_tensors=per_file,
        small_first_shard=no_tensor_first,
    )
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kinds = field.types
            writer.add_key_value(name, field.contents(), kinds[0], sub_type=kinds[1] if len(kinds) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    files = sorted(folder.glob("m-*.gguf"))
    assert len(files) == n_files
    return files


def slices(data: bytes, path: Path, cuts: Sequence[int]) -> list[Path]:
    """`data` in files `path`.cat0 …, cut at these places."""
    bounds = [0, *cuts, len(data)]
    files = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        files.append(path.with_name(f"{path.name}.cat{number}"))
        files[-1].write_bytes(data[begin:end])
    return files


def logits(parts: Sequence[object], **weights: object) -> np.ndarray:
    model = _core.Model(_core.ModelFacts(*parts), n_threads=2, n_batch=64, precise=False, **weights)
    context = _core.Context(model, n_kv_tokens=64, n_sequences=1, kv_type="f32")
    return logits_alone(context, IDS)


def assert_same_model(plain: Path, parts: Sequence[object]) -> None:
    """The same metadata, tensors and logits, packed and mapped, whatever stays in the cache."""
    one, other = _core.Gguf(plain), _core.Gguf(*parts)
    assert [key for key in [*other.keys()] if not key.startswith("split.")] == one.keys()
    assert {t[:3] for t in other.tensors()} == {t[:3] for t in one.tensors()}
    expected = logits([plain])
    for weights in ({}, {"mapped": True}, {"mapped": True, "cache_bytes": 1000}, {"cache_bytes": 1000}):
        np.testing.assert_array_equal(logits(parts, **weights), expected)


def same_text(plain: Path, ref: Path | str) -> None:
    for mmap in (False, True):
        with gemmart.load(plain, mmap=mmap) as one, gemmart.load(ref, mmap=mmap) as other:
            assert (
                other.generate("hello", seed=1, max_tokens=16).text == one.generate("hello", seed=1, max_tokens=16).text
            )


# ---- split files


@pytest.mark.parametrize("quant", ["Q4_K", "F32"])
@pytest.mark.parametrize("no_tensor_first", [False, True])
def test_a_split_model_is_the_whole_one(quant: str, no_tensor_first: bool, tiny: Tiny, tmp_path: Path) -> None:
    files = split(tiny("gemma2", quant), tmp_path / "parts", 3, no_tensor_first=no_tensor_first)
    assert_same_model(tiny("gemma2", quant), files)
    sources = [resolve(str(path)) for path in (*files, tmp_path / "parts")]
    for source in sources:
        assert [part.path for part in source.parts] == files
        assert source.name == "m"
        assert source.length == sum(path.stat().st_size for path in files)
    same_text(tiny("gemma2", quant), files[1])


def refused(files: Sequence[Path], error: type[GemmartError], *parts: str) -> None:
    """The core refuses them, naming the file and what is wrong."""
    for open_it in (_core.Gguf, _core.ModelFacts):
        with pytest.raises(error) as caught:
            open_it(*files)
        assert type(caught.value) is error
        assert caught.value.exit_code == 3
        for part in parts:
            assert part in str(caught.value)


def test_split_files_that_do_not_go_together(tiny: Tiny, tmp_path: Path) -> None:
    a, b, c = split(tiny("gemma2", "Q4_K"), tmp_path / "parts", 3)
    refused([a], ModelFormatError, f"{a}: key 'split.count' is 3", "here are 1")
    refused([a, b], ModelFormatError, f"{a}: key 'split.count' is 3", "here are 2")
    refused([a, c, b], ModelFormatError, f"{c}: key 'split.no' is 2, expected 1", "not part 2 of the 3", str(a))
    refused([a, b, b], ModelFormatError, f"{b}: key 'split.no' is 1, expected 2", "not part 3 of the 3")
    refused([b, b, c], ModelFormatError, f"{b}: key 'split.no' is 1, expected 0")
    refused([a, b, a], ModelFormatError, f"{a}: key 'split.no' is 0, expected 2")
    refused([a, b, tiny("gemma2", "Q4_K")], ModelFormatError, "key 'split.count' is missing")
    four = split(tiny("gemma2", "Q4_K"), tmp_path / "four", 4)
    refused([a, b, four[2]], ModelFormatError, f"{four[2]}: key 'split.count' is 4, expected 3")
    other = split(tiny("gemma2", "Q8_0", n_layers=5), tmp_path / "other", 3)
    refused([a, b, other[2]], ModelFormatError, "tensor 'blk.", "comes twice")


def with_number(path: Path, key: str, value: int) -> Path:
    """A copy whose key has another value, of 16 or 32 bits as before."""
    data = bytearray(path.read_bytes())
    at = data.index(key.encode()) + len(key)
    n_bytes = {2: 2, 3: 2, 4: 4, 5: 4}[int.from_bytes(data[at : at + 4], "little")]
    data[at + 4 : at + 4 + n_bytes] = value.to_bytes(n_bytes, "little")
    copy = path.with_name("edited.gguf")
    copy.write_bytes(data)
    return copy


def test_wrong_numbers_in_split_files(tiny: Tiny, tmp_path: Path) -> None:
    a, b, c = split(tiny("gemma2", "Q4_K"), tmp_path / "parts", 3)
    n = len(gguf.GGUFReader(tiny("gemma2", "Q4_K")).tensors)
    refused([with_number(a, "split.tensors.count", n + 1), b, c], ModelFormatError,
            f"key 'split.tensors.count' is {n + 1}, but the 3 files have {n} tensors")  # fmt: skip
    refused([with_number(a, "split.count", 2), b, c], ModelFormatError, "key 'split.count' is 2", "here are 3")
    refused([with_number(a, "split.count", 65_535), b, c], ModelFormatError, "key 'split.count' is 65535")
    zero = with_number(a, "split.count", 0)  # then it is a file like any other, whose tensors are not all there
    with pytest.raises(ModelFormatError, match=r"tensor .* is missing"):
        _core.ModelFacts(zero)


def test_a_broken_part_is_named(tiny: Tiny, tmp_path: Path) -> None:
    a, b, c = split(tiny("gemma2", "Q4_K"), tmp_path / "parts", 3)
    whole = b.read_bytes()
    b.write_bytes(whole[:-100])
    refused([a, b, c], TruncatedModel, f"{b}: ends inside tensor")
    b.write_bytes(whole[:50])
    refused([a, b, c], TruncatedModel, f"{b}: ends inside")
    b.write_bytes(b"<html>" + whole[6:])
    refused([a, b, c], ModelFormatError, f"{b}: is not a GGUF file but an HTML")
    b.write_bytes(b"")
    with pytest.raises(TruncatedModel, match=re.escape(str(b))):
        resolve(str(a))


def test_missing_parts_are_named(tiny: Tiny, tmp_path: Path) -> None:
    a, b, c = split(tiny("gemma2", "Q4_K"), tmp_path / "parts", 3)
    b.unlink()
    for ref in (a, b, c, tmp_path / "parts"):
        with pytest.raises(ModelNotFound, match=r"m-00002-of-00003\.gguf: no such file"):
            resolve(str(ref))
    shutil.copy(a, tmp_path / "renamed.gguf")
    with pytest.raises(ModelFormatError, match=r"renamed\.gguf: key 'split.count' is 3"):
        gemmart.load(tmp_path / "renamed.gguf")
    shutil.copy(c, tmp_path / "one-00001-of-00001.gguf")  # one of one is a file by itself
    assert len(resolve(str(tmp_path / "one-00001-of-00001.gguf")).parts) == 1


def test_a_folder_with_several_models_lists_each_once(tiny: Tiny, tmp_path: Path) -> None:
    split(tiny("gemma2", "Q4_K"), tmp_path / "parts", 3)
    slices(b"GGUF" + bytes(20), tmp_path / "parts" / "z.llamafile", [10])
    (tmp_path / "parts" / "mmproj-m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFound, match=r"several models.*: m-00001-of-00003\.gguf, z\.llamafile\.cat0$"):
        resolve(str(tmp_path / "parts"))


# ---- slices


def test_slices_are_used_without_joining_them(tiny: Tiny, tmp_path: Path) -> None:
    for quant in ("Q4_K", "F32"):
        plain = tiny("gemma2", quant)
        data = plain.read_bytes()
        n = len(data)
        for cuts in ([n // 3 + 1, n // 2, n - 5], [1], [4, 5, 6, 7, 100]):
            folder = tmp_path / f"{quant}{cuts}"
            folder.mkdir()
            assert_same_model(plain, slices(data, folder / "m.gguf", cuts))


def test_slices_of_every_kind(tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("gemma2", "Q4_K")
    archive = Packed({".args": b"-c\n64\n", "m.gguf": plain.read_bytes()}).write(tmp_path / "m.llamafile").read_bytes()
    for number, (data, cuts) in enumerate([(plain.read_bytes(), [50_000, 100_000]), (archive, [70_001, 200_000, len(archive) - 30]),
                                           (archive, [len(archive) - 100]), (archive, range(30_000, 330_000, 30_000))]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        files = slices(data, folder / "big.llamafile", cuts)
        for ref in (*files, folder, folder / "big.llamafile"):
            source = resolve(str(ref))
            assert data_of(source) == plain.read_bytes()
            assert source.name == ("m" if data is archive else "big")
        same_text(plain, files[0])
        assert not (folder / "big.llamafile").exists()
    assert data_of(resolve(f"{tmp_path}/1/big.llamafile@m.gguf")) == plain.read_bytes()
    assert gemmart.sources.packed_arguments(resolve(f"{tmp_path}/1/big.llamafile.cat0")) == ["-c", "64"]


def test_slices_that_are_missing_or_swapped(tiny: Tiny, tmp_path: Path) -> None:
    archive = Packed({"m.gguf": tiny("gemma2", "Q4_K").read_bytes()}).write(tmp_path / "whole").read_bytes()
    a, b, c = slices(archive, tmp_path / "m.llamafile", [100_000, 200_000])
    c.rename(tmp_path / "aside")
    with pytest.raises(TruncatedModel, match=r"m\.llamafile\.cat0: no end record .* \.cat parts of which the last"):
        resolve(str(a))
    (tmp_path / "aside").rename(tmp_path / "m.llamafile.cat3")
    with pytest.raises(ModelNotFound, match=r"m\.llamafile\.cat2: no such file"):
        resolve(str(a))
    (tmp_path / "m.llamafile.cat3").rename(c)
    a.rename(tmp_path / "aside")
    with pytest.raises(ModelNotFound, match=r"m\.llamafile\.cat0: no such file"):
        resolve(str(b))
    b.rename(a)
    (tmp_path / "aside").rename(b)
    with pytest.raises(ModelFormatError):
        gemmart.load(a)
    plain = slices(tiny("gemma2", "Q4_K").read_bytes(), tmp_path / "n.gguf", [100_000, 200_000])
    plain[2].unlink()
    with pytest.raises(TruncatedModel, match=r"n\.gguf\.cat0: ends inside tensor"):
        gemmart.load(plain[0])
    wrong = slices(tiny("gemma2", "Q4_K").read_bytes(), tmp_path / "w.gguf", [100_000])
    wrong[0].write_bytes(wrong[1].read_bytes()[:100_000])
    with pytest.raises(ModelFormatError, match=r"w\.gguf\.cat0: not a GGUF file"):
        resolve(str(wrong[0]))


def test_ten_slices_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    data = b"GGUF" + bytes(range(256)) * 4
    slices(data, tmp_path / "m.gguf", range(64, 1024, 64))
    assert data_of(resolve(str(tmp_path / "m.gguf.cat11"))) == data


def test_messages_say_which_slice_and_where(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", "gemma2")
    data = bytearray(path.read_bytes())
    key = data.index(b"general.license")
    data[key + 15 : key + 19] = (99).to_bytes(4, "little")  # its type
    files = slices(bytes(data), tmp_path / "m.gguf", [key + 10])
    with pytest.raises(
        ModelFormatError, match=rf"^{re.escape(str(files[1]))}: the type of key 'general.license' at byte 5 is 99"
    ):
        _core.Gguf(*files)


def test_a_plan_counts_what_is_copied(tiny: Tiny, tmp_path: Path) -> None:
    """Of mapped slices, only what lies across a border is in memory."""
    plain = tiny("gemma2", "Q4_K")
    *_, offset, n_bytes = max(_core.Gguf(plain).tensors(), key=lambda tensor: tensor[4])
    files = slices(plain.read_bytes(), tmp_path / "m.gguf", [offset + n_bytes // 2])
    one, other = gemmart.plan(plain, mmap=True), gemmart.plan(files[0], mmap=True)
    assert other.weight_bytes - one.weight_bytes == -(-n_bytes // 64) * 64
    assert gemmart.plan(plain, mmap=False).weight_bytes == gemmart.plan(files[0], mmap=False).weight_bytes
    files = slices(plain.read_bytes(), tmp_path / "n.gguf", [offset])
    assert gemmart.plan(files[0], mmap=True).weight_bytes == one.weight_bytes


# ---- parts that change while they are used

CHANGE = """
import os, sys, gemmart
path, part, what = sys.argv[1:]
with gemmart.load(path, mmap=True) as model:
    before = model.logits([2, 3, 4])
    if what == "truncate":
        os.truncate(part, 50)
    elif what == "touch":
        os.utime(part, (1, 1))
    else:
        os.rename(part, part + ".old")
        open(part, "w").close()
    try:
        assert (model.logits([2, 3, 4]) == before).all()
        print("the same")
    except gemmart.ModelChanged as error:
        print(error)
"""


@pytest.mark.parametrize("what", ["truncate", "touch", "replace"])
@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.parametrize("kind", ["split", "slices"])
def test_a_part_that_changes_is_named(kind: str, number: int, what: str, tiny: Tiny, tmp_path: Path) -> None:
    plain = tiny("gemma2", "Q4_K")
    if kind == "split":
        files = split(plain, tmp_path / "parts", 3)
    else:
        files = slices(plain.read_bytes(), tmp_path / "m.gguf", [100_000, 200_000])
    run = subprocess.run(
        [sys.executable, "-c", CHANGE, files[0], files[number], what], capture_output=True, timeout=60, text=True
    )
    assert (run.returncode, run.stderr) == (0, "")
    expected = "the same" if what == "replace" else f"{files[number]}: was changed after it was opened; load it again"
    assert run.stdout == expected + "\n"


def test_parts_are_checked_as_files_are(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(100))
    path = tmp_path / "m.gguf"
    for parts, error, words in [
        ([(path, 200, 0)], TruncatedModel, "ends at byte 104; 0 bytes wanted from byte 200"),
        ([path, (path, 1, 104)], TruncatedModel, "ends at byte 104; 104 bytes wanted from byte 1"),
        ([path, tmp_path / "none"], ModelNotFound, "none: cannot be opened"),
        ([path, tmp_path], ModelFormatError, "is a folder"),
        ([(path, -1, 0)], gemmart.InvalidRequest, "offset and length >= 0"),
        ([(path, 0)], gemmart.InvalidRequest, "a part is a path or"),
        ([], gemmart.InvalidRequest, "no part is given"),
    ]:
        with pytest.raises(error, match=words):
            _core.Gguf(*parts)
    descriptors = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            _core.Gguf(path, path, tmp_path / "none")
    assert len(os.listdir("/proc/self/fd")) == descriptors
