"""Models that Ollama has on this machine: `ollama:NAME[:TAG]`. Its store is read, never written.

A manifest, OLLAMA_MODELS/manifests/HOST/USER/NAME/TAG, names the model's blob by its SHA-256; the blob is a GGUF file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gemmart.errors import InvalidRequest, ModelFormatError, ModelNotFound, UnsupportedModel

MODEL_LAYER = "application/vnd.ollama.image.model"
DEFAULT_PLACE = ("registry.ollama.ai", "library")
NAME = re.compile(r"(?:(?:([\w.:-]+)/)?([\w.-]+)/)?([\w.-]+?)(?::([\w.-]+))?", re.ASCII)
DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
MAX_MANIFEST = 1 << 20  # bytes


def stores() -> list[Path]:
    """Where Ollama keeps its models: for this user, and for the service of the system."""
    if folder := os.environ.get("OLLAMA_MODELS"):
        return [Path(folder).expanduser()]
    return [Path.home() / ".ollama" / "models", Path("/usr/share/ollama/.ollama/models")]


def find(name: str) -> Path:
    """The blob of a model. Raises InvalidRequest for what is no name of Ollama's, ModelNotFound, ModelFormatError for a
    broken manifest, UnsupportedModel for a model that is no single GGUF file."""
    match = NAME.fullmatch(name)
    host, user, model, tag = match.groups() if match else ("", "", "", "")
    parts = [host or DEFAULT_PLACE[0], user or DEFAULT_PLACE[1], model, tag or "latest"]
    if match is None or any(set(part) == {"."} for part in parts):
        raise InvalidRequest(f"ollama:{name}: expected ollama:NAME[:TAG] or ollama:USER/NAME[:TAG]")
    looked = []
    for store in stores():
        manifest = store.joinpath("manifests", *parts)
        if manifest.is_file():
            return _blob(store, manifest)
        looked.append(str(store))
    raise ModelNotFound(f"ollama:{name}: Ollama has no such model on this machine (looked in {', '.join(looked)})")


def models() -> Iterator[tuple[str, Path]]:
    """The name and the blob of each model in the stores that can be read."""
    for store in stores():
        for manifest in sorted(store.glob("manifests/*/*/*/*")):
            host, user, name, tag = manifest.relative_to(store / "manifests").parts
            place = () if (host, user) == DEFAULT_PLACE else (user,) if host == DEFAULT_PLACE[0] else (host, user)
            try:
                yield f"{'/'.join((*place, name))}:{tag}", _blob(store, manifest)
            except (ModelFormatError, ModelNotFound):
                continue


def _blob(store: Path, manifest: Path) -> Path:
    try:
        with manifest.open("rb") as file:
            layers = json.loads(file.read(MAX_MANIFEST))["layers"]
        digests = [DIGEST.fullmatch(layer["digest"]) for layer in layers if layer["mediaType"] == MODEL_LAYER]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFormatError(f"{manifest}: not a manifest of Ollama's: {error}") from None
    if len(digests) != 1 or digests[0] is None:
        raise UnsupportedModel(f"{manifest}: names {len(digests)} files of weights; one GGUF file is expected")
    blob = store / "blobs" / f"sha256-{digests[0][1]}"
    if not blob.is_file():
        raise ModelNotFound(f"{manifest}: its model, {blob}, is missing; `ollama pull` fetches it again")
    return blob
