#!/usr/bin/env python3
"""Clients that take for ever: what those who behave notice of them.

    python benchmarks/slow_clients.py MODEL --clients 64 256 1024
    python benchmarks/slow_clients.py MODEL --clients 200 --descriptors 64

A third of the clients connect and say nothing, a third send a head and a third a body at one byte a second; whoever is
thrown out comes again. Meanwhile /health is asked every 20 ms, each time on a new connection, and a chat every second.

Told for each number of clients: percentiles of the time to /health's answer, how many got none or another one; chats
that were not answered; the processor time of the server in percent of one core; and whether, when the slow ones have
left, as many ordinary requests at once are all served. The exit code is 1 if anybody who behaved got no answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import random
import resource
import sys
import time
from multiprocessing.synchronize import Event
from statistics import quantiles

import psutil

from http_load import free_port, get, post, server

CHAT = "/v1/chat/completions"
QUESTION = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 1}
HEAD = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n"


async def slow_client(port: int, kind: int) -> None:
    """Again and again: nothing (0), a head (1) or a body (2) that does not come to its end."""
    head = HEAD.format(CHAT).encode()
    while True:
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            reading = asyncio.ensure_future(reader.read())  # until the server has had enough
            if kind == 2:
                writer.write(head + b"\r\n")
            sent = head if kind == 1 else b"{" + b" " * 900
            for byte in sent if kind else b"":
                await asyncio.wait([reading], timeout=1)
                if reading.done():
                    break
                writer.write(bytes([byte]))
            with contextlib.suppress(OSError):
                await reading
            writer.close()
        await asyncio.sleep(random.uniform(0.5, 1.5))


def slow_clients(port: int, n: int, ready: Event) -> None:
    """In a process of their own."""

    async def work() -> None:
        clients = [asyncio.ensure_future(slow_client(port, i % 3)) for i in range(n)]
        await asyncio.sleep(3)
        ready.set()
        await asyncio.gather(*clients)

    asyncio.run(work())


def measure(port: int, seconds: float) -> tuple[list[float], int, int]:
    """(milliseconds to each answer of /health, how many were none, chats that were not answered)"""
    times, failed, unanswered = [], 0, 0
    end = time.perf_counter() + seconds
    next_chat = time.perf_counter()
    while time.perf_counter() < end:
        began = time.perf_counter()
        try:
            failed += get(port, "/health")[0] != 200
        except (OSError, ValueError, IndexError):
            failed += 1
        times.append(1000 * (time.perf_counter() - began))
        if time.perf_counter() > next_chat:
            next_chat += 1
            try:
                unanswered += asyncio.run(post(port, CHAT, QUESTION)).status != 200
            except (OSError, ValueError, IndexError):
                unanswered += 1
        time.sleep(0.02)
    return times, failed, unanswered


async def all_served(port: int, n: int) -> bool:
    """Whether n who tokenize at once are all served; whoever is told to come again does."""

    async def one() -> bool:
        for _ in range(20):
            with contextlib.suppress(OSError, IndexError, ValueError):
                if (await post(port, "/tokenize", {"content": "it"})).status == 200:
                    return True
            await asyncio.sleep(0.2)
        return False

    return all(await asyncio.gather(*(one() for _ in range(n))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--clients", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--seconds", type=float, default=15)
    parser.add_argument("--descriptors", type=int, help="that the server may have")
    given = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    limit = [] if given.descriptors is None else ["prlimit", f"--nofile={given.descriptors}"]
    well = True
    for n in given.clients:
        port = free_port()
        command = [
            *limit,
            sys.executable,
            "-m",
            "gemmart",
            "serve",
            given.model,
            "--port",
            str(port),
            "-c",
            "2048",
            "-q",
        ]
        with server(command, port) as process:
            ready = multiprocessing.Event()
            others = multiprocessing.Process(target=slow_clients, args=(port, n, ready))
            others.start()
            ready.wait()
            program = psutil.Process(process.pid)
            before = sum(program.cpu_times()[:2])
            began = time.perf_counter()
            times, failed, unanswered = measure(port, given.seconds)
            share = (sum(program.cpu_times()[:2]) - before) / (time.perf_counter() - began)
            others.kill()
            others.join()
            served = asyncio.run(all_served(port, n))
        cuts = quantiles(times, n=100)
        found = {
            "clients": n,
            "descriptors": given.descriptors,
            "asked": len(times),
            "p50_ms": round(cuts[49], 1),
            "p99_ms": round(cuts[98], 1),
            "max_ms": round(max(times), 1),
            "failed": failed,
            "chats_unanswered": unanswered,
            "cpu_percent": round(100 * share, 1),
            "all_served_after": served,
        }
        print(json.dumps(found), flush=True)
        well = well and not failed and not unanswered and served
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
