"""Tiny random GGUF models of every family, in every storage format, on which the whole program runs.

    write_tiny(tmp_path / "m.gguf", "gemma2", "Q4_K")

Weights are random but sized so that attention looks at few tokens, soft caps bite, layers outweigh the embedding: what
a wrong step would change shows in the logits, and greedy text moves on. The default sizes differ wherever a mix-up
could hide: head_dim is not dim / n_heads, query heads share key/value heads, and the window is short. Equal arguments
give equal bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter, RopeScalingType
from gguf import GGMLQuantizationType as Format
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

FAMILIES = ("gemma", "gemma2", "gemma3", "llama")
# The gguf package quantises these. The others it only reads: they are made of random blocks, and SCALE_BYTES says where
# a block has its float16 scale, and the scale of its minimums.
QUANTIZED = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4")
SCALE_BYTES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
    "IQ1_S": (0,), "IQ1_M": (), "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
    "IQ4_NL": (0,), "IQ4_XS": (0,),
}  # fmt: skip
FORMATS = (*QUANTIZED, *SCALE_BYTES)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # token types

GEMMA_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = (
    *("the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are", "as", "with", "his"),
    *("they", "at", "be", "this", "have", "from", "or", "one", "had", "by", "word", "but", "not", "what", "hello"),
)


def write_tiny(
    path: Path | str,
    family: str,
    quant: str = "F32",
    *,
    n_layers: int | None = None,
    dim: int | None = None,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    head_dim: int | None = None,
    ffn_dim: int | None = None,
    n_vocab: int = 512,
    n_ctx: int = 512,
    window: int = 12,
    attention_cap: float = 50.0,
    final_cap: float = 30.0,
    rope_base: float | None = None,
    rope_factor: float | None = None,
    rope_freqs: bool = False,
    tied: bool = True,
    vocabulary: bool = True,
    seed: int = 0,
) -> Path:
    """Write a model of `family` with its matrices in `quant` (a name in FORMATS) to `path`, and return that.

    Sizes left out are small: rows of 96 and more, of 256 and more where blocks are that long; 4 layers, 7 for gemma3,
    whose first global layer is the sixth. Window (tokens) and caps concern the families that have them. `rope_factor`
    asks for linear scaling; `rope_freqs` (llama) writes a factor per frequency; `tied` False (llama) writes an output
    matrix. Without `vocabulary` the file has no tokenizer. ValueError where a format's blocks do not fit the rows."""
    if family not in FAMILIES or quant not in FORMATS:
        raise ValueError(f"no such family or format: {family}, {quant}")
    long_blocks = GGML_QUANT_SIZES[Format[quant]][0] == 256
    dim = dim or (256 if long_blocks else 96)
    ffn_dim = ffn_dim or (512 if long_blocks else 160)
    head_dim = head_dim or (128 if long_blocks else 32)
    n_layers = n_layers or (7 if family == "gemma3" else 4)
    rng = np.random.default_rng(seed)

    w = GGUFWriter(path, family)
    w.add_name(f"tiny {family} {quant}")
    w.add_license("apache-2.0")
    w.add_context_length(n_ctx)
    w.add_embedding_length(dim)
    w.add_block_count(n_layers)
    w.add_feed_forward_length(ffn_dim)
    w.add_head_count(n_heads)
    w.add_head_count_kv(n_kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-2)  # real models have 1e-5 or 1e-6, which is lost beside these activations
    if family == "gemma2":
        w.add_attn_logit_softcapping(attention_cap)
        w.add_final_logit_softcapping(final_cap)
    if family in ("gemma2", "gemma3"):
        w.add_sliding_window(window)
    if family == "llama":
        w.add_rope_dimension_count(head_dim)
        w.add_vocab_size(n_vocab)
    if rope_base is not None:
        w.add_rope_freq_base(rope_base)
    if rope_factor is not None:
        w.add_rope_scaling_type(RopeScalingType.LINEAR)
        w.add_rope_scaling_factor(rope_factor)
    if vocabulary:
        add_bpe(w, n_vocab) if family == "llama" else add_spm(w, n_vocab)

    matrices = matrix_sizes(family, n_layers, dim, n_heads * head_dim, n_kv_heads * head_dim, ffn_dim, n_vocab, tied)
    for name, n_rows, n_cols, std in matrices:
        raw = random_matrix(rng, quant, n_rows, n_cols, std)
        w.add_tensor(f"{name}.weight", raw, raw_dtype=Format[quant])
    for name, size, mean in vector_sizes(family, n_layers, dim, head_dim):
        w.add_tensor(f"{name}.weight", (mean * rng.normal(1, 0.2, size)).astype(np.float32))
    if rope_freqs:  # as Llama 3 has them: fast pairs as they are, slow ones slowed
        w.add_tensor("rope_freqs.weight", np.linspace(1, 8, head_dim // 2, dtype=np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return Path(path)


def matrix_sizes(
    family: str, n_layers: int, dim: int, q_dim: int, kv_dim: int, ffn_dim: int, n_vocab: int, tied: bool
) -> Iterator[tuple[str, int, int, float]]:
    """(name, n_rows, n_cols, standard deviation of the weights) of each matrix."""
    embedding = 3 / np.sqrt(dim)  # logits of about ±3 from a normalised state of size 1
    residual = 3.0 if family != "llama" else embedding  # Gemma scales the embedding by sqrt(dim)
    sharp = 3.4 if family == "gemma2" else 1.8  # attention scores of about sharp², which the cap of 50 bends
    yield "token_embd", n_vocab, dim, embedding
    if not tied:
        yield "output", n_vocab, dim, embedding
    for i in range(n_layers):
        yield f"blk.{i}.attn_q", q_dim, dim, sharp / np.sqrt(dim)
        yield f"blk.{i}.attn_k", kv_dim, dim, sharp / np.sqrt(dim)
        yield f"blk.{i}.attn_v", kv_dim, dim, 1 / np.sqrt(dim)
        yield f"blk.{i}.attn_output", dim, q_dim, 8 * residual / np.sqrt(q_dim)
        yield f"blk.{i}.ffn_gate", ffn_dim, dim, 1 / np.sqrt(dim)
        yield f"blk.{i}.ffn_up", ffn_dim, dim, 1 / np.sqrt(dim)
        yield f"blk.{i}.ffn_down", dim, ffn_dim, 8 * residual / np.sqrt(ffn_dim)


def vector_sizes(family: str, n_layers: int, dim: int, head_dim: int) -> Iterator[tuple[str, int, float]]:
    """(name, size, mean) of each norm's weights."""
    yield "output_norm", dim, 5.0 if family == "gemma2" else 1.0  # logits that the cap of 30 bends
    for i in range(n_layers):
        yield f"blk.{i}.attn_norm", dim, 1.0
        yield f"blk.{i}.ffn_norm", dim, 1.0
        if family in ("gemma2", "gemma3"):
            yield f"blk.{i}.post_attention_norm", dim, 9.0
            yield f"blk.{i}.post_ffw_norm", dim, 9.0
        if family == "gemma3":
            yield f"blk.{i}.attn_q_norm", head_dim, 1.8
            yield f"blk.{i}.attn_k_norm", head_dim, 1.8


def random_matrix(rng: np.random.Generator, quant: str, n_rows: int, n_cols: int, std: float) -> NDArray:
    """Weights of mean 0 and deviation `std` in `quant`: floats [n_rows, n_cols], or bytes [n_rows, bytes of a row]."""
    per_block, block_bytes = GGML_QUANT_SIZES[Format[quant]]
    if n_cols % per_block:
        raise ValueError(f"rows of {n_cols} do not divide into {quant}'s blocks of {per_block}")
    if quant in QUANTIZED:
        return quantize(rng.normal(0, std, (n_rows, n_cols)).astype(np.float32), Format[quant])

    blocks = rng.integers(0, 256, (n_rows * n_cols // per_block, block_bytes), dtype=np.uint8)
    vary = rng.uniform(0.5, 1.5, len(blocks))  # each block has its own scale

    def weights(*scales: float) -> NDArray[np.float32]:
        if quant == "IQ1_M":  # its scale is spread over the top four bits of a block's last four 16-bit words
            bits = (scales[0] * vary).astype("<f2").view("<u2")[:, None] >> np.array([0, 4, 8, 12], np.uint16) & 0xF
            words = np.ascontiguousarray(blocks[:, -8:]).view("<u2") & 0x0FFF | bits << 12
            blocks[:, -8:] = words.astype("<u2").view(np.uint8)
        else:
            for offset, scale in zip(SCALE_BYTES[quant], scales, strict=True):
                blocks[:, offset : offset + 2] = (scale * vary).astype("<f2").view(np.uint8).reshape(-1, 2)
        return dequantize(blocks, Format[quant])

    if len(SCALE_BYTES[quant]) == 2:  # scale · q − minimum scale · m: balance the two around 0, then size them
        minimum = float(weights(1, 0).mean() / -weights(0, 1).mean())
        size = std / float(weights(1, minimum).std())
        weights(size, size * minimum)
    else:
        weights(std / float(weights(1).std()))
    return blocks.reshape(n_rows, -1)


def add_spm(w: GGUFWriter, n_vocab: int) -> None:
    """A SentencePiece vocabulary in Gemma's manner: control tokens, newline, bytes, some words, ASCII; its template."""
    tokens = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", UNKNOWN)]
    tokens += [("<start_of_turn>", CONTROL), ("<end_of_turn>", CONTROL), ("\n", USER_DEFINED)]
    tokens += [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]
    tokens += [(piece, NORMAL) for piece in (*prefixes("▁"), "▁", *map(chr, range(0x21, 0x7F)))]
    tokens = fill(tokens, n_vocab)
    w.add_tokenizer_model("llama")
    w.add_tokenizer_pre("default")
    w.add_token_list([text for text, _ in tokens])
    w.add_token_scores([-float(i) if kind == NORMAL else 0.0 for i, (_, kind) in enumerate(tokens)])
    w.add_token_types([kind for _, kind in tokens])
    w.add_pad_token_id(0)
    w.add_eos_token_id(1)
    w.add_bos_token_id(2)
    w.add_unk_token_id(3)
    w.add_eot_token_id(5)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(GEMMA_TEMPLATE)


def add_bpe(w: GGUFWriter, n_vocab: int) -> None:
    """A byte-level BPE vocabulary in SmolLM2's manner: control tokens, the byte alphabet, some words; ChatML."""
    tokens = [("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL)]
    words = prefixes("Ġ")
    tokens = fill(tokens + [(piece, NORMAL) for piece in (*byte_alphabet(), *words)], n_vocab)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list([text for text, _ in tokens])
    w.add_token_types([kind for _, kind in tokens])
    w.add_token_merges([f"{piece[:-1]} {piece[-1]}" for piece in words])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_pad_token_id(2)
    w.add_add_bos_token(False)
    w.add_add_space_prefix(False)
    w.add_chat_template(CHATML_TEMPLATE)


def prefixes(space: str) -> list[str]:
    """Every prefix of each word with its leading space, so that each is the one before it and one letter: a merge."""
    return list(dict.fromkeys((space + word)[:end] for word in WORDS for end in range(2, len(word) + 2)))


def byte_alphabet() -> list[str]:
    """The letter that GPT-2 writes for each byte: printable bytes are themselves, the others follow from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(0x100 + i) for i in range(256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def fill(tokens: list[tuple[str, int]], n_vocab: int) -> list[tuple[str, int]]:
    """`tokens` and unused ones up to n_vocab. ValueError if there are more."""
    if len(tokens) > n_vocab:
        raise ValueError(f"the vocabulary alone has {len(tokens)} tokens; n_vocab is {n_vocab}")
    return tokens + [(f"<unused{i}>", USER_DEFINED) for i in range(n_vocab - len(tokens))]
