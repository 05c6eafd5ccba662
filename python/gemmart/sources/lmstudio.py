"""Models that LM Studio has on this machine, in folders USER/REPO as on the hub. They are read, never written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gemmart.sources import names


def stores() -> list[Path]:
    """Where LM Studio keeps its models, now and formerly."""
    return [Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"]


def files(repo: str) -> dict[str, Path]:
    """The files of a repository of the hub, USER/REPO, that may be models, by their names there."""
    found: dict[str, Path] = {}
    for store in reversed(stores()):
        folder = store / repo
        if folder.is_dir():
            found.update((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if _is_model(path))
    return found


def repos() -> Iterator[str]:
    """The repositories of which there is something."""
    found = {f"{folder.parent.name}/{folder.name}" for store in stores() for folder in store.glob("*/*")}
    yield from sorted(repo for repo in found if files(repo))


def _is_model(path: Path) -> bool:
    return names.is_model(path.name) and path.is_file()
