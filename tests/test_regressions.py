"""Faults that were found once, each by the smallest case that shows it."""

from __future__ import annotations

import gc
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFValueType, GGUFWriter

import gemmart
import tiny as tiny_models
from conftest import Tiny, require_no_gpu
from edit import edit
from gemmart import _core
from gemmart.errors import DeviceError, InternalError, InvalidRequest, ModelFormatError
from gemmart.model_file import read_vocabulary
from gemmart.sequence import ActiveSequence
from tiny import write_tiny


def run_python(code: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def engine_threads() -> int:
    return sum(thread.name == "gemmart-engine" for thread in threading.enumerate())


def test_a_program_may_end_while_a_model_computes(tiny: Tiny) -> None:
    """The engine's thread was ended inside the core, which aborted the process."""
    code = (
        "import gemmart, sys\n"
        "model = gemmart.load(sys.argv[1], threads=2)\n"
        "print(len(next(iter(model.stream('hello', ignore_eos=True))).tokens))\n"
    )
    for _ in range(3):
        done = run_python(code, tiny("gemma2", "Q8_0", n_ctx=16384))
        assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


def test_a_forgotten_model_ends(tiny: Tiny) -> None:
    before = engine_threads()
    stream = gemmart.load(tiny("gemma2", "Q8_0")).stream("hello", max_tokens=5, ignore_eos=True)
    assert len(stream.result().tokens) == 5  # the stream keeps it
    del stream
    gc.collect()
    assert engine_threads() == before


def test_a_batch_beyond_what_windowed_layers_keep(tiny: Tiny) -> None:
    """A step of more tokens than the windowed pages have room for was out of memory."""
    prompt = [5 + i % 400 for i in range(5000)]
    with gemmart.load(tiny("gemma2", "Q8_0", n_ctx=8192), batch=8192) as model:
        assert len(model.generate(prompt, max_tokens=2, ignore_eos=True).tokens) == 2


def test_a_batch_smaller_than_what_runs(tiny: Tiny) -> None:
    """Sequences that decode left a prompt no row until they ended."""
    with gemmart.load(tiny("gemma2", "Q8_0"), batch=1, parallel=2, ctx=400) as model:
        long = model.stream([7], max_tokens=390, ignore_eos=True)
        next(iter(long))
        short = model.generate([8, 9, 10], max_tokens=2, ignore_eos=True)
        long.close()
        assert len(short.tokens) == 2
        assert long.result().finish_reason == "cancelled"


def test_an_error_of_one_request(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error while one answer is chosen, or while a request is admitted, ended all, or the engine."""
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=64, parallel=4) as model:
        expected = model.generate([7], max_tokens=5, seed=1, ignore_eos=True)
        choose = ActiveSequence._choose
        monkeypatch.setattr(ActiveSequence, "_choose", lambda s, *at: 1 // 0 if s.request.seed == 2 else choose(s, *at))
        streams = [model.stream([7], max_tokens=5, seed=seed, ignore_eos=True) for seed in (1, 2)]
        assert streams[0].result().tokens == expected.tokens
        with pytest.raises(InternalError, match="ZeroDivisionError"):
            streams[1].result()

        monkeypatch.setattr(model._tokenizer, "decoder", None)
        with pytest.raises(InternalError, match="not callable"):
            model.generate([7])
        monkeypatch.undo()
        assert model.generate([7], max_tokens=5, seed=1, ignore_eos=True).tokens == expected.tokens
        assert model._engine._kv.stats()["n_sequences"] == 0


def test_two_threads_on_one_stream(tiny: Tiny) -> None:
    """One of them got the end, the other waited for ever."""
    with gemmart.load(tiny("gemma2", "Q8_0")) as model:
        stream = model.stream([7], max_tokens=300, ignore_eos=True)
        threads = [threading.Thread(target=stream.result, daemon=True) for _ in range(3)]
        for thread in threads:
            thread.start()
        stream.close()
        stream.result()
        for thread in threads:
            thread.join(30)
            assert not thread.is_alive()


def test_a_turn_that_is_read_in_two_goes(tiny: Tiny) -> None:
    """It entered the conversation as far as the first loop had come."""
    with gemmart.load(tiny("gemma2", "Q8_0")) as model:
        session = model.session()
        stream = session.stream("what is it", max_tokens=40, ignore_eos=True)
        for _ in stream:
            break
        assert session.messages == []
        assert stream.result().text == session.messages[1]["content"]

        stream = session.stream("and this", max_tokens=40, ignore_eos=True)
        for _ in stream:
            if stream.text:
                break
        text = stream.text
        del stream  # closes it
        assert [message["content"] for message in session.messages[2:]] == ["and this", text]


def test_paths_that_are_not_utf8(tiny: Tiny, tmp_path: Path) -> None:
    """The core refused them, or failed to say what was wrong with the file."""
    path = tmp_path / os.fsdecode(b"caf\xe9.gguf")
    shutil.copy(tiny("gemma2", "Q8_0"), path)
    with gemmart.load(path) as model:
        assert len(model.generate([7], max_tokens=2, ignore_eos=True).tokens) == 2
    for opened in (_core.ModelFacts(path), _core.ModelFacts(os.fsencode(path)), _core.ModelFacts(str(path))):
        assert opened.info()["family"] == "gemma2"
    path.write_bytes(b"GGUF\x09\0\0\0")
    with pytest.raises(ModelFormatError, match=r"caf\\xe9.gguf: the version"):
        gemmart.load(path)


def test_parts_of_a_model_by_another_name(tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("gemma2", "Q8_0"), tmp_path / "m.gguf", keys={"split.count": 3})
    with pytest.raises(ModelFormatError, match=r"key 'split\.count' is 3"):
        gemmart.load(path)


@pytest.mark.parametrize("quant", ["F32", "Q8_0", "Q5_1"])
def test_padded_embedding(quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond the vocabulary were refused; they are no tokens."""
    n_rows, n_tokens = 512, 493
    whole = write_tiny(tmp_path / "whole.gguf", "gemma2", quant, n_vocab=n_rows)
    add_spm = tiny_models.add_spm
    monkeypatch.setattr(tiny_models, "add_spm", lambda w, n: add_spm(w, n_tokens))
    padded = write_tiny(tmp_path / "padded.gguf", "gemma2", quant, n_vocab=n_rows)
    ids = [7, 8, 9, 10, 492]
    with gemmart.load(padded) as model, gemmart.load(whole) as other:
        assert model.info.n_vocab == n_tokens
        np.testing.assert_array_equal(model.logits(ids), other.logits(ids)[:, :n_tokens])
        assert max(model.generate([7], max_tokens=100, ignore_eos=True).tokens) < n_tokens
        with pytest.raises(InvalidRequest, match="id 493"):
            model.logits([n_tokens])

    monkeypatch.setattr(tiny_models, "add_spm", lambda w, n: add_spm(w, n_rows + 1))
    short = write_tiny(tmp_path / "short.gguf", "gemma2", quant, n_vocab=n_rows)
    with pytest.raises(ModelFormatError, match=r"has 513 entries, but tensor token_embd\.weight only 512 rows"):
        gemmart.load(short)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("model", value) for value in (7, [1, 2], ["a", "b"])),
        *(("pre", value) for value in (7, [1, 2], ["a", "b"])),
        *(("bos_token_id", value) for value in ("x", 1.5, [1, 2], ["a", "b"])),
        *(("add_bos_token", value) for value in ("false", 1, [1, 2])),
        *(("token_type", value) for value in ("x", 1, ["a", "b"])),
        *(("scores", value) for value in ("x", 1.5, ["a", "b"])),
        *(("tokens", value) for value in ("x", 1, [1, 2])),
    ],
)
def test_tokenizer_keys_of_a_wrong_type(key: str, value: object, tmp_path: Path) -> None:
    """They came out as ValueError or TypeError, or were taken for something else."""
    path, name = tmp_path / "m.gguf", f"tokenizer.ggml.{key}"
    writer = GGUFWriter(path, "llama")
    vocabulary = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b"], "merges": ["a b"], key: value}
    for each, given in vocabulary.items():
        writer.add_key_value(f"tokenizer.ggml.{each}", given, GGUFValueType.get_type(given))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelFormatError, match=re.escape(name)):
        read_vocabulary(_core.Gguf(path), "m.gguf")


def test_other_names_of_options(tiny: Tiny) -> None:
    path = tiny("gemma2", "Q8_0")
    with gemmart.load(path, n_ctx=40, n_gpu_layers=0) as model:
        assert model.ctx == gemmart.plan(path, n_ctx=40, n_gpu_layers=0).ctx == 40
    for call in (gemmart.load, gemmart.plan):
        require_no_gpu()
        with pytest.raises(DeviceError, match="no NVIDIA driver"):
            call(path, n_gpu_layers="all")
        with pytest.raises(InvalidRequest, match="another name of ctx"):
            call(path, ctx=40, n_ctx=40)
        with pytest.raises(InvalidRequest, match="another name of ngl"):
            call(path, ngl=0, n_gpu_layers=0)


@pytest.mark.parametrize("prompt", [None, 7, [1.5], ["a"]])
def test_prompts_that_are_none(prompt: object, tiny: Tiny) -> None:
    """They came out as TypeError, and 1.5 was taken for 1."""
    with gemmart.load(tiny("gemma2", "Q8_0")) as model, pytest.raises(InvalidRequest, match="prompt: expected"):
        model.generate(prompt, max_tokens=1)
