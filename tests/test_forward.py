"""The core's logits against the specification in float64.

The core rounds where it says that it does: inputs of integer products to 8 bits (one term or two), keys and values to
the type of the cache. Where nothing is rounded, core and specification agree to float32; where something is, they agree
once the specification rounds it too, and the error of both is the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import pytest

import reference
from conftest import ISAS, KV_TYPES, SHARED, Tiny, difference, logits_alone, open_context
from edit import edit
from gemmart import _core
from tiny import FAMILIES, FORMATS

IDS = np.random.default_rng(3).integers(0, 512, 70).astype(np.int32)  # two page edges, five windows
FLOAT32 = 2e-5  # measured: 1.1e-5 at most


class Rounded(reference.Weights):
    """Weights whose products see their input as the core rounds it: to 8 bits where the weights are integers in
    panels; in two terms for queries, keys and values, or everywhere if `precise`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._dequantised: dict[str, reference.Array] = {}
        self.rounds, self.precise = False, False

    def __getitem__(self, name: str) -> reference.Array:
        if name not in self._dequantised:
            self._dequantised[name] = super().__getitem__(name)
        return self._dequantised[name]

    def matmul(self, name: str, x: reference.Array) -> reference.Array:
        if self.rounds and integer_product(self._tensors[f"{name}.weight"].tensor_type.name):
            two_terms = self.precise or name.endswith(("attn_q", "attn_k", "attn_v"))
            x = activations(x, two_terms)
        return super().matmul(name, x)


def integer_product(quant: str) -> bool:
    return _core.kernels.has_panels(quant) and quant not in ("F32", "F16", "BF16")


def eight_bits(x: reference.Array) -> reference.Array:
    """Blocks of 32, each an int8 times its scale."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / 127
    return (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)


def activations(x: reference.Array, two_terms: bool) -> reference.Array:
    """Blocks of 32, each an int8 times its scale, a number of four bits; the second term holds the rest, as an int8 times
    a 256th of the scale."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    power = 2.0 ** (np.frexp(np.abs(blocks).max(-1, keepdims=True) / 127)[1] - 4)
    scale = np.ceil(np.abs(blocks).max(-1, keepdims=True) / 127 / power) * power
    scale[scale == 0] = 1
    first = np.rint(blocks / scale)
    rest = np.rint((blocks / scale - first) * 256).clip(-127, 127) / 256
    return ((first + rest if two_terms else first) * scale).reshape(x.shape)


def bfloat16(x: reference.Array) -> reference.Array:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32).astype(np.float64)


ROUND_KV: dict[str, Callable[[reference.Array], reference.Array]] = {
    "f32": lambda x: x,
    "f16": lambda x: x.astype(np.float16).astype(np.float64),
    "bf16": bfloat16,
    "q8_0": eight_bits,
}


weights_of = lru_cache(maxsize=None)(Rounded)


@cache
def specified(path: Path, kv_type: str = "f32", *, rounds: bool = False, precise: bool = False) -> reference.Array:
    """Logits of IDS; `rounds`: with the core's rounding of inputs and of the cache."""
    weights = weights_of(path)
    weights.rounds, weights.precise = rounds, precise
    attention, to_cache = reference.attention, ROUND_KV[kv_type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "attention", lambda q, k, v, **facts: attention(q, to_cache(k), to_cache(v), **facts))
        return reference.logits(weights, reference.FAMILIES[weights.family](weights, IDS))


def computed(path: Path, kv_type: str = "f32", precise: bool = False) -> np.ndarray:
    return logits_alone(open_context(path, kv_type=kv_type, precise=precise), IDS)


FACTS = [  # family, what differs from the tiny model of that family
    *((family, {}) for family in FAMILIES),
    *((family, {"n_kv_heads": 1, "rope_base": 500.0}) for family in FAMILIES),
    *((family, {"n_heads": 3, "n_kv_heads": 3, "head_dim": 64}) for family in FAMILIES),
    *(("gemma2", {"window": window}) for window in (1, 31, 32, 33, 69, 70, 4096)),
    ("gemma2", {"attention_cap": 5.0, "final_cap": 4.0}),
    ("gemma2", {"attention_cap": 0.0, "final_cap": 0.0}),
    ("gemma2", {"n_layers": 46, "dim": 64, "ffn_dim": 64, "attention_cap": 5.0}),  # the 27B's query scale
    ("gemma3", {"n_layers": 62, "dim": 64, "ffn_dim": 64}),
    ("gemma3", {"rope_factor": 8.0, "n_layers": 12}),  # of the global layers only
    ("gemma3", {"window": 40}),
    ("llama", {"rope_freqs": True}),
    ("llama", {"rope_factor": 4.0}),
    ("llama", {"tied": False}),
]


@pytest.mark.parametrize(("family", "facts"), FACTS, ids=str)
def test_families(family: str, facts: dict, isa: str, tiny: Tiny) -> None:
    path = tiny(family, **facts)
    deep = 10 if facts.get("n_layers", 0) > 12 else 1  # errors of early layers grow in later ones
    assert difference(computed(path), specified(path)) < deep * FLOAT32


def test_gemma2_without_the_keys_of_later_files(tiny: Tiny, tmp_path: Path) -> None:
    keys = ("attn_logit_softcapping", "final_logit_softcapping", "attention.sliding_window")
    path = edit(tiny("gemma2"), tmp_path / "m.gguf", keys={f"gemma2.{key}": None for key in keys})
    assert difference(computed(path), specified(path)) < FLOAT32


def test_counts_of_each_layer(tiny: Tiny, tmp_path: Path) -> None:
    """One number for all layers may be written as one for each."""
    names = {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": 160}
    keys = {f"llama.{name}": [value] * 4 for name, value in names.items()}
    path = edit(tiny("llama"), tmp_path / "m.gguf", keys=keys)
    np.testing.assert_array_equal(computed(path), computed(tiny("llama")))


@pytest.mark.parametrize("kv_type", KV_TYPES[1:])
@pytest.mark.parametrize("family", FAMILIES)
def test_rounded_keys_and_values(family: str, kv_type: str, isa: str, tiny: Tiny) -> None:
    path = tiny(family)
    expected = specified(path, kv_type, rounds=True)
    rounding = difference(expected, specified(path))
    logits = computed(path, kv_type)
    assert difference(logits, expected) < 0.4 * rounding
    assert 0.9 < difference(logits, specified(path)) / rounding < 1.1


@pytest.mark.parametrize("quant", ["F16", "BF16"])
def test_float_formats(quant: str, isa: str, tiny: Tiny) -> None:
    path = tiny("gemma2", quant)
    assert difference(computed(path), specified(path)) < FLOAT32
    np.testing.assert_array_equal(computed(path, precise=True), computed(path))  # there is nothing to round


@pytest.mark.parametrize("precise", [False, True], ids=["one term", "two terms"])
@pytest.mark.parametrize(
    ("family", "quant"),
    [
        *(("gemma2", quant) for quant in FORMATS if integer_product(quant)),
        *((family, "Q8_0") for family in ("gemma", "gemma3", "llama")),
    ],
)
def test_formats_with_integer_products(family: str, quant: str, precise: bool, isa: str, tiny: Tiny) -> None:
    path = tiny(family, quant)
    expected = specified(path, rounds=True, precise=precise)
    rounding = difference(expected, specified(path))
    logits = computed(path, precise=precise)
    # Float32's own errors turn some numbers to the other side of a rounding: 0.7 of the whole for one term. Two random
    # errors of this size would differ by 1.4 of it.
    assert difference(logits, expected) < (2 if precise else 1) * rounding
    assert 0.6 < difference(logits, specified(path)) / rounding < 1.5
    assert rounding < (6e-3 if precise else 0.2)


def test_isas_differ_by_float32_only(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = {}
    for isa in ISAS:
        monkeypatch.setenv("GEMMART_ISA", isa)
        logits[isa] = computed(tiny("gemma2"))
    for isa in ISAS[1:]:
        assert 0 < difference(logits[isa], logits["scalar"]) < 2 * FLOAT32


BARS = {}
if (SHARED / "README.md").exists():
    table = re.findall(r"((?:local|wide)\.\w+) +\| +([0-9.e-]+)", (SHARED / "README.md").read_text())
    BARS = {name: float(error) for name, error in table}


@pytest.mark.skipif(not BARS, reason=f"no table of errors in {SHARED}/README.md; GEMMART_SHARED says where it is")
@pytest.mark.parametrize("precise", [False, True], ids=["one term", "two terms"])
@pytest.mark.parametrize("name", BARS)
def test_no_worse_than_llama_cpp(name: str, precise: bool) -> None:
    """Logits of larger models against stored ones of Hugging Face's own code, with the cache in F16."""
    path = SHARED / f"models/gemma2-tiny/{name}.gguf"
    stored = np.load(path.with_suffix(".npz"))
    for key in (key for key in stored.files if key.startswith("ids_")):
        expected = stored[key.replace("ids", "logits")]
        error = difference(logits_alone(open_context(path, kv_type="f16", precise=precise), stored[key]), expected)
        assert error <= BARS[name], key
        if name == "local.F32":
            exact = logits_alone(open_context(path, kv_type="f32", precise=precise), stored[key])
            assert difference(exact, expected) <= 1e-5
