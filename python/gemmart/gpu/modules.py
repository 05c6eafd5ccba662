"""Modules that were built here: the folder where they are kept, and which of them fit.

It is its owner's alone (0700), and nothing is loaded that another user could have put there."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from gemmart import _core
from gemmart.gpu import sources
from gemmart.gpu.compilers import covers
from gemmart.places import modules_folder

MODULE, FACTS = "module.so", "module.json"


@dataclass(frozen=True, slots=True)
class Recipe:
    """All that a module depends on. driver: of the machine that it was built for; empty: for any."""

    version: str  # of gemmart
    abi: int
    sources: str
    backend: str
    compiler: str
    command: tuple[str, ...]
    blas: str
    archs: tuple[str, ...]
    driver: str

    @property
    def name(self) -> str:
        """Of its folder."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"{self.abi}-{'+'.join(self.archs)}-{digest[:16]}"


@dataclass(frozen=True, slots=True)
class Built:
    """A module in the folder."""

    path: Path
    recipe: Recipe


def distrust(path: Path) -> str:
    """Why a file or folder may not be used, if there is a reason: who but its owner could have written it."""
    try:
        status = path.lstat()
    except OSError as error:
        return f"{path}: {error.strerror}"
    if stat.S_ISLNK(status.st_mode):
        return f"{path}: is a symbolic link"
    if status.st_uid != os.geteuid():
        return f"{path}: belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path}: other users may write there"
    return ""


def built(folder: Path | None = None) -> Iterator[Built]:
    """Those that may be trusted, the newest first."""
    root = folder or modules_folder()
    if distrust(root):
        return
    for path in sorted(root.glob(f"[0-9]*/{MODULE}"), key=_modified, reverse=True):
        if any(distrust(part) for part in (path.parent, path, path.with_name(FACTS))):
            continue
        try:
            facts = json.loads(path.with_name(FACTS).read_text(encoding="utf-8"))
            facts |= {name: tuple(facts[name]) for name in ("command", "archs")}
            yield Built(path, Recipe(**facts))
        except (OSError, ValueError, TypeError, KeyError):  # broken, or of another version: as if it were not there
            continue


def find(backend: str, abi: int, gpu_arch: str, driver: str) -> Path | None:
    """The newest module of these sources for such a GPU and driver."""
    for module in built():
        recipe = module.recipe
        current = (recipe.version, recipe.abi, recipe.backend) == (_core.version, abi, backend)
        if (
            current
            and recipe.driver in ("", driver)
            and covers(recipe.archs, gpu_arch)
            and recipe.sources == sources.sha256()
        ):
            return module.path
    return None


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
