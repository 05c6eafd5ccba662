"""What is on this machine: in the hub's cache, in the folder of fetched models, and in Ollama's and LM Studio's stores.

Only the first two are ours to remove from.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gemmart.errors import InvalidRequest, ModelNotFound
from gemmart.sources import hub, lmstudio, names, ollama, shortnames, store, urls, wheels

QUANT = re.compile(rf"(?:^|[-._/:])({shortnames.QUANT.pattern})(?=[-.]|$)", re.IGNORECASE)
HUB, FETCHED, OLLAMA, LM_STUDIO = "hub", "gemmart", "ollama", "lm studio"


@dataclass(frozen=True, slots=True)
class Installed:
    """A model on this machine."""

    ref: str  # names it in any command
    place: str  # hub, gemmart, ollama or lm studio
    files: tuple[Path, ...]  # the model, or its parts in order
    n_bytes: int
    quant: str | None  # as its name says it
    modified: float  # seconds since 1970


def models() -> list[Installed]:
    """All of them, by place and reference."""
    return [*_in_hub(), *_fetched(), *_in_ollama(), *_in_lmstudio()]


def named(ref: str) -> list[Installed]:
    """What `ref` names among the models that are ours to remove: one model, or all of a repository of the hub.

    Raises ModelNotFound, and InvalidRequest for what belongs to Ollama or LM Studio."""
    alias = shortnames.find(ref)
    wanted = ref if alias is None else alias.ref
    found = [model for model in models() if _is_named(model, wanted)]
    if not found:
        raise ModelNotFound(f"{ref}: nothing of that name was fetched; `gemmart list` shows what was")
    ours = [model for model in found if model.place in (HUB, FETCHED)]
    if not ours:
        raise InvalidRequest(f"{ref}: belongs to {found[0].place}; remove it there")
    return ours


def remove(model: Installed) -> None:
    """Remove a model of the hub's cache or of the folder of fetched models, and what only it needs."""
    if model.place == HUB:
        _remove_from_hub(model)
    elif model.place == FETCHED:
        for file in model.files:
            store.forget(file)
        shutil.rmtree(model.files[0].parent)
    else:
        raise InvalidRequest(f"{model.ref}: belongs to {model.place}; remove it there")


def _is_named(model: Installed, ref: str) -> bool:
    kind, _, rest = ref.partition(":")
    own_kind, _, own_rest = model.ref.partition(":")
    if ref == model.ref or ref in map(str, model.files):
        return True
    if kind != own_kind:
        return False
    if kind == "pypi":
        wanted, own = wheels.parse(rest), wheels.parse(own_rest)
        return wanted.name == own.name and wanted.version in (None, own.version)
    if kind == "hf":
        asked, there = hub.parse(rest), hub.parse(own_rest)
        if asked.repo != there.repo or there.file is None:
            return False
        if asked.file is None and asked.quant is None:
            return True
        sizes = {there.file: model.n_bytes, **{_sibling(there.file, file): 0 for file in model.files}}
        with suppress(ModelNotFound):
            return there.file in hub.choose(asked, sizes)
    return False


def _sibling(name: str, file: Path) -> str:
    """The name of another file of the same folder of a repository."""
    folder, slash, _ = name.rpartition("/")
    return folder + slash + file.name


def _installed(ref: str, place: str, files: tuple[Path, ...], quant_of: str) -> Installed:
    status = [file.stat() for file in files]
    match = QUANT.search(quant_of)
    return Installed(
        ref,
        place,
        files,
        sum(each.st_size for each in status),
        match[1].upper() if match else None,
        max(each.st_mtime for each in status),
    )


def _of_repo(repo: str, there: Mapping[str, Path], place: str) -> Iterator[Installed]:
    for first, parts in names.models(there).items():
        yield _installed(f"hf:{repo}/{first}", place, tuple(there[part] for part in parts), first)


def _in_hub() -> Iterator[Installed]:
    for repo in hub.cached_repos():
        yield from _of_repo(repo, hub.cached(hub.HubReference(repo)), HUB)


def _fetched() -> Iterator[Installed]:
    for path in sorted((store.models_folder() / "pypi").glob("*/[!.]*/*")):
        yield _installed(f"pypi:{path.parent.parent.name}=={path.parent.name}", FETCHED, (path,), path.name)
    for url, path in urls.fetched():
        yield _installed(url, FETCHED, (path,), path.name)


def _in_ollama() -> Iterator[Installed]:
    for name, blob in ollama.models():
        yield _installed(f"ollama:{name}", OLLAMA, (blob,), name)


def _in_lmstudio() -> Iterator[Installed]:
    for repo in lmstudio.repos():
        yield from _of_repo(repo, lmstudio.files(repo), LM_STUDIO)


def _remove_from_hub(model: Installed) -> None:
    """Where a version of a repository holds this model alone, all of that version goes, as the hub's client removes it;
    else its files, and their bytes where no other version has them too."""
    import huggingface_hub

    cache = huggingface_hub.scan_cache_dir()
    repo = hub.parse(model.ref.removeprefix("hf:")).repo
    revisions = [revision for found in cache.repos if found.repo_id == repo for revision in found.revisions]
    wanted = {(file.parent, file.name) for file in model.files}
    for revision in revisions:
        mine = {file for file in revision.files if (file.file_path.parent, file.file_path.name) in wanted}
        if not mine:
            continue
        others = {file for file in revision.files if names.is_model(file.file_name)} - mine
        if not others:
            cache.delete_revisions(revision.commit_hash).execute()
            continue
        kept = {file.blob_path for other in revisions for file in other.files if file not in mine}
        for file in mine:
            file.file_path.unlink()
            if file.blob_path not in kept:
                file.blob_path.unlink(missing_ok=True)
