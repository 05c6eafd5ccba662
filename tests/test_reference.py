"""The specification against Hugging Face's logits, and against misreadings: each fact must show in the logits.

The tiny models that other tests rely on are judged here too: one on which a mistake leaves no trace tests nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader

import reference
from tiny import FAMILIES, FORMATS, write_tiny

SHARED = Path(os.environ.get("GEMMART_SHARED", Path(__file__).resolve().parents[2] / "shared"))
MODELS = sorted((SHARED / "models/gemma2-tiny").glob("*.gguf"))
IDS = np.random.default_rng(3).integers(0, 512, 40)


def difference(logits: reference.Array, expected: reference.Array) -> float:
    """‖logits − expected‖ / ‖expected‖; NaN where either has one."""
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


@pytest.mark.skipif(not MODELS, reason=f"no models in {SHARED}/models/gemma2-tiny; GEMMART_SHARED says where they are")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_gemma2_equals_hugging_face(path: Path) -> None:
    stored = np.load(path.with_suffix(".npz"))
    lengths = [name.removeprefix("ids_") for name in stored.files if name.startswith("ids_")]
    assert lengths
    for length in lengths:
        logits = reference.forward(path, stored[f"ids_{length}"])
        assert difference(logits, stored[f"logits_{length}"]) < 3e-6  # its norms, softmax and angles are float32


def in_attention(**changes: Callable) -> Callable:
    """A misreading of attention that maps the named arguments, where it is given them."""

    def misread(attention: Callable) -> Callable:
        def misreading(q, k, v, **arguments):
            return attention(q, k, v, **{name: changes.get(name, lambda x: x)(x) for name, x in arguments.items()})

        return misreading

    return misread


def swap_heads(split_heads: Callable) -> Callable:
    """The four query heads as 0, 2, 1, 3, so that two of them read the other group's keys and values."""
    return lambda x, n: split_heads(x, n)[:, [0, 2, 1, 3]] if n == 4 else split_heads(x, n)


MISREADINGS = [  # family, piece, what is read into it, ‖difference‖ that it must make
    ("gemma2", "attention", in_attention(cap=lambda cap: 0), 0.1),
    ("gemma2", "soft_cap", lambda _: lambda x, cap: x, 0.1),
    ("gemma2", "attention", in_attention(window=lambda window: window and window + 1), 0.1),
    ("gemma2", "attention", in_attention(window=lambda window: window and window - 1), 0.1),
    ("gemma2", "attention", in_attention(window=lambda window: 12 - window), 0.1),
    ("gemma2", "rms_norm", lambda norm: lambda x, weight, eps: norm(x, weight + 1, eps), 0.1),
    *((family, "attention", in_attention(scale=lambda scale: 1.05 * scale), 0.01) for family in FAMILIES),
    *((family, "split_heads", swap_heads, 0.1) for family in FAMILIES),
    *((family, "rotate", lambda rotate: lambda a, b, freq: rotate(a, b, 1.01 * freq), 0.01) for family in FAMILIES),
    *((family, "rms_norm", lambda norm: lambda x, weight, eps: norm(x, weight, 1e-6), 1e-3) for family in FAMILIES),
    *((f, "rope_neox", lambda _: reference.rope_neighbours, 0.1) for f in ("gemma", "gemma2", "gemma3")),
    *((f, "gelu_tanh", lambda _: reference.silu, 0.05) for f in ("gemma", "gemma2", "gemma3")),
    ("gemma3", "attention", in_attention(window=lambda window: 12), 0.01),
    ("llama", "rope_neighbours", lambda _: reference.rope_neox, 0.1),
    ("llama", "silu", lambda _: reference.gelu_tanh, 0.05),
]


@pytest.mark.parametrize(("family", "piece", "misread", "least"), MISREADINGS)
def test_a_misreading_shows(
    family: str, piece: str, misread: Callable, least: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny(tmp_path / "m.gguf", family)
    expected = reference.forward(path, IDS)
    monkeypatch.setattr(reference, piece, misread(getattr(reference, piece)))
    assert difference(reference.forward(path, IDS), expected) > least


@pytest.mark.parametrize(
    ("family", "n_layers", "denominator"),
    [("gemma", 46, 8), ("gemma2", 45, 8), ("gemma2", 46, 24), ("gemma3", 61, 8), ("gemma3", 62, 24), ("llama", 46, 8)],
)
def test_query_scale(
    family: str, n_layers: int, denominator: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1 / sqrt(head_dim), but 1 / sqrt(dim / n_heads) in the 27B of Gemma 2 and 3, known by the number of layers."""
    path = write_tiny(tmp_path / "m.gguf", family, n_layers=n_layers, dim=96, n_heads=4, head_dim=8, ffn_dim=8)
    scales = []
    note = in_attention(scale=lambda scale: scales.append(scale) or scale)
    monkeypatch.setattr(reference, "attention", note(reference.attention))
    reference.forward(path, IDS[:2])
    assert scales == pytest.approx(n_layers * [denominator**-0.5])


@pytest.mark.parametrize(
    ("family", "option"),
    [
        *((family, {"rope_base": 20000.0}) for family in FAMILIES),
        ("gemma3", {"rope_factor": 8.0}),
        ("llama", {"rope_factor": 4.0}),
        ("llama", {"rope_freqs": True}),
        ("llama", {"tied": False}),
        ("gemma2", {"window": 13}),
        ("gemma3", {"window": 13}),
        ("gemma2", {"attention_cap": 40.0}),
        ("gemma2", {"final_cap": 20.0}),
    ],
)
def test_what_the_file_says_shows(family: str, option: dict, tmp_path: Path) -> None:
    plain = reference.forward(write_tiny(tmp_path / "plain.gguf", family), IDS)
    other = reference.forward(write_tiny(tmp_path / "other.gguf", family, **option), IDS)
    assert difference(other, plain) > 0.01


def test_gemma3_scales_the_rope_of_global_layers_only(tmp_path: Path) -> None:
    options = {"n_layers": 5, "window": 12}  # no global layer
    plain = reference.forward(write_tiny(tmp_path / "plain.gguf", "gemma3", **options), IDS)
    path = write_tiny(tmp_path / "scaled.gguf", "gemma3", rope_factor=8.0, rope_base=5000.0, **options)
    assert np.array_equal(reference.forward(path, IDS), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_later_tokens_change_nothing_before_them(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", family)
    assert difference(reference.forward(path, IDS[:20]), reference.forward(path, IDS)[:20]) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_matmul_input_is_what_is_multiplied(family: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", family, "Q8_0", n_layers=2)
    seen = []

    def zero(x: reference.Array, name: str) -> reference.Array:
        seen.append((x.shape, name))
        return 0 * x

    assert not reference.forward(path, IDS, matmul_input=zero).any()
    assert len(seen) == 2 * 7 + 1  # four products of attention and three of the feed-forward a layer, and the output
    assert {name for _, name in seen} == {"Q8_0"}


@pytest.mark.parametrize(
    ("family", "quant"), [*((f, "F32") for f in FAMILIES), *(("gemma2", quant) for quant in FORMATS[1:])]
)
def test_tiny_models_are_lively(family: str, quant: str, tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "m.gguf", family, quant)
    assert path.stat().st_size < 3_000_000
    assert path.read_bytes() == write_tiny(tmp_path / "again.gguf", family, quant).read_bytes()
    logits = reference.forward(path, IDS)
    assert logits.shape == (40, 512)
    assert 2 < logits.std() < 20
    assert len(set(logits.argmax(-1))) > 10


@pytest.mark.parametrize("family", FAMILIES)
def test_tiny_vocabulary(family: str, tmp_path: Path) -> None:
    fields = GGUFReader(write_tiny(tmp_path / "m.gguf", family, n_vocab=600)).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == len(set(tokens)) == len(fields["tokenizer.ggml.token_type"].contents()) == 600
    if family == "llama":
        merges = [merge.split(" ") for merge in fields["tokenizer.ggml.merges"].contents()]
        assert merges
        assert {part for pair in merges for part in (*pair, "".join(pair))} <= set(tokens)
    else:
        assert len(fields["tokenizer.ggml.scores"].contents()) == 600
        assert [f"<0x{byte:02X}>" for byte in range(256)] == [token for token in tokens if token.startswith("<0x")]


def test_tiny_refuses(tmp_path: Path) -> None:
    for arguments, options, message in [
        (("gemma9", "F32"), {}, "gemma9"),
        (("gemma2", "Q4_K"), {"dim": 128}, "rows of 128"),
        (("gemma2", "F32"), {"n_vocab": 100}, "n_vocab is 100"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_tiny(tmp_path / "m.gguf", *arguments, **options)
