"""Models on the Hugging Face hub: `hf:user/repo`, `hf:user/repo:QUANT`, `hf:user/repo/FILE`.

The hub's own client fetches into its own cache, under its own locks, and reads its own settings (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE …). What is cached is used without asking the hub. The client checks sizes only, so a file
is used when its SHA-256 was compared with the hub's record; a small note remembers that, for this very file.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gemmart.errors import ChecksumError, DownloadError, InvalidRequest, ModelNotFound
from gemmart.progress import Progress
from gemmart.sources import store
from gemmart.sources.names import is_part as is_split

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PREFERRED_QUANTS = ("Q4_K_M", "Q4_0")
REQUEST_SECONDS = 5.0  # for each step of a request
ANSWER_SECONDS = 10.0  # for the whole answer: looking up a name has no limit of its own
REFERENCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[^/]+)|/(?P<file>.+))?", re.ASCII)

T = TypeVar("T")


class HubUnreachable(DownloadError):
    """The hub did not answer, or only that it is out of order."""


class NotCached(ModelNotFound):
    """Not in the hub's cache while offline."""


@dataclass(frozen=True)
class HubReference:
    """A repository, and what to take from it: a file, a quantisation, or (neither) the preferred one."""

    repo: str
    file: str | None = None
    quant: str | None = None

    def __str__(self) -> str:
        return f"hf:{self.repo}" + (f":{self.quant}" if self.quant else f"/{self.file}" if self.file else "")


def parse(text: str) -> HubReference:
    """Read user/repo, user/repo:QUANT or user/repo/FILE."""
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"hf:{text}: expected hf:user/repo, hf:user/repo:QUANT or hf:user/repo/FILE.gguf")
    return HubReference(match["repo"], match["file"], match["quant"])


def fetch(wanted: HubReference, *, offline: bool, progress: Progress) -> Path:
    """The model file, fetched if the hub's cache has none that fits."""
    from huggingface_hub import constants

    cached = _cached(Path(constants.HF_HUB_CACHE), wanted.repo)
    with suppress(ModelNotFound):
        name = choose(wanted, {name: path.stat().st_size for name, path in cached.items()})
        _verify(cached[name], None, progress)
        return cached[name]
    if offline or constants.HF_HUB_OFFLINE:
        have = f" (there is {', '.join(sorted(cached))})" if cached else ""
        raise NotCached(f"{wanted}: offline, and it is not in the cache of the hub, {constants.HF_HUB_CACHE}{have}")
    return _download(wanted, progress)


def choose(wanted: HubReference, sizes: Mapping[str, int]) -> str:
    """The name of the one file that is wanted, out of the names and sizes (bytes) of what there is."""
    models = sorted(name for name in sizes if name.lower().endswith(".gguf"))
    if wanted.file is not None:
        matches = [name for name in models if name == wanted.file]
    elif wanted.quant is not None:
        matches = _of_quant(models, wanted.quant)
    else:
        matches = next(filter(None, (_of_quant(models, quant) for quant in PREFERRED_QUANTS)), [])
    whole = [name for name in matches if not is_split(name)]
    if len(whole) == 1:
        return whole[0]
    listing = ", ".join(f"{name} ({sizes[name]:,} bytes)" for name in models) or "no .gguf file"
    reason = "several files fit" if whole else "only a model split into parts fits" if matches else "no file fits"
    raise ModelNotFound(f"{wanted}: {reason}; name one as hf:{wanted.repo}/FILE; there is: {listing}")


def _of_quant(names: list[str], quant: str) -> list[str]:
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?:[-.]|$)", re.IGNORECASE)
    return [name for name in names if pattern.search(name)]


def _cached(cache: Path, repo: str) -> dict[str, Path]:
    """The .gguf files of a repository in the hub's cache, by their names there; of several versions the newest."""
    snapshots = cache / ("models--" + repo.replace("/", "--")) / "snapshots"
    found: dict[str, Path] = {}
    if snapshots.is_dir():
        for snapshot in sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime):
            for path in snapshot.rglob("*.gguf"):
                if path.is_file():
                    found[path.relative_to(snapshot).as_posix()] = path
    return found


def _download(wanted: HubReference, progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    api = huggingface_hub.HfApi()
    with _hub_errors(wanted.repo):
        info = _within(
            ANSWER_SECONDS, lambda: api.model_info(wanted.repo, files_metadata=True, timeout=REQUEST_SECONDS)
        )
    files = {file.rfilename: file for file in info.siblings or []}
    name = choose(wanted, {name: file.size or 0 for name, file in files.items()})
    file = files[name]
    if file.lfs is None or not file.size:
        raise DownloadError(
            f"hf:{wanted.repo}/{name}: the hub gives no size and SHA-256 for it, so it cannot be checked"
        )
    cache = Path(constants.HF_HUB_CACHE)
    with store.writing(cache, file.size), _hub_errors(wanted.repo):
        store.require_space(cache, file.size)
        progress(f"fetching {name}", 0, file.size)
        path = Path(
            huggingface_hub.hf_hub_download(
                wanted.repo,
                name,
                revision=info.sha,
                etag_timeout=REQUEST_SECONDS,
                tqdm_class=_reporter(f"fetching {name}", file.size, progress),
            )
        )
    _verify(path, file.lfs.sha256, progress, file.size)
    return path


def _within(seconds: float, call: Callable[[], T]) -> T:
    """The result of `call`, or HubUnreachable if it takes longer; the call is then left to end by itself."""
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise HubUnreachable(f"the Hugging Face hub cannot be reached: no answer within {seconds:.0f} s")
    return results[0]


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into our errors."""
    from huggingface_hub import constants, errors

    # The base of all errors of the HTTP library that the client uses.
    library_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]
    try:
        yield
    except DownloadError:
        raise
    except errors.LocalEntryNotFoundError as error:  # nothing is cached, and the reason is that the hub …
        cause = error.__cause__ or error
        if isinstance(cause, errors.HfHubHTTPError):
            raise _answered(repo, cause) from error
        raise HubUnreachable(_unreachable(constants.ENDPOINT, cause)) from error
    except errors.HfHubHTTPError as error:
        raise _answered(repo, error) from error
    except library_error as error:  # no connection, or a lost one
        raise HubUnreachable(_unreachable(constants.ENDPOINT, error)) from error
    except OSError as error:
        if error.errno is not None:  # the disk
            raise
        raise DownloadError(f"hf:{repo}: the download failed: {_first_line(error)}") from error
    except ValueError as error:  # a name or an answer that the client refuses
        raise DownloadError(f"hf:{repo}: {_first_line(error)}") from error


def _unreachable(endpoint: str, reason: BaseException) -> str:
    return f"the Hugging Face hub cannot be reached: {endpoint}: {_first_line(reason)}"


def _answered(repo: str, error: HfHubHTTPError) -> DownloadError | ModelNotFound:
    """Our error for an answer of the hub that is not a file."""
    from huggingface_hub import constants, errors

    status = error.response.status_code
    gated = isinstance(error, errors.GatedRepoError)
    if isinstance(error, errors.RepositoryNotFoundError) and not gated:
        return ModelNotFound(
            f"hf:{repo}: the hub has no such repository, or it is private: then give a token in HF_TOKEN"
        )
    if gated or status in (401, 403):
        return DownloadError(
            f"hf:{repo}: the hub refuses access ({status}). Where a licence is asked for, as for Gemma, accept it on "
            f"{constants.ENDPOINT}/{repo}, then give a token with `hf auth login` or in HF_TOKEN"
        )
    if status >= 500:
        return HubUnreachable(f"the Hugging Face hub is out of order: {constants.ENDPOINT} answers {status}")
    return DownloadError(f"hf:{repo}: the hub answers {status}: {_first_line(error)}")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _reporter(what: str, size: int, progress: Progress) -> type:
    """A class in the shape of a tqdm bar, as the hub's client wants it, that reports to `progress`."""

    class Reporter:
        total: int | None = size

        def __init__(self, *, initial: int = 0, **_: Any) -> None:
            self.n = initial

        def __enter__(self) -> Reporter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            self.n += int(n or 0)
            progress(what, min(self.n, size), size)

        # With Xet the client tells bytes of the network and bytes of the file; we show those of the file.
        def update_transfer(self, n: float | None = 1) -> None:
            pass

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        set_transfer_postfix_str = set_postfix_str

    return Reporter


def _verify(path: Path, sha256: str | None, progress: Progress, size: int | None = None) -> None:
    """Check a file of the hub's cache, unless a note says that this was done and the file has not changed since.

    Without `sha256` the hash is taken from the cache, which names its blobs so. A wrong file is removed from the cache.
    """
    blob = path.parent / path.readlink() if path.is_symlink() else path
    real = path.resolve()
    if sha256 is None and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        sha256 = blob.name
    status = real.stat()
    note = store.models_folder() / "verified" / hashlib.sha256(os.fsencode(real)).hexdigest()
    checked = f"{status.st_size} {status.st_mtime_ns} "
    with suppress(FileNotFoundError):
        text = note.read_text()
        if text.startswith(checked) and sha256 in (None, text.removeprefix(checked)):
            return
    if sha256 is None:
        raise DownloadError(
            f"{path}: cannot be checked, since its SHA-256 is not known here; remove it and fetch it again"
        )
    found = store.sha256_of(real, progress)
    if found != sha256 or size not in (None, status.st_size):
        for wrong in (path, blob, real):
            wrong.unlink(missing_ok=True)
        raise ChecksumError(f"{path.name}: its SHA-256 is {found}, but the hub's record says {sha256}; removed")
    with suppress(OSError):  # without a note it is checked again next time
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(checked + sha256)
