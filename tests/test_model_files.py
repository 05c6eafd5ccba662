"""Model files that are sound GGUF and yet no model that can run: each is refused by name, none ends the process."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

from conftest import KV_TYPES, Tiny, logits_alone, open_context
from edit import edit
from gemmart import _core
from gemmart.errors import (
    GemmartError,
    InvalidRequest,
    ModelChanged,
    ModelFormatError,
    UnsupportedModel,
)

IDS = np.arange(40, dtype=np.int32)


def tensor(path: Path, name: str) -> np.ndarray:
    return next(t.data for t in GGUFReader(path).tensors if t.name == name).copy()


def refused(path: Path, error: type[GemmartError], *parts: str) -> None:
    """Raises `error` itself, no subclass, with the path and all `parts` in its message."""
    with pytest.raises(error) as raised:
        _core.ModelFacts(str(path))
    assert raised.type is error
    for part in (str(path), *parts):
        assert part in str(raised.value)


# Tensors


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("llama", n) for n in ("token_embd", "output_norm", "blk.0.attn_norm", "blk.3.attn_q", "blk.1.attn_k")),
        *(("llama", n) for n in ("blk.2.attn_v", "blk.0.attn_output", "blk.0.ffn_norm", "blk.3.ffn_gate")),
        *(("llama", n) for n in ("blk.1.ffn_up", "blk.2.ffn_down")),
        *(("gemma2", n) for n in ("blk.0.post_attention_norm", "blk.3.post_ffw_norm")),
        *(("gemma3", n) for n in ("blk.6.attn_q_norm", "blk.0.attn_k_norm")),
    ],
)
def test_missing_tensor(family: str, name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny(family), tmp_path / "m.gguf", tensors={f"{name}.weight": None})
    refused(path, ModelFormatError, f"tensor {name}.weight is missing")


@pytest.mark.parametrize(
    ("name", "shape", "expected", "meaning"),
    [
        ("output_norm", (97,), "[96]", "dim"),
        ("output_norm", (1, 96), "[96]", "dim"),
        ("token_embd", (512, 128), "[512, 96]", "n_vocab, dim"),
        ("blk.0.attn_q", (96, 128), "[128, 96]", "n_heads × head_dim, dim"),  # transposed
        ("blk.1.attn_k", (128, 96), "[64, 96]", "n_kv_heads × head_dim, dim"),
        ("blk.1.attn_v", (64, 96, 1, 2), "[64, 96]", "n_kv_heads × head_dim, dim"),
        ("blk.2.attn_output", (96, 96), "[96, 128]", "dim, n_heads × head_dim"),
        ("blk.3.ffn_gate", (161, 96), "[160, 96]", "ffn_dim, dim"),
        ("blk.3.ffn_up", (160, 64), "[160, 96]", "ffn_dim, dim"),
        ("blk.3.ffn_down", (160, 96), "[96, 160]", "dim, ffn_dim"),
        ("blk.3.post_ffw_norm", (32,), "[96]", "dim"),
    ],
)
def test_wrong_shape(
    name: str, shape: tuple[int, ...], expected: str, meaning: str, tiny: Tiny, tmp_path: Path
) -> None:
    path = edit(tiny("gemma2"), tmp_path / "m.gguf", tensors={f"{name}.weight": np.ones(shape, np.float32)})
    found = f"[{', '.join(map(str, shape))}]"
    refused(path, ModelFormatError, f"tensor {name}.weight has shape {found}, expected {expected} ({meaning})")


def test_embedding_of_wrong_rank(tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("gemma2"), tmp_path / "m.gguf", tensors={"token_embd.weight": np.ones(96, np.float32)})
    refused(path, ModelFormatError, "tensor token_embd.weight has shape [96], expected [n_vocab", "96]")


@pytest.mark.parametrize(
    "name", ["blk.0.attn_q.bias", "blk.4.attn_norm.weight", "rope_freqs.weight", "v.patch_embd.weight"]
)
def test_tensor_that_nobody_uses(name: str, tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("gemma2"), tmp_path / "m.gguf", tensors={name: np.ones(32, np.float32)})
    refused(path, UnsupportedModel, f"tensor {name} is not part of the architecture gemma2")


def test_rows_that_kernels_do_not_take(tiny: Tiny) -> None:
    refused(tiny("llama", dim=72), UnsupportedModel, "tensor token_embd.weight has rows of 72 numbers", "32")


@pytest.mark.parametrize("quant", ["Q4_K", "Q6_K", "Q2_K", "IQ4_XS"])
def test_rows_that_are_no_multiple_of_the_block(quant: str, tiny: Tiny, tmp_path: Path) -> None:
    """Such a file cannot be written by the gguf package; so the type in the table of one with long rows is changed."""
    path = tiny("llama", "Q8_0")
    image = bytearray(path.read_bytes())
    name = b"blk.0.attn_q.weight"
    at = image.index(len(name).to_bytes(8, "little") + name) + 8 + len(name) + 4 + 2 * 8
    assert image[at] == 8  # Q8_0
    image[at] = {"Q2_K": 10, "Q4_K": 12, "Q6_K": 14, "IQ4_XS": 23}[quant]
    (tmp_path / "m.gguf").write_bytes(image)
    refused(tmp_path / "m.gguf", ModelFormatError, "blk.0.attn_q.weight", quant, "96", "256")


# Metadata


def test_unknown_family(tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("gemma2"), tmp_path / "m.gguf", keys={"general.architecture": "mamba"})
    refused(path, UnsupportedModel, "general.architecture is mamba; supported: gemma, gemma2, gemma3, llama")


COUNTS = {
    "embedding_length": 65536,
    "block_count": 1024,
    "attention.head_count": 1024,
    "attention.head_count_kv": 1024,
    "feed_forward_length": 1 << 20,
    "attention.key_length": 1024,
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_out_of_bounds(name: str, tiny: Tiny, tmp_path: Path) -> None:
    limit = COUNTS[name]
    for value in (0, limit + 1, 2**31 - 1, 2**31, 2**32 - 1):
        path = edit(tiny("llama"), tmp_path / "m.gguf", keys={f"llama.{name}": value})
        refused(path, ModelFormatError, f"llama.{name} is {value}, expected 1 to {limit}")
    with pytest.raises((ModelFormatError, UnsupportedModel)):  # the limit itself is only another shape
        _core.ModelFacts(str(edit(tiny("llama"), tmp_path / "m.gguf", keys={f"llama.{name}": limit})))


def metadata(name: str, keys: dict, error: type[GemmartError], *parts: str) -> object:
    return pytest.param(keys, error, parts, id=name)


@pytest.mark.parametrize(
    ("keys", "error", "parts"),
    [
        metadata("no layers", {"block_count": None}, ModelFormatError, "llama.block_count"),
        metadata("text for a count", {"block_count": "4"}, ModelFormatError, "llama.block_count", "str"),
        metadata("no eps", {"attention.layer_norm_rms_epsilon": None}, ModelFormatError, "layer_norm_rms_epsilon"),
        *(
            metadata(f"eps {v}", {"attention.layer_norm_rms_epsilon": v}, ModelFormatError, "0 to 0.1")
            for v in (-1e-6, 0.11, float("nan"), float("inf"))
        ),
        metadata("context 0", {"context_length": 0}, ModelFormatError, "llama.context_length is 0"),
        metadata("experts", {"expert_count": 8}, UnsupportedModel, "expert_count is 8", "mixtures of experts"),
        metadata(
            "3 of 4 heads", {"attention.head_count_kv": 3}, ModelFormatError, "head_count_kv 3 does not divide", "4"
        ),
        metadata(
            "more kv heads", {"attention.head_count_kv": 8}, ModelFormatError, "head_count_kv 8 does not divide", "4"
        ),
        metadata("odd heads", {"attention.key_length": 33}, ModelFormatError, "heads have 33 components", "even"),
        metadata(
            "heads that do not divide dim",
            {"attention.key_length": None, "attention.head_count": 5},
            ModelFormatError,
            "llama.attention.head_count 5 does not divide llama.embedding_length 96",
        ),
        metadata("other values", {"attention.value_length": 64}, UnsupportedModel, "value_length is 64", "32"),
        metadata("half rope", {"rope.dimension_count": 16}, UnsupportedModel, "rope.dimension_count is 16", "32"),
        metadata("yarn", {"rope.scaling.type": "yarn"}, UnsupportedModel, "rope.scaling.type is yarn", "linear"),
        metadata("no factor", {"rope.scaling.type": "linear"}, ModelFormatError, "rope.scaling.factor"),
        metadata(
            "factor 0", {"rope.scaling.type": "linear", "rope.scaling.factor": 0.0}, ModelFormatError, "factor is 0"
        ),
        *(
            metadata(f"base {v}", {"rope.freq_base": v}, ModelFormatError, "llama.rope.freq_base is", "positive")
            for v in (0.0, -1.0, float("inf"), float("nan"))
        ),
        metadata("a count too few", {"feed_forward_length": [160] * 3}, ModelFormatError, "3 values for 4 layers"),
        metadata("a count of 0", {"attention.head_count": [4, 4, 0, 4]}, ModelFormatError, "head_count holds 0"),
        metadata("a count below 0", {"attention.head_count": [4, -4, 4, 4]}, ModelFormatError, "head_count holds -4"),
        metadata("another layer's heads", {"attention.head_count": [4, 4, 6, 4]}, ModelFormatError, "blk.2.attn_q"),
        metadata(
            "another layer's width", {"feed_forward_length": [160, 192, 160, 160]}, ModelFormatError, "blk.1.ffn_"
        ),
    ],
)
def test_metadata(keys: dict, error: type[GemmartError], parts: tuple[str, ...], tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("llama"), tmp_path / "m.gguf", keys={f"llama.{name}": value for name, value in keys.items()})
    refused(path, error, *parts)


@pytest.mark.parametrize("value", [0, 1 << 30])
def test_window_of_gemma3(value: int, tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("gemma3"), tmp_path / "m.gguf", keys={"gemma3.attention.sliding_window": value})
    refused(path, ModelFormatError, "gemma3.attention.sliding_window is", str(value))


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_soft_caps(value: float, tiny: Tiny, tmp_path: Path) -> None:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        path = edit(tiny("gemma2"), tmp_path / "m.gguf", keys={f"gemma2.{key}": value})
        refused(path, ModelFormatError, "soft cap")


@pytest.mark.parametrize(
    ("values", "part"),
    [([1.0] * 15, "expected F32 [16]"), ([1.0] * 15 + [0.0], "element 15 is 0"), ([np.nan] * 16, "nan")],
)
def test_rope_freqs(values: list[float], part: str, tiny: Tiny, tmp_path: Path) -> None:
    freqs = {"rope_freqs.weight": np.array(values, np.float32)}
    path = edit(tiny("llama"), tmp_path / "m.gguf", tensors=freqs)
    refused(path, ModelFormatError, "tensor rope_freqs.weight", part)


def test_a_context_length_beyond_all_bounds(tiny: Tiny, tmp_path: Path) -> None:
    path = edit(tiny("llama"), tmp_path / "m.gguf", keys={"llama.context_length": 2**32 - 1})
    assert _core.ModelFacts(str(path)).info()["n_ctx_train"] == 1 << 24


# Weights


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("bad", [np.nan, -np.inf])
def test_numbers_that_are_not_finite_stay_in_their_sequence(
    bad: float, kv_type: str, isa: str, tiny: Tiny, tmp_path: Path
) -> None:
    """Token 7 has a broken embedding. Whoever reads it fails; neighbours, and who takes its pages later, do not."""
    sound = tiny("llama", tied=False, n_layers=2)
    embedding = tensor(sound, "token_embd.weight")
    embedding[7] = bad
    path = edit(sound, tmp_path / "m.gguf", tensors={"token_embd.weight": embedding})
    good = np.arange(100, 170, dtype=np.int32)
    expected = logits_alone(open_context(sound, kv_type=kv_type), good)

    context = open_context(path, kv_type=kv_type, n_kv_tokens=6 * 32, n_sequences=2)
    broken, healthy = context.kv.new_sequence(), context.kv.new_sequence()
    tokens = np.concatenate([[1, 7, *range(30, 98)], good]).astype(np.int32)
    finite = context.forward(tokens, [(broken, 70), (healthy, 70)], [0, 1, 69, *range(70, 140)])
    assert finite == [True, False, False] + [True] * 70
    np.testing.assert_array_equal(context.logits()[3:], expected)
    context.kv.free(broken)
    context.kv.free(healthy)
    context.kv.drop_cached()
    for n in (70, 1, 33):  # other parts of other pages
        np.testing.assert_array_equal(logits_alone(context, good[:n]), expected[:n])
        context.kv.drop_cached()


def test_a_broken_norm_shows(tiny: Tiny, tmp_path: Path) -> None:
    norm = tensor(tiny("gemma2"), "output_norm.weight")
    norm[3] = np.nan
    context = open_context(edit(tiny("gemma2"), tmp_path / "m.gguf", tensors={"output_norm.weight": norm}))
    assert context.forward(IDS, [(context.kv.new_sequence(), 40)], [0, 39]) == [False, False]


# Files that change


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1000)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    image = path.read_bytes()
    with path.open("r+b") as file:
        file.write(bytes(len(image)))
    os.utime(path, ns=(0, 0))  # a clock may be coarser than this test is quick


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("change", [cut, empty, overwrite])
def test_changed_before_the_weights_are_read(change, mapped: bool, tiny: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("gemma2"), tmp_path / "m.gguf"))
    facts = _core.ModelFacts(str(path))
    change(path)
    with pytest.raises(ModelChanged, match=re.escape(str(path))):
        _core.Model(facts, n_threads=2, n_batch=64, precise=False, mapped=mapped)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("change", [cut, empty, overwrite])
def test_changed_while_it_runs(change, mapped: bool, tiny: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("gemma2"), tmp_path / "m.gguf"))
    context = open_context(path, mapped=mapped)
    expected = logits_alone(context, IDS)
    change(path)
    for _ in range(2):
        with pytest.raises(ModelChanged, match=re.escape(str(path))):
            logits_alone(context, IDS)
    assert np.isfinite(expected).all()


@pytest.mark.parametrize("change", [cut, empty, overwrite])
def test_metadata_outlives_a_change(change, tiny: Tiny, tmp_path: Path) -> None:
    """A mapped file that somebody truncates would end the process with SIGBUS."""
    path = Path(shutil.copy(tiny("gemma2"), tmp_path / "m.gguf"))
    file, other = _core.Gguf(str(path)), _core.Gguf(str(tiny("gemma2")))
    change(path)
    for mine, theirs in zip(file.strings("tokenizer.ggml.tokens"), other.strings("tokenizer.ggml.tokens"), strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert file.get("general.name") == "tiny gemma2 F32"


@pytest.mark.parametrize("mapped", [False, True])
def test_deleted_or_replaced_files_go_on(mapped: bool, tiny: Tiny, tmp_path: Path) -> None:
    path = Path(shutil.copy(tiny("gemma2"), tmp_path / "m.gguf"))
    context = open_context(path, mapped=mapped)
    expected = logits_alone(context, IDS)
    os.replace(shutil.copy(tiny("llama"), tmp_path / "other.gguf"), path)
    np.testing.assert_array_equal(logits_alone(context, IDS), expected)
    path.unlink()
    np.testing.assert_array_equal(logits_alone(context, IDS), expected)


# Calls


def test_wrong_calls(tiny: Tiny) -> None:
    context = open_context(tiny("gemma2"), n_batch=8, n_kv_tokens=64)
    seq = context.kv.new_sequence()
    calls = [
        ([], [], [], "a batch has 0 tokens, expected 1 to 8"),
        ([1] * 9, [(seq, 9)], [], "a batch has 9 tokens, expected 1 to 8"),
        ([512], [(seq, 1)], [], r"token id 512 at row 0 is outside \[0, 512\)"),
        ([3, -1], [(seq, 2)], [], r"token id -1 at row 1"),
        ([3, 4], [(seq, 1)], [], "the runs of a batch have 1 tokens, the batch 2"),
        ([3, 4], [(seq, 3)], [], "more or less than its 2 tokens"),
        ([3, 4], [(seq, 2**31 - 1)], [], "more or less than its 2 tokens"),
        ([3, 4], [(seq, 0), (seq, 2)], [], "more or less"),
        ([3, 4], [(seq, 1), (seq, 1)], [], f"sequence {seq} stands twice"),
        ([3, 4], [(seq + 1, 2)], [], f"sequence {seq + 1}"),
        ([3, 4], [(-1, 2)], [], "sequence -1"),
        ([3, 4], [(seq, 2)], [2], "output row 2: rows must ascend within the batch's 2"),
        ([3, 4], [(seq, 2)], [1, 0], "output row 0: rows must ascend"),
        ([3, 4], [(seq, 2)], [1, 1], "output row 1: rows must ascend"),
        ([3, 4], [(seq, 2)], [-1], "output row -1"),
    ]
    for tokens, runs, outputs, message in calls:
        with pytest.raises(InvalidRequest, match=message):
            context.forward(np.array(tokens, np.int32), runs, outputs)
        assert context.kv.length(seq) == 0
    facts = _core.ModelFacts(str(tiny("gemma2")))
    for n_threads, n_batch in ((0, 1), (1025, 1), (1, 0), (1, 65537), (-1, -1)):
        with pytest.raises(InvalidRequest, match=r"n_(threads|batch) is"):
            _core.Model(facts, n_threads=n_threads, n_batch=n_batch, precise=False)
    with pytest.raises(InvalidRequest, match="f64"):
        open_context(tiny("gemma2"), kv_type="f64")
