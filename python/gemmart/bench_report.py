"""Measurements for people: beside an earlier one, and as a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gemmart.errors import InvalidRequest
from gemmart.terminal import table

# What is compared: key, heading, format of a value.
ROWS = (
    ("prefill_tokens_per_s", "prefill, tokens/s", "{:.1f}"),
    ("decode_tokens_per_s", "decode, tokens/s", "{:.1f}"),
    ("bandwidth_gb_per_s", "memory, GB/s", "{:.1f}"),
    ("bandwidth_share", "share of it", "{:.2f}"),
    ("load_s", "load, s", "{:.2f}"),
    ("first_token_s", "to the first token, s", "{:.2f}"),
    ("peak_mib", "peak memory, MiB", "{:.0f}"),
)
COUNTS = {"prefill": "prompt_tokens", "decode": "decode_tokens"}
COLORS = ("#9aa0a6", "#1a73e8")  # earlier, now


def read(path: str) -> dict[str, Any]:
    """A measurement that `gemmart bench --json` wrote. Raises InvalidRequest."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--compare {path}: {error}") from None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), int | float) for key, *_ in ROWS):
        raise InvalidRequest(f"--compare {path}: is not what `gemmart bench --json` writes")
    return found


def compared(earlier: dict[str, Any], now: dict[str, Any]) -> str:
    """A table of both, and of now over earlier."""
    rows: list[tuple[str, object]] = [("", f"{'earlier':>10} {'now':>10} {'ratio':>7}")]
    for key, heading, form in ROWS:
        before, after = form.format(earlier[key]), form.format(now[key])
        ratio = f"{now[key] / earlier[key]:.2f}" if earlier[key] else "–"
        rows.append((heading, f"{before:>10} {after:>10} {ratio:>7}"))
    differ = [
        key
        for key in ("model", "cpu", "isa", "gpu", "threads", "prompt_tokens", "decode_tokens")
        if earlier.get(key) != now[key]
    ]
    rows += [(f"other {key}", f"{earlier.get(key)} → {now[key]}") for key in differ]
    return table(rows)


def plot(path: str, now: dict[str, Any], earlier: dict[str, Any] | None) -> None:
    """Bars of both speeds, with what the memory allows for decoding. The ending of `path` says in which format. Raises
    InvalidRequest where matplotlib is missing or cannot write it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InvalidRequest("--plot: needs matplotlib: pip install 'gemmart[plot]'") from None
    figure = Figure(figsize=(8, 4), layout="constrained")
    runs = [
        (label, run, color) for label, run, color in zip(("earlier", "now"), (earlier, now), COLORS, strict=True) if run
    ]
    for part, axes in zip(("prefill", "decode"), figure.subplots(1, 2), strict=True):
        values = [run[f"{part}_tokens_per_s"] for _, run, _ in runs]
        bars = axes.bar([label for label, *_ in runs], values, color=[color for *_, color in runs], width=0.5)
        axes.bar_label(bars, fmt="%.1f")
        axes.set_title(f"{part} of {now[COUNTS[part]]} tokens")
        axes.set_ylabel("tokens/s")
    if not now["gpu"]:  # whose memory is another one
        limit = now["bandwidth_gb_per_s"] * 1e9 / now["weight_bytes_per_token"]
        axes.axhline(limit, color="#d93025", linestyle="--")
        axes.annotate(
            f"memory allows {limit:.1f}", (0, limit), xytext=(0, -12), textcoords="offset points", color="#d93025"
        )
    gpu = f"{now['gpu']}, " if now["gpu"] else ""
    figure.suptitle(f"{now['model']} · {gpu}{now['cpu']}, {now['isa']}, threads: {now['threads']}")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"--plot {path}: {error}") from None
