"""Hugging Face model folders become GGUF files that compute and say the same."""

from __future__ import annotations

import io
import json
import math
import os
import random
import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from gguf import GGMLQuantizationType as Format
from gguf import GGUFReader
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

import gemmart
import hf
import program
import reference
from conftest import SHARED, Tiny, difference
from gemmart.convert import convert, weights
from gemmart.errors import (
    DiskFull,
    GemmartError,
    InvalidRequest,
    ModelFormatError,
    ModelNotFound,
    NumericError,
    TruncatedModel,
    UnsupportedModel,
)
from program import failure, small_disk
from vocab_reader import Metadata

IDS = [int(id) for id in np.random.default_rng(3).integers(0, 512, 40)]
MODELS = {
    "gemma": {"family": "gemma"},
    "gemma2": {"family": "gemma2"},
    "gemma3": {"family": "gemma3"},
    "gemma3-linear": {"family": "gemma3", "rope_base": 5e5, "rope_factor": 8.0},
    "llama": {"family": "llama", "tied": False},
    "llama-tied": {"family": "llama"},
    "llama-linear": {"family": "llama", "rope_base": 5e5, "rope_factor": 4.0},
}


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A Llama in F32."""
    return hf.write_folder(tmp_path / "Tiny-Llama", tiny("llama", tied=False))


@pytest.fixture
def gemma(tiny: Tiny, tmp_path: Path) -> Path:
    return hf.write_folder(tmp_path / "gemma", tiny("gemma3"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out" / "model.gguf"


@pytest.fixture(autouse=True)
def _out_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()


def logits(path: Path) -> np.ndarray:
    with gemmart.load(path, precise=True, kv_type="f32") as model:
        return np.asarray(model.logits(IDS), np.float64)


def fields(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(path).fields.items()}


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def change_weights(folder: Path, change: Any) -> None:
    values = hf.read_safetensors(folder / "model.safetensors")
    change(values)
    hf.write_safetensors(folder / "model.safetensors", values)


# What a model computes


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_computes_what_the_model_computes(name: str, tiny: Tiny, tmp_path: Path, out: Path) -> None:
    original = tiny(**MODELS[name])
    convert(hf.write_folder(tmp_path / "hf", original), out)
    assert difference(logits(out), reference.forward(original, IDS)) < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_keys_and_tensors_are_those_of_the_original(name: str, tiny: Tiny, tmp_path: Path, out: Path) -> None:
    original = tiny(**MODELS[name])
    convert(hf.write_folder(tmp_path / "hf", original), out)
    before, after = fields(original), fields(out)
    family = before["general.architecture"]
    defaults = {f"{family}.rope.freq_base": 1e6 if family == "gemma3" else 1e4, "gemma3.rope.freq_base_swa": 1e4}
    assert {key: value for key, value in after.items() if key.startswith(f"{family}.")} == {
        key: value
        for key, value in {**defaults, **before}.items()
        if key.startswith(f"{family}.") and (family == "gemma3" or not key.startswith("gemma3"))
    }
    old, new = tensors(original), tensors(out)
    assert old.keys() == new.keys()
    for key in old:
        assert old[key].shape.tolist() == new[key].shape.tolist()
        assert np.allclose(old[key].data, new[key].data, rtol=0, atol=1e-6), key


def test_llama_3_stretches_long_wavelengths(tiny: Tiny, tmp_path: Path, out: Path) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    convert(hf.write_folder(tmp_path / "hf", tiny("llama"), rope_scaling=scaling), out)
    expected = []
    for i in range(16):  # as Meta's code applies it to each frequency
        frequency = 10000 ** (-2 * i / 32)
        wavelength = 2 * math.pi / frequency
        if wavelength < 64 / 4:
            scaled = frequency
        elif wavelength > 64 / 1:
            scaled = frequency / 8
        else:
            smooth = (64 / wavelength - 1) / (4 - 1)
            scaled = (1 - smooth) * frequency / 8 + smooth * frequency
        expected.append(frequency / scaled)
    found = tensors(out)["rope_freqs.weight"].data
    assert found.dtype == np.float32
    assert np.allclose(found, expected, rtol=1e-6)
    assert 1 < sorted({round(value, 3) for value in expected})[1] < 8  # one between
    assert difference(logits(out), reference.forward(out, IDS)) < 1e-5


def test_rope_as_transformers_5_writes_it(gemma: Path, folder: Path, out: Path) -> None:
    def written(model: Path, **changes: Any) -> dict[str, Any]:
        config = json.loads((model / "config.json").read_text())
        for name in ("rope_theta", "rope_scaling"):
            config.pop(name, None)
        hf.write_json(model / "config.json", config | changes)
        return fields(convert(model, out, force=True))

    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5}
    local = {"rope_type": "default", "rope_theta": 1e4}
    found = written(gemma, rope_parameters={"full_attention": linear, "sliding_attention": local})
    assert found["gemma3.rope.freq_base"] == 5e5
    assert (found["gemma3.rope.scaling.type"], found["gemma3.rope.scaling.factor"]) == ("linear", 8)
    assert found["gemma3.rope.freq_base_swa"] == 1e4
    found = written(folder, rope_parameters=linear)
    assert (found["llama.rope.freq_base"], found["llama.rope.scaling.factor"]) == (5e5, 8)
    with pytest.raises(UnsupportedModel, match=r"sliding_attention: windowed layers have rope default of base 20000"):
        written(gemma, rope_parameters={"full_attention": linear, "sliding_attention": local | {"rope_theta": 2e4}})


def test_what_published_configs_leave_out_has_the_defaults_of_transformers(gemma: Path, out: Path) -> None:
    config = json.loads((gemma / "config.json").read_text())
    for name in ("rope_theta", "max_position_embeddings", "num_attention_heads", "rms_norm_eps", "vocab_size"):
        config.pop(name)
    hf.write_json(gemma / "config.json", config | {"num_attention_heads": 4, "head_dim": 32})
    found = fields(convert(gemma, out))
    assert found["gemma3.context_length"] == 131072
    assert found["gemma3.rope.freq_base"] == 1e6
    assert found["gemma3.attention.layer_norm_rms_epsilon"] == np.float32(1e-6)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_part_of_a_model_with_pictures(
    prefix: str, gemma: Path, tiny: Tiny, out: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def add_pictures(values: dict[str, Any]) -> None:
        for name in list(values):
            values[prefix + name.removeprefix("model.")] = values.pop(name)
        tower = "vision_tower" if prefix.startswith("language_model") else "model.vision_tower"
        values[f"{tower}.embeddings.weight"] = np.ones((3, 3), np.float32)
        values["multi_modal_projector.mm_input_projection_weight"] = np.ones((3, 3), np.float32)

    change_weights(gemma, add_pictures)
    config = json.loads((gemma / "config.json").read_text())
    config.pop("architectures")
    hf.write_json(
        gemma / "config.json", {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": config, "eos": 1}
    )
    notes: list[str] = []
    convert(gemma, out, notice=notes.append)
    assert notes == ["the model also reads pictures; that part is left out, the file holds the text part alone"]
    assert difference(logits(out), reference.forward(tiny("gemma3"), IDS)) < 1e-5


def test_copies_of_the_embedding_are_left_out(gemma: Path, tiny: Tiny, tmp_path: Path, out: Path) -> None:
    tied = hf.write_folder(tmp_path / "tied", tiny("llama"))
    for model in (gemma, tied):
        change_weights(model, lambda values: values.update({"lm_head.weight": values["model.embed_tokens.weight"]}))
        assert "output.weight" not in tensors(convert(model, out, force=True))
    hf.edit_json(gemma / "config.json", tie_word_embeddings=False)
    with pytest.raises(UnsupportedModel, match="tie_word_embeddings is false; supported is null or true"):
        convert(gemma, out, force=True)


def test_parts_and_their_index(folder: Path, out: Path) -> None:
    whole = convert(folder, out).read_bytes()
    values = hf.read_safetensors(folder / "model.safetensors")
    names = list(values)
    parts = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for part, held in parts.items():
        hf.write_safetensors(folder / part, {name: values[name] for name in held})
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    hf.write_json(folder / "model.safetensors.index.json", index)
    (folder / "model.safetensors").unlink()
    assert convert(folder, out, force=True).read_bytes() == whole
    (folder / "model.safetensors.index.json").unlink()
    assert convert(folder, out, force=True).read_bytes() == whole

    hf.write_json(folder / "model.safetensors.index.json", index)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"model-00002-of-00003\.safetensors is missing, which .*index\.json lists"):
        convert(folder, out, force=True)
    hf.write_safetensors(folder / "model-00002-of-00003.safetensors", {names[0]: values[names[0]]})
    with pytest.raises(ModelFormatError, match=rf"tensor {names[0]}: is in model-00001-of-00003\.safetensors, too"):
        convert(folder, out, force=True)
    hf.write_safetensors(folder / "model-00002-of-00003.safetensors", {})
    with pytest.raises(ModelFormatError, match=rf"tensor {names[1]} is missing, which .* lists there"):
        convert(folder, out, force=True)
    for name in ("../model.safetensors", "/etc/passwd", 7, "a\0.safetensors", "model.bin"):
        hf.write_json(folder / "model.safetensors.index.json", {"weight_map": {names[0]: name}})
        with pytest.raises(ModelFormatError, match=r"expected a \.safetensors file of this folder"):
            convert(folder, out, force=True)


def test_files_may_be_links_as_the_hub_keeps_them(folder: Path, out: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "blob")
    (folder / "model.safetensors").symlink_to(folder.parent / "blob")
    convert(folder, out)


# Types


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("wanted", ["auto", *weights.TYPES])
def test_matrices_are_rounded_to_the_type_and_vectors_are_float32(
    stored: str, wanted: str, tiny: Tiny, tmp_path: Path, out: Path
) -> None:
    folder = hf.write_folder(tmp_path / "hf", tiny("llama"), stored)
    convert(folder, out, type=wanted)
    name = stored if wanted == "auto" else wanted.upper()
    assert fields(out)["general.file_type"] == {"F32": 0, "F16": 1, "BF16": 32}[name]
    for key, tensor in tensors(out).items():
        original = np.frombuffer(hf.in_dtype(np.array(tensors(tiny("llama"))[key].data), stored), np.uint8)
        values = dequantize(original.view({"F32": "<f4", "F16": "<f2", "BF16": "u1"}[stored]), Format[stored])
        expected = "F32" if len(tensor.shape) == 1 else name
        assert tensor.tensor_type == Format[expected]
        assert tensor.data.tobytes() == quantize(values, Format[expected]).tobytes(), key


def test_several_stored_types_become_float32(folder: Path, tmp_path: Path, out: Path) -> None:
    values = hf.read_safetensors(folder / "model.safetensors")
    head = {"lm_head.weight": values.pop("lm_head.weight")}
    (folder / "model.safetensors").unlink()
    hf.write_safetensors(folder / "a.safetensors", values, "BF16")
    hf.write_safetensors(folder / "b.safetensors", head, "F16")
    assert fields(convert(folder, out))["general.file_type"] == 0


def test_bfloat16_is_rounded_to_nearest_ties_to_even() -> None:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1 << 20, np.uint32)
    bits[: 1 << 18] = bits[: 1 << 18] & 0xFFFF0000 | 0x8000  # ties
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    assert np.array_equal(weights.bfloat16_bits(values), quantize(values, Format.BF16).view("<u2").ravel())


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("wanted", weights.TYPES)
def test_weights_that_are_no_numbers_are_refused(dtype: str, bad: float, wanted: str, folder: Path, out: Path) -> None:
    values = hf.read_safetensors(folder / "model.safetensors")
    name = "model.layers.3.mlp.down_proj.weight"
    values[name] = values[name].copy()
    values[name][5, 7] = bad
    hf.write_safetensors(folder / "model.safetensors", values, dtype)
    with pytest.raises(NumericError, match=rf"{name}: holds NaN or infinity"):
        convert(folder, out, type=wanted)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(("value", "wanted"), [(65520, "f16"), (3.4e38, "bf16")])
def test_weights_too_large_for_the_type_are_refused(value: float, wanted: str, folder: Path, out: Path) -> None:
    def grow(values: dict[str, Any]) -> None:
        values["lm_head.weight"] = values["lm_head.weight"].copy()
        values["lm_head.weight"][0, 0] = value

    change_weights(folder, grow)
    with pytest.raises(NumericError, match=rf"lm_head\.weight: holds values too large for {wanted}"):
        convert(folder, out, type=wanted)
    convert(folder, out, type="f32")


@pytest.mark.parametrize("chunk", [1, 96 * 40, 96 * 100])
def test_bytes_are_the_same_in_pieces_of_any_size(
    chunk: int, folder: Path, gemma: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for model in (folder, gemma):
        whole = convert(model, out, type="bf16", force=True).read_bytes()
        with monkeypatch.context() as patch:
            patch.setattr(weights, "CHUNK", chunk)
            assert convert(model, out, type="bf16", force=True).read_bytes() == whole


def test_memory_stays_small_whatever_the_matrix(tiny: Tiny, tmp_path: Path, out: Path) -> None:
    model = hf.write_folder(tmp_path / "hf", tiny("llama", dim=32, ffn_dim=1 << 18, n_layers=1), "BF16")
    tracemalloc.start()
    convert(model, out, type="f16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert out.stat().st_size > 48 << 20
    assert peak < 24 << 20


# Tokenizers


@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_the_tokenizer_and_its_marks(name: str, tiny: Tiny, tmp_path: Path, out: Path) -> None:
    original = tiny(name)
    convert(hf.write_folder(tmp_path / "hf", original), out)
    before, after = fields(original), fields(out)
    same = ["tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id",
            "tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_space_prefix"]  # fmt: skip
    same += ["tokenizer.ggml.eot_token_id", "tokenizer.ggml.add_eos_token"] if name == "gemma3" else []
    assert {key: after.get(key) for key in same} == {key: before.get(key) for key in same}
    assert after.get("tokenizer.ggml.merges") == before.get("tokenizer.ggml.merges")
    text = "hello the <end_of_turn> that word 1234\n\tétat <|im_end|>  you"
    with gemmart.load(original) as a, gemmart.load(out) as b:
        for special in (False, True):
            assert a.tokenize(text, special=special) == b.tokenize(text, special=special)


@pytest.mark.parametrize("pre", hf.PRE_TOKENIZERS)
def test_the_pre_tokenizer_has_its_name(pre: str, folder: Path, out: Path) -> None:
    hf.write_bpe_json(folder, 512, pre)
    assert fields(convert(folder, out))["tokenizer.ggml.pre"] == pre


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, r'pre_tokenizer \[{"type": "Whitespace"}\] are not known'),
        ({"pre_tokenizer": None}, r"pre_tokenizer \[\] are not known; known are those of default, gpt-2"),
        ({"pre_tokenizer": hf.BYTE_LEVEL | {"add_prefix_space": True}}, "are not known"),
        ({"normalizer": {"type": "NFC"}}, r'normalizer {"type": "NFC"} and pre_tokenizer'),
        ({"model": {"type": "Unigram", "vocab": []}}, r'model\.type is "Unigram"; supported is BPE'),
        ({"model": 7}, r"model\.type is 7"),
        ({"model": {"type": "BPE", "vocab": {"a": 512}, "merges": []}}, r"'a' has the id 512, expected 0 to 511"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": []}}, "two tokens have one id"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}, r"merges\[0\] is \"a b\", which"),
        ({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a"]]}}, r"merges\[0\] is .*two tokens"),
        ({"model": {"type": "BPE", "vocab": {"a": 0}}}, r"model\.merges is missing"),
        ({"model": {"type": "BPE", "merges": []}}, r"model\.vocab is missing"),
        ({"added_tokens": [{"id": -1, "content": "x"}]}, r'tokenizer\.json: an added token is "x" with the id -1'),
        ({"added_tokens": [7]}, r"tokenizer\.json: an added token is null"),
    ],
)
def test_a_tokenizer_that_cannot_be_said_is_named(changes: Any, told: str, folder: Path, out: Path) -> None:
    hf.edit_json(folder / "tokenizer.json", **changes)
    with pytest.raises((ModelFormatError, UnsupportedModel), match=told):
        convert(folder, out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize("merges", [["ll", "el"], ["el", "ll"]])
def test_scores_merge_in_the_order_of_the_merges(merges: list[str], gemma: Path, out: Path) -> None:
    spec = json.loads((gemma / "tokenizer.json").read_text())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["id"] < 510]
    vocab = {text: id for text, id in spec["model"]["vocab"].items() if id < 510}
    spec["model"] |= {"vocab": vocab | {"ll": 510, "el": 511}, "merges": [*map(list, merges), *spec["model"]["merges"]]}
    hf.write_json(gemma / "tokenizer.json", spec)
    scores = fields(convert(gemma, out))["tokenizer.ggml.scores"]
    assert [scores[510 + ("ll", "el").index(text)] for text in merges] == [0, -1]
    with gemmart.load(out) as model:
        assert (510 in model.tokenize("ell")) is (merges[0] == "ll")


def test_a_tokenizer_that_the_file_would_not_imitate_is_refused(folder: Path, gemma: Path, out: Path) -> None:
    """Sentencepiece merges whatever makes a piece; tokenizer.json only what it lists."""
    spec = json.loads((gemma / "tokenizer.json").read_text())
    spec["model"]["vocab"].pop("<unused0>")
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<unused0>"]
    missing = next(id for id in range(512) if id not in spec["model"]["vocab"].values())
    spec["model"]["vocab"]["ll"] = missing
    spec["model"]["merges"].insert(0, ["l", "l"])
    hf.write_json(gemma / "tokenizer.json", spec)
    convert(gemma, out)
    spec["model"]["vocab"]["el"] = spec["model"]["vocab"].pop("ll")
    spec["model"]["merges"][0] = ["e", "l"]
    hf.write_json(gemma / "tokenizer.json", spec)
    convert(gemma, out, force=True)
    spec["model"]["merges"].pop(0)  # "el" is a piece that no merge makes
    hf.write_json(gemma / "tokenizer.json", spec)
    with pytest.raises(UnsupportedModel, match=r"cuts a sample text otherwise .*: token \d+ is 'e', not 'el'"):
        convert(gemma, out, force=True)


def trained(kind: str = "bpe", **options: Any) -> bytes:
    """A small sentencepiece model in Gemma's manner."""
    rng, model = random.Random(0), io.BytesIO()
    words = ["hello", "the", "that", "word", "water", "étude", "1234", "<html>", "(x):", "return", "end", "def"]
    lines = [" ".join(rng.choice(words) for _ in range(8)) for _ in range(200)]
    given = {
        "vocab_size": 360,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["\n\n", "▁▁"],
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type=kind, byte_fallback=True,
        normalization_rule_name="identity", pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
        control_symbols=["<start_of_turn>", "<end_of_turn>"], **given | options,
    )  # fmt: skip
    return model.getvalue()


def with_sentencepiece(folder: Path, model: bytes) -> Path:
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return folder


@pytest.mark.parametrize("prefix", [False, True])
def test_a_sentencepiece_model(prefix: bool, gemma: Path, out: Path) -> None:
    model = trained(add_dummy_prefix=prefix)
    decoder = {"4": {"content": "<start_of_turn>", "special": True}, "511": {"content": "▁new▁", "special": False}}
    hf.edit_json(gemma / "tokenizer_config.json", added_tokens_decoder=decoder)
    convert(with_sentencepiece(gemma, model), out)
    theirs, found = sentencepiece.SentencePieceProcessor(model_proto=model), fields(out)
    n = theirs.vocab_size()
    tokens, scores, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    assert tokens[:n] == [theirs.id_to_piece(id) for id in range(n)]
    assert [scores[id] for id in range(n) if id != 4] == [theirs.get_score(id) for id in range(n) if id != 4]
    assert [id for id in range(n) if types[id] == 3] == [id for id in range(n) if theirs.is_control(id)]
    assert [id for id in range(n) if types[id] == 6] == [id for id in range(n) if theirs.is_byte(id)]
    assert [tokens[id] for id in range(n) if types[id] == 4] == ["\n\n", "▁▁"]
    assert [tokens[n], types[n], tokens[511], types[511], len(tokens)] == [f"[PAD{n}]", 5, " new ", 4, 512]
    assert (tokens[4], scores[4], types[4]) == ("<start_of_turn>", -1000, 3)
    assert found["tokenizer.ggml.add_space_prefix"] is prefix
    assert found["tokenizer.ggml.eot_token_id"] == theirs.piece_to_id("<end_of_turn>")
    with gemmart.load(out) as ours:
        for text in ("hello the  that\n\nétude ∑ (x):", "water1234<html>", " the", "x   return"):
            assert ours.tokenize(text) == theirs.encode(text), text


def test_a_broken_sentencepiece_model_is_an_error(gemma: Path, out: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.model: is a sentencepiece model of type 1; supported is 2"):
        convert(with_sentencepiece(gemma, trained("unigram", vocab_size=300)), out)
    model = trained()
    for data in (b"", b"\x0a\xff", b"\xff" * 40, b"<html>", b"\x0a\x03\x0a\x01a\x0b", b"\x0a\x02\x10\x05"):
        with pytest.raises(ModelFormatError, match=r"tokenizer\.model: is no sentencepiece model"):
            convert(with_sentencepiece(gemma, data), out)
    rng = random.Random(1)
    refused = 0
    for _ in range(60):
        data = bytearray(model[: rng.choice([len(model), rng.randrange(len(model))])])
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            convert(with_sentencepiece(gemma, bytes(data)), out, force=True)
        except GemmartError:
            refused += 1
    assert refused > 20


def test_added_tokens_without_a_row_are_told(gemma: Path, out: Path) -> None:
    spec = json.loads((gemma / "tokenizer.json").read_text())
    hf.edit_json(gemma / "tokenizer.json", added_tokens=[*spec["added_tokens"], hf.added(512, "<image_soft_token>")])
    notes: list[str] = []
    convert(gemma, out, notice=notes.append)
    assert notes == ["1 added tokens have no row in the embedding and are left out: '<image_soft_token>' first"]


def test_begin_and_end_as_the_post_processor_says(folder: Path, out: Path) -> None:
    first = [{"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    ids = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    processor = {"type": "TemplateProcessing", "single": first, "pair": first, "special_tokens": ids}
    assert fields(convert(folder, out))["tokenizer.ggml.add_bos_token"] is False
    hf.edit_json(folder / "tokenizer.json", post_processor=processor)
    assert fields(convert(folder, out, force=True))["tokenizer.ggml.add_bos_token"] is True


def test_marks_come_from_special_tokens_map_too(folder: Path, out: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    hf.write_json(folder / "special_tokens_map.json", {"eos_token": {"content": "<|endoftext|>"}, "bos_token": "<no>"})
    found = fields(convert(folder, out))
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.eot_token_id"] == 2
    assert "tokenizer.ggml.bos_token_id" not in found


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
def test_the_chat_template(name: str, folder: Path, out: Path) -> None:
    text = "{% for m in messages %}{{ m.content }}é{% endfor %}"
    if name.endswith("jinja"):
        (folder / name).write_text(text)
    elif name == "chat_template.json":
        hf.write_json(folder / name, {"chat_template": text})
    else:
        hf.edit_json(folder / name, chat_template=text)
    assert fields(convert(folder, out))["tokenizer.chat_template"] == text


def test_name_licence_and_sampling_come_from_the_folder(folder: Path, out: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: [en, de]\n---\nA model.\n")
    hf.write_json(folder / "generation_config.json", {"temperature": 0.6, "top_k": 40})
    found = fields(convert(folder, out))
    assert found["general.name"] == "Tiny Llama"
    assert found["general.license"] == "apache-2.0"
    assert found["general.languages"] == ["en", "de"]
    assert (found["general.sampling.temp"], found["general.sampling.top_k"]) == (np.float32(0.6), 40)
    broken = [("README.md", "---\nlicense: {\n---\n"), ("README.md", "---\nlanguage: [en, 5]\n---\n")]
    broken += [("generation_config.json", '{"top_k": "many"}'), ("generation_config.json", "[1]")]
    for name, text in broken:
        (folder / name).write_text(text)
        with pytest.raises(
            ModelFormatError, match=rf"{folder}: README\.md.* generation_config\.json .*(broken|written)"
        ):
            convert(folder, out, force=True)
        (folder / name).unlink()


# Broken folders


@pytest.mark.parametrize(
    ("changes", "error", "told"),
    [
        ({"architectures": ["MambaForCausalLM"]}, UnsupportedModel, r'architectures is \["Mamba.*supported are Gemma'),
        ({"architectures": []}, UnsupportedModel, r"architectures is \[\]"),
        ({"architectures": [["x"]]}, UnsupportedModel, r"architectures is"),
        ({"architectures": ["Gemma3ForConditionalGeneration"]}, ModelFormatError, "text_config is missing"),
        ({"num_hidden_layers": 0}, ModelFormatError, "num_hidden_layers is 0, expected 1 to 1024"),
        ({"num_hidden_layers": 1 << 62}, ModelFormatError, "num_hidden_layers is 46116.*, expected"),
        ({"num_hidden_layers": 3}, ModelFormatError, r"layers\.3\..* and 8 more: no tensor of a llama model with 3"),
        ({"num_hidden_layers": 5}, ModelFormatError, r"tensor model\.layers\.4\.\S+ is missing"),
        ({"num_hidden_layers": "4"}, ModelFormatError, 'num_hidden_layers is "4"'),
        ({"hidden_size": None}, ModelFormatError, r"config\.json: hidden_size is missing"),
        ({"hidden_size": 97}, ModelFormatError, r"has the shape \[512, 96\], expected \[512, 97\]"),
        ({"num_attention_heads": True}, ModelFormatError, "num_attention_heads is true"),
        ({"num_key_value_heads": 3}, ModelFormatError, "num_key_value_heads 3 does not divide num_attention_heads 4"),
        ({"num_key_value_heads": 4}, ModelFormatError, r"k_proj\.weight has the shape \[64, 96\], expected \[128, 96\]"),
        ({"head_dim": 31}, ModelFormatError, "heads have 31 components"),
        ({"head_dim": 2048}, ModelFormatError, "head_dim is 2048, expected 1 to 1024"),
        ({"head_dim": None, "num_attention_heads": 5, "num_key_value_heads": 5}, ModelFormatError, "5 does not divide"),
        ({"vocab_size": 511}, ModelFormatError, "vocab_size is 511, but the embedding has 512 rows"),
        ({"rms_norm_eps": float("nan")}, ModelFormatError, "rms_norm_eps is NaN, expected 0 to 0.1"),
        ({"rms_norm_eps": "small"}, ModelFormatError, 'rms_norm_eps is "small"'),
        ({"rope_theta": 0}, ModelFormatError, "rope_theta is 0, expected"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, UnsupportedModel, 'rope_type is "yarn"; supported are'),
        ({"rope_scaling": {"type": "linear"}}, ModelFormatError, "rope_scaling: factor is null"),
        ({"rope_scaling": 7}, ModelFormatError, "rope_scaling is 7"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8}}, ModelFormatError, "low_freq_factor is null"),
        ({"partial_rotary_factor": 0.5}, UnsupportedModel, r"partial_rotary_factor is 0\.5"),
        ({"hidden_act": "gelu"}, UnsupportedModel, 'hidden_act is "gelu"; supported is "silu"'),
        ({"attention_bias": True}, UnsupportedModel, "attention_bias is true"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedModel, r'are quantised \("gptq"\)'),
        ({"max_position_embeddings": -1}, ModelFormatError, "max_position_embeddings is -1"),
    ],
)  # fmt: skip
def test_a_config_that_cannot_be_is_named(changes: Any, error: type, told: str, folder: Path, out: Path) -> None:
    hf.edit_json(folder / "config.json", **changes)
    with pytest.raises(error, match=told):
        convert(folder, out)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"query_pre_attn_scalar": 31}, "query_pre_attn_scalar is 31; a GGUF file of 7 layers implies 32"),
        ({"sliding_window_pattern": 4}, "sliding_window_pattern is 4; supported is null or 6"),
        ({"layer_types": ["full_attention"] * 7}, "implies full_attention in every 6th layer"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0; supported is null"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true"),
        ({"rope_local_base_freq": 20000}, "windowed layers have rope default of base 20000"),
    ],
)
def test_what_no_gguf_file_says_is_refused(changes: Any, told: str, gemma: Path, out: Path) -> None:
    hf.edit_json(gemma / "config.json", **changes)
    with pytest.raises(UnsupportedModel, match=told):
        convert(gemma, out)


def test_tensors_that_do_not_fit_are_named(folder: Path, out: Path) -> None:
    values = hf.read_safetensors(folder / "model.safetensors")
    norm, bias = "model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias"
    cases: list[tuple[dict[str, Any], str]] = [
        ({norm: None}, f"{folder}: tensor {norm} is missing"),
        ({norm: values[norm][:-1]}, rf"tensor {norm} has the shape \[95\], expected \[96\]"),
        ({"lm_head.weight": None}, r"tensor lm_head\.weight is missing"),
        ({bias: np.ones(128)}, f"tensor {bias}: no tensor of a llama model with 4 layers"),
        ({"model.embed_tokens.weight": None}, r"tensor model\.embed_tokens\.weight is missing"),
        ({"model.embed_tokens.weight": np.ones(3)}, r"tensor model\.embed_tokens\.weight is missing or no matrix"),
    ]
    for changes, told in cases:
        changed = {name: value for name, value in (values | changes).items() if value is not None}
        hf.write_safetensors(folder / "model.safetensors", changed)
        with pytest.raises(ModelFormatError, match=told):
            convert(folder, out)
    hf.write_safetensors(
        folder / "model.safetensors", values | {"model.layers.0.self_attn.rotary_emb.inv_freq": values[norm]}
    )
    convert(folder, out)


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(begin: Any, end: Any, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "error", "told"),
    [
        (b"", TruncatedModel, "has 0 bytes, too few"),
        (b"\x08\0\0", TruncatedModel, "has 3 bytes, too few"),
        (safetensors({}, length=1 << 60), ModelFormatError, r"no safetensors file: its header would have 1,152,9.* bytes"),
        (safetensors({}, length=100_000_001), ModelFormatError, "limit 100,000,000"),
        (safetensors({}, length=3), TruncatedModel, "its header has 3 bytes, but 2 are there"),
        (b"version https://git-lfs.github.com/spec/v1\n", ModelFormatError, "is a Git LFS pointer"),
        (safetensors(b"[]"), ModelFormatError, "holds list, expected a JSON object"),
        (safetensors(b"[" * 100_000), ModelFormatError, "is nested too deeply"),
        (safetensors(b'{"a":' * 100_000), ModelFormatError, "is nested too deeply"),
        (safetensors(b"\xff\xfe{}"), ModelFormatError, "is no JSON"),
        (safetensors(b"{"), ModelFormatError, "is no JSON"),
        (safetensors(b'{"a":' + b"1" * 5000 + b"}"), ModelFormatError, "is no JSON"),
        (safetensors(b'{"a":1,"a":2}'), ModelFormatError, "'a' comes twice"),
        (safetensors({"a": 1}), ModelFormatError, "tensor a: dtype is null, expected F32, F16, BF16"),
        (safetensors({"a": entry(0, 4, dtype="Q4")}, b"1234"), ModelFormatError, 'tensor a: dtype is "Q4"'),
        (safetensors({"a": entry(0, 4, dtype=["F32"])}, b"1234"), ModelFormatError, "tensor a: dtype is"),
        (safetensors({"a": entry(0, 4, [-1])}, b"1234"), ModelFormatError, r"tensor a: shape is \[-1\]"),
        (safetensors({"a": entry(0, 4, [1.0])}, b"1234"), ModelFormatError, r"tensor a: shape is \[1\.0\]"),
        (safetensors({"a": entry(0, 4, [True])}, b"1234"), ModelFormatError, r"tensor a: shape is \[true\]"),
        (safetensors({"a": entry(0, 4, [1] * 9)}, b"1234"), ModelFormatError, "expected at most 8 whole numbers"),
        (safetensors({"a": entry(0, 4, [1 << 48])}, b"1234"), ModelFormatError, "tensor a: shape is"),
        (safetensors({"a": entry(0, 4, [1 << 47, 1 << 47])}, b"1234"), ModelFormatError, "has 4 bytes, expected 79,228"),
        (safetensors({"a": entry(0, 8)}, b"12345678"), ModelFormatError, "tensor a: has 8 bytes, expected 4 for F32"),
        (safetensors({"a": entry(8, 4)}, b"12345678"), ModelFormatError, "tensor a: has -4 bytes"),
        (safetensors({"a": entry(-4, 0)}, b"1234"), ModelFormatError, r"data_offsets is \[-4, 0\]"),
        (safetensors({"a": entry(0, "4")}, b"1234"), ModelFormatError, "data_offsets is"),
        (safetensors({"a": entry(0, 4)}, b"123"), TruncatedModel, "tensor a: ends at byte 7.?, but the file has 7"),
        (safetensors({"a": entry(1 << 40, (1 << 40) + 4)}, b"1234"), TruncatedModel, "tensor a: ends at byte 1,099"),
        (safetensors({"a": entry(4, 8)}, b"12345678"), ModelFormatError, "tensor a: begins at 4, expected 0"),
        (safetensors({"a": entry(0, 4), "b": entry(0, 4)}, b"1234"), ModelFormatError, "tensor b: begins at 0, expected 4"),
        (safetensors({"a": entry(0, 4)}, b"12345"), ModelFormatError, "has 5 bytes of data, but its tensors end before"),
        (safetensors({}), ModelFormatError, r"embed_tokens\.weight is missing"),
    ],
)  # fmt: skip
def test_a_broken_safetensors_file_is_an_error(data: bytes, error: type, told: str, folder: Path, out: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(error, match=told):
        convert(folder, out)
    assert not list(out.parent.iterdir())


@settings(max_examples=60, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255), cut=st.booleans(), header=st.booleans())
def test_damaged_files_give_an_error_or_a_model(
    position: float, byte: int, cut: bool, header: bool, tiny: Tiny, tmp_path_factory: pytest.TempPathFactory
) -> None:
    place = tmp_path_factory.mktemp("damaged")
    model = hf.write_folder(place / "hf", tiny("llama", n_layers=1, tied=False))
    name = ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json")[byte % 4]
    data = bytearray((model / name).read_bytes())
    size = 8 + int.from_bytes(data[:8], "little") if header and name == "model.safetensors" else len(data)
    at = int(position * size)
    data[at:] = b"" if cut else bytes([byte]) + data[at + 1 :]
    (model / name).write_bytes(data)
    try:
        convert(model, place / "out.gguf")
    except GemmartError:
        assert [path.name for path in place.iterdir()] == ["hf"]
    else:
        GGUFReader(place / "out.gguf")
    shutil.rmtree(place)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("text", [b"", b"[]", b"\xff", b"{", b"null", b"[" * 100_000, b'{"a":1,"a":1}'])
def test_broken_json_is_named(name: str, text: bytes, folder: Path, out: Path) -> None:
    (folder / name).write_bytes(text)
    with pytest.raises(ModelFormatError, match=str(folder / name)):
        convert(folder, out)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_what_is_no_file_is_not_waited_for(name: str, folder: Path, out: Path) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(ModelFormatError, match=rf"{name}: is no regular file"):
        convert(folder, out)


def test_a_file_cut_short_while_it_is_read(folder: Path, out: Path) -> None:
    def cut(what: str, done: int, total: int | None) -> None:
        with (folder / "model.safetensors").open("r+b") as file:
            file.truncate(100_000)

    with pytest.raises(ModelFormatError, match=r"model\.safetensors: was cut short while it was read"):
        convert(folder, out, progress=cut)
    assert not list(out.parent.iterdir())


# The new file


def test_a_disk_that_is_full_keeps_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", 700_000):
        disk = tmp_path / "disk"
        with pytest.raises(DiskFull, match=r"1,7\d\d,\d+ bytes are needed and [\d,]+ are free"):
            convert(folder, disk / "m.gguf")
        assert not list(disk.iterdir())
        monkeypatch.setattr("gemmart.convert.require_space", lambda *_: None)  # it looked free when we asked
        with pytest.raises(DiskFull, match=r"the disk is full: [\d,]+ are free; nothing was kept"):
            convert(folder, disk / "m.gguf")
        assert not list(disk.iterdir())


def test_a_place_that_cannot_be_written(folder: Path, tmp_path: Path, out: Path) -> None:
    out.write_bytes(b"precious")
    with pytest.raises(InvalidRequest, match="exists already; replace it with --force"):
        convert(folder, out)
    (folder / "model.safetensors").rename(folder / "kept")
    with pytest.raises(ModelNotFound):
        convert(folder, out, force=True)
    assert out.read_bytes() == b"precious"
    (folder / "kept").rename(folder / "model.safetensors")
    convert(folder, out, force=True)
    assert out.read_bytes()[:4] == b"GGUF"
    with pytest.raises(InvalidRequest, match="there is no folder"):
        convert(folder, tmp_path / "no" / "m.gguf")
    with pytest.raises(InvalidRequest, match="is a folder"):
        convert(folder, tmp_path, force=True)
    with pytest.raises(InvalidRequest, match="cannot be written"):
        convert(folder, Path("/proc/m.gguf"))


def test_a_file_that_appears_meanwhile_is_kept(folder: Path, out: Path) -> None:
    with pytest.raises(InvalidRequest, match="exists already"):
        convert(folder, out, progress=lambda what, done, total: out.write_bytes(b"precious") and None)
    assert out.read_bytes() == b"precious"
    assert [path.name for path in out.parent.iterdir()] == ["model.gguf"]


# The command


def test_the_command(folder: Path, gemma: Path, tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> Any:
        return program.run("convert", *arguments, home=tmp_path)

    out = tmp_path / "m.gguf"
    done = run(folder, out, "--type", "bf16")
    assert (done.returncode, done.stdout) == (0, b"")
    assert done.stderr.decode() == f"{out}: {out.stat().st_size:,} bytes\n"
    assert program.run("run", out, "hello", "-n", "4", home=tmp_path).returncode == 0
    assert "exists already; replace it with --force" in failure(run(folder, out), 2)
    assert run(folder, out, "--force", "-q").stderr == b""

    new = tmp_path / "new.gguf"
    for kind in ("q4_k_m", "Q8_0", "int8"):
        assert f"`gemmart quantize {new} NEW.gguf {kind}`" in failure(run(folder, new, "--type", kind), 2)
    assert "there is no such folder" in failure(run(tmp_path / "no", new), 3)
    assert "is no folder" in failure(run(folder / "config.json", new), 3)
    assert "Missing argument 'OUT'" in failure(run(folder), 2)
    (gemma / "tokenizer.json").unlink()
    assert "neither tokenizer.model nor tokenizer.json is there" in failure(run(gemma, new), 3)
    hf.edit_json(gemma / "config.json", architectures=["GPT2LMHeadModel"])
    assert 'architectures is ["GPT2LMHeadModel"]' in failure(run(gemma, new), 4)
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors file there" in failure(run(folder, new), 3)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin, a pickle" in failure(run(folder, new), 4)
    assert not new.exists()


# Real tokenizers


def as_tokenizer_json(vocabulary: Metadata, folder: Path) -> None:
    """The vocabulary of a GGUF file as transformers makes a tokenizer.json of one; sentencepiece's scores go, and come
    back as all the merges that make each piece, best piece first."""
    blob, offsets = vocabulary.strings("tokenizer.ggml.tokens")
    texts = [blob[begin:end].decode() for begin, end in pairwise(offsets)]
    types = vocabulary.get("tokenizer.ggml.token_type").tolist()
    vocab = {text: id for id, text in enumerate(texts)}
    marks = [hf.added(id, text, types[id] != 4) for id, text in enumerate(texts) if types[id] in (2, 3, 4)]
    if vocabulary.get("tokenizer.ggml.model") == "llama":
        scores = vocabulary.get("tokenizer.ggml.scores")
        merges = []
        for id in sorted((id for id, kind in enumerate(types) if kind == 1), key=lambda id: -scores[id]):
            text = texts[id]
            pairs = [(text[:i], text[i:]) for i in range(1, len(text)) if text[:i] in vocab and text[i:] in vocab]
            merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        model = {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
        space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        parts: dict[str, Any] = {"normalizer": space}
    else:
        data, ends = vocabulary.strings("tokenizer.ggml.merges")
        merges = [data[begin:end].decode().split(" ") for begin, end in pairwise(ends)]
        model = {"type": "BPE", "byte_fallback": False}
        parts = {"pre_tokenizer": hf.PRE_TOKENIZERS[vocabulary.get("tokenizer.ggml.pre")]}
    spec = hf.tokenizer_json(model | {"vocab": vocab, "merges": merges}, marks, **parts)
    hf.write_json(folder / "tokenizer.json", spec)


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm2"])
def test_real_tokenizers_cut_as_their_references(name: str, tiny: Tiny, tmp_path: Path, out: Path) -> None:
    cases = SHARED / "tokenizer/cases.json"
    models = Path(os.environ.get("GEMMART_MODELS", "/nowhere"))
    path = {
        "gemma2": SHARED / "tokenizer/gemma-2-vocab.gguf",
        "gemma3": models / "gemma-3-270m-q4_k_m.gguf",
        "smollm2": models / "SmolLM2-135M-Instruct.Q4_1.gguf",
    }[name]
    if not cases.exists() or not path.exists():
        pytest.skip(f"{cases} or {path} is not there")
    vocabulary = Metadata(path)
    n_vocab = len(vocabulary.strings("tokenizer.ggml.tokens")[1]) - 1
    original = tiny("llama" if name == "smollm2" else name, n_vocab=n_vocab, n_layers=1, dim=32, vocabulary=False)
    folder = hf.write_folder(tmp_path / "hf", original)
    as_tokenizer_json(vocabulary, folder)
    convert(folder, out)
    checked = 0
    with gemmart.load(out) as model:
        for case in json.loads(cases.read_text()):
            for key, special in ((name, True), (f"{name}_plain", False)):
                if key in case and "<mask>" not in case["text"]:  # a mark to converters, text to sentencepiece
                    assert model.tokenize(case["text"], special=special) == case[key], (key, case["text"])
                    checked += 1
    assert checked > 120


# Against transformers


def made_by_transformers(name: str) -> Any:
    """A random model that transformers makes, with weights that matter: norms away from one, attention that is sharp."""
    torch, hub = pytest.importorskip("torch"), pytest.importorskip("transformers")
    sizes = {"vocab_size": 512, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 7, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    window = {"sliding_window": 12, "query_pre_attn_scalar": 32}
    marks = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    llama3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = {
        "gemma": lambda: hub.GemmaConfig(**sizes, **marks),
        "gemma2": lambda: hub.Gemma2Config(
            **sizes, **marks, **window, attn_logit_softcapping=5.0, final_logit_softcapping=3.0
        ),
        "gemma3": lambda: hub.Gemma3TextConfig(**sizes, **marks, **window),
        "llama": lambda: hub.LlamaConfig(**sizes, rope_theta=5e5),
        "llama3": lambda: hub.LlamaConfig(
            **sizes, tie_word_embeddings=True, rope_scaling=llama3 | {"original_max_position_embeddings": 64}
        ),
    }[name]()
    torch.manual_seed(0)
    model = hub.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, weight in model.named_parameters():
            scale = 0.2 if weight.dim() == 1 else 0.3 if "embed" in key else 1.5 / weight.shape[1] ** 0.5
            one = 1 if weight.dim() == 1 and name.startswith("llama") else 0
            weight.copy_(torch.randn_like(weight) * scale + one)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gemma", "gemma2", "gemma3", "llama", "llama3"])
def test_logits_and_greedy_text_are_those_of_transformers(name: str, tmp_path: Path, out: Path) -> None:
    model = made_by_transformers(name)
    import torch

    folder = tmp_path / "hf"
    model.save_pretrained(folder)
    (hf.write_bpe_json if name.startswith("llama") else hf.write_spm_json)(folder, 512)
    convert(folder, out)
    with torch.no_grad():
        expected = model.double()(torch.tensor([IDS])).logits[0].numpy()
        greedy = model.generate(torch.tensor([IDS]), max_new_tokens=24, do_sample=False, eos_token_id=None)[0].tolist()
    assert difference(logits(out), expected) < 5e-6
    with gemmart.load(out, precise=True, kv_type="f32") as ours:
        assert np.asarray(ours.logits(greedy)).argmax(-1)[len(IDS) - 1 : -1].tolist() == greedy[len(IDS) :]
