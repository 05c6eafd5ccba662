"""Files with the shapes of the Gemma 2 models and random weights: every byte costs what it would cost.

Each matrix repeats a tile of random rows, so that memory stays small and files are written
as fast as the disk takes them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUFWriter
from gguf import GGMLQuantizationType as Format

from gemmart.mixtures import Facts, format_for, mixture_named

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from tiny import add_spm, matrix_sizes, random_matrix, vector_sizes

SHAPES = {  # n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim, n_vocab
    "tiny": (3, 256, 4, 2, 64, 512, 1024),
    "2b": (26, 2304, 8, 4, 256, 9216, 256_000),
    "9b": (42, 3584, 16, 8, 256, 14_336, 256_000),
    "27b": (46, 4608, 32, 16, 128, 36_864, 256_000),
}
TILE_ROWS = 64


def write_synthetic(path: Path, size: str, mixture: str) -> Path:
    """A Gemma 2 of `size` in `mixture` (a name of gemmart.mixtures, or of a format) at `path`, unless it is there."""
    if path.exists():
        return path
    n_layers, dim, n_heads, n_kv_heads, head_dim, ffn_dim, n_vocab = SHAPES[size]
    rng = np.random.default_rng(0)
    w = GGUFWriter(path.with_suffix(".part"), "gemma2")
    w.add_name(f"synthetic {size} {mixture}")
    w.add_context_length(8192)
    w.add_embedding_length(dim)
    w.add_block_count(n_layers)
    w.add_feed_forward_length(ffn_dim)
    w.add_head_count(n_heads)
    w.add_head_count_kv(n_kv_heads)
    w.add_key_length(head_dim)
    w.add_value_length(head_dim)
    w.add_layer_norm_rms_eps(1e-6)
    w.add_attn_logit_softcapping(50)
    w.add_final_logit_softcapping(30)
    w.add_sliding_window(4096)
    add_spm(w, n_vocab)
    facts = Facts("gemma2", n_layers, n_heads // n_kv_heads, True, False)
    sizes = matrix_sizes("gemma2", n_layers, dim, n_heads * head_dim, n_kv_heads * head_dim, ffn_dim, n_vocab, True)
    rules = mixture_named(mixture)[1]
    matrices = []
    for name, n_rows, n_cols, _ in sizes:
        quant = format_for(rules, facts, f"{name}.weight", (n_rows, n_cols))
        assert quant
        matrices.append((f"{name}.weight", n_rows, n_cols, quant))
    vectors = [(f"{name}.weight", size, mean) for name, size, mean in vector_sizes("gemma2", n_layers, dim, head_dim)]
    for name, n_rows, n_cols, quant in matrices:
        block, n_bytes = GGML_QUANT_SIZES[Format[quant]]
        row = n_cols // block * n_bytes
        w.add_tensor_info(name, (n_rows, row), np.dtype(np.uint8), n_rows * row, raw_dtype=Format[quant])
    for name, n, _ in vectors:
        w.add_tensor_info(name, (n,), np.dtype(np.float32), 4 * n)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_ti_data_to_file()
    tiles: dict[tuple[str, int], np.ndarray] = {}
    for _, n_rows, n_cols, quant in matrices:
        key = quant, n_cols
        if key not in tiles:
            tile = random_matrix(rng, quant, TILE_ROWS, n_cols, 0.02)
            tiles[key] = np.ascontiguousarray(tile).view(np.uint8).reshape(TILE_ROWS, -1)
        w.write_tensor_data(np.resize(tiles[key], (n_rows, tiles[key].shape[1])))
    for _, n, mean in vectors:
        w.write_tensor_data(np.full(n, mean, np.float32))
    w.close()
    path.with_suffix(".part").rename(path)
    return path
