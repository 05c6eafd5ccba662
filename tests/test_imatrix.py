"""Importance matrices: what is measured, against the reference decoder; their files; what quantising makes of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import quants
from numpy.typing import NDArray

import gemmart
import program
import reference
from conftest import Tiny
from gemmart import _core, imatrix
from gemmart.errors import InvalidRequest, ModelFormatError, NumericError
from gemmart.quantize import quantize
from tiny import FAMILIES

TEXT = "the word of that is you and he was for on are as with his they at be this have from or one had by " * 30


class Recorder(reference.Weights):
    """The reference's weights, which sum the squares of what they are multiplied with."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.squares: dict[str, NDArray[np.float64]] = {}

    def matmul(self, name: str, x: NDArray[np.float64]) -> NDArray[np.float64]:
        self.squares[f"{name}.weight"] = self.squares.get(f"{name}.weight", 0) + (x * x).sum(axis=0)
        return super().matmul(name, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_measures_the_inputs_of_each_matrix(family: str, tiny: Tiny) -> None:
    path = tiny(family)
    found = imatrix.collect(path, TEXT, n_ctx=48, n_chunks=2, threads=2)
    weights = Recorder(path)
    with gemmart.load(path, ctx=64) as model:
        tokens, bos = model.tokenize(TEXT, bos=True), model.tokenize("", bos=True)
    for start in (0, 48):
        reference.FAMILIES[family](weights, np.array(bos + tokens[start + len(bos) : start + 48]))
    assert set(found.squares) == {name for name in weights.squares if name.startswith("blk.")}
    for name, squares in found.squares.items():
        want = weights.squares[name]
        assert np.linalg.norm(squares - want) < 1e-2 * np.linalg.norm(want), name  # keys and values are halves
        assert found.counts[name] == 96
    assert (found.n_chunks, found.chunk_size, found.datasets) == (2, 48, ("text",))
    mean = found.importance("blk.0.ffn_down.weight")
    np.testing.assert_allclose(mean, found.squares["blk.0.ffn_down.weight"] / 96, rtol=1e-6)
    assert found.importance("token_embd.weight") is None


def test_sums_are_off_until_asked_for(tiny: Tiny) -> None:
    model = _core.Model(_core.ModelFacts(str(tiny("llama"))), n_threads=2, n_batch=8, precise=True)
    context = _core.Context(model, n_kv_tokens=64, n_sequences=1, kv_type="f16")
    sequence = context.kv.new_sequence()

    def forward(n: int, outputs: list[int]) -> int:
        context.forward(np.arange(n, dtype=np.int32), [(sequence, n)], outputs)
        return model.input_squares().get("blk.3.ffn_down.weight", (None, -1))[1]

    assert forward(3, []) == -1
    model.sum_input_squares(True)
    assert forward(3, []) == 3
    assert forward(4, [3]) == 3 + 1  # of the last layer only the rows whose logits are wanted
    model.sum_input_squares(True)
    assert forward(2, []) == 2
    model.sum_input_squares(False)
    assert forward(2, []) == -1


def test_does_not_change_what_is_computed(tiny: Tiny) -> None:
    logits = []
    for on in (False, True):
        model = _core.Model(_core.ModelFacts(str(tiny("gemma3", "Q8_0"))), n_threads=2, n_batch=64, precise=False)
        model.sum_input_squares(on)
        context = _core.Context(model, n_kv_tokens=64, n_sequences=1, kv_type="f16")
        context.forward(np.arange(40, dtype=np.int32), [(context.kv.new_sequence(), 40)], list(range(40)))
        logits.append(context.logits())
    np.testing.assert_array_equal(*logits)


def make(**squares: NDArray) -> imatrix.Imatrix:
    return imatrix.Imatrix(
        "m",
        {name: np.asarray(x, np.float64) for name, x in squares.items()},
        dict.fromkeys(squares, 12),
        ("a", "b"),
        3,
        4,
    )


def test_files(tmp_path: Path) -> None:
    made, path = make(x=np.arange(7), y=np.ones(3)), tmp_path / "i.gguf"
    imatrix.write(made, path)
    reader = gguf.GGUFReader(path)
    assert {t.name: (t.tensor_type.name, t.data.shape) for t in reader.tensors} == {
        "x.in_sum2": ("F32", (7,)),
        "x.counts": ("F32", (1,)),
        "y.in_sum2": ("F32", (3,)),
        "y.counts": ("F32", (1,)),
    }
    assert {
        key: reader.fields[key].contents() for key in reader.fields if key.startswith(("imatrix", "general.type"))
    } == {
        "general.type": "imatrix",
        "imatrix.datasets": ["a", "b"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 4,
    }
    found = imatrix.read(path)
    assert (found.name, found.datasets, found.n_chunks, found.chunk_size) == ("i.gguf", ("a", "b"), 3, 4)
    for name in ("x", "y"):
        np.testing.assert_array_equal(found.squares[name], made.squares[name])
        np.testing.assert_array_equal(found.importance(name), (made.squares[name] / 12).astype(np.float32))
    with pytest.raises(InvalidRequest, match="--force"):
        imatrix.write(made, path)
    imatrix.write(made, path, force=True)


def test_experts_are_added_up(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "i.gguf", "imatrix")
    writer.add_tensor("x.in_sum2", np.array([[1, 2], [3, 4], [0, 0]], np.float32))
    writer.add_tensor("x.counts", np.array([[2], [2], [0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    np.testing.assert_array_equal(imatrix.read(tmp_path / "i.gguf").importance("x"), [1, 1.5])


def test_the_older_format(tmp_path: Path) -> None:
    """Values are means times calls."""

    def text(value: str) -> bytes:
        return struct.pack("<i", len(value)) + value.encode()

    entry = text("blk.0.x") + struct.pack("<ii3f", 4, 3, 4, 8, 12)
    whole = struct.pack("<i", 1) + entry + struct.pack("<i", 5) + text("wiki")
    path = tmp_path / "i.dat"
    for data, n_chunks, datasets in [(whole, 5, ("wiki",)), (struct.pack("<i", 1) + entry, 0, ())]:
        path.write_bytes(data)
        found = imatrix.read(path)
        np.testing.assert_array_equal(found.importance("blk.0.x"), [1, 2, 3])
        assert (found.n_chunks, found.datasets) == (n_chunks, datasets)
    for n in range(len(struct.pack("<i", 1) + entry)):
        path.write_bytes(whole[:n])
        with pytest.raises(ModelFormatError, match=r"i\.dat"):
            imatrix.read(path)
    for data in (b"hello, this is no importance matrix", struct.pack("<ii", 1, -5), struct.pack("<i", 0)):
        path.write_bytes(data)
        with pytest.raises(ModelFormatError, match="no importance matrix"):
            imatrix.read(path)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        imatrix.read(tmp_path / "none")


def test_quantising_with_it(tmp_path: Path, tiny: Tiny) -> None:
    """The error in what comes out is less on inputs like those measured, and the file says where it came from."""
    source = tiny("gemma2", dim=256, ffn_dim=512, n_layers=3)
    found = imatrix.collect(source, TEXT, n_ctx=64, n_chunks=4)
    errors = []
    for i, given in enumerate((None, found)):
        out = tmp_path / f"{i}.gguf"
        quantize(source, out, "Q3_K_S", imatrix=given)
        tensors = {t.name: quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(out).tensors}
        originals = {t.name: t.data for t in gguf.GGUFReader(source).tensors}
        errors.append(sum(((tensors[n] - originals[n]) ** 2 @ found.importance(n)).sum() for n in found.squares))
    assert errors[1] < 0.97 * errors[0]
    file = _core.Gguf(tmp_path / "1.gguf")
    assert file.get("quantize.imatrix.entries_count") == len(found.squares)
    assert file.get("quantize.imatrix.chunks_count") == 4
    quantize(tmp_path / "1.gguf", tmp_path / "2.gguf", "Q8_0", allow_requantize=True)
    assert not [key for key in _core.Gguf(tmp_path / "2.gguf").keys() if key.startswith("quantize.")]  # noqa: SIM118
    with pytest.raises(InvalidRequest, match="another model's"):
        quantize(source, tmp_path / "3.gguf", "Q8_0", imatrix=make(**{"blk.0.attn_q.weight": np.ones(7)}))


def test_weights_that_are_not_numbers(tmp_path: Path, tiny: Tiny) -> None:
    data = bytearray(tiny("gemma2").read_bytes())
    at = next(t for t in _core.Gguf(tiny("gemma2")).tensors() if t[0] == "blk.1.attn_norm.weight")[3]
    data[at : at + 4] = np.float32("nan").tobytes()
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    with pytest.raises(NumericError, match=r"the inputs of blk\.\d\.\w+\.weight are not finite"):
        imatrix.collect(broken, TEXT, n_ctx=32, n_chunks=1)


def test_command(tmp_path: Path, tiny: Tiny) -> None:
    model, text = tiny("llama", dim=256, ffn_dim=512, n_layers=2), tmp_path / "text.txt"
    text.write_text(TEXT)

    def run(*arguments: str | Path) -> tuple[int, str]:
        done = program.run(*arguments, home=tmp_path)
        return done.returncode, done.stderr.decode()

    out = tmp_path / "i.gguf"
    code, told = run("imatrix", model, text, "-o", out, "-c", "64", "--chunks", "3", "-t", "2")
    assert code == 0
    assert "14 matrices, 3 chunks of 64 tokens" in told
    assert imatrix.read(out).datasets == ("text.txt",)
    assert run("quantize", model, tmp_path / "q.gguf", "Q4_K_M", "--imatrix", out)[0] == 0
    for arguments, message in [
        ((model,), "TEXTFILE is missing"),
        ((model, text, "-o", out), "--force"),
        ((model, tmp_path / "none.txt", "-o", tmp_path / "new"), "none.txt"),
        ((model, text, "-o", tmp_path / "new", "-c", "100k"), "n_ctx"),
    ]:
        code, told = run("imatrix", *arguments)
        assert (code, message in told) == (2, True), told
    assert not (tmp_path / "new").exists()
    assert json.loads(program.run("show", tmp_path / "q.gguf", "--json", home=tmp_path).stdout)["formats"]["Q4_K"]
