"""Embeddings: the states behind the last norm, pooled; each text's own, whatever is computed beside it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

import gemmart
import program
import reference
from conftest import KV_TYPES, Tiny, difference, open_context
from edit import edit
from gemmart import ContextOverflow, InvalidRequest, NumericError, _core
from tiny import FAMILIES

IDS = np.random.default_rng(3).integers(0, 512, 70).astype(np.int32)
FLOAT32 = 2e-5


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=2, batch=64, threads=2) as model:
        yield model


# The core


@pytest.mark.parametrize(("family", "options"), [*((name, {}) for name in FAMILIES), ("llama", {"tied": False})])
def test_states_are_those_of_the_specification(family: str, options: dict[str, bool], isa: str, tiny: Tiny) -> None:
    path = tiny(family, **options)
    context = open_context(path)
    finite = context.forward(IDS, [(context.kv.new_sequence(), 70)], [], range(70))
    assert finite == [True] * 70
    assert context.hidden().shape == (70, 96)
    assert difference(context.hidden(), reference.hidden(path, IDS)) < FLOAT32
    assert context.logits().shape[0] == 0


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_states_in_company(family: str, kv_type: str, isa: str, tiny: Tiny) -> None:
    """Beside rows that want logits, in parts of any size: the same bits."""
    path = tiny(family, "F16", n_layers=6 if family == "gemma3" else 2)
    alone = open_context(path, kv_type=kv_type, n_threads=1)
    alone.forward(IDS, [(alone.kv.new_sequence(), 70)], [], range(70))
    logits = open_context(path, kv_type=kv_type, n_threads=1)
    logits.forward(IDS, [(logits.kv.new_sequence(), 70)], range(70))
    context = open_context(path, kv_type=kv_type, n_kv_tokens=1024, n_sequences=2)
    one, two = context.kv.new_sequence(), context.kv.new_sequence()
    at = 0
    for n in (1, 8, 33, 9, 19):
        part = IDS[at : at + n]
        finite = context.forward(
            np.concatenate([part, part]), [(one, n), (two, n)], range(n // 2, n + n // 2), range(n + n // 2, 2 * n)
        )
        assert finite == [True] * (2 * n - n // 2)
        np.testing.assert_array_equal(context.hidden(), alone.hidden()[at + n // 2 : at + n])
        expected = logits.logits()[at : at + n]
        np.testing.assert_array_equal(context.logits(), np.concatenate([expected[n // 2 :], expected[: n // 2]]))
        at += n
    assert at == 70


def test_the_head_is_not_computed_for_states(tiny: Tiny) -> None:
    model = _core.Model(_core.ModelFacts(str(tiny("gemma2"))), n_threads=1, n_batch=64, precise=False)
    context = _core.Context(model, n_kv_tokens=128, n_sequences=1, kv_type="f32")
    for outputs, hidden, phases in (([], [5, 9], {"hidden norm"}), ([9], [], {"head", "soft cap"})):
        model.time_phases(True)
        context.forward(IDS[:10], [(context.kv.new_sequence(), 10)], outputs, hidden)
        assert {"hidden norm", "head", "soft cap"} & model.phase_times().keys() == phases


@pytest.mark.parametrize("hidden", [[3, 3], [4, 3], [-1], [10], [0, 5]])
def test_rows_that_cannot_be(hidden: list[int], tiny: Tiny) -> None:
    context = open_context(tiny("gemma2"))
    seq = context.kv.new_sequence()
    with pytest.raises(InvalidRequest, match="row"):
        context.forward(IDS[:10], [(seq, 10)], [5], hidden)
    assert context.kv.length(seq) == 0


# The model


def pooled(states: np.ndarray, pooling: str, *, normalize: bool) -> np.ndarray:
    found = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]
    return found / np.linalg.norm(found) if normalize else found


@pytest.mark.parametrize("family", FAMILIES)
def test_pooling(family: str, tiny: Tiny) -> None:
    texts = ["the word", "hello, that was it. " * 8, "é"]
    with gemmart.load(tiny(family), ctx=256, kv_type="f32", batch=16, threads=1) as model:
        states = [reference.hidden(tiny(family), model.tokenize(text, bos=True)) for text in texts]
        for pooling, normalize in product(("mean", "cls", "last"), (False, True)):
            found = model.embed(texts, pooling=pooling, normalize=normalize)
            assert (found.dtype, found.shape) == (np.float32, (3, 96))
            for embedding, of_text in zip(found, states, strict=True):
                assert difference(embedding, pooled(of_text, pooling, normalize=normalize)) < FLOAT32


def test_forms_of_input(model: gemmart.Model) -> None:
    text, other = "the word is", "that"
    ids = model.tokenize(text, bos=True)
    expected = model.embed([text, other])
    assert expected.shape == (2, 96)
    for form in (text, ids, tuple(ids), np.array(ids), [ids], [text], (text,)):
        np.testing.assert_array_equal(model.embed(form), expected[:1])
    np.testing.assert_array_equal(model.embed([ids, other]), expected)
    assert model.embed([]).shape == (0, 96)


def test_alone_and_in_company(model: gemmart.Model, tiny: Tiny, rng: np.random.Generator) -> None:
    """Many at once, of mixed lengths and beside answers that are written: bit by bit those of the texts alone."""
    texts = [rng.integers(7, 512, n).tolist() for n in rng.integers(1, 200, 30)]
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, batch=512, threads=1) as lonely:
        expected = {
            pooling: np.concatenate([lonely.embed(text, pooling=pooling) for text in texts])
            for pooling in ("mean", "last")
        }
        answer = lonely.generate(texts[0], seed=1, max_tokens=30, ignore_eos=True)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = [pool.submit(model.generate, texts[0], seed=1, max_tokens=30, ignore_eos=True) for _ in range(3)]
            found = {pooling: pool.submit(model.embed, texts, pooling=pooling) for pooling in expected}
            for pooling, embeddings in found.items():
                np.testing.assert_array_equal(embeddings.result(60), expected[pooling])
            assert all(found.result(60).tokens == answer.tokens for found in answers)


def test_bos_and_eos_as_the_file_says(tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("llama"), tmp_path / "m.gguf", keys={"tokenizer.ggml.add_eos_token": True})
    with gemmart.load(tiny("llama"), ctx=64) as plain, gemmart.load(path, ctx=64) as ended:
        ids = plain.tokenize("the word")
        np.testing.assert_array_equal(plain.embed("the word"), plain.embed(ids))
        np.testing.assert_array_equal(ended.embed("the word"), plain.embed([*ids, 2]))
        np.testing.assert_array_equal(ended.embed(ids), plain.embed(ids))
        np.testing.assert_array_equal(ended.embed(""), plain.embed([2]))
        with pytest.raises(InvalidRequest, match="no token") as raised:
            plain.embed(["the", ""])
        assert raised.value.param == "texts[1]"


@pytest.mark.parametrize(("kind", "pooling"), [(None, "mean"), (0, "mean"), (1, "mean"), (2, "cls"), (3, "last")])
def test_the_file_says_how(kind: int | None, pooling: str, tiny: Tiny, tmp_path: Path) -> None:
    path = edit(
        tiny("gemma3", n_layers=2), tmp_path / "m.gguf", keys={} if kind is None else {"gemma3.pooling_type": kind}
    )
    with gemmart.load(path, ctx=64) as model:
        assert model.default_pooling == pooling
        np.testing.assert_array_equal(model.embed("the word"), model.embed("the word", pooling=pooling))


def test_a_pooling_that_there_is_not(model: gemmart.Model, tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="'max' is unknown; mean, cls, last are known") as raised:
        model.embed("a", pooling="max")
    assert raised.value.param == "pooling"
    path = edit(tiny("gemma3", n_layers=2), tmp_path / "m.gguf", keys={"gemma3.pooling_type": 4})
    with gemmart.load(path, ctx=64) as ranking:
        with pytest.raises(InvalidRequest, match="pooling_type 4"):
            ranking.embed("the word")
        ranking.embed("the word", pooling="last")


def test_lengths(model: gemmart.Model) -> None:
    assert model.embed([7] * 256).shape == (1, 96)
    with pytest.raises(ContextOverflow, match="257 tokens") as raised:
        model.embed([[7], [7] * 257])
    assert (raised.value.n_prompt, raised.value.n_ctx, raised.value.param) == (257, 256, "texts[1]")
    for wrong in ([512], [-1], ["a", 3], [1.5]):
        with pytest.raises(InvalidRequest):
            model.embed(wrong)  # type: ignore[arg-type]


def test_a_fault_is_that_text_alone(tiny: Tiny, tmp_path: Path) -> None:
    """Token 9 has a broken embedding."""
    sound = tiny("llama", tied=False, n_layers=2)
    (tensor,) = (t for t in GGUFReader(sound).tensors if t.name == "token_embd.weight")
    embedding = np.array(dequantize(tensor.data, tensor.tensor_type))
    embedding[9] = np.nan
    with gemmart.load(edit(sound, tmp_path / "m.gguf", tensors={"token_embd.weight": embedding}), ctx=64) as model:
        good = list(range(100, 150))
        expected = model.embed(good)
        with ThreadPoolExecutor(2) as pool:
            broken = [pool.submit(model.embed, [100, 9, 101]) for _ in range(5)]
            np.testing.assert_array_equal(model.embed([good] * 9), np.repeat(expected, 9, axis=0))
            for found in broken:
                with pytest.raises(NumericError, match=re.escape("NaN")):
                    found.result(60)
        with pytest.raises(NumericError):
            model.embed([good, [9]])
        assert model.n_requests == (0, 0)


def test_many_texts_do_not_stand_before_others(model: gemmart.Model) -> None:
    """They are let in a few at a time, so that whoever asks beside them is answered long before they are done."""
    texts = [[7 + i % 400, 8, 9] for i in range(2000)]
    with ThreadPoolExecutor(1) as pool:
        many = pool.submit(model.embed, texts)
        seen = 0
        while not many.done():
            seen = max(seen, sum(model.n_requests))
            if seen:
                model.generate("it", max_tokens=1)
                break
        assert not many.done()
        assert 0 < seen <= 64
        assert many.result(60).shape == (2000, 96)


# The command


def vectors(done: subprocess.CompletedProcess[bytes]) -> np.ndarray:
    """Printed one JSON array a line."""
    assert done.returncode == 0, done.stderr.decode()
    return np.float32([json.loads(line) for line in done.stdout.splitlines()])


def test_the_command(model: gemmart.Model, tiny: Tiny, tmp_path: Path) -> None:
    path, texts = tiny("gemma2", "Q8_0"), ["the word", "", "é that"]
    expected = model.embed(texts)
    lines = tmp_path / "texts"
    lines.write_bytes("\r\n".join([*texts, ""]).encode())
    for arguments, stdin in (
        (texts, ""),
        (["-f", lines], ""),
        (["-f", "-"], lines.read_text()),
        ([], lines.read_text()),
    ):
        done = program.run("embed", path, *arguments, home=tmp_path, stdin=stdin)
        np.testing.assert_array_equal(vectors(done), expected)
    done = program.run("embed", "-m", path, texts[0], "--pooling", "last", "--no-normalize", home=tmp_path)
    np.testing.assert_array_equal(vectors(done), model.embed(texts[:1], pooling="last", normalize=False))
    found = json.loads(program.run("embed", path, *texts, "--json", home=tmp_path).stdout)
    np.testing.assert_array_equal(np.float32([data["embedding"] for data in found["data"]]), expected)
    assert [data["index"] for data in found["data"]] == [0, 1, 2]
    assert (found["object"], found["model"]) == ("list", path.stem)
    assert found["usage"]["prompt_tokens"] == sum(len(model.tokenize(text, bos=True)) for text in texts)


def test_more_texts_than_are_read_at_once(model: gemmart.Model, tiny: Tiny, tmp_path: Path) -> None:
    texts = [f"the {i}" for i in range(300)]
    done = program.run("embed", tiny("gemma2", "Q8_0"), home=tmp_path, stdin="\n".join(texts))
    np.testing.assert_array_equal(vectors(done), model.embed(texts))


def test_wrong_commands(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("gemma2", "Q8_0")
    for arguments, code, said in (
        ((path, "-f", "/nowhere"), 2, "-f /nowhere: No such file"),
        ((path, "a", "-f", "-"), 2, "--file: TEXT is given too"),
        ((path,), 2, "stdin: holds no text"),
        ((path, "a", "--pooling", "max"), 2, "'max' is not one of 'mean', 'cls', 'last'"),
        ((path, "a", "word " * 99, "-c", "64"), 11, "text 2 has 104 tokens"),
        ((tmp_path / "no.gguf", "a"), 3, "no.gguf"),
    ):
        assert said in program.failure(program.run("embed", *arguments, home=tmp_path), code)
    assert program.run("embed", tiny("llama", n_layers=2), "a", "", home=tmp_path).stdout == b""  # its file adds no BOS
