"""One connection, on top of uvicorn's: how many there may be, how long a head, an idle one and a stalled reader have,
and refusals of our own shape. Nothing here takes longer the more connections there are."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter

import h11
import msgspec
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemmart.server import limits
from gemmart.server.access import is_loopback
from gemmart.server.errors import HttpError, body, too_many_connections


class Places:
    """The connections of one server."""

    def __init__(self) -> None:
        self.waiting: dict[Connection, None] = {}
        """On which nothing is worked on, neither a whole request nor an answer; whoever waits longest comes first."""
        self.n_busy = 0
        self.by_address: Counter[str] = Counter()


class Connection(H11Protocol):
    """uvicorn's timer for idle connections runs between requests only; these cover what else can take for ever."""

    places: Places

    @classmethod
    def of_one_server(cls) -> type[Connection]:
        """For its configuration."""
        return type(cls.__name__, (cls,), {"places": Places()})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.app_state = {"is_full": self._is_full}
        self._is_busy = False
        self._lingered = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        is_one_too_many = self._is_one_too_many()
        self.places.waiting[self] = None
        self.places.by_address[self._address] += 1
        if is_one_too_many:
            self._refuse(too_many_connections())
        else:
            self._limit(limits.HEADER_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        self._limit(None)
        self._set_busy(False)
        del self.places.waiting[self]
        self.places.by_address[self._address] -= 1
        if not self.places.by_address[self._address]:
            del self.places.by_address[self._address]
        self.resume_writing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._settle()
        if self.transport.is_closing() or self._lingers:
            return
        if self.conn.their_state is not h11.IDLE:
            self._limit(None)
        elif self._timer is None or self._lingered:
            self._limit(limits.HEADER_SECONDS)
        self._lingered = False

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._settle()
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
    def _address(self) -> str:
        return self.client[0] if self.client else ""

    def _settle(self) -> None:
        """After something has happened: whether something of it is worked on."""
        is_answered = self.cycle is None or self.cycle.response_complete
        self._set_busy(not is_answered and self.conn.their_state is not h11.SEND_BODY)

    def _set_busy(self, is_busy: bool) -> None:
        if is_busy == self._is_busy:
            return
        self._is_busy = is_busy
        if is_busy:
            del self.places.waiting[self]
            self.places.n_busy += 1
        else:
            self.places.waiting[self] = None
            self.places.n_busy -= 1

    def _is_full(self) -> bool:
        """Whether all places but those kept for /health are taken by work, its own apart."""
        return self.places.n_busy - self._is_busy >= limits.connections()

    def _is_one_too_many(self) -> bool:
        """Whether there is no place for it; the connection that waits longest makes place."""
        places = self.places
        is_remote = bool(self._address) and not is_loopback(self._address)
        if is_remote and places.by_address[self._address] >= limits.CONNECTIONS_PER_ADDRESS:
            return True
        if len(places.waiting) + places.n_busy < limits.connections() + limits.KEPT_CONNECTIONS:
            return False
        longest = next((other for other in places.waiting if not other.transport.is_closing()), None)
        if longest is None:
            return True
        longest.transport.abort()
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
