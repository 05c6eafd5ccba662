"""A server that runs: its thread, and how it ends."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import uvicorn

from gemmart.errors import InternalError, InvalidRequest
from gemmart.model import Model
from gemmart.server import address, limits
from gemmart.server.access import is_loopback
from gemmart.server.app import App, AppOptions
from gemmart.server.connection import Connection

log = logging.getLogger("gemmart.server")
logging.getLogger("uvicorn").addHandler(logging.NullHandler())  # or its warnings go to stderr where nobody logs

ACCEPTED_AT_ONCE = 4
"""Connections that asyncio accepts before any is counted and one too many closed."""
END_SECONDS = 2
"""What is left for sending when everything is answered."""
INTERRUPTED = 130


@dataclass(frozen=True, slots=True, kw_only=True)
class ListenOptions:
    """Where to listen, and how to end."""

    host: str = "127.0.0.1"  # a name, an address or unix:PATH
    port: int = 0  # 0: any free one
    or_any_port: bool = False  # where it is taken: any free one
    require_key: bool = False  # not beyond this machine without an API key
    root_path: str = ""  # what a proxy takes from the front of every path
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    drain: float = limits.DRAIN_SECONDS  # for answers under way when the server ends


class RunningServer:
    """A server in a thread of its own, which listens when this is made. A context manager; close() ends it."""

    def __init__(self, listen: ListenOptions, options: AppOptions, model: Model | None = None) -> None:
        """Without a model, it says that it is loading until attach(). Raises InvalidRequest where it cannot listen
        so."""
        local = listen.host.startswith(address.UNIX) or is_loopback(listen.host)
        if not local and not options.api_keys:
            _anybody(listen)
        self._app = App(options, model, local=local)
        self._listen = listen
        config = uvicorn.Config(
            self._app,
            http=Connection.of_one_server(),
            backlog=ACCEPTED_AT_ONCE,
            ws="none",
            loop="asyncio",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            root_path=listen.root_path,
            ssl_certfile=listen.ssl_certfile,
            ssl_keyfile=listen.ssl_keyfile,
            timeout_keep_alive=limits.IDLE_SECONDS,
            timeout_graceful_shutdown=END_SECONDS,
            h11_max_incomplete_event_size=limits.HEADER_BYTES,
        )
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequest(f"ssl_certfile, ssl_keyfile: cannot be used: {error}", "ssl_certfile") from None
        self._sockets = address.bind(listen.host, listen.port, or_any_port=listen.or_any_port)
        self.url = address.url(self._sockets, secure=listen.ssl_certfile is not None)
        """Where this machine reaches it: "http://127.0.0.1:8080" or "unix:PATH"."""
        self._server = _Server(config)
        self._thread = threading.Thread(target=self._run, name="gemmart-server", daemon=True)
        self._thread.start()
        self._server.ready.wait()
        if not self._server.started:
            raise InternalError("the server did not start; the log says why")

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def attach(self, model: Model) -> None:
        """The model has been loaded."""
        self._app.attach(model)

    def close(self, drain: float | None = None) -> None:
        """Take nothing new, let running answers end within `drain` seconds (None: as the options say), stop listening.
        Closing twice does no harm."""
        if not self._thread.is_alive():
            return
        seconds = self._listen.drain if drain is None else drain
        asyncio.run_coroutine_threadsafe(self._app.drain(seconds), self._server.loop).result()
        self._server.should_exit = True
        self._thread.join()
        address.forget(self._listen.host)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self._server.run(self._sockets)
        finally:
            self._server.ready.set()


class _Server(uvicorn.Server):
    """uvicorn's, which tells when it listens. Signals are ours: it runs beside the main thread."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = threading.Event()
        self.loop: asyncio.AbstractEventLoop

    async def startup(self, sockets: list[Any] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)
        for found in sockets or ():
            found.listen(address.BACKLOG)  # asyncio has set how many may wait to how many it accepts at once
        self.ready.set()


def _anybody(listen: ListenOptions) -> None:
    """Say loudly that there is no key, or refuse it."""
    if listen.require_key:
        raise InvalidRequest(
            f"host: {listen.host} is reached from other machines, which needs an API key here: --api-key-file FILE or "
            "GEMMART_API_KEY",
            "host",
        )
    log.warning(
        "ANYBODY who reaches %s may use this server: it has no API key. Set one: --api-key-file FILE or "
        "GEMMART_API_KEY",
        listen.host,
    )


class _Stopped(BaseException):
    """A signal came while the model was loading."""


def serve_forever(
    load: Callable[[], Model],
    listen: ListenOptions,
    options: AppOptions,
    ready: Callable[[str, Model], None],
) -> int:
    """Listen, load the model, call `ready` with the URL and the model, and serve until SIGINT or SIGTERM; then finish
    what runs. A second signal ends the process at once. For the main thread. Returns the exit code; raises what `load`
    raises, and InvalidRequest where it cannot listen."""
    server = RunningServer(listen, options)
    stop = threading.Event()
    loading = True

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            address.forget(listen.host)
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        stop.set()
        if loading:
            raise _Stopped

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with load() as model:
            loading = False
            server.attach(model)
            ready(server.url, model)
            while server.is_alive and not stop.wait(0.5):
                pass
            if not stop.is_set():
                raise InternalError("the server ended; the log says why")
            server.close()
        return 0
    except _Stopped:
        return 0
    finally:
        server.close()
        for number, handler in before.items():
            signal.signal(number, handler)
