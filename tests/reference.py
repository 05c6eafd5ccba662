"""The decoder in float64 NumPy: the specification that the core is measured against.

One function per family says what that family computes up to the last norm, over a few shared pieces; `logits` is the
end of all. Weights are read from the GGUF file,
dequantised by the independent `gguf` package to float32 and widened; everything after that is float64. Nothing is fast.

    reference.forward("model.gguf", [2, 17, 5])   # logits [3, n_vocab], float64

Shapes: n_tokens rows; dim the width of the residual stream; heads of head_dim; position p is the row number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

Array = NDArray[np.float64]
MatmulInput = Callable[[Array, str], Array]
"""Maps the input [n_tokens, n_in] of a matrix product and the weight's format name ("Q4_K") to the input to use."""


class Weights:
    """The metadata and the dequantised tensors of one GGUF file, and the products with them."""

    def __init__(self, path: Path | str, matmul_input: MatmulInput | None = None) -> None:
        self._reader = GGUFReader(path)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self._matmul_input = matmul_input
        self.family: str = self._reader.fields["general.architecture"].contents()

    def __contains__(self, name: str) -> bool:
        return f"{name}.weight" in self._tensors

    def key(self, name: str, default: float | str | None = None):
        """The metadata value FAMILY.name; where the file has none, `default`, and KeyError if that is None."""
        field = self._reader.fields.get(f"{self.family}.{name}")
        if field is not None:
            return field.contents()
        if default is None:
            raise KeyError(f"{self.family}.{name}")
        return default

    def __getitem__(self, name: str) -> Array:
        """The tensor name.weight, [n_out, n_in] or [n], dequantised."""
        tensor = self._tensors[f"{name}.weight"]
        return dequantize(tensor.data, tensor.tensor_type).astype(np.float64)

    def matmul(self, name: str, x: Array) -> Array:
        """x [n_tokens, n_in] times the transposed matrix name.weight [n_out, n_in]: [n_tokens, n_out]."""
        if self._matmul_input is not None:
            x = self._matmul_input(x, self._tensors[f"{name}.weight"].tensor_type.name)
        return x @ self[name].T


def forward(
    path: Path | str, ids: Sequence[int] | NDArray[np.int32], *, matmul_input: MatmulInput | None = None
) -> Array:
    """Logits [n_tokens, n_vocab] after each of `ids` [n_tokens], soft-capped where the family does so.

    `matmul_input` simulates the rounding of activations: it sees the input of each matrix product."""
    weights = Weights(path, matmul_input)
    return logits(weights, FAMILIES[weights.family](weights, np.asarray(ids)))


def hidden(path: Path | str, ids: Sequence[int] | NDArray[np.int32]) -> Array:
    """States [n_tokens, dim] behind the last norm."""
    weights = Weights(path)
    return FAMILIES[weights.family](weights, np.asarray(ids))


def gemma(w: Weights, ids: NDArray) -> Array:
    """Gemma 1: scaled embedding, two norms a layer, GELU gate, tied output."""
    dim, n_layers, eps = w.key("embedding_length"), w.key("block_count"), w.key("attention.layer_norm_rms_epsilon")
    n_heads, n_kv_heads, head_dim = head_shape(w)
    inv_freq = rope_frequencies(head_dim, w.key("rope.freq_base", 10000.0))
    x = w["token_embd"][ids] * np.sqrt(dim)
    for i in range(n_layers):
        h = rms_norm(x, w[f"blk.{i}.attn_norm"], eps)
        q = rope_neox(split_heads(w.matmul(f"blk.{i}.attn_q", h), n_heads), inv_freq)
        k = rope_neox(split_heads(w.matmul(f"blk.{i}.attn_k", h), n_kv_heads), inv_freq)
        v = split_heads(w.matmul(f"blk.{i}.attn_v", h), n_kv_heads)
        x = x + w.matmul(f"blk.{i}.attn_output", attention(q, k, v, scale=1 / np.sqrt(head_dim)))
        x = x + gated_ffn(w, i, rms_norm(x, w[f"blk.{i}.ffn_norm"], eps), gelu_tanh)
    return rms_norm(x, w["output_norm"], eps)


def gemma2(w: Weights, ids: NDArray) -> Array:
    """Gemma 2: four norms a layer, soft caps on attention and logits, even layers windowed."""
    dim, n_layers, eps = w.key("embedding_length"), w.key("block_count"), w.key("attention.layer_norm_rms_epsilon")
    n_heads, n_kv_heads, head_dim = head_shape(w)
    inv_freq = rope_frequencies(head_dim, w.key("rope.freq_base", 10000.0))
    # Not in the file: the 27B, which its 46 layers tell, divides queries by sqrt(dim / n_heads) = 12.
    scale = 1 / np.sqrt(dim / n_heads if n_layers == 46 else head_dim)
    # Files converted in the family's first weeks lack these two keys, and that of the last cap.
    attention_cap = w.key("attn_logit_softcapping", 50.0)
    window = w.key("attention.sliding_window", 4096)
    x = w["token_embd"][ids] * np.sqrt(dim)
    for i in range(n_layers):
        h = rms_norm(x, w[f"blk.{i}.attn_norm"], eps)
        q = rope_neox(split_heads(w.matmul(f"blk.{i}.attn_q", h), n_heads), inv_freq)
        k = rope_neox(split_heads(w.matmul(f"blk.{i}.attn_k", h), n_kv_heads), inv_freq)
        v = split_heads(w.matmul(f"blk.{i}.attn_v", h), n_kv_heads)
        h = attention(q, k, v, scale=scale, cap=attention_cap, window=window if i % 2 == 0 else 0)
        x = x + rms_norm(w.matmul(f"blk.{i}.attn_output", h), w[f"blk.{i}.post_attention_norm"], eps)
        h = gated_ffn(w, i, rms_norm(x, w[f"blk.{i}.ffn_norm"], eps), gelu_tanh)
        x = x + rms_norm(h, w[f"blk.{i}.post_ffw_norm"], eps)
    return rms_norm(x, w["output_norm"], eps)


def gemma3(w: Weights, ids: NDArray) -> Array:
    """Gemma 3, text: four norms a layer and one on each head's query and key, no caps, every sixth layer global."""
    dim, n_layers, eps = w.key("embedding_length"), w.key("block_count"), w.key("attention.layer_norm_rms_epsilon")
    n_heads, n_kv_heads, head_dim = head_shape(w)
    # Windowed layers keep base 10000; the base and the scaling in the file are those of the global layers.
    local_freq = rope_frequencies(head_dim, 10000.0)
    global_freq = rope_frequencies(head_dim, w.key("rope.freq_base", 1000000.0)) / linear_rope_factor(w)
    # Not in the file: the 27B, which its 62 layers tell, divides queries by sqrt(dim / n_heads) = sqrt(168).
    scale = 1 / np.sqrt(dim / n_heads if n_layers == 62 else head_dim)
    window = w.key("attention.sliding_window")
    x = w["token_embd"][ids] * np.sqrt(dim)
    for i in range(n_layers):
        is_global = (i + 1) % 6 == 0
        inv_freq = global_freq if is_global else local_freq
        h = rms_norm(x, w[f"blk.{i}.attn_norm"], eps)
        q = rms_norm(split_heads(w.matmul(f"blk.{i}.attn_q", h), n_heads), w[f"blk.{i}.attn_q_norm"], eps)
        k = rms_norm(split_heads(w.matmul(f"blk.{i}.attn_k", h), n_kv_heads), w[f"blk.{i}.attn_k_norm"], eps)
        v = split_heads(w.matmul(f"blk.{i}.attn_v", h), n_kv_heads)
        q, k = rope_neox(q, inv_freq), rope_neox(k, inv_freq)
        h = attention(q, k, v, scale=scale, window=0 if is_global else window)
        x = x + rms_norm(w.matmul(f"blk.{i}.attn_output", h), w[f"blk.{i}.post_attention_norm"], eps)
        h = gated_ffn(w, i, rms_norm(x, w[f"blk.{i}.ffn_norm"], eps), gelu_tanh)
        x = x + rms_norm(h, w[f"blk.{i}.post_ffw_norm"], eps)
    return rms_norm(x, w["output_norm"], eps)


def llama(w: Weights, ids: NDArray) -> Array:
    """Llama 2 and 3 and their like: two norms a layer, SiLU gate, neighbours rotated, output tied or its own."""
    n_layers, eps = w.key("block_count"), w.key("attention.layer_norm_rms_epsilon")
    n_heads, n_kv_heads, head_dim = head_shape(w)
    inv_freq = rope_frequencies(head_dim, w.key("rope.freq_base", 10000.0)) / linear_rope_factor(w)
    if "rope_freqs" in w:  # Llama 3 divides each frequency by its own factor
        inv_freq = inv_freq / w["rope_freqs"]
    x = w["token_embd"][ids]
    for i in range(n_layers):
        h = rms_norm(x, w[f"blk.{i}.attn_norm"], eps)
        q = rope_neighbours(split_heads(w.matmul(f"blk.{i}.attn_q", h), n_heads), inv_freq)
        k = rope_neighbours(split_heads(w.matmul(f"blk.{i}.attn_k", h), n_kv_heads), inv_freq)
        v = split_heads(w.matmul(f"blk.{i}.attn_v", h), n_kv_heads)
        x = x + w.matmul(f"blk.{i}.attn_output", attention(q, k, v, scale=1 / np.sqrt(head_dim)))
        x = x + gated_ffn(w, i, rms_norm(x, w[f"blk.{i}.ffn_norm"], eps), silu)
    return rms_norm(x, w["output_norm"], eps)


def logits(w: Weights, x: Array) -> Array:
    """Logits [n_tokens, n_vocab] of states behind the last norm; the output matrix is the embedding, or llama's own."""
    cap = w.key("final_logit_softcapping", 30.0) if w.family == "gemma2" else 0.0
    return soft_cap(w.matmul("output" if "output" in w else "token_embd", x), cap)


FAMILIES = {"gemma": gemma, "gemma2": gemma2, "gemma3": gemma3, "llama": llama}


def head_shape(w: Weights) -> tuple[int, int, int]:
    """(n_heads, n_kv_heads, head_dim); keys and values are equally wide."""
    n_heads = w.key("attention.head_count")
    n_kv_heads = w.key("attention.head_count_kv", n_heads)
    return n_heads, n_kv_heads, w.key("attention.key_length", w.key("embedding_length") // n_heads)


def linear_rope_factor(w: Weights) -> float:
    """What linear scaling divides every frequency by; 1 without scaling."""
    kind = w.key("rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise ValueError(f"rope scaling {kind!r} is not specified here")
    return w.key("rope.scaling.factor") if kind == "linear" else 1.0


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x²) + eps) · weight over the last axis. Converters fold Gemma's "1 +" into the stored weight."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def split_heads(x: Array, n_heads: int) -> Array:
    """[n_tokens, n_heads · head_dim] to [n_tokens, n_heads, head_dim]."""
    return x.reshape(len(x), n_heads, -1)


def rope_frequencies(head_dim: int, base: float) -> Array:
    """base^(−2i / head_dim) for i < head_dim / 2: radians a position.

    Hugging Face rounds frequencies and angles (and norms and softmax) to float32 whatever the model's type. Its float64
    logits are 1e-6 away from these after 100 tokens, its float32 angles followed or not, so nothing is rounded here."""
    return base ** (-np.arange(0, head_dim, 2) / head_dim)


def rope_neox(x: Array, inv_freq: Array) -> Array:
    """Rotate the pairs (i, i + head_dim / 2) of x [n_tokens, heads, head_dim] by position · inv_freq[i]."""
    return np.concatenate(rotate(*np.split(x, 2, axis=-1), inv_freq), axis=-1)


def rope_neighbours(x: Array, inv_freq: Array) -> Array:
    """Rotate the pairs (2i, 2i + 1). Llama's converters permute the rows of attn_q and attn_k so that this is right."""
    return np.stack(rotate(x[..., 0::2], x[..., 1::2], inv_freq), axis=-1).reshape(x.shape)


def rotate(a: Array, b: Array, inv_freq: Array) -> tuple[Array, Array]:
    angle = (np.arange(len(a))[:, None] * inv_freq)[:, None, :]
    return a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)


def attention(q: Array, k: Array, v: Array, *, scale: float, cap: float = 0, window: int = 0) -> Array:
    """Causal attention of q [n_tokens, n_heads, head_dim] over k, v [n_tokens, n_kv_heads, head_dim], heads joined.

    Scores are scaled, then capped, then masked: position p sees p − window + 1 … p, or 0 … p if window is 0."""
    group = q.shape[1] // k.shape[1]  # neighbouring query heads share a key/value head
    scores = scale * np.einsum("phd,shd->hps", q, np.repeat(k, group, axis=1))
    scores = soft_cap(scores, cap)
    distance = np.arange(len(q))[:, None] - np.arange(len(q))[None, :]
    seen = (distance >= 0) & ((distance < window) | (window == 0))
    scores = np.where(seen, scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    shares /= shares.sum(axis=-1, keepdims=True)
    return np.einsum("hps,shd->phd", shares, np.repeat(v, group, axis=1)).reshape(len(q), -1)


def soft_cap(x: Array, cap: float) -> Array:
    """cap · tanh(x / cap); x itself if cap is 0."""
    return cap * np.tanh(x / cap) if cap else x


def gated_ffn(w: Weights, i: int, x: Array, activation: Callable[[Array], Array]) -> Array:
    """down(activation(gate(x)) · up(x)) of layer i."""
    return w.matmul(f"blk.{i}.ffn_down", activation(w.matmul(f"blk.{i}.ffn_gate", x)) * w.matmul(f"blk.{i}.ffn_up", x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))
