"""Who may ask: names of this machine in Host, no foreign page in Origin, and a key where there are keys.

A web page can make its reader's browser ask a server on the reader's machine. The browser tells in Origin where the
page is from; and where the page's own name was made to mean this machine, that name is in Host."""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Scope

from gemmart.errors import InvalidRequest
from gemmart.server.errors import HttpError

DEFAULT_PORTS = {"http": 80, "https": 443}


class Access:
    def __init__(
        self,
        *,
        keys: Sequence[str],
        allowed_hosts: Sequence[str],
        cors_origins: Sequence[str],
        local: bool,
        open_paths: Sequence[str],
        share_cache: bool = False,
    ) -> None:
        """`allowed_hosts`: names beside our own, "*" for all. `cors_origins`: pages that may ask, as
        "https://example.com", "*" for all. `local`: only this machine reaches the server. `open_paths`, as
        routes have them, need no key. `share_cache`: computed prefixes are shared between keys. Raises
        InvalidRequest for a key that no header can carry, and for what is no origin."""
        for key in keys:
            if not key or not key.isascii() or not key.isprintable() or key.strip() != key:
                raise InvalidRequest("an API key is empty, or not of visible ASCII characters alone")
        self._keys = [key.encode() for key in keys]
        self._local = local
        self._share_cache = share_cache
        self._open_paths = [compile_path(path)[0] for path in open_paths]
        self._allowed_hosts = {host.lower().rstrip(".") for host in allowed_hosts}
        self._any_origin = "*" in cors_origins
        self._origins = {_origin(origin) for origin in cors_origins if origin != "*"}
        if None in self._origins:
            raise InvalidRequest("an allowed origin must be as http://NAME or https://NAME, with a port if it has one")

    @property
    def needs_key(self) -> bool:
        """Whether there are keys."""
        return bool(self._keys)

    def check_browser(self, scope: Scope) -> None:
        """Raises HttpError 403 for a foreign Host or Origin."""
        headers = _headers(scope)
        host = headers.get("host")
        if host is not None and not self._is_ours(host, scope):
            raise HttpError(
                403,
                "forbidden_host",
                f"the Host {_shown(host)} is no name of this server; --allowed-host adds one",
            )
        origin = headers.get("origin")
        if origin is not None and not self._may_ask(origin, host):
            raise HttpError(
                403,
                "forbidden_origin",
                f"pages of {_shown(origin)} may not use this server; --cors-origin allows one",
            )

    def is_open(self, scope: Scope) -> bool:
        """Whether what is asked needs no key."""
        return any(pattern.match(path_of(scope)) for pattern in self._open_paths)

    def check_key(self, scope: Scope) -> None:
        """Raises HttpError 401 where there are keys and none of them is given."""
        if self._keys and not self.is_open(scope) and not self._key(scope):
            raise HttpError(
                401,
                "invalid_api_key",
                "an API key is needed, as Authorization: Bearer KEY or X-Api-Key: KEY, and this is none",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def salt(self, scope: Scope) -> int:
        """A number for whose computed prefixes may be shared: those of one key, unless all share them."""
        key = None if self._share_cache else self._key(scope)
        return int.from_bytes(hashlib.sha256(key).digest()[:8]) if key else 0

    def _key(self, scope: Scope) -> bytes | None:
        """The key that the request gives, if it is one of ours."""
        headers = _headers(scope)
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        given = (credentials.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")).encode("latin-1")
        found = None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(key, given):
                found = key
        return found

    def _is_ours(self, host: str, scope: Scope) -> bool:
        if "*" in self._allowed_hosts:
            return True
        name = _name(host)
        if name in self._allowed_hosts or name == "localhost" or name.endswith(".localhost"):
            return True
        address = _ip(name)
        if address is None:
            return not self._local and name in _own_names()
        # Nobody can make an address mean another machine, and behind a router it need not be one that we know.
        server = scope.get("server")
        return not self._local or address.is_loopback or (server is not None and address == _ip(server[0]))

    def _may_ask(self, origin: str, host: str | None) -> bool:
        given = _origin(origin)
        if self._any_origin or given in self._origins:
            return True
        # A proxy may have ended TLS, so the page's scheme is believed.
        return given is not None and host is not None and given == _origin(f"{given[0]}://{host.strip()}")


class Cors(CORSMiddleware):
    """Starlette's, with a refusal of our shape."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """Raises HttpError 403 for a method that there is not."""
        response = super().preflight_response(request_headers)
        if response.status_code != 200:
            raise HttpError(403, "forbidden_origin", bytes(response.body).decode())
        return response


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine alone."""
    address = _ip(host)
    return address.is_loopback if address else host == "localhost"


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}


def path_of(scope: Scope) -> str:
    """The path as the application sees it, behind what a proxy takes."""
    return str(scope["path"]).removeprefix(scope.get("root_path", ""))


def _own_names() -> set[str]:
    name = socket.gethostname().lower()
    short = name.partition(".")[0]
    return {name, short, short + ".local"}


def _name(host: str) -> str:
    """A Host without its port, in lower case."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".")


def _ip(name: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(name)
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _origin(text: str) -> tuple[str, str, int] | None:
    """Scheme, name and port of an origin; None where it is none."""
    try:
        parts = urlsplit(text.strip().lower())
        port = parts.port or DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    return (parts.scheme, parts.hostname, port) if parts.hostname else None


def _shown(value: str) -> str:
    return repr(value[:100])
