#!/usr/bin/env python3
"""gemmart's server and llama.cpp's on the same GGUF file, with the same users, alternating.

    python benchmarks/compare_servers.py MODEL.gguf --peer llama-server --users 1 8 32 --json out.json

Both servers are loaded and idle but for the one that is measured. In a round each user asks --requests times, one
request after the other, with prompts of random tokens of mixed lengths (--prompt at most) and answers of mixed lengths
(--answer at most), all streamed; the requests are the same for both servers, new ones in each round, so that no prefix
is known. Reported are medians of the rounds: tokens of answers a second of all users together, prompt tokens included
too, and the time from a request to its first token, median and 95th percentile.

llama.cpp's server comes with its sources, which llama-cpp-python's sdist contains (target llama-server). It runs as
many slots as there are users, each with the same context as here, the same threads, and its own defaults else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import date
from statistics import median, quantiles
from typing import Any

from gemmart import _core, doctor
from http_load import free_port, post, server


def ask(prompt: list[int], n_answer: int, seed: int) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "max_tokens": n_answer,
        "temperature": 0.8,
        "seed": seed,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def stream(port: int, body: dict[str, Any]) -> dict[str, float]:
    answer = await post(port, "/v1/completions", body)
    if answer.status != 200 or not answer.finished:
        raise RuntimeError(f"port {port}: {answer}")
    usage = answer.body["usage"]
    return {"first_s": answer.first_s, "prompt": usage["prompt_tokens"], "answer": usage["completion_tokens"]}


async def load(port: int, users: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """All users at once, each with its requests in turn."""

    async def user(bodies: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
        return [await stream(port, body) for body in bodies]

    began = time.perf_counter()
    found = [one for some in await asyncio.gather(*map(user, users)) for one in some]
    seconds = time.perf_counter() - began
    n_answer = sum(one["answer"] for one in found)
    firsts = [one["first_s"] for one in found]
    return {
        "answer_tokens_per_s": n_answer / seconds,
        "total_tokens_per_s": (n_answer + sum(one["prompt"] for one in found)) / seconds,
        "first_s": median(firsts),
        "first_p95_s": quantiles(firsts, n=20, method="inclusive")[-1] if len(firsts) > 1 else firsts[0],
        "seconds": seconds,
    }


def requests(arguments: argparse.Namespace, n_users: int, n_vocab: int, seed: int) -> list[list[dict[str, Any]]]:
    chance = random.Random(seed)

    def one() -> dict[str, Any]:
        # 0 to 9 are control tokens in most vocabularies, as are some of the last.
        n_prompt = chance.randint(arguments.prompt // 4, arguments.prompt)
        prompt = [chance.randrange(10, n_vocab * 9 // 10) for _ in range(n_prompt)]
        return ask(prompt, chance.randint(arguments.answer // 2, arguments.answer), chance.randrange(2**31))

    return [[one() for _ in range(arguments.requests)] for _ in range(n_users)]


def compare(arguments: argparse.Namespace, n_users: int, n_vocab: int) -> dict[str, Any]:
    ctx = arguments.prompt + arguments.answer + 32
    ours, theirs = free_port(), free_port()
    threads = str(arguments.threads)
    commands = {
        "gemmart": [
            *(sys.executable, "-m", "gemmart", "serve", arguments.model, "--port", str(ours), "-t", threads),
            *("-c", str(ctx), "-np", str(n_users), *shlex.split(arguments.options)),
        ],
        "llama_cpp": [
            *(arguments.peer, "-m", arguments.model, "--port", str(theirs), "-t", threads),
            *("-c", str(ctx * n_users), "-np", str(n_users), *shlex.split(arguments.peer_options)),
        ],
    }
    ports = {"gemmart": ours, "llama_cpp": theirs}
    sides = [name for name in commands if name == "gemmart" or arguments.peer]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    with ExitStack() as stack:
        for name in sides:
            stack.enter_context(server(commands[name], ports[name]))
            asyncio.run(load(ports[name], requests(arguments, n_users, n_vocab, -1)[:2]))  # to warm up
        for round_ in range(arguments.rounds):
            users = requests(arguments, n_users, n_vocab, round_)
            for name in sides if round_ % 2 == 0 else sides[::-1]:
                runs[name].append(found := asyncio.run(load(ports[name], users)))
                print(
                    f"{n_users:3} users  {name:10} {found['answer_tokens_per_s']:7.1f} tokens/s  first token"
                    f" {found['first_s']:.2f} s, 95 %: {found['first_p95_s']:.2f} s",
                    flush=True,
                )
    summary = {name: {key: median(run[key] for run in runs[name]) for key in runs[name][0]} for name in sides}
    ratio = {}
    if arguments.peer:
        keys = ("answer_tokens_per_s", "total_tokens_per_s", "first_s", "first_p95_s")
        ratio = {key: summary["gemmart"][key] / summary["llama_cpp"][key] for key in keys}
        print(f"{n_users:3} users  ratios: " + ", ".join(f"{key} {value:.2f}" for key, value in ratio.items()))
    return {"users": n_users, "summary": summary, "ratio": ratio, "runs": runs, "commands": commands}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file")
    parser.add_argument("--peer", default="", help="llama.cpp's llama-server; none: gemmart alone")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=2, help="of each user in a round")
    parser.add_argument("--prompt", type=int, default=128, help="most tokens of a prompt; a quarter is the least")
    parser.add_argument("--answer", type=int, default=64, help="most tokens of an answer; half is the least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--options", default="", help="more of gemmart's")
    parser.add_argument("--peer-options", default="--no-webui", help="more of llama-server's")
    parser.add_argument("--json", help="where to write everything")
    arguments = parser.parse_args()
    n_vocab = _core.ModelFacts(arguments.model).info()["n_vocab"]
    found = {
        "date": date.today().isoformat(),
        "cpu": doctor.cpu_name(),
        "model": os.path.basename(arguments.model),
        "comparisons": [compare(arguments, n, n_vocab) for n in arguments.users],
    }
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
