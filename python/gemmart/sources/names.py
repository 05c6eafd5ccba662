"""What file names say: which files are one model in parts, and which of several files are models.

A split model is NAME-00001-of-0000N.gguf …, files that each begin as a GGUF file; NAME.cat0, NAME.cat1 … are slices of
one file. The first one's name stands for them all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from gemmart.errors import ModelNotFound

SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<end>\.gguf)", re.IGNORECASE)
SLICE = re.compile(r"(?P<whole>.+)\.cat(?P<number>\d{1,4})")
MODEL = re.compile(r"\.(gguf|llamafile)(\.cat\d{1,4})?$", re.IGNORECASE)
HELPER = re.compile(r"mmproj|^imatrix", re.IGNORECASE)  # belongs to a model, and is none


def is_model(name: str) -> bool:
    """Whether a file of this name may be a model, or a part of one."""
    base = name.rpartition("/")[2]
    return bool(MODEL.search(base) or SLICE.fullmatch(base)) and not HELPER.search(base)


def is_part(name: str) -> bool:
    """Whether a file of this name is one of several."""
    match = SPLIT.fullmatch(name)
    return int(match["count"]) > 1 if match else SLICE.fullmatch(name) is not None


def models(names: Iterable[str]) -> dict[str, list[str]]:
    """The models among files of these names: the first part of each, and what there is of its parts, in order."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        if is_model(name):
            first, number = _place(name)
            found.setdefault(first, {})[number] = name
    return {first: [parts[number] for number in sorted(parts)] for first, parts in sorted(found.items())}


def parts(name: str, there: Iterable[str]) -> list[str]:
    """The files of the model that the file `name` is, or is a part of, in order, out of those that are there.

    Raises ModelNotFound that names the first part that is missing."""
    first, _ = _place(name)
    found = {number: other for other in there for own, number in [_place(other)] if own == first}
    match = SPLIT.fullmatch(name)
    count = int(match["count"]) if match else max(found, default=0) + 1
    for number in range(count):
        if number not in found:
            raise ModelNotFound(f"{_part(name, number)}: no such file: part {number + 1} of {count} of the model")
    return [found[number] for number in range(count)]


def whole(name: str) -> str:
    """The name of the file of which a file is a slice; a file that is no slice is whole."""
    match = SLICE.fullmatch(name)
    return match["whole"] if match else name


def title(name: str) -> str:
    """The name of a model: that of its file without what marks a part, and without .gguf or .llamafile."""
    base = whole(name.rpartition("/")[2])
    if match := SPLIT.fullmatch(base):
        base = match["stem"]
    return re.sub(r"\.(gguf|llamafile)$", "", base, flags=re.IGNORECASE)


def _place(name: str) -> tuple[str, int]:
    """The first part of the model that a file belongs to, and which part it is, from 0."""
    if match := SPLIT.fullmatch(name):
        return _part(name, 0), int(match["number"]) - 1
    if match := SLICE.fullmatch(name):
        return _part(name, 0), int(match["number"])
    return name, 0


def _part(name: str, number: int) -> str:
    """The name of another part of the same model."""
    if match := SPLIT.fullmatch(name):
        return f"{match['stem']}-{number + 1:05}-of-{match['count']}{match['end']}"
    if match := SLICE.fullmatch(name):
        return f"{match['whole']}.cat{number}"
    return name
