"""Where a server listens: sockets for a name, an address or a path."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat

from gemmart.errors import InvalidRequest

UNIX = "unix:"
BACKLOG = 1024


def bind(host: str, port: int, *, or_any_port: bool = False) -> list[socket.socket]:
    """Listening sockets for every address of `host`, or for `unix:PATH`, which only this user may open. `or_any_port`:
    where the port is taken, any free one. Raises InvalidRequest that says why not."""
    if host.startswith(UNIX):
        return [_bind_unix(host.removeprefix(UNIX))]
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError, OverflowError) as error:
        raise InvalidRequest(f"host, port: {host}:{port} is no address to listen on: {error}", "host") from None
    sockets: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            wanted = sockets[0].getsockname()[1] if sockets and not port else address[1]
            sockets.append(_bind_tcp(family, (address[0], wanted, *address[2:])))
    except OSError as error:
        for bound in sockets:
            bound.close()
        if error.errno == errno.EADDRINUSE and or_any_port:
            return bind(host, 0)
        raise InvalidRequest(f"port: cannot listen on {host}:{port}: {error.strerror}", "port") from None
    return sockets


def url(sockets: list[socket.socket], *, secure: bool) -> str:
    """How a program on this machine reaches them."""
    name = sockets[0].getsockname()
    if isinstance(name, str):
        return UNIX + name
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(name[0], name[0])
    return f"{'https' if secure else 'http'}://{f'[{host}]' if ':' in host else host}:{name[1]}"


def forget(host: str) -> None:
    """Remove the file of a unix socket on which nothing listens any more."""
    if host.startswith(UNIX):
        with contextlib.suppress(OSError):
            os.unlink(host.removeprefix(UNIX))


def _bind_tcp(family: int, address: tuple[object, ...]) -> socket.socket:
    # The protocol is named, or asyncio does not see that it is TCP, which it tells not to wait before it sends (Nagle).
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # where others may not listen on it as well then
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
        found.listen(BACKLOG)
    except BaseException:
        found.close()
        raise
    return found


def _bind_unix(path: str) -> socket.socket:
    found = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        found.bind(path)
        os.chmod(path, 0o600)  # before it listens, so nobody else gets in
        found.listen(BACKLOG)
    except OSError as error:
        found.close()
        reason = error.strerror or error
        raise InvalidRequest(f"host: cannot listen on {UNIX}{path}: {reason}", "host") from None
    return found


def _remove_stale(path: str) -> None:
    """Remove the socket of a server that did not end properly."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
