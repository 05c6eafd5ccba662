#!/usr/bin/env python3
"""How soon a second request starts that begins as the first one did.

    python benchmarks/prefix_reuse.py MODEL.gguf

In each round two requests share --prefix random tokens and end with --own others; the second is asked when the first
is answered. Printed are the times to the first token, over HTTP, and their ratio, medians of the rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from statistics import median
from typing import Any

from gemmart import _core, doctor
from http_load import free_port, post, server


async def round_(port: int, prefix: list[int], ends: list[list[int]]) -> list[float]:
    found = []
    for end in ends:
        body: dict[str, Any] = {"prompt": prefix + end, "max_tokens": 2, "ignore_eos": True, "stream": True}
        found.append((await post(port, "/v1/completions", body)).first_s)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--prefix", type=int, default=2000)
    parser.add_argument("--own", type=int, default=16, help="tokens that are not shared")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    n_vocab = _core.ModelFacts(arguments.model).info()["n_vocab"]
    port = free_port()
    n_ctx = arguments.prefix + arguments.own + 16
    command = [sys.executable, "-m", "gemmart", "serve", arguments.model, "--port", str(port)]
    command += ["-np", "2", "-c", str(n_ctx), "-t", str(arguments.threads)]
    chance = random.Random(0)

    def tokens(n: int) -> list[int]:
        return [chance.randrange(10, n_vocab * 9 // 10) for _ in range(n)]

    with server(command, port):
        asyncio.run(round_(port, tokens(32), [tokens(arguments.own)]))  # to warm up
        rounds = []
        for _ in range(arguments.rounds):
            found = asyncio.run(round_(port, tokens(arguments.prefix), [tokens(arguments.own) for _ in range(2)]))
            rounds.append(found)
            print(f"first token after {found[0]:.3f} s, then {found[1]:.3f} s", flush=True)
    first, second = (median(times) for times in zip(*rounds, strict=True))
    print(f"{doctor.cpu_name()}: {first:.3f} s, {second:.3f} s: {second / first:.1%}")


if __name__ == "__main__":
    main()
