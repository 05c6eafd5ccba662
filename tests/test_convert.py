"""Hugging Face model folders become GGUF files that compute and say the same."""

from __future__ import annotations

import io
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from gguf import GGUFReader
from gguf import GGMLQuantizationType as Format
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
    DownloadError,
    GemmartError,
    InvalidRequest,
    ModelFormatError,
    ModelNotFound,
    NumericError,
    TruncatedModel,
    UnsupportedModel,
)
from gemmart.sources import store
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
        key: value for key, value in {**defaults, **before}.items() if key.startswith(f"{family}.") and (
            family == "gemma3" or not key.startswith("gemma3")
        )
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
def test_weights_that_are_no_numbers_are_refused(
    dtype: str, bad: float, wanted: str, folder: Path, out: Path
) -> None:
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
