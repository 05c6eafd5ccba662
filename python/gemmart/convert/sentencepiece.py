"""tokenizer.model: the few fields of a serialized sentencepiece ModelProto that a GGUF file needs.

The `sentencepiece` package tells neither which pieces are user-defined nor how the model was trained, so the protocol
buffer is read here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from gemmart.errors import ModelFormatError, UnsupportedModel
from gemmart.tokenizer import BYTE, NORMAL

PIECES, TRAINER, NORMALIZER = 1, 2, 3  # fields of ModelProto
BPE = 2  # of TrainerSpec.model_type; 1 is unigram, the default


@dataclass(slots=True)
class Pieces:
    """The pieces of a BPE model in order: their texts, scores and types, whose numbers are those of GGUF."""

    texts: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    types: list[int] = field(default_factory=list)
    space_first: bool = True  # a space is put before every text


def read_pieces(data: bytes, source: Path) -> Pieces:
    """The pieces in a tokenizer.model. Raises ModelFormatError, UnsupportedModel for another kind than BPE."""
    pieces, kind = Pieces(), 1
    try:
        for number, value in _fields(data):
            if number == PIECES and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score = piece.get(1, b""), piece.get(2, b"\0\0\0\0")
                assert isinstance(text, bytes)
                assert isinstance(score, bytes)
                pieces.texts.append(text.decode())
                pieces.scores.append(struct.unpack("<f", score)[0])
                pieces.types.append(int(piece.get(3, NORMAL)))
            elif number == TRAINER and isinstance(value, bytes):
                kind = int(dict(_fields(value)).get(3, 1))
            elif number == NORMALIZER and isinstance(value, bytes):
                pieces.space_first = bool(dict(_fields(value)).get(3, 1))
    except (AssertionError, IndexError, TypeError, ValueError, struct.error):
        raise ModelFormatError(f"{source}: is no sentencepiece model: piece {len(pieces.texts)} is broken") from None
    if not pieces.texts:
        raise ModelFormatError(f"{source}: is no sentencepiece model: it has no pieces")
    if kind != BPE:
        raise UnsupportedModel(f"{source}: is a sentencepiece model of type {kind}; supported is {BPE}, BPE")
    strange = next((i for i, kind in enumerate(pieces.types) if not NORMAL <= kind <= BYTE), None)
    if strange is not None:
        raise ModelFormatError(f"{source}: piece {strange} has the type {pieces.types[strange]}, expected 1 to {BYTE}")
    return pieces


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a message: an int, or bytes for strings, messages and fixed-size numbers."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        else:
            size = {1: 8, 5: 4}[kind] if kind in (1, 5) else len(data)
        if size > len(data) - at:
            raise ValueError
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError
