"""Models on the Hugging Face hub: `hf:user/repo`, `hf:user/repo:QUANT`, `hf:user/repo/FILE`, or an address there.

The hub's own client fetches into its own cache, under its own locks, and reads its own settings (HF_HOME, HF_TOKEN,
HF_ENDPOINT, HF_HUB_OFFLINE …). What is cached is used without asking the hub. The client checks sizes only, so a file
is used when its SHA-256 was compared with the hub's record; a small note remembers that, for this very file. The parts
of a model come together. What LM Studio has fetched from the hub is used where it lies.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlsplit

from gemmart.errors import ChecksumError, DownloadError, InvalidRequest, ModelNotFound
from gemmart.progress import Progress
from gemmart.sources import lmstudio, names, store

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

PREFERRED_QUANTS = ("Q4_K_M", "Q4_0")
REQUEST_SECONDS = 5.0  # for each step of a request
ANSWER_SECONDS = 10.0  # for the whole answer: looking up a name has no limit of its own
CHUNK = 1 << 20  # bytes that are lost where a connection breaks
REPO = r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
REFERENCE = re.compile(REPO + r"(?:@(?P<revision>[\w./-]+?))?(?::(?P<quant>[^/]+)|/(?P<file>.+))?", re.ASCII)
PAGE = re.compile(
    rf"/{REPO}(?:/(?:resolve|blob)/(?P<revision>[^/]+)/(?P<file>.+)|(?:/tree/(?P<tree>[^/]+))?/?)", re.ASCII
)
HOSTS = ("huggingface.co", "hf.co")

T = TypeVar("T")


class HubUnreachable(DownloadError):
    """The hub did not answer, or only that it is out of order."""


class NotCached(ModelNotFound):
    """Not in the hub's cache while offline."""


@dataclass(frozen=True)
class HubReference:
    """A repository, and what to take from it: a file, a quantisation, or (neither) the preferred one; of the newest
    revision, or of the one named."""

    repo: str
    file: str | None = None
    quant: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        place = f"hf:{self.repo}" + (f"@{self.revision}" if self.revision else "")
        return place + (f":{self.quant}" if self.quant else f"/{self.file}" if self.file else "")


def parse(text: str) -> HubReference:
    """Read user/repo, user/repo:QUANT or user/repo/FILE, with @REVISION after the repository where that is wanted."""
    match = REFERENCE.fullmatch(text)
    if match is None:
        raise InvalidRequest(f"hf:{text}: expected hf:user/repo, hf:user/repo:QUANT or hf:user/repo/FILE.gguf")
    return HubReference(match["repo"], match["file"], match["quant"], match["revision"])


def of_page(url: str) -> HubReference | None:
    """What an address of the hub names; None for any other address."""
    from huggingface_hub import constants

    try:
        address = urlsplit(url)
    except ValueError:
        return None
    if address.netloc not in (*HOSTS, urlsplit(constants.ENDPOINT).netloc):
        return None
    match = PAGE.fullmatch(unquote(address.path))
    if match is None:
        return None
    revision = match["revision"] or match["tree"]
    return HubReference(match["repo"], match["file"], revision=None if revision == "main" else revision)


def fetch(wanted: HubReference, *, offline: bool, verify: bool = False, progress: Progress) -> tuple[Path, str]:
    """The model file, or its first part, with the others beside it; and where it was found. Fetched if the hub's cache
    has none that fits. `verify`: compare the sums again."""
    from huggingface_hub import constants

    there = cached(wanted)
    with suppress(ModelNotFound):
        files = choose(wanted, {name: path.stat().st_size for name, path in there.items()})
        for name in files:
            _verify(there[name], None, progress, again=verify)
        return there[files[0]], str(wanted)
    theirs = lmstudio.files(wanted.repo) if wanted.revision is None else {}
    with suppress(ModelNotFound):
        files = choose(wanted, {name: path.stat().st_size for name, path in theirs.items()})
        return theirs[files[0]], f"{wanted}, fetched by LM Studio"
    if offline or constants.HF_HUB_OFFLINE:
        have = f" (there is {', '.join(sorted(there))})" if there else ""
        raise NotCached(f"{wanted}: offline, and it is not in the cache of the hub, {constants.HF_HUB_CACHE}{have}")
    return _download(wanted, progress), str(wanted)


def choose(wanted: HubReference, sizes: Mapping[str, int]) -> list[str]:
    """The file that is wanted, or the files of the one model in parts, out of the names and sizes (bytes) of what there
    is."""
    there = names.models(sizes)
    if wanted.file is not None:
        first = {name: first for first, parts in there.items() for name in (*parts, names.whole(first))}.get(
            wanted.file
        )
        matches = [] if first is None else [first]
    elif wanted.quant is not None:
        matches = _of_quant(there, wanted.quant)
    else:
        matches = next(filter(None, (_of_quant(there, quant) for quant in PREFERRED_QUANTS)), [])
    plain = [name for name in matches if name.lower().endswith(".gguf")]
    if len(matches) > 1 and len(plain) == 1:
        matches = plain  # rather than the same one in an archive
    if len(matches) == 1:
        return names.parts(matches[0], sizes)
    listing = ", ".join(f"{name} ({sum(sizes[part] for part in parts):,} bytes)" for name, parts in there.items())
    reason = "several files fit" if matches else "no file fits"
    raise ModelNotFound(
        f"{wanted}: {reason}; name one as hf:{wanted.repo}/FILE; there is: {listing or 'no .gguf file'}"
    )


def _of_quant(there: Iterable[str], quant: str) -> list[str]:
    pattern = re.compile(rf"(?:^|[-._/]){re.escape(quant)}(?:[-.]|$)", re.IGNORECASE)
    return [name for name in there if pattern.search(name)]


def cached_repos() -> Iterator[str]:
    """The repositories of which the hub's cache has something."""
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*")):
        yield "/".join(folder.name.split("--")[1:])


def cached(wanted: HubReference) -> dict[str, Path]:
    """The files in the hub's cache that may be models of the repository, by their names there; of several versions the
    newest, or the one asked for."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / ("models--" + wanted.repo.replace("/", "--"))
    found: dict[str, Path] = {}
    snapshots = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    if wanted.revision is not None:
        commit = wanted.revision
        with suppress(OSError):
            commit = (folder / "refs" / wanted.revision).read_text().strip()
        snapshots = [path for path in snapshots if path.name == commit]
    for snapshot in sorted(snapshots, key=lambda snapshot: snapshot.stat().st_mtime):
        for path in snapshot.rglob("*"):
            if names.is_model(path.name) and path.is_file():
                found[path.relative_to(snapshot).as_posix()] = path
    return found


def _download(wanted: HubReference, progress: Progress) -> Path:
    import huggingface_hub
    from huggingface_hub import constants

    constants.DOWNLOAD_CHUNK_SIZE = CHUNK
    api = huggingface_hub.HfApi()
    with _hub_errors(wanted.repo):
        info = _within(
            ANSWER_SECONDS,
            lambda: api.model_info(wanted.repo, revision=wanted.revision, files_metadata=True, timeout=REQUEST_SECONDS),
        )
    there = {file.rfilename: file for file in info.siblings or []}
    chosen: dict[str, tuple[int, str]] = {}  # size and SHA-256
    for name in choose(wanted, {name: file.size or 0 for name, file in there.items()}):
        size, lfs = there[name].size, there[name].lfs
        if lfs is None or not size:
            raise DownloadError(
                f"hf:{wanted.repo}/{name}: the hub gives no size and SHA-256 for it, so it cannot be checked"
            )
        chosen[name] = size, lfs.sha256
    cache = Path(constants.HF_HUB_CACHE)
    blobs = cache / ("models--" + wanted.repo.replace("/", "--")) / "blobs"
    missing = sum(size for size, sha256 in chosen.values() if not (blobs / sha256).exists())
    paths = []
    with store.writing(cache, missing), _hub_errors(wanted.repo):
        store.require_space(cache, missing)
        for name, (size, sha256) in chosen.items():
            what = f"fetching {name}"
            progress(what, 0, size)
            path = Path(
                huggingface_hub.hf_hub_download(
                    wanted.repo,
                    name,
                    revision=info.sha,
                    etag_timeout=REQUEST_SECONDS,
                    tqdm_class=_reporter(what, size, progress),
                )
            )
            _verify(path, sha256, progress)
            paths.append(path)
    return paths[0]


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


def _verify(path: Path, sha256: str | None, progress: Progress, *, again: bool = False) -> None:
    """Check a file of the hub's cache, as store.verify() does; a wrong one is removed from the cache.

    Without `sha256` the sum is taken from the cache, which names its blobs so."""
    sha256 = sha256 or store.sum_on_record(path)
    if sha256 is None:
        raise DownloadError(
            f"{path}: cannot be checked, since its SHA-256 is not known here; remove it and fetch it again"
        )
    try:
        store.verify(path, sha256, progress, again=again)
    except ChecksumError as error:
        blob = path.parent / path.readlink() if path.is_symlink() else path
        for wrong in (path.resolve(), blob, path):
            store.forget(wrong)
        raise ChecksumError(f"{error}; removed") from None
