"""The JSON Schemas of what commands print with --json, docs/schemas; and the page that tells their fields.

python tests/schemas.py > docs/json.md      writes the page anew
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"
ORDER = (
    *("run", "list", "show", "pull", "plan", "doctor", "config", "version", "tokenize", "embed"),
    *("bench", "bench-phases", "bench-kernels", "quantize", "perplexity"),
)
HEAD = """# What `--json` prints

One JSON object on stdout, in UTF-8; `list` prints an array, `pull` an object a line. Errors are on stderr, beside the
exit code. The keys are stable: every answer has them all, and a later version may have more. Each has a JSON Schema in
[schemas](schemas).
"""


def schema(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def as_markdown() -> str:
    parts = [HEAD]
    for name in ORDER:
        found = schema(name)
        parts.append(f"## `{found['title']}`\n\n{found['description']} [Schema](schemas/{name}.json)\n")
        for kind in found.get("oneOf", [found]):
            if kind is not found:
                parts.append(f"{kind['title'].capitalize()}:\n")
            lines = [f"| `{field}` | {type_of(about)} | {about['description']} |" for field, about in fields(kind)]
            parts.append("\n".join(["| field | type | |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def fields(kind: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of each field, and of those in objects and lists of objects."""
    if kind.get("type") == "array":
        kind, prefix = kind["items"], f"{prefix}[]." if prefix else "[]."
    elif prefix:
        prefix += "."
    for name, about in kind.get("properties", {}).items():
        yield prefix + name, about
        yield from fields(about, prefix + name)


def type_of(about: dict[str, Any]) -> str:
    if "const" in about:
        return f"`{about['const']}`"
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    if about["type"] == "array" and about["items"].get("type") != "object":
        return f"list of {type_of(about['items'])}s"
    names = [about["type"]] if isinstance(about["type"], str) else about["type"]
    return " or ".join("list of objects" if name == "array" and "items" in about else name for name in names)


if __name__ == "__main__":
    print(as_markdown(), end="")
