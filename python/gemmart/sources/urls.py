"""Models at any address: `https://HOST/…/NAME.gguf`, with `#sha256=…` where the sum is known.

Only https, and plain http on this machine; at most five redirects, never down to plain http; no token is sent to
anybody. A download that breaks off is resumed, by the next program too where an ETag shows that the file there is still
the same. It is installed whole, under its own name, when its size is right, and its SHA-256 where the address gives
one; without it the sum that it had is kept, for `gemmart pull --verify`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import mkstemp
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from gemmart.errors import ChecksumError, DownloadError, InvalidRequest, ModelNotFound
from gemmart.progress import Progress
from gemmart.sources import names, store

if TYPE_CHECKING:
    import httpx

MAX_REDIRECTS = 5
STALL_SECONDS = 60.0  # without a byte
TRIES = 4  # in a row that bring nothing new
PAUSE_SECONDS = 0.5  # before the second one, then twice as long each time
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,199}")
LOCAL = ("localhost", "127.0.0.1", "::1")
PLACE = "url"


@dataclass(frozen=True)
class Address:
    """Where a file is, without the sum; its name, and its SHA-256 if it is known."""

    url: str
    name: str
    sha256: str | None


@dataclass(frozen=True)
class Offer:
    """What a server says of a file: its size in bytes, and what changes when the file does."""

    size: int
    etag: str | None


def parse(text: str) -> Address:
    """Read an address. Raises InvalidRequest."""
    url, _, fragment = text.partition("#")
    try:
        address = urlsplit(url)
    except ValueError as error:
        raise InvalidRequest(f"{text}: not an address: {error}") from None
    if not address.hostname or not (address.scheme == "https" or _is_local(address)):
        raise InvalidRequest(f"{text}: expected https://HOST/…/NAME.gguf; plain http only to this machine")
    name = unquote(address.path).rpartition("/")[2]
    if NAME.fullmatch(name) is None or not names.is_model(name):
        raise InvalidRequest(f"{text}: expected the address of a .gguf or .llamafile file")
    if names.is_part(name):
        raise InvalidRequest(f"{text}: is one part of several; fetch all of them into a folder and name one there")
    match = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", fragment)
    if fragment and match is None:
        raise InvalidRequest(f"{text}: expected nothing after #, or sha256= and 64 hexadecimal digits")
    return Address(url, name, match[1].lower() if match else None)


def fetch(
    wanted: Address, *, offline: bool, verify: bool = False, progress: Progress, notice: Callable[[str], None]
) -> Path:
    """The file, fetched if it was not before."""
    shelf = store.models_folder() / PLACE / hashlib.sha256(wanted.url.encode()).hexdigest()[:16]
    model = shelf / wanted.name
    if model.exists():
        if verify or wanted.sha256 not in (None, store.sum_on_record(model)):
            store.verify_fetched(model, wanted.sha256, progress, notice)
        return model
    if offline:
        raise ModelNotFound(f"{wanted.url}: not fetched yet (looked in {shelf}), and offline")
    with store.writing(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        waiting = f"waiting for another process that fetches {wanted.name}"
        with store.locked(shelf, lambda: notice(waiting)) as alone:
            if not model.exists():
                _fetch_into(shelf, wanted, alone, progress)
    return model


def fetched() -> Iterator[tuple[str, Path]]:
    """The addresses of what was fetched, and where it is."""
    for shelf in sorted((store.models_folder() / PLACE).glob("*")):
        with suppress(OSError, UnicodeDecodeError):
            url = (shelf / ".url").read_text(encoding="utf-8")
            for path in sorted(shelf.iterdir()):
                if not path.name.startswith("."):
                    yield url, path


def _fetch_into(shelf: Path, wanted: Address, alone: bool, progress: Progress) -> None:
    part = shelf / ".part"
    if not alone:  # on a file system without locks nobody else must write into it
        handle, unique = mkstemp(prefix=".part-", dir=shelf)
        os.close(handle)
        part = Path(unique)
    state = part.with_name(part.name + ".json")
    keep = False
    try:
        _download(wanted, part, state, progress)
        found = store.sha256_of(part, progress)
        if wanted.sha256 not in (None, found):
            raise ChecksumError(f"{wanted.url}: its SHA-256 is {found}, but {wanted.sha256} is expected; not installed")
        (shelf / ".url").write_text(wanted.url, encoding="utf-8")
        os.replace(part, shelf / wanted.name)
        store.sync_folder(shelf)
        store.note(shelf / wanted.name, found)
    except _Broken as error:
        keep = alone
        kept = "; what there is of it is kept, for the next try" if alone and part.exists() else ""
        raise DownloadError(f"{wanted.url}: cannot be fetched: {error}{kept}") from None
    except KeyboardInterrupt:
        keep = alone
        raise
    finally:
        if not keep:
            part.unlink(missing_ok=True)
            state.unlink(missing_ok=True)


def _download(wanted: Address, part: Path, state: Path, progress: Progress) -> None:
    """Bring `part` to its full size from where it stands; `state` says which file it is a part of."""
    import httpx

    known = _known(state)
    tries = furthest = 0
    with httpx.Client(timeout=httpx.Timeout(STALL_SECONDS), follow_redirects=False) as client:
        while True:
            have = part.stat().st_size if part.exists() and known is not None else 0
            if known is not None and have == known.size:
                return
            try:
                with _request(client, wanted.url, have, known) as response:
                    known, have = _offer(wanted.url, response, have, known)
                    store.require_space(part.parent, known.size - have)
                    state.write_text(json.dumps(asdict(known)))
                    with store.writing(part.parent, known.size):
                        _append(response, part, have, known.size, wanted.name, progress)
                reason = "the connection was closed"
            except httpx.HTTPError as error:
                reason = str(error) or type(error).__name__
            except _Changed as error:
                reason, known = str(error), None
            except _Busy as error:
                reason = str(error)
            now = part.stat().st_size if known is not None and part.exists() else 0
            tries = 0 if now > furthest else tries + 1
            furthest = max(now, furthest)
            if tries == TRIES:
                raise _Broken(reason)
            if tries:
                time.sleep(PAUSE_SECONDS * 2 ** (tries - 1))


class _Busy(Exception):
    """An answer that may be another one soon."""


class _Changed(Exception):
    """The file there is no longer the one of which there is a part here."""


class _Broken(Exception):
    """Tried often enough."""


@contextmanager
def _request(client: httpx.Client, url: str, have: int, known: Offer | None) -> Iterator[httpx.Response]:
    """The answer to a request for the bytes from `have` on, behind all redirects."""
    headers = {"Accept-Encoding": "identity"}
    if have and known is not None:
        headers["Range"] = f"bytes={have}-"
        if _is_strong(known.etag):
            headers["If-Range"] = str(known.etag)
    for _ in range(MAX_REDIRECTS + 1):
        with client.stream("GET", url, headers=headers) as response:
            if not response.has_redirect_location:
                yield response
                return
            target = urljoin(url, response.headers["Location"])
        place = urlsplit(target)
        if place.scheme != "https" and not (_is_local(place) and _is_local(urlsplit(url))):
            raise DownloadError(f"{url}: leads to {target}, which is not https; not followed")
        url = target
    raise DownloadError(f"{url}: more than {MAX_REDIRECTS} redirects")


def _offer(url: str, response: httpx.Response, have: int, known: Offer | None) -> tuple[Offer, int]:
    """What an answer says of the whole file, and where in it the bytes begin that it brings, which are 0 or `have`.

    Raises _Busy, _Changed, DownloadError, ModelNotFound."""
    status, headers = response.status_code, response.headers
    if status == 416:
        raise _Changed("the file has become shorter")
    if status in (408, 429) or status >= 500:
        raise _Busy(f"the server answers {status}")
    if status in (401, 403):
        raise DownloadError(f"{url}: the server refuses access ({status})")
    if status in (404, 410):
        raise ModelNotFound(f"{url}: the server has no such file ({status})")
    if status not in (200, 206):
        raise DownloadError(f"{url}: the server answers {status}")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{url}: the server compresses what it sends, so its size is not known; not fetched")
    span, text = "", headers.get("Content-Length", "")
    if status == 206:
        span, _, text = headers.get("Content-Range", "").rpartition("/")
    if not text.isdecimal() or int(text) == 0:
        raise DownloadError(f"{url}: the server does not say how long the file is; not fetched")
    offer = Offer(int(text), headers.get("ETag"))
    if status == 200:
        return offer, 0
    if offer != known or not span.startswith(f"bytes {have}-"):
        raise _Changed(f"of {known} from byte {have:,} the answer brings {span!r} of {offer}")
    return offer, have


def _append(response: httpx.Response, part: Path, have: int, size: int, name: str, progress: Progress) -> None:
    """Write what comes behind the first `have` bytes of `part`."""
    with part.open("r+b" if part.exists() else "w+b") as file:
        file.truncate(have)
        file.seek(have)
        for chunk in response.iter_raw():
            have += len(chunk)
            if have > size:
                raise DownloadError(f"{response.url}: sends more than the {size:,} bytes that it announced")
            file.write(chunk)
            progress(f"fetching {name}", have, size)
        file.flush()
        os.fsync(file.fileno())


def _known(state: Path) -> Offer | None:
    """What an earlier program wrote down of the file that it fetched a part of, if that can be recognised."""
    with suppress(OSError, ValueError, TypeError):
        offer = Offer(**json.loads(state.read_text()))
        if isinstance(offer.size, int) and _is_strong(offer.etag):
            return offer
    return None


def _is_strong(etag: str | None) -> bool:
    return etag is not None and etag.startswith('"')


def _is_local(address: SplitResult) -> bool:
    """Whether an address is plain http to this machine."""
    return address.scheme == "http" and address.hostname in LOCAL
