"""Where models come from: `resolve(ref)` turns any form of a reference into bytes of files on this machine.

A reference is a path (a GGUF file, a .llamafile or .zip archive, a part of a split one, ARCHIVE@ENTRY, or a folder with
exactly one model), `hf:user/repo[:QUANT|/FILE]`, an address `https://…`, `pypi:NAME[==VERSION]`, `ollama:NAME[:TAG]`,
or a short name, to which `:QUANT` may be added where it stands for a repository of the hub. docs/models.md tells all.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from gemmart.errors import InvalidRequest, ModelNotFound
from gemmart.progress import Progress, no_progress
from gemmart.sources import files, hub, ollama, shortnames, store, urls, wheels
from gemmart.sources.files import ModelSource, packed_arguments
from gemmart.sources.parts import Part
from gemmart.sources.shortnames import Alias, aliases

__all__ = ["DEFAULT", "FALLBACK", "Alias", "ModelSource", "Part", "aliases", "packed_arguments", "pull", "resolve"]

DEFAULT = "gemma-2-2b-it"
FALLBACK = "smollm2-135m"  # comes from PyPI, so it is there where the hub is not

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _How:
    """How a model is to be found."""

    offline: bool
    verify: bool
    progress: Progress
    notice: Callable[[str], None]


def resolve(
    ref: str | None,
    *,
    offline: bool = False,
    verify: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> ModelSource:
    """Find the model that `ref` names, fetching it unless it is here or `offline`.

    None is the default model; where it is not here and the hub cannot be reached, the small fallback model instead,
    which `notice` (else the log) is told. `verify`: compare its sums again, where it was fetched before. Raises
    ModelNotFound, ModelFormatError or UnsupportedModel for what is not a model that can be read, DownloadError with
    ChecksumError and DiskFull for what could not be fetched, InvalidRequest for a reference of no known form.
    """
    how = _How(offline, verify, progress or no_progress, notice or log.warning)
    if ref is not None:
        return _resolve(ref, how)
    try:
        return _resolve(DEFAULT, how)
    except (hub.HubUnreachable, hub.NotCached) as error:
        how.notice(f"{error}; taking {FALLBACK} instead of {DEFAULT}")
        return _resolve(FALLBACK, how)


def pull(
    ref: str,
    *,
    verify: bool = False,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """Fetch the model that `ref` names, unless it is here, and return its file, or its first part.

    `verify`: compare what is here with its SHA-256 again, a model in an archive with its CRC-32. Raises as resolve().
    """
    return resolve(ref, offline=offline, verify=verify, progress=progress, notice=notice).path


def _resolve(ref: str, how: _How) -> ModelSource:
    alias = None if os.path.exists(ref) else shortnames.find(ref)
    if alias is None:
        source = _named(ref, Alias(ref), how)
    else:
        source = _in_ollama(ref, alias, how) or _named(alias.ref, alias, how)
    if how.verify:
        files.check(source, how.progress)
    return source


def _named(ref: str, alias: Alias, how: _How) -> ModelSource:
    """The model of a reference that is no alias; `alias` pins it."""
    kind, colon, rest = ref.partition(":")
    if colon and kind == "hf":
        return _of_hub(hub.parse(rest), how)
    if kind in ("http", "https") and rest.startswith("//"):
        if (page := hub.of_page(ref)) is not None:
            return _of_hub(page, how)
        address = urls.parse(ref)
        path = urls.fetch(address, offline=how.offline, verify=how.verify, progress=how.progress, notice=how.notice)
        return files.from_path(path, address.url)
    if colon and kind == "pypi":
        package = wheels.parse(rest)
        path = wheels.fetch(
            package,
            size=alias.size,
            sha256=alias.sha256,
            offline=how.offline,
            verify=how.verify,
            progress=how.progress,
            notice=how.notice,
        )
        return files.from_path(path, f"pypi:{package}")
    if colon and kind == "ollama":
        return _of_ollama(rest, how)
    if not ref or "://" in ref:
        raise InvalidRequest(
            f"{ref!r}: expected a path, hf:user/repo[:QUANT|/FILE], https://…, pypi:NAME[==VERSION], ollama:NAME or an "
            "alias"
        )
    return _of_path(ref, how)


def _of_hub(wanted: hub.HubReference, how: _How) -> ModelSource:
    path, origin = hub.fetch(wanted, offline=how.offline, verify=how.verify, progress=how.progress)
    return files.from_path(path, origin)


def _of_path(ref: str, how: _How) -> ModelSource:
    try:
        source = files.from_path(Path(os.path.expanduser(ref)))
    except ModelNotFound as error:
        if "/" in ref or os.path.exists(ref):
            raise
        try:
            return _of_ollama(ref, how)
        except (ModelNotFound, InvalidRequest):
            close = difflib.get_close_matches(ref, aliases(), n=3) or sorted(aliases())
            raise ModelNotFound(f"{error}; nor is it an alias, such as {', '.join(close)}") from None
    if how.verify:
        for part in dict.fromkeys(part.path for part in source.parts):
            if (sha256 := store.sum_on_record(part)) is not None:
                store.verify(part, sha256, how.progress, again=True)
            elif source.entry is None:
                how.notice(f"{part}: nobody gives a SHA-256 for it, so its sum is not compared")
    return source


def _of_ollama(name: str, how: _How) -> ModelSource:
    blob = ollama.find(name)
    if how.verify:
        store.verify(blob, blob.name.removeprefix("sha256-"), how.progress, again=True)
    return replace(files.from_path(blob, f"ollama:{name}"), name=name)


def _in_ollama(ref: str, alias: Alias, how: _How) -> ModelSource | None:
    """What Ollama has of a model of the hub that goes by a short name, where the hub's cache has none."""
    if ref not in alias.also or not alias.ref.startswith("hf:"):
        return None
    try:
        hub.fetch(hub.parse(alias.ref.removeprefix("hf:")), offline=True, progress=how.progress)
    except hub.NotCached:
        for name in alias.also:
            with suppress(ModelNotFound, InvalidRequest):
                return _of_ollama(name, how)
    return None
