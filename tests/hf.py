"""Tiny Hugging Face model folders, made backwards from tiny GGUF files, so that what a conversion must give is known.

Names, the order of rope's halves and Gemma's norms less one are written out here apart from the code under test.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from tiny import byte_alphabet, prefixes

ARCHITECTURES = {
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TWO_NORMS = {"ffn_norm": "post_attention_layernorm"}
FOUR_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS: dict[str, Any] = {
    "gpt-2": BYTE_LEVEL,
    "smollm": {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
    "llama-bpe": {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
            BYTE_LEVEL | {"use_regex": False},
        ],
    },
}


def write_folder(folder: Path, model: Path, dtype: str = "F32", **config: Any) -> Path:
    """The model of a GGUF file as a Hugging Face folder, weights in `dtype`; `config` is put
    over config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    reader = GGUFReader(model)
    family: str = reader.fields["general.architecture"].contents()

    def key(name: str) -> Any:
        field = reader.fields.get(f"{family}.{name}")
        return None if field is None else field.contents()

    head_dim = key("attention.key_length") or key("embedding_length") // key("attention.head_count")
    tensors = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name, family)
        if name is not None:
            tensors[name] = stored_values(tensor.name, dequantize(tensor.data, tensor.tensor_type), family, head_dim)
    write_safetensors(folder / "model.safetensors", tensors, dtype)
    n_vocab = tensors["model.embed_tokens.weight"].shape[0]
    values = {
        "architectures": [ARCHITECTURES[family]],
        "vocab_size": n_vocab,
        "hidden_size": key("embedding_length"),
        "intermediate_size": key("feed_forward_length"),
        "num_hidden_layers": key("block_count"),
        "num_attention_heads": key("attention.head_count"),
        "num_key_value_heads": key("attention.head_count_kv"),
        "head_dim": head_dim,
        "max_position_embeddings": key("context_length"),
        "rms_norm_eps": key("attention.layer_norm_rms_epsilon"),
    }
    if family != "gemma":
        values |= {"rope_theta": key("rope.freq_base") or (1e6 if family == "gemma3" else 1e4)}
    if key("rope.scaling.factor"):
        values |= {"rope_scaling": {"rope_type": "linear", "factor": key("rope.scaling.factor")}}
    if family in ("gemma2", "gemma3"):
        values |= {"query_pre_attn_scalar": head_dim, "sliding_window": key("attention.sliding_window")}
    if family == "gemma2":
        values |= {name: key(name) for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    if family == "llama":
        values |= {"tie_word_embeddings": "lm_head.weight" not in tensors}
    write_json(folder / "config.json", values | config)
    write_spm_json(folder, n_vocab) if family != "llama" else write_bpe_json(folder, n_vocab)
    return folder


def hf_name(name: str, family: str) -> str | None:
    """The name of a tensor in Hugging Face's files; None for what those do not store."""
    if name == "rope_freqs.weight":
        return None
    norms = FOUR_NORMS if family in ("gemma2", "gemma3") else TWO_NORMS
    if match := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name):
        return f"model.layers.{match[1]}.{(NAMES | norms)[match[2]]}.weight"
    return NAMES[name.removesuffix(".weight")] + ".weight"


def stored_values(name: str, values: NDArray, family: str, head_dim: int) -> NDArray:
    """What Hugging Face stores for a tensor of a GGUF file."""
    if family != "llama":
        return values - np.float32(1) if name.endswith("norm.weight") else values
    if not name.endswith(("attn_q.weight", "attn_k.weight")):
        return values
    heads = values.reshape(-1, head_dim, values.shape[1])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(values.shape)


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def edit_json(path: Path, **changes: Any) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


def in_dtype(values: NDArray, dtype: str) -> bytes:
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def write_safetensors(path: Path, tensors: dict[str, NDArray], dtype: str = "F32") -> None:
    """A file as the safetensors library writes it; `path` is replaced."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs: list[bytes] = []
    at = 0
    for name, values in tensors.items():
        blobs.append(in_dtype(values, dtype))
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(blobs[-1])]}
        at += len(blobs[-1])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(blobs))


def read_safetensors(path: Path) -> dict[str, NDArray]:
    """The tensors of a file of F32."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + n])
    header.pop("__metadata__")
    return {
        name: np.frombuffer(data[8 + n :][slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
    }


# Tokenizers


def added(id: int, content: str, special: bool = True) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": not special}
    return {"id": id, "content": content, "special": special, **flags}


def tokenizer_json(model: dict[str, Any], marks: list[dict[str, Any]], **parts: Any) -> dict[str, Any]:
    empty = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None, "post_processor": None}
    return {"version": "1.0", **empty, "decoder": None, "added_tokens": marks, "model": model, **parts}


def write_spm_json(folder: Path, n_vocab: int) -> None:
    """A tokenizer.json in Gemma's manner, with the tokens of tiny.add_spm."""
    heads = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
    pieces = prefixes("▁")
    vocab = [*heads, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces, "▁", *map(chr, range(0x21, 0x7F))]
    vocab += [f"<unused{i}>" for i in range(n_vocab - len(vocab))]
    marks = [added(id, text, text != "\n") for id, text in enumerate(vocab) if text in heads or "<unused" in text]
    model = {
        "type": "BPE",
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {text: id for id, text in enumerate(vocab)},
        "merges": [[piece[:-1], piece[-1]] for piece in pieces],
    }
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    write_json(folder / "tokenizer.json", tokenizer_json(model, marks, normalizer=space))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", names | {"add_bos_token": True, "add_eos_token": False})


def write_bpe_json(folder: Path, n_vocab: int, pre: str = "smollm") -> None:
    """A tokenizer.json in SmolLM2's manner, with the tokens of tiny.add_bpe."""
    heads = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = prefixes("Ġ")
    vocab = [*heads, *byte_alphabet(), *words]
    marks = [added(id, text) for id, text in enumerate(heads)]
    marks += [added(id, f"<|unused{id}|>") for id in range(len(vocab), n_vocab)]
    model = {
        "type": "BPE",
        "byte_fallback": False,
        "ignore_merges": pre == "llama-bpe",
        "vocab": {text: id for id, text in enumerate(vocab)},
        "merges": [f"{piece[:-1]} {piece[-1]}" for piece in words],
    }
    write_json(folder / "tokenizer.json", tokenizer_json(model, marks, pre_tokenizer=PRE_TOKENIZERS[pre]))
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    write_json(folder / "tokenizer_config.json", names)
