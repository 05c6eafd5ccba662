"""One connection, on top of uvicorn's: how many there may be, how long a head, an idle one and a stalled reader have,
and refusals of our own shape."""

from __future__ import annotations

import asyncio
import sys

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemmart.server import limits
from gemmart.server.access import is_loopback
from gemmart.server.errors import HttpError, body, too_many_connections


class Connection(H11Protocol):
    """uvicorn's timer for idle connections runs between requests only; these cover what else can take for ever."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._opened = self.loop.time()
        self.app_state = {"is_full": self._is_full}
        self._lingered = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        if self._is_one_too_many():
            self._refuse(too_many_connections())
        else:
            self._limit(limits.HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.transport.is_closing() or self._lingers:
            return
        if self.conn.their_state is not h11.IDLE:
            self._limit(None)
        elif self._timer is None or self._lingered:
            self._limit(limits.HEADER_SECONDS)
        self._lingered = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._lingers:
            self._lingered = True
            self._limit(limits.LINGER_SECONDS)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(limits.STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def send_400_response(self, msg: str) -> None:
        error = sys.exception()  # the one that uvicorn calls this for
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        code = {431: "headers_too_large"}.get(status, "invalid_http")
        self._refuse(HttpError(status, code, f"this is no HTTP request that the server takes: {error or msg}"))

    @property
    def _lingers(self) -> bool:
        """Whether a body still comes whose request has been answered: closing now might lose the answer."""
        return self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE

    @property
    def _is_waiting(self) -> bool:
        """Whether nothing of it is being worked on: neither a whole request nor an answer."""
        return self.cycle is None or self.cycle.response_complete or self.conn.their_state is h11.SEND_BODY

    @property
    def _others(self) -> list[Connection]:
        return [other for other in self.connections if isinstance(other, Connection) and other is not self]

    def _is_full(self) -> bool:
        """Whether all places but those kept for /health are taken by work."""
        return sum(not other._is_waiting for other in self._others) >= limits.connections()

    def _is_one_too_many(self) -> bool:
        """Whether there is no place for it; the oldest connection that waits makes place."""
        others = self._others
        here = self.client[0] if self.client else None
        if here is not None and not is_loopback(here):
            same = sum(other.client is not None and other.client[0] == here for other in others)
            if same >= limits.CONNECTIONS_PER_ADDRESS:
                return True
        if len(others) < limits.connections() + limits.KEPT_CONNECTIONS:
            return False
        waiting = [other for other in others if other._is_waiting]
        if not waiting:
            return True
        min(waiting, key=lambda other: other._opened).transport.abort()
        return False

    def _limit(self, seconds: float | None) -> None:
        """From now on it has so long; None: as long as it likes."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _refuse(self, error: HttpError) -> None:
        """Answer before there is a request, and close."""
        headers = {"content-type": "application/json", "connection": "close"} | error.headers
        encoded = msgspec.json.encode(body(error))
        headers["content-length"] = str(len(encoded))
        for event in (
            h11.Response(status_code=error.http_status, headers=list(headers.items())),
            h11.Data(data=encoded),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self._limit(None)
        self.transport.close()
