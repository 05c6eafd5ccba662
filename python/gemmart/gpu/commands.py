"""Running compilers: argument lists without a shell, a process group each, limits of time and output."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

MAX_OUTPUT = 1 << 20  # bytes of one that are kept
TICK = 0.1


class CommandError(Exception):
    """A command that failed: its arguments, how it ended, what it printed."""

    def __init__(self, arguments: Sequence[str], how: str, output: str) -> None:
        super().__init__(f"{arguments[0]} {how}")
        self.how = how
        self.output = output


class Commands:
    """The commands of one task, in one folder and environment, each with `timeout` seconds. end(), from any thread,
    ends them and their children."""

    def __init__(self, folder: Path, environment: Mapping[str, str], timeout: float) -> None:
        self._folder = folder
        self._environment = dict(environment)
        self._timeout = timeout
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._ended = False

    def run(self, arguments: Sequence[str]) -> str:
        """What it prints, on stdout and stderr. Raises CommandError."""
        with self._lock:
            if self._ended:
                raise CommandError(arguments, "was not started", "")
            try:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    cwd=self._folder,
                    env=self._environment,
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandError(arguments, f"cannot be started: {error.strerror}", "") from error
            self._running.add(process)
        try:
            output, in_time = _read(process, self._timeout)
        finally:
            _kill(process)  # and what it left running
            with self._lock:
                self._running.discard(process)
        if not in_time:
            raise CommandError(arguments, f"did not end within {self._timeout:.0f} s and was stopped", output)
        if process.returncode != 0:
            code = process.returncode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
            raise CommandError(arguments, how, output)
        return output

    def end(self) -> None:
        with self._lock:
            self._ended = True
            for process in self._running:
                _kill_group(process)


def _read(process: subprocess.Popen[bytes], timeout: float) -> tuple[str, bool]:
    """What a command prints, at most MAX_OUTPUT bytes of it, until it ends; and whether that was in time."""
    assert process.stdout is not None
    file = process.stdout.fileno()
    kept, n_more = bytearray(), 0
    deadline = time.monotonic() + timeout
    in_time = True
    while in_time:
        if select.select([file], [], [], TICK)[0]:
            data = os.read(file, 1 << 16)
            if not data:
                break
            room = MAX_OUTPUT - len(kept)
            kept += data[:room]
            n_more += max(0, len(data) - room)
        elif process.poll() is not None:  # a child of it may hold the pipe open
            break
        in_time = time.monotonic() < deadline
    if in_time:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            in_time = False
    text = kept.decode("utf-8", "replace")
    return (f"{text}\n[{n_more} more bytes]" if n_more else text), in_time


def _kill(process: subprocess.Popen[bytes]) -> None:
    _kill_group(process)
    process.wait()
    if process.stdout:
        process.stdout.close()


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):  # all of it ended
        os.killpg(process.pid, signal.SIGKILL)
