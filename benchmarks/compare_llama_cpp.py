#!/usr/bin/env python3
"""gemmart and llama-cpp-python on the same GGUF files, alternating, in one process tree.

    python benchmarks/compare_llama_cpp.py MODEL.gguf … --peer-python VENV/bin/python --json out.json --plot out.png

Each side is a child process with its own interpreter (side.py). A round is one side's run, then the other's, on the
same fresh random tokens; a run reads --prompt tokens and feeds --decode tokens, one at a time, taking the likeliest
next token each time. llama.cpp runs with as many threads for the prompt as for decoding, batches of 2048 in parts of
512, and flash attention on or off, whichever was faster in its warm-up. Between the runs the read bandwidth and the
peak of the multiply instructions are measured with the same threads; a run is held against the better of the
measurements before and after it. The logits of both sides are compared in every round.

--depth N decodes after N tokens of context, read once, and measures no prompt. --parallel N decodes N sequences
together, each with a prompt of its own. --start measures whole processes instead: from their start to the first token
of a five-token prompt, and their peak memory, with the file in the page cache. A side that fails or crashes is reported
as such; the other is measured all the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
SIDES = ("gemmart", "llama_cpp")
PROMPT = "one two three four"  # five tokens, with BOS
BANDWIDTH_BYTES = 1 << 30
SAME_LOGITS = 0.95
"""Least correlation of both sides' logits, in the median of the rounds."""


class Failed(Exception):
    """A side's process ended; the message says how."""


# Arithmetic on samples


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def multiplications(tensors: list[tuple[str, str, list[int]]]) -> dict[str, Any]:
    """Multiplications of one token: in the layers, and in the head, which a prompt needs once; and whether their
    weights are integers."""
    matrices = {name: (kind, int(np.prod(shape))) for name, kind, shape in tensors if len(shape) == 2}
    head = "output.weight" if "output.weight" in matrices else "token_embd.weight"
    body = {name: m for name, m in matrices.items() if name not in (head, "token_embd.weight")}
    integers = sum(n for kind, n in body.values() if kind not in ("F32", "F16", "BF16"))
    total = sum(n for _, n in body.values())
    return {"body": total, "head": matrices[head][1], "numbers": "int8" if 2 * integers > total else "float"}


def kv_bytes(layers: list[dict[str, Any]], position: float) -> float:
    """Bytes of keys and values, in 16 bits, that a token at this position reads."""
    return sum(
        4.0 * layer["n_kv_heads"] * layer["head_dim"] * min(position + 1, layer["window"] or position + 1)
        for layer in layers
    )


def speeds(runs: list[dict[str, Any]], work: dict[str, Any], settings: dict[str, int]) -> dict[str, Any]:
    """Tokens a second of a side's runs, and what part that is of run["limits"], the machine's at that time.

    work: body, head, numbers, weight_bytes, layers."""
    prompt, decode, depth, parallel = (settings[name] for name in ("prompt", "decode", "depth", "parallel"))
    bytes_a_step = work["weight_bytes"] + parallel * kv_bytes(work["layers"], (depth or prompt) + (decode - 1) / 2)
    found: dict[str, list[float]] = {}
    for run in runs:
        limits, steps = run["limits"], decode / run["decode_s"]
        sample = {
            "decode": steps * parallel,
            "decode_bandwidth_share": steps * bytes_a_step / limits["bandwidth"],
            "decode_peak_share": steps * parallel * (work["body"] + work["head"]) / limits[work["numbers"]],
        }
        if run["prefill_s"]:
            products = parallel * (prompt * work["body"] + work["head"])
            sample["prefill"] = prompt * parallel / run["prefill_s"]
            sample["prefill_peak_share"] = products / run["prefill_s"] / limits[work["numbers"]]
        for name, value in sample.items():
            found.setdefault(name, []).append(value)
    return {name: spread(values) | {"rounds": values} for name, values in found.items()}


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Of the medians."""
    return {name: ours[name]["median"] / theirs[name]["median"] for name in ("prefill", "decode") if name in ours}


def agreement(ours: np.ndarray, theirs: np.ndarray, chosen: list[Any], others: list[Any]) -> dict[str, float]:
    """How far both sides' logits [2, n_vocab] and greedy choices agree."""
    return {
        "correlation": min(float(np.corrcoef(a, b)[0, 1]) for a, b in zip(ours, theirs, strict=True)),
        "same_choices": float(np.mean(np.array(chosen) == np.array(others))),
    }


def same_logits(found: dict[str, Any]) -> bool:
    """Whether both sides' logits agree in most rounds, or were not compared.

    Not in all: on one of six random prompts of a synthetic 2B, llama.cpp's logits correlated 0.07 with a float64
    computation, gemmart's 0.9999."""
    return "logits" not in found or found["logits"]["correlation"]["median"] >= SAME_LOGITS


# Processes


class Child:
    """A side's process, and the questions to it."""

    def __init__(self, side: str, python: str, options: dict[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 as long as the child
        self._process = subprocess.Popen(
            [python, str(HERE / "side.py"), side, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self.about = self._answer()
        except Failed:
            self.close()
            raise

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # _answer() says how it ended
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        self._errors.seek(0)
        raise Failed(failure(code, self._errors.read()))

    def huge_page_mib(self) -> float:
        return field_kib(Path(f"/proc/{self._process.pid}/smaps_rollup"), "AnonHugePages") / 1024

    def close(self) -> None:
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # it may be gone
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
        self._errors.close()


def failure(code: int, errors: str) -> str:
    """How a process ended, and its last words."""
    lines = errors.strip().splitlines()
    how = f"crashed with {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    return how + (f": {lines[-1]}" if lines else "")


def field_kib(file: Path, name: str) -> int:
    return int(file.read_text().partition(f"{name}:")[2].split()[0])


class Comparison:
    """The rounds of one model."""

    def __init__(self, model: Path, args: argparse.Namespace, say: Callable[[str], None]) -> None:
        self._model, self._args, self._say = model, args, say
        self._settings = {name: getattr(args, name) for name in ("prompt", "decode", "depth", "parallel")}
        self._rng = np.random.default_rng(args.seed)
        self._children: dict[str, Child] = {}
        self._folder = tempfile.TemporaryDirectory()
        common = {"model": str(model), "threads": args.threads}
        self._machine = Child("limits", sys.executable, common)
        n_vocab = self._machine.about["info"]["n_vocab"]
        self._tokens = (n_vocab // 4, n_vocab // 2)  # no control tokens
        self._options: dict[str, Any] = common | {
            "n_tokens": (args.depth or args.prompt) + args.decode,
            "n_sequences": args.parallel,
            "depth": args.depth,
            "tokens": self._tokens,
            "seed": args.seed,
            "precise": args.precise,
            "flash": True,
        }

    def run(self) -> dict[str, Any]:
        try:
            return self._run()
        finally:
            for child in (self._machine, *self._children.values()):
                child.close()
            self._folder.cleanup()

    def _run(self) -> dict[str, Any]:
        facts = self._machine.about
        work = multiplications(facts["tensors"]) | {"weight_bytes": facts["weight_bytes"]}
        found: dict[str, Any] = {
            "model": self._model.name,
            "file_bytes": self._model.stat().st_size,
            **self._settings,
            **work,
            **{side: {} for side in SIDES},
        }
        self._warm_up(found)
        runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
        measured, agreements = [self._limits()], []
        for i in range(self._args.rounds):
            job, logits = self._job(), {}
            for side in SIDES:
                if "failure" in found[side]:
                    continue
                self._say(f"{self._model.name}, round {i + 1} of {self._args.rounds}: {side}")
                try:
                    done, logits[side] = self._ask(side, job)
                except Failed as error:
                    found[side]["failure"] = str(error)
                    continue
                if side in self._children:
                    found[side]["anon_huge_pages_mib"] = self._children[side].huge_page_mib()
                measured.append(self._limits())
                best = {name: max(limits[name] for limits in measured[-2:]) for name in measured[-1]}
                runs[side].append(done | {"limits": best})
            if len(logits) == len(SIDES):
                agreements.append(
                    agreement(*(logits[side] for side in SIDES), *(runs[side][-1]["chosen"] for side in SIDES))
                )
        for side in SIDES:
            if runs[side]:
                found[side] |= speeds(runs[side], work | {"layers": facts["info"]["layers"]}, self._settings)
        found["limits"] = {name: spread([limits[name] for limits in measured]) for name in measured[0]}
        if all(runs.values()):
            found["ratios"] = ratios(*(found[side] for side in SIDES))
            found["logits"] = {
                name: spread([a[name] for a in agreements]) | {"rounds": [a[name] for a in agreements]}
                for name in agreements[0]
            }
        return found

    def _warm_up(self, found: dict[str, Any]) -> None:
        """A run of each side; llama.cpp's with and without flash attention, of which the faster one stays."""
        job, times = self._job(), {}
        for side, flash in (("gemmart", None), ("llama_cpp", True), ("llama_cpp", False)):
            self._say(f"{self._model.name}, warm-up: {side}" + ("" if flash is None else f", flash attention {flash}"))
            self._close(side)
            self._options["flash"] = flash
            try:
                done, _ = self._ask(side, job)
                times[side, flash] = (done["prefill_s"] or 1) * done["decode_s"]
            except Failed as error:
                found[side]["failure"] = str(error)
        for side in SIDES:
            best = min((key for key in times if key[0] == side), key=lambda key: times[key], default=None)
            if best is None:
                continue
            found[side].pop("failure", None)  # of the other variant
            if best[1] is True:
                self._close(side)
                self._options["flash"] = True
            found[side]["about"] = self._child(side).about

    def _job(self) -> dict[str, Any]:
        def ids(rows: int, columns: int) -> list[list[int]]:
            tokens: list[list[int]] = self._rng.integers(*self._tokens, (rows, columns)).tolist()
            return tokens

        parallel = self._args.parallel
        return {
            "prompts": [] if self._args.depth else ids(parallel, self._args.prompt),
            "decode": ids(self._args.decode, parallel),
        }

    def _limits(self) -> dict[str, float]:
        return self._machine.ask(limits=BANDWIDTH_BYTES)

    def _child(self, side: str) -> Child:
        if side not in self._children:
            python = sys.executable if side == "gemmart" else self._args.peer_python
            self._children[side] = Child(side, python, self._options)
        return self._children[side]

    def _ask(self, side: str, job: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray]:
        path = Path(self._folder.name) / f"{side}.npy"
        try:
            done = self._child(side).ask(**job, logits=str(path))
        except Failed:
            self._close(side)
            raise
        return done, np.load(path)

    def _close(self, side: str) -> None:
        if child := self._children.pop(side, None):
            child.close()


# From the start of a process to its first token


def measure_start(model: Path, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    options = json.dumps({"model": str(model), "threads": args.threads, "start": PROMPT})
    threads = str(args.threads)
    commands = {
        "gemmart": [
            *(sys.executable, "-m", "gemmart", "run", str(model)),
            *("--cli", "-p", PROMPT, "-n", "1", "-t", threads, "-q"),
        ],
        "llama_cpp": [args.peer_python, str(HERE / "side.py"), "start", options],
    }
    with model.open("rb") as file:  # into the page cache
        while file.read(1 << 24):
            pass
    found: dict[str, Any] = {"model": model.name, "file_bytes": model.stat().st_size, "start": True}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    found |= {side: {} for side in SIDES}
    for i in range(args.rounds + 1):  # the first one warms up
        for side, command in commands.items():
            if "failure" in found[side]:
                continue
            say(f"{model.name}, start {i} of {args.rounds}: {side}")
            try:
                runs[side].append(whole_process(command))
            except Failed as error:
                found[side]["failure"] = str(error)
    for side in SIDES:
        if len(runs[side]) > 1:
            found[side] |= {name: spread([run[name] for run in runs[side][1:]]) for name in runs[side][0]}
    if all("first_token_s" in found[side] for side in SIDES):
        ours, theirs = (found[side] for side in SIDES)
        found["ratios"] = {
            name: theirs[name]["median"] / ours[name]["median"] for name in ("first_token_s", "peak_mib")
        }
    return found


def whole_process(command: list[str]) -> dict[str, float]:
    """Seconds to the first token and to the end of a process, and the most memory that it held, MiB."""
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL) as process:
            assert process.stdout
            process.stdout.read(1)
            first = time.perf_counter()
            process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        end = time.perf_counter()
        if process.returncode:
            errors.seek(0)
            raise Failed(failure(process.returncode, errors.read()))
    return {"first_token_s": first - began, "end_s": end - began, "peak_mib": usage.ru_maxrss / 1024}


# What is shown


def machine() -> dict[str, Any]:
    from gemmart.doctor import report

    found = report()
    return {
        "date": date.today().isoformat(),
        "cpu": found["cpu"],
        "huge_pages": found["memory"]["huge_pages"],
        "system": found["system"],
        "versions": {**found["versions"], "python": platform.python_version()},
        "command": shlex.join(sys.argv),
    }


def as_text(found: dict[str, Any]) -> str:
    lines = [f"{found['model']}, {found['file_bytes'] / 1e6:,.0f} MB"]
    names = (
        (("first_token_s", "first token, s", 1), ("end_s", "end, s", 1), ("peak_mib", "peak memory, MiB", 1))
        if "start" in found
        else (
            ("prefill", "prefill, tokens/s", 1),
            ("prefill_peak_share", "  % of the multiply peak", 100),
            ("decode", "decode, tokens/s", 1),
            ("decode_bandwidth_share", "  % of the read bandwidth", 100),
            ("decode_peak_share", "  % of the multiply peak", 100),
        )
    )
    for name, title, scale in names:
        row = f"  {title:26}"
        for side in SIDES:
            if sample := found[side].get(name):
                median_, least, most = (scale * sample[key] for key in ("median", "min", "max"))
                row += f"  {side} {median_:9.2f} ({least:.2f} to {most:.2f})"
        if name in found.get("ratios", {}):
            row += f"  ratio {found['ratios'][name]:.2f}"
        lines.append(row)
    for side in SIDES:
        if "failure" in found[side]:
            lines.append(f"  {side}: {found[side]['failure']}")
        about = found[side].get("about", {})
        if about:
            told = ", ".join(f"{key} {about[key]}" for key in about)
            lines.append(f"  {side}: {told}; {found[side].get('anon_huge_pages_mib', 0):,.0f} MiB on huge pages")
    if limits := found.get("limits"):
        parts = (("bandwidth", "GB/s"), ("int8", "G int8 products/s"), ("float", "G float products/s"))
        told = ", ".join(f"{limits[name]['median'] / 1e9:.1f} {unit}" for name, unit in parts)
        lines.append(f"  the machine: {told}")
    if logits := found.get("logits"):
        correlation, same = logits["correlation"], logits["same_choices"]
        lines.append(
            f"  logits {'agree' if same_logits(found) else 'DIFFER'}: correlation {correlation['median']:.4f} "
            f"(worst round {correlation['min']:.4f}), {100 * same['median']:.0f} % of the greedy choices are the same "
            f"(worst round {100 * same['min']:.0f} %)"
        )
    return "\n".join(lines)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Medians as bars, rounds as dots."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(4 + 2 * len(results), 4.5), layout="constrained")
    for panel, name in zip(panels, ("prefill", "decode"), strict=True):
        for i, side in enumerate(SIDES):
            for x, found in enumerate(results):
                if sample := found[side].get(name):
                    place = x + 0.4 * (i - 0.5)
                    panel.bar(place, sample["median"], 0.36, color=f"C{i}", label=side if x == 0 else None)
                    panel.plot([place] * len(sample["rounds"]), sample["rounds"], "k.", markersize=4)
        panel.set_xticks(range(len(results)), [found["model"].removesuffix(".gguf") for found in results], rotation=20)
        panel.set_ylabel("tokens/s")
        panel.set_title(name)
    figure.legend(*panels[1].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    figure.savefig(path, dpi=150)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="has llama-cpp-python")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512, metavar="N")
    parser.add_argument("--decode", type=int, default=32, metavar="N")
    parser.add_argument("--depth", type=int, default=0, metavar="N")
    parser.add_argument("--parallel", type=int, default=1, metavar="N")
    parser.add_argument("--precise", action=argparse.BooleanOptionalAction, help="of gemmart; default: as it chooses")
    parser.add_argument("--start", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--plot", type=Path, metavar="PATH")
    return parser


def main() -> int:
    args = options().parse_args()
    if args.plot and args.start:
        options().error("--plot shows tokens/s, which --start does not measure")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    results = []
    for model in args.models:
        results.append(measure_start(model, args, say) if args.start else Comparison(model, args, say).run())
        print(as_text(results[-1]), flush=True)
        if args.json:  # what is measured is kept
            args.json.write_text(json.dumps(machine() | {"threads": args.threads, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)
    return int(not all(map(same_logits, results)))


if __name__ == "__main__":
    sys.exit(main())
