"""The tokenizer of a model folder in the words of GGUF.

Where there is a tokenizer.model it tells the pieces and their scores, as for llama.cpp's converter; else tokenizer.json
does: a byte-level BPE goes as it is, with a name for the way it cuts words; a BPE that falls back to bytes (Gemma,
Llama 2) is sentencepiece's, and a piece's score is its rank among the merges. What comes of it is compared with
tokenizer.json in the hands of the `tokenizers` package before anything is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from gemmart.convert.folder import LARGEST_JSON, ModelFolder, Object, shown
from gemmart.convert.sentencepiece import read_pieces
from gemmart.errors import ModelFormatError, ModelNotFound, UnsupportedModel
from gemmart.tokenizer import (
    BYTE,
    CONTROL,
    NORMAL,
    PRE_TOKENIZERS,
    SPACE,
    STOP_TOKENS,
    UNKNOWN,
    USER_DEFINED,
    Strings,
    Tokenizer,
    Vocabulary,
)

if TYPE_CHECKING:
    from gguf import GGUFWriter

Notice = Callable[[str], None]

UNUSED = 5  # a token type
LARGEST_MODEL = 64 << 20  # bytes of tokenizer.model; Gemma's has 4 MB
LARGEST_TEMPLATE = 1 << 20  # characters
ADDED_SCORE, PADDING_SCORE = -1000.0, -10000.0  # of tokens that no merge makes
CODE_MARKS = {
    "prefix": "<|fim_prefix|>",
    "suffix": "<|fim_suffix|>",
    "middle": "<|fim_middle|>",
    "fsep": "<|file_separator|>",
}
SAMPLE = "Hello, WORLD! I've 1234567 of 'em:\n\n\tdef f(x):  return x # naïve\n 中文, नमस्ते 🙂👍🏽 ...\r\n   The  end "
"""Text on which tokenizers differ."""


@dataclass(slots=True)
class Words:
    """A vocabulary in the making: one entry for each row of the embedding."""

    model: str  # "llama" (sentencepiece) or "gpt2" (byte-level BPE)
    pre: str
    texts: list[str]
    scores: list[float]  # of "llama"
    types: list[int]
    merges: list[str]  # of "gpt2"
    space_first: bool  # whether a space is put before every text

    @classmethod
    def unused(cls, model: str, n_vocab: int) -> Words:
        texts = [f"[PAD{i}]" for i in range(n_vocab)]
        return cls(model, "default", texts, [PADDING_SCORE] * n_vocab, [UNUSED] * n_vocab, [], False)

    def put(self, id: int, text: str, score: float, kind: int) -> None:
        self.texts[id], self.scores[id], self.types[id] = text, score, kind


def add_tokenizer(writer: GGUFWriter, folder: ModelFolder, n_vocab: int, notice: Notice) -> None:
    """Write the tokenizer and the chat template of `folder`, with as many tokens as the embedding has rows. Raises
    ModelNotFound, ModelFormatError, UnsupportedModel naming the file and the field."""
    spec, settings = folder.optional_json("tokenizer.json"), folder.optional_json("tokenizer_config.json")
    if folder.has("tokenizer.model"):
        words = _from_sentencepiece(folder, n_vocab)
    elif spec:
        words = _from_json(spec, str(folder.path / "tokenizer.json"), n_vocab)
    else:
        raise ModelNotFound(f"{folder.path}: neither tokenizer.model nor tokenizer.json is there; the model needs one")
    left_out = [
        text for id, text, special in _added(folder, spec, settings) if not _put_added(words, id, text, special)
    ]
    if left_out:
        notice(f"{len(left_out)} added tokens have no row in the embedding and are left out: {left_out[0]!r} first")

    try:
        "".join(words.texts).encode()
    except UnicodeEncodeError as error:
        raise ModelFormatError(f"{folder.path}: a token of its tokenizer is no Unicode text: {error}") from None
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.texts)
    if words.model == "llama":
        writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    add_prefix = settings.get("add_prefix_space")
    writer.add_add_space_prefix(add_prefix if isinstance(add_prefix, bool) else words.space_first)
    _add_marks(writer, folder, words)
    if spec:
        _compare(writer, folder)


# The pieces


def _from_sentencepiece(folder: ModelFolder, n_vocab: int) -> Words:
    source = folder.path / "tokenizer.model"
    pieces = read_pieces(folder.bytes_of(source.name, LARGEST_MODEL), source)
    if len(pieces.texts) > n_vocab:
        raise ModelFormatError(f"{source}: has {len(pieces.texts)} pieces, but the embedding has {n_vocab} rows")
    words = Words.unused("llama", n_vocab)
    for id, piece in enumerate(zip(pieces.texts, pieces.scores, pieces.types, strict=True)):
        words.put(id, *piece)
    words.space_first = pieces.space_first
    return words


def _from_json(spec: Object, source: str, n_vocab: int) -> Words:
    model = spec.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
        kind = model.get("type") if isinstance(model, dict) else model
        raise UnsupportedModel(f"{source}: model.type is {shown(kind)}; supported is BPE")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise ModelFormatError(f"{source}: model.vocab is missing")
    for text, id in vocab.items():
        if type(id) is not int or not 0 <= id < n_vocab:
            raise ModelFormatError(
                f"{source}: model.vocab: {text[:80]!r} has the id {shown(id)}, expected 0 to {n_vocab - 1}, "
                "the rows of the embedding"
            )
    if len(set(vocab.values())) < len(vocab):
        raise ModelFormatError(f"{source}: model.vocab: two tokens have one id")
    merges = list(_merges(model, vocab, source))
    if model.get("byte_fallback"):
        return _like_sentencepiece(spec, vocab, merges, source, n_vocab)
    words = Words.unused("gpt2", n_vocab)
    words.pre = _pre_tokenizer(spec, source)
    for text, id in vocab.items():
        words.put(id, text, 0.0, NORMAL)
    words.merges = [f"{left} {right}" for left, right in merges]
    return words


def _merges(model: Object, vocab: Object, source: str) -> Iterator[tuple[str, str]]:
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise ModelFormatError(f"{source}: model.merges is missing")
    for i, merge in enumerate(merges):
        pair = merge.split(" ") if isinstance(merge, str) else merge  # pairs since transformers 4.45
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ModelFormatError(f"{source}: model.merges[{i}] is {shown(merge)}, expected two tokens")
        left, right = pair
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise ModelFormatError(f"{source}: model.merges[{i}] is {shown(merge)}, which are no tokens or make none")
        yield left, right


def _like_sentencepiece(spec: Object, vocab: Object, merges: list[tuple[str, str]], source: str, n_vocab: int) -> Words:
    """Merging by rank and merging by score are one where each merge's result scores higher than those after it."""
    words = Words.unused("llama", n_vocab)
    words.space_first = _space_first(spec, source)
    results = dict.fromkeys(left + right for left, right in merges)
    order = [*results, *(text for text in sorted(vocab, key=vocab.__getitem__) if text not in results)]
    unknown = spec["model"].get("unk_token")
    for rank, text in enumerate(order):
        is_byte = re.fullmatch(r"<0x[0-9A-F]{2}>", text)
        kind = UNKNOWN if text == unknown else BYTE if is_byte else NORMAL
        words.put(vocab[text], text, -float(rank) if kind == NORMAL else 0.0, kind)
    return words


def _space_first(spec: Object, source: str) -> bool:
    """Whether a space comes before every text, of a tokenizer.json that writes spaces as sentencepiece does."""
    parts = [*_parts(spec.get("normalizer"), "normalizers"), *_parts(spec.get("pre_tokenizer"), "pretokenizers")]
    first = False
    for part in parts:
        match part:
            case {"type": "Prepend", "prepend": "▁"}:
                first = True
            case {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first" | "always" | "never" as scheme}:
                first = scheme != "never"
            case {"type": "Metaspace", "replacement": "▁", "add_prefix_space": bool(adds)}:
                first = adds
            case {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}:
                pass
            case {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}:
                pass
            case _:
                raise UnsupportedModel(
                    f"{source}: before its BPE with byte_fallback stands {shown(part)}; supported is what "
                    "sentencepiece does: Prepend and Replace for spaces, Metaspace"
                )
    return first


def _pre_tokenizer(spec: Object, source: str) -> str:
    """The name in GGUF for how words are cut before a byte-level BPE."""
    cuts: list[tuple[str, ...]] = []
    normal = tuple(part.get("type") for part in _parts(spec.get("normalizer"), "normalizers"))
    parts = _parts(spec.get("pre_tokenizer"), "pretokenizers")
    for part in parts:
        match part:
            case {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False}:
                cuts.append((regex,))
            case {"type": "Digits", "individual_digits": True}:
                cuts.append((r"\p{N}",))
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}:
                pass
            case {"type": "ByteLevel", "add_prefix_space": False}:
                cuts.append(PRE_TOKENIZERS["gpt-2"])
            case _:
                cuts.append(("?",))
    found = tuple(regex for cut in cuts for regex in cut)
    ends_in_bytes = bool(parts) and parts[-1].get("type") == "ByteLevel"
    for name, patterns in PRE_TOKENIZERS.items():
        if ends_in_bytes and patterns == found and normal == (("NFC",) if name == "qwen2" else ()):
            return name
    raise UnsupportedModel(
        f"{source}: normalizer {shown(spec.get('normalizer'))} and pre_tokenizer {shown(parts)} are not known; "
        f"known are those of {', '.join(PRE_TOKENIZERS)}"
    )


def _parts(step: Any, name: str) -> list[Object]:
    """The steps of a normalizer or pre-tokenizer, which may be none, one or a sequence."""
    if step is None:
        return []
    if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(name), list):
        step = step[name]
    return [part if isinstance(part, dict) else {"type": part} for part in (step if isinstance(step, list) else [step])]


# Tokens beside the pieces


def _added(folder: ModelFolder, spec: Object, settings: Object) -> Iterator[tuple[int, str, bool]]:
    """(id, text, whether it is a mark) of the tokens that were added to a vocabulary, from all that may tell."""
    for text, id in folder.optional_json("added_tokens.json").items():
        yield _added_token(folder, "added_tokens.json", id, text, False)
    for entry in spec.get("added_tokens") or []:
        token = entry if isinstance(entry, dict) else {}
        yield _added_token(folder, "tokenizer.json", token.get("id"), token.get("content"), token.get("special"))
    for id, entry in (settings.get("added_tokens_decoder") or {}).items():
        token, number = entry if isinstance(entry, dict) else {}, int(id) if re.fullmatch(r"\d{1,9}", id) else None
        yield _added_token(folder, "tokenizer_config.json", number, token.get("content"), token.get("special"))


def _added_token(folder: ModelFolder, name: str, id: Any, text: Any, special: Any) -> tuple[int, str, bool]:
    if type(id) is not int or id < 0 or not isinstance(text, str) or not text:
        raise ModelFormatError(f"{folder.path / name}: an added token is {shown(text)} with the id {shown(id)}")
    return id, text, bool(special)


def _put_added(words: Words, id: int, text: str, special: bool) -> bool:
    """False for a token without a row in the embedding. Some files say of marks that they are none."""
    if id >= len(words.texts):
        return False
    mark = re.fullmatch(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<unused.*>|<\|.*\|>|<｜.*｜>", text, re.DOTALL)
    if words.types[id] == UNKNOWN:
        return True
    if special or mark:
        words.put(id, text, ADDED_SCORE, CONTROL)
    else:
        words.put(id, text.replace(SPACE, " "), ADDED_SCORE, USER_DEFINED)
    return True


def _add_marks(writer: GGUFWriter, folder: ModelFolder, words: Words) -> None:
    """Which tokens begin and end a text or a turn, whether they are added to a prompt, and the chat template."""
    from gguf import SpecialVocab

    try:
        marks = SpecialVocab(folder.path, n_vocab=len(words.texts))
        template = marks.chat_template
        if template is not None and len(template if isinstance(template, str) else shown(template)) > LARGEST_TEMPLATE:
            raise ModelFormatError(f"{folder.path}: its chat template has more than {LARGEST_TEMPLATE:,} characters")
        ids = {
            text: id for id, (text, kind) in enumerate(zip(words.texts, words.types, strict=True)) if kind == CONTROL
        }
        for name, entry in folder.optional_json("special_tokens_map.json").items():
            text = entry.get("content") if isinstance(entry, dict) else entry
            if isinstance(text, str) and name in ("bos_token", "eos_token", "unk_token", "pad_token") and text in ids:
                marks.special_token_ids.setdefault(name.removesuffix("_token"), ids[text])
        turn_ends = [ids[text] for text in STOP_TOKENS if text in ids]
        if turn_ends and turn_ends[0] != marks.special_token_ids.get("eos"):
            marks.special_token_ids.setdefault("eot", turn_ends[0])
        for name, text in CODE_MARKS.items():
            if text in ids:
                marks.special_token_ids.setdefault(name, ids[text])
        if words.model == "gpt2":  # readers would guess by the name of the pre-tokenizer
            marks.add_special_token.setdefault("bos", False)
        marks.add_to_gguf(writer, quiet=True)
    except ModelFormatError:
        raise
    except Exception as error:  # the library checks nothing
        raise ModelFormatError(
            f"{folder.path}: tokenizer.json, tokenizer_config.json or the chat template is broken: "
            f"{type(error).__name__}: {error}"
        ) from error


# The result


def _compare(writer: GGUFWriter, folder: ModelFolder) -> None:
    """Cut a sample with what will be written and with tokenizer.json; UnsupportedModel where they differ."""
    import tokenizers

    source = folder.path / "tokenizer.json"
    values = {key: entry.value for key, entry in writer.kv_data[0].items()}

    def get(key: str, default: Any) -> Any:
        value = values.get(key, default)
        if not isinstance(value, list):
            return value
        return np.array(value, np.float32 if isinstance(value[0], float) else np.int32)

    def strings(key: str) -> Strings:
        parts = [text.encode() for text in values[key]]
        return b"".join(parts), np.array([0, *accumulate(map(len, parts))], np.int64)

    ours = Tokenizer(Vocabulary.from_gguf(get, strings, str(folder.path))).encode(SAMPLE)
    try:
        theirs = tokenizers.Tokenizer.from_buffer(folder.bytes_of(source.name, LARGEST_JSON))
        expected: list[int] = theirs.encode(SAMPLE, add_special_tokens=False).ids
    except Exception as error:  # the library raises no narrower class
        raise ModelFormatError(f"{source}: {error}") from None
    if ours != expected:
        at = next(
            (i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), min(len(ours), len(expected))
        )
        raise UnsupportedModel(
            f"{source}: cuts a sample text otherwise than the new file would: token {at} is "
            f"{theirs.id_to_token(expected[at]) if at < len(expected) else None!r}, not "
            f"{values['tokenizer.ggml.tokens'][ours[at]] if at < len(ours) else None!r}"
        )
