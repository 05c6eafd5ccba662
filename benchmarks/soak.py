#!/usr/bin/env python3
"""Many clients for a long time: every answer is what it was alone, and nothing is left behind.

    python benchmarks/soak.py MODEL --clients 32 --requests 300
    python benchmarks/soak.py MODEL --clients 32 --minutes 10

A set of requests of mixed lengths, temperatures 0 and 0.8 with seeds, streamed or not, with shared and own system
prompts, some with a regular expression, is answered one by one first. Then the clients ask at random from that set, one
request after the other; a tenth leaves early, a hundredth asks for nonsense. Each finished answer is compared with the
one that came alone.

Told at the end: how many were compared and differed; pages, sequences and descriptors that are still held; and how the
memory (RssAnon + VmSwap) grew with the number of requests, after the first quarter: the slope of a least-squares line
through the medians of eight parts, and its 95 % bound. The exit code is 1 if an answer differed or something is held.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

from gemmart import doctor
from http_load import free_port, get, post, server

CHAT = "/v1/chat/completions"
N_PARTS = 8
T_95 = 2.447
"""Student's t for a two-sided 95 % bound of a line through eight points, so six degrees of freedom."""
WORDS = ["stone", "river", "lamp", "green", "seven", "quiet", "paper", "north", "glass", "under", "apple", "twelve"]


def request_set(n: int, n_answer: int) -> list[dict[str, Any]]:
    chance = random.Random(0)
    found = []
    for i in range(n):
        words = " ".join(chance.choices(WORDS, k=chance.choice((1, 4, 30, 120))))
        system = (None, "Answer in one sentence. " * 12, f"You are number {i}.")[i % 3]
        messages = [] if system is None else [{"role": "system", "content": system}]
        found.append(
            {
                "messages": [*messages, {"role": "user", "content": f"{words} {i}"}],
                "temperature": (0, 0.8)[i % 2],
                "seed": i,
                "max_tokens": chance.randint(1, n_answer),
                "stream": bool(chance.randrange(2)),
                "stop": ["e"] if i % 7 == 0 else None,
                "ignore_eos": i % 5 == 0 and i % 11 != 1,
                "regex": "[a-z ]+[.]" if i % 11 == 1 else None,
            }
        )
    return found


@dataclass
class Tally:
    counts: Counter[str] = field(default_factory=Counter)
    different: list[tuple[int, str, str]] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    """(requests so far, bytes)"""


async def client(port: int, bodies: list[dict[str, Any]], alone: list[str], tally: Tally, seed: int, end: End) -> None:
    chance = random.Random(seed)
    for _ in range(end.requests or 2**62):
        if time.monotonic() > end.time:
            return
        at, kind = chance.randrange(len(bodies)), chance.random()
        if kind < 0.01:
            answer = await post(port, CHAT, {**bodies[at], "temperature": "hot"})
            tally.counts["refused" if answer.status == 400 else "wrong status"] += 1
            continue
        leave_after = chance.randrange(8) if kind < 0.11 else None
        if leave_after and not bodies[at]["stream"]:
            leave_after = 0
        answer = await post(port, CHAT, bodies[at], leave_after=leave_after)
        if answer.finished and answer.status == 200:
            tally.counts["finished"] += 1
            if answer.text != alone[at]:
                tally.different.append((at, alone[at], answer.text))
        elif leave_after is not None:
            tally.counts["left"] += 1
        else:
            tally.counts[f"status {answer.status}"] += 1


@dataclass(frozen=True)
class End:
    requests: int | None
    time: float


def status(pid: int) -> dict[str, int]:
    """Bytes of the process's own memory, descriptors, threads."""
    text = Path(f"/proc/{pid}/status").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(RssAnon|VmSwap|Threads):\s+(\d+)", text, re.MULTILINE)}
    fds = len(os.listdir(f"/proc/{pid}/fd"))
    return {"bytes": 1024 * (kib["RssAnon"] + kib["VmSwap"]), "fds": fds, "threads": kib["Threads"]}


def gauges(port: int) -> dict[str, float]:
    text = get(port, "/metrics")[1].decode()
    return {name: float(value) for name, value in re.findall(r"^gemmart_(\w+) (\S+)$", text, re.MULTILINE)}


def slope(samples: list[tuple[int, int]]) -> tuple[float, float]:
    """Bytes a request, and the upper 95 % bound."""
    samples = samples[len(samples) // 4 :]
    parts = [samples[len(samples) * i // N_PARTS : len(samples) * (i + 1) // N_PARTS] for i in range(N_PARTS)]
    x = [mean(n for n, _ in part) for part in parts]
    y = [median(size for _, size in part) for part in parts]
    spread = sum((xi - mean(x)) ** 2 for xi in x)
    b = sum((xi - mean(x)) * (yi - mean(y)) for xi, yi in zip(x, y, strict=True)) / spread
    rest = sum((yi - mean(y) - b * (xi - mean(x))) ** 2 for xi, yi in zip(x, y, strict=True))
    return b, b + T_95 * (rest / (N_PARTS - 2) / spread) ** 0.5


async def watch(pid: int, tally: Tally) -> None:
    while True:
        tally.samples.append((tally.counts.total(), status(pid)["bytes"]))
        await asyncio.sleep(0.1)


async def run(port: int, pid: int, bodies: list[dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    alone = [(await post(port, CHAT, body)).text for body in bodies]
    tally = Tally()
    before = status(pid)
    watching = asyncio.create_task(watch(pid, tally))
    end = End(arguments.requests, time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf"))
    began = time.monotonic()
    await asyncio.gather(*(client(port, bodies, alone, tally, seed, end) for seed in range(arguments.clients)))
    seconds = time.monotonic() - began
    watching.cancel()
    await asyncio.sleep(2)  # the last ones who left
    after, held = status(pid), gauges(port)
    b, bound = slope(tally.samples)
    return {
        "seconds": seconds,
        "counts": dict(tally.counts),
        "different": tally.different[:5],
        "n_different": len(tally.different),
        "held": {name: held[name] for name in ("running", "waiting", "kv_pages_held")},
        "before": before,
        "after": after,
        "bytes_per_request": b,
        "bytes_per_request_95": bound,
        "samples": tally.samples,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--requests", type=int, help="of each client; none: as long as --minutes says")
    parser.add_argument("--minutes", type=float, help="end after so long")
    parser.add_argument("--set", type=int, default=120, help="different requests")
    parser.add_argument("--answer", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--json", help="where to write everything")
    parser.add_argument("--options", default="-c 1k -np 8", help="the server's")
    arguments = parser.parse_args()
    if not arguments.requests and not arguments.minutes:
        parser.error("--requests or --minutes: how long?")
    port = free_port()
    command = [sys.executable, "-m", "gemmart", "serve", arguments.model, "--port", str(port)]
    bodies = request_set(arguments.set, arguments.answer)
    with server([*command, *arguments.options.split()], port) as process:
        found = asyncio.run(run(port, process.pid, bodies, arguments))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found), encoding="utf-8")
    del found["samples"]
    print(json.dumps({"cpu": doctor.cpu_name(), **found}, indent=1, ensure_ascii=False))
    leaked = any(found["held"].values()) or found["after"]["fds"] > found["before"]["fds"]
    return 1 if found["n_different"] or leaked else 0


if __name__ == "__main__":
    sys.exit(main())
