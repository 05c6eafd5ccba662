#!/usr/bin/env python3
"""gemmart's quantisers and llama.cpp's on one model: errors in the weights, and perplexity on one text.

    python benchmarks/quantizers.py MODEL TEXT [--types Q4_0,Q4_K_M] [--peer-python VENV/bin/python] [--chunks 40]

Both write each type from the same float file; a model that is quantised already is decoded for that, and each weight of
its layers is moved by a random number of --dither of its block's size, so that weights do not stand where the first
quantising put them. Errors are root mean squares, a part of the weights' own, over all matrices that both quantised to
the same format; "worse" counts the tensors in which gemmart's error is the larger one. Perplexity is measured by
gemmart on both files.
--peer-python has llama-cpp-python; without it only gemmart is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

import gemmart
from gemmart import _core, perplexity
from gemmart.mixtures import MIXTURES
from gemmart.quantize import quantize

TYPES = "Q8_0,Q6_K,Q5_K_M,Q5_0,Q4_K_M,Q4_K_S,Q4_1,Q4_0,IQ4_NL,IQ4_XS,Q3_K_M,Q2_K"
PEER = """
import ctypes, sys, llama_cpp
params = llama_cpp.llama_model_quantize_default_params()
params.ftype = int(sys.argv[3])
sys.exit(llama_cpp.llama_model_quantize(sys.argv[1].encode(), sys.argv[2].encode(), ctypes.byref(params)))
"""


def floats(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Format and weights of each matrix."""
    file = _core.Gguf(path)
    found = {}
    for name, kind, shape, _, _ in file.tensors():
        if len(shape) == 2:
            data = _core.quantize_tensor(file, name, kind, first_row=0, n_rows=shape[0])
            found[name] = kind, _core.decode(kind, data.ravel())
    return found


def dither(path: Path, amount: float) -> None:
    rng = np.random.default_rng(0)
    for name, _, shape, offset, _ in _core.Gguf(path).tensors():
        if len(shape) == 2 and name.startswith("blk."):
            weights = np.memmap(path, np.float32, "r+", offset=offset, shape=(shape[0] * shape[1] // 32, 32))
            sizes = np.sqrt(np.mean(weights**2, axis=1, keepdims=True))
            weights += amount * sizes * rng.normal(0, 1, weights.shape).astype(np.float32)


def measure(path: Path, text: str, chunks: int) -> float:
    with gemmart.load(path, ctx=512, lookup=False) as model:
        return perplexity.measure(model, text, n_chunks=chunks).value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", type=Path)
    parser.add_argument("--types", default=TYPES)
    parser.add_argument("--peer-python")
    parser.add_argument("--chunks", type=int, default=40, help="of 512 tokens; 0: no perplexity")
    parser.add_argument("--dither", type=float, default=0.08)
    given = parser.parse_args()
    text = given.text.read_text()
    with tempfile.TemporaryDirectory() as folder:
        source, ours, theirs = (Path(folder, name) for name in ("source.gguf", "ours.gguf", "theirs.gguf"))
        was = quantize(given.model, source, "F32", allow_requantize=True)
        if any(tensor.format not in ("F32", "F16", "BF16") for tensor in was.tensors):
            dither(source, given.dither)
        originals = floats(source)
        print("type | error | llama.cpp's | ratio | worse | perplexity | llama.cpp's")
        if given.chunks:
            print(f"F32 | | | | | {measure(source, text, given.chunks):.3f} |", flush=True)
        for name in given.types.split(","):
            quantize(source, ours, name, force=True)
            files = [ours]
            if given.peer_python:
                done = subprocess.run(
                    [given.peer_python, "-c", PEER, source, theirs, str(MIXTURES[name].file_type)], capture_output=True
                )
                files += [theirs] if done.returncode == 0 else []
            both = [floats(file) for file in files]
            changed = [n for n, (kind, _) in both[0].items() if kind != "F32" and all(b[n][0] == kind for b in both)]
            total = sum(float(np.sum(originals[n][1] ** 2, dtype=np.float64)) for n in changed)
            errors = [
                [float(np.sum((b[n][1] - originals[n][1]) ** 2, dtype=np.float64)) for n in changed] for b in both
            ]
            rms = [np.sqrt(sum(e) / total) for e in errors]
            values = [f"{measure(file, text, given.chunks):.3f}" if given.chunks else "" for file in files]
            cells = [name, f"{rms[0]:.5f}"]
            if len(files) > 1:
                worse = sum(a > b for a, b in zip(*errors, strict=True))
                cells += [f"{rms[1]:.5f}", f"{rms[0] / rms[1]:.3f}", f"{worse} of {len(changed)}", *values]
            else:
                cells += ["", "", "", values[0], ""]
            print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    sys.exit(main())
