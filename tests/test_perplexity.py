"""Perplexity against a computation in NumPy from all logits, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import gemmart
import program
from conftest import Tiny
from gemmart import perplexity
from gemmart.errors import InvalidRequest

TEXT = "the word of that is you and he was for on are as with his they at be this have from or one had by " * 30


@pytest.fixture(scope="module", params=["gemma2", "llama"])  # with BOS and without
def model(request: pytest.FixtureRequest, tiny: Tiny) -> gemmart.Model:
    with gemmart.load(tiny(request.param), ctx=128) as model:
        yield model


@pytest.mark.parametrize("n_ctx", [32, 33, 128])
def test_against_all_logits(model: gemmart.Model, n_ctx: int) -> None:
    """llama.cpp's definition, written out anew: the first token of a chunk becomes BOS where the model has one, and of
    the logits of the second half all but the last one are scored."""
    tokens = model.tokenize(TEXT, bos=True)
    bos = model.tokenize("", bos=True)
    assert len(bos) == (model.info.family == "gemma2")
    losses = []
    for start in range(0, 3 * n_ctx, n_ctx):
        chunk = tokens[start : start + n_ctx]
        chunk[: len(bos)] = bos
        logits = model.logits(chunk).astype(np.float64)
        for i in range(n_ctx // 2, n_ctx - 1):
            chances = np.exp(logits[i] - logits[i].max())
            losses.append(-np.log(chances[chunk[i + 1]] / chances.sum()))
    seen = []
    found = perplexity.measure(
        model, TEXT, n_ctx=n_ctx, n_chunks=3, on_chunk=lambda so_far, n: seen.append((so_far.n_chunks, n))
    )
    assert found.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    error = np.std(losses) / np.sqrt(len(losses) - 1)
    assert found.error == pytest.approx(found.value * error, rel=1e-4)
    assert (found.n_chunks, found.n_ctx, found.n_scored) == (3, n_ctx, len(losses))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_all_chunks_that_the_text_has(model: gemmart.Model) -> None:
    n = len(model.tokenize(TEXT, bos=True))
    assert perplexity.measure(model, TEXT, n_ctx=64).n_chunks == n // 64
    assert perplexity.measure(model, TEXT, n_ctx=64, n_chunks=1000).n_chunks == n // 64


def test_logits_of_the_last_tokens(model: gemmart.Model) -> None:
    tokens = model.tokenize(TEXT)[:100]
    whole = model.logits(tokens)
    for n in (1, 40, 100):
        np.testing.assert_array_equal(np.concatenate(list(model.stream_logits(tokens, n))), whole[-n:])
    for n in (0, 101):
        with pytest.raises(InvalidRequest, match=f"n is {n}"):
            model.stream_logits(tokens, n)


def test_refuses_what_it_cannot_measure(model: gemmart.Model) -> None:
    with pytest.raises(InvalidRequest, match=r"the text has [45] tokens and a chunk needs 32"):
        perplexity.measure(model, "the word", n_ctx=32)
    with pytest.raises(InvalidRequest, match="n_ctx is 129, expected an integer from 4 to 128"):
        perplexity.measure(model, TEXT, n_ctx=129)
    with pytest.raises(InvalidRequest, match="n_chunks"):
        perplexity.measure(model, TEXT, n_ctx=32, n_chunks=0)


def test_command(tmp_path: Path, tiny: Tiny) -> None:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    model = tiny("gemma2")

    def run(*arguments: str | Path, stdin: str = "") -> object:
        return program.run("perplexity", model, *arguments, home=tmp_path, stdin=stdin)

    found = json.loads(run(file, "-c", "64", "--chunks", "4", "--json").stdout)
    with gemmart.load(model, ctx=64) as loaded:
        want = perplexity.measure(loaded, TEXT, n_ctx=64, n_chunks=4)
    assert found == {
        "model": "tiny gemma2 F32",
        "value": want.value,
        "error": want.error,
        "n_chunks": 4,
        "n_ctx": 64,
        "n_scored": 4 * 31,
    }
    text = run("-", "-c", "64", "--chunks", "4", stdin=TEXT).stdout.decode()
    assert text == f"Final estimate: PPL = {want.value:.4f} +/- {want.error:.5f}\n"
    for arguments, message in [
        ((), "FILE is missing"),
        ((tmp_path / "none.txt",), "none.txt"),
        ((file, "-c", "4k"), "tokens"),
        ((file, "--chunks", "0"), "--chunks"),
    ]:
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, b"")
        assert message in done.stderr.decode()
