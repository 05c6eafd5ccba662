"""Where models come from: `resolve(ref)` turns any form of a reference into bytes of a file on this machine.

A reference is a path (a .gguf file, or a folder with exactly one), `hf:user/repo[:QUANT|/FILE]`,
`pypi:NAME[==VERSION]`, or an alias of aliases.toml, to which `:QUANT` may be added where it stands for a repository of
the hub.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from gemmart.errors import InvalidRequest, ModelNotFound
from gemmart.progress import Progress, no_progress
from gemmart.sources import files, hub, wheels
from gemmart.sources.files import ModelSource, packed_arguments

__all__ = ["DEFAULT", "FALLBACK", "Alias", "ModelSource", "aliases", "packed_arguments", "resolve"]

DEFAULT = "gemma-2-2b-it"
FALLBACK = "smollm2-135m"  # comes from PyPI, so it is there where the hub is not

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Alias:
    """What a short name stands for; `size` (bytes) and `sha256` pin the model file where they are given."""

    ref: str
    size: int | None = None
    sha256: str | None = None


@functools.cache
def aliases() -> dict[str, Alias]:
    """Every short name, in all its spellings."""
    table = tomllib.loads(resources.files(__name__).joinpath("aliases.toml").read_text(encoding="utf-8"))
    found = {}
    for name, row in table.items():
        alias = Alias(row["ref"], row.get("size"), row.get("sha256"))
        found.update(dict.fromkeys([name, *row.get("also", [])], alias))
    return found


def resolve(
    ref: str | None,
    *,
    offline: bool = False,
    progress: Progress | None = None,
    notice: Callable[[str], None] | None = None,
) -> ModelSource:
    """Find the model that `ref` names, fetching it unless it is here or `offline`.

    None is the default model; where it is not here and the hub cannot be reached, the small fallback model instead,
    which `notice` (else the log) is told. Raises ModelNotFound, ModelFormatError or UnsupportedModel for what is not a
    model that can be read, DownloadError with ChecksumError and DiskFull for what could not be fetched, InvalidRequest
    for a reference of no known form.
    """
    progress = progress or no_progress
    notice = notice or log.warning
    if ref is not None:
        return _resolve(ref, offline, progress, notice)
    try:
        return _resolve(DEFAULT, offline, progress, notice)
    except (hub.HubUnreachable, hub.NotCached) as error:
        notice(f"{error}; taking {FALLBACK} instead of {DEFAULT}")
        return _resolve(FALLBACK, offline, progress, notice)


def _resolve(ref: str, offline: bool, progress: Progress, notice: Callable[[str], None]) -> ModelSource:
    alias = _alias(ref) or Alias(ref)
    kind, colon, rest = alias.ref.partition(":")
    if colon and kind == "hf":
        wanted = hub.parse(rest)
        return files.from_path(hub.fetch(wanted, offline=offline, progress=progress), str(wanted))
    if colon and kind == "pypi":
        package = wheels.parse(rest)
        path = wheels.fetch(
            package, size=alias.size, sha256=alias.sha256, offline=offline, progress=progress, notice=notice
        )
        return files.from_path(path, f"pypi:{package}")
    if not ref or "://" in ref:
        raise InvalidRequest(f"{ref!r}: expected a path, hf:user/repo[:QUANT|/FILE], pypi:NAME[==VERSION] or an alias")
    try:
        return files.from_path(Path(os.path.expanduser(ref)))
    except ModelNotFound as error:
        if "/" in ref or os.path.exists(ref):
            raise
        close = difflib.get_close_matches(ref, aliases(), n=3) or sorted(aliases())
        raise ModelNotFound(f"{error}; nor is it an alias, such as {', '.join(close)}") from None


def _alias(ref: str) -> Alias | None:
    """The alias that `ref` names, unless a file of that name exists."""
    known = aliases()
    name, colon, quant = ref.rpartition(":")
    if ref in known and not os.path.exists(ref):
        return known[ref]
    if colon and quant and name in known and known[name].ref.startswith("hf:"):
        return Alias(f"{known[name].ref}:{quant}")
    return None
