"""How fast single kernels are here, next to what memory and the multiply instructions of this machine can give."""

from __future__ import annotations

from typing import Any

from gemmart import _core
from gemmart.doctor import cpu_name
from gemmart.memory import KV_TYPES
from gemmart.progress import Progress

COLUMNS = (1, 2, 4, 8, 32, 512)
TOKENS = (1, 32)
"""Tokens at the end of 8192 positions that attention computes together: as in decoding, and as in reading a prompt."""
FLOATS = ("F32", "F16", "BF16")


def measure(*, threads: int, n_bytes: int, progress: Progress) -> dict[str, Any]:
    """Times of every kernel of the ISA in use. n_bytes: of the memory that passes read, more than the caches hold.

    Shares: of the read bandwidth and of the peak of the multiply instruction, both measured here with as many threads
    (integers for the formats that have a layout of panels, floats for the others and for attention).
    """
    isa = _core.kernels.running_isa()
    formats = [name for name, *_ in _core.formats()]
    jobs = [("matmul", name, n) for name in formats for n in COLUMNS]
    jobs += [("attention", name, n) for name in KV_TYPES for n in TOKENS]
    bandwidth = _core.kernels.read_bandwidth(min(n_bytes, 1 << 32), threads)
    peaks = {numbers: _core.kernels.multiply_peak(isa, numbers, threads) for numbers in ("int8", "float")}
    bench = _core.kernels.Bench(isa, n_threads=threads, n_bytes=n_bytes)
    rows: dict[str, list[dict[str, Any]]] = {"matmul": [], "attention": []}
    for i, (kernel, name, n) in enumerate(jobs):
        progress("measuring", i, len(jobs))
        seconds, read, products = getattr(bench, kernel)(name, n)
        integers = kernel == "matmul" and name not in FLOATS and _core.kernels.has_panels(name)
        numbers = "int8" if integers else "float"
        rows[kernel].append(
            {
                "format": name,
                "columns": n,
                "gb_per_s": read / seconds / 1e9,
                "bandwidth_share": read / seconds / bandwidth,
                "g_products_per_s": products / seconds / 1e9,
                "peak": numbers,
                "peak_share": products / seconds / peaks[numbers],
            }
        )
    progress("measuring", len(jobs), len(jobs))
    return {
        "cpu": cpu_name(),
        "isa": isa,
        "threads": threads,
        "bandwidth_gb_per_s": bandwidth / 1e9,
        "peak_g_products_per_s": {numbers: peak / 1e9 for numbers, peak in peaks.items()},
        **rows,
        "vectors": [{"kernel": name, "g_numbers_per_s": rate / 1e9} for name, rate in bench.vectors()],
    }


def as_text(found: dict[str, Any]) -> str:
    peaks = found["peak_g_products_per_s"]
    lines = [
        f"{found['cpu']}, {found['isa']}, threads: {found['threads']}",
        f"reading {found['bandwidth_gb_per_s']:.1f} GB/s; multiplying {peaks['int8']:.0f} G int8/s, "
        f"{peaks['float']:.0f} G float/s",
    ]
    for kernel, counts, what in (("matmul", COLUMNS, "columns"), ("attention", TOKENS, "tokens, 8192 positions")):
        lines += ["", f"{kernel}: GB/s and its share of reading for one column; share of the multiply peak for more"]
        lines.append(f"{what:24}" + "".join(f"{n:>8}" if n > 1 else f"{n:>16}" for n in counts))
        samples = {(row["format"], row["columns"]): row for row in found[kernel]}
        for name in dict.fromkeys(row["format"] for row in found[kernel]):
            one, *more = (samples[name, n] for n in counts)
            cells = f"{one['gb_per_s']:9.1f} {100 * one['bandwidth_share']:4.0f} %"
            cells += "".join(f"{100 * row['peak_share']:6.0f} %" for row in more)
            lines.append(f"{name + ' (' + one['peak'] + ')':24}{cells}")
    lines += ["", "element-wise, one thread: G numbers/s"]
    lines += [f"{row['kernel']:24}{row['g_numbers_per_s']:10.2f}" for row in found["vectors"]]
    return "\n".join(lines)
