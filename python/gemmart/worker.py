"""A process that works for this one under limits of its own: what would end or stop it, ends it alone.

It is a script of this folder that knows nothing of gemmart. It speaks frames on its standard streams, four bytes of
length (big-endian), then JSON: first an empty object, when it is ready, then an answer to each request.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from gemmart.errors import InternalError

START_TIMEOUT = 30.0  # seconds


class WorkerEnded(Exception):
    """The process ended instead of answering; too_long: since its time for computing was used up."""

    def __init__(self, too_long: bool) -> None:
        super().__init__(f"a worker ended: {too_long=}")
        self.too_long = too_long


class Worker:
    """Started when needed, kept, ended when it exceeds a limit. Threads take turns."""

    def __init__(self, script: str, modules: Sequence[ModuleType], timeout: float) -> None:
        """modules: what the script imports beside the standard library. timeout: seconds that an answer may take."""
        self._script = Path(__file__).with_name(script)
        self._paths = [str(Path(str(module.__file__)).parents[1]) for module in modules]
        self._timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._end = _nothing

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises TimeoutError, WorkerEnded."""
        frame = json.dumps(request).encode()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            try:
                return self._exchange(frame)
            except BaseException:  # even of Ctrl-C: its answer must not be taken for that of the next request
                self._end()
                raise

    def _start(self) -> None:
        self._end()
        kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}  # and no secret
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", str(self._script), *self._paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=kept,
            cwd="/",
        )
        self._end = weakref.finalize(self, _end, self._process)
        try:
            _receive(self._process, START_TIMEOUT)
        except (EOFError, TimeoutError):
            self._end()
            raise InternalError(f"a worker does not start: {self._script}") from None

    def _exchange(self, request: bytes) -> dict[str, Any]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        try:
            process.stdin.write(struct.pack(">I", len(request)) + request)
            process.stdin.flush()
            return _receive(process, self._timeout)
        except (EOFError, BrokenPipeError):
            raise WorkerEnded(process.wait() == -signal.SIGPROF) from None


def _nothing() -> None:
    """Ends no process."""


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream:
            with contextlib.suppress(BrokenPipeError):  # a request that was not taken
                stream.close()


def _receive(process: subprocess.Popen[bytes], timeout: float) -> dict[str, Any]:
    """The worker's next frame. Raises EOFError if it ends before, TimeoutError after `timeout` seconds."""
    assert process.stdout is not None
    file = process.stdout.fileno()
    deadline = time.monotonic() + timeout

    def read(n: int) -> bytes:
        data = bytearray()
        while len(data) < n:
            if not select.select([file], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise TimeoutError
            part = os.read(file, n - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    (n,) = struct.unpack(">I", read(4))
    answer: dict[str, Any] = json.loads(read(n))
    return answer
