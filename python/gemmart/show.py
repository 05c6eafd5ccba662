"""What a model's file says of itself, read without its weights."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemmart import _core
from gemmart.model_file import describe, metadata, read_vocabulary
from gemmart.sources import ModelSource
from gemmart.terminal import mib, table
from gemmart.tokenizer import Tokenizer


def report(source: ModelSource) -> dict[str, Any]:
    """Everything that `gemmart show --json` prints. Raises as gemmart.load does for a file that is not sound."""
    gguf = _gguf(source)
    info = describe(gguf, _core.ModelFacts(*source.parts), source)
    return asdict(info) | {
        "path": str(info.path),
        "origin": source.origin,
        "entry": source.entry,
        "parts": [{"path": str(part.path), "offset": part.offset, "bytes": part.length} for part in source.parts],
        "n_tensors": len(gguf.tensors()),
        "metadata": metadata(gguf),
    }


def as_text(found: dict[str, Any]) -> str:
    total, parts = sum(found["formats"].values()), found["parts"]
    formats = sorted(found["formats"].items(), key=lambda item: -item[1])
    metadata = found["metadata"]
    vocabulary = (metadata.get("tokenizer.ggml.model", "none"), metadata.get("tokenizer.ggml.pre"))
    link = metadata.get("general.license.link")
    rows: list[tuple[str, object]] = [
        ("name", found["name"]),
        ("path", found["path"]),
        ("origin", found["origin"]),
        *([("alias of", found["alias"])] if found.get("alias") else []),
        *([("entry", found["entry"])] if found["entry"] else []),
        *([("parts", ", ".join(Path(part["path"]).name for part in parts))] if len(parts) > 1 else []),
        ("family", found["family"]),
        ("parameters", f"{found['n_parameters']:,} in {found['n_tensors']} tensors"),
        ("layers, width", f"{found['n_layers']}, {found['dim']}"),
        ("size", mib(found["file_bytes"])),
        ("formats", ", ".join(f"{name} {100 * n / total:.1f} %" for name, n in formats)),
        ("context", f"{found['n_ctx_train']} tokens"),
        ("tokenizer", f"{' '.join(filter(None, vocabulary))}, {found['n_vocab']:,} tokens"),
        ("template", "yes: a chat model" if found["chat_template"] else "none: a base model"),
        ("licence", " ".join(filter(None, (found["license"] or "not given", link)))),
    ]
    return table(rows) + "\n\n" + table((key, _short(value)) for key, value in metadata.items())


def tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer of a model's file."""
    return Tokenizer(read_vocabulary(_gguf(source), str(source.path)))


def _gguf(source: ModelSource) -> _core.Gguf:
    return _core.Gguf(*source.parts)


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 80 else text[:79] + "…"
