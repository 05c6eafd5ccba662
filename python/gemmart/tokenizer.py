"""Text to token ids and back, from the vocabulary of a GGUF file.

Two libraries do the work: `sentencepiece` for SPM vocabularies ("llama": Gemma, Llama 2) and `tokenizers` for
byte-level BPE ("gpt2": Llama 3, SmolLM2, Qwen). Both are built from the file's lists alone. What an id means as bytes
is read here, so decoding is one table for both.

Text is text: a control token is recognised in it only where the caller asks (`special=True`).
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers

from gemmart.errors import InvalidRequest, ModelFormatError, UnsupportedModel

log = logging.getLogger("gemmart")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6
"""Token types of GGUF, which are those of a sentencepiece model. 0 is undefined, 5 unused."""

SPACE = "▁"
"""How SPM vocabularies write a space."""

LONGEST_PIECE = 7_999
"""Bytes that sentencepiece allows a token."""

STOP_TOKENS = ("<end_of_turn>", "<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>")

WORDS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRE_TOKENIZERS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", WORDS_GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (WORDS_GPT2,),
    "smollm": (r"\p{N}", WORDS_GPT2),
    "llama-bpe": (WORDS_LLAMA3 % "{1,3}",),
    "qwen2": (WORDS_LLAMA3 % "",),
}
"""How BPE cuts text into words: each pattern cuts the words of the ones before it; its matches and the gaps are
words."""

Strings = tuple[npt.NDArray[np.uint8] | bytes, npt.NDArray[np.int64]]
"""Many strings as one: all bytes, and [n + 1] offsets of where each begins and ends."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The `tokenizer.ggml.*` metadata of a file, checked; no Python object per token."""

    source: str  # the file, for messages
    model: str  # "llama" (SPM) or "gpt2" (BPE)
    pre: str  # how BPE cuts text into words
    blob: bytes  # all tokens as the file writes them
    offsets: npt.NDArray[np.int64]  # [n_tokens + 1]
    scores: npt.NDArray[np.float32] | None  # [n_tokens]; SPM needs them
    types: npt.NDArray[np.int32]  # [n_tokens]
    merges: Callable[[], Strings] | None  # BPE needs them; "left right" each
    bos: int | None
    eos: int | None
    eot: int | None
    unk: int | None
    pad: int | None
    add_bos: bool
    add_eos: bool
    add_space_prefix: bool

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    def token(self, id: int) -> bytes:
        """The token as the file writes it."""
        return self.blob[self.offsets[id] : self.offsets[id + 1]]

    @classmethod
    def from_gguf(
        cls, get: Callable[[str, Any], Any], strings: Callable[[str], Strings], source: str = "model"
    ) -> Vocabulary:
        """Read a file's vocabulary through `get(key, default)`, for scalars and arrays of numbers, and
        `strings(key)`, for arrays of strings, which raises KeyError where the key is missing. Raises ModelFormatError
        naming the key, UnsupportedModel for another kind of tokenizer."""

        def refuse(key: str, what: str) -> ModelFormatError:
            return ModelFormatError(f"{source}: tokenizer.ggml.{key} {what}")

        def scalar(key: str, kind: type, default: Any = None) -> Any:
            value = get("tokenizer.ggml." + key, default)
            if value is not None and not isinstance(value, kind):
                raise refuse(key, f"has the type {type(value).__name__}, expected {kind.__name__}")
            return value

        model = scalar("model", str)
        if model is None:
            raise refuse("model", "is missing; the file has no tokenizer")
        if model not in ("llama", "gpt2"):
            raise UnsupportedModel(f"{source}: tokenizer.ggml.model is {model!r}; this build knows 'llama' and 'gpt2'")
        pre = scalar("pre", str, "default")
        if model == "gpt2" and pre not in PRE_TOKENIZERS:
            known = ", ".join(PRE_TOKENIZERS)
            raise UnsupportedModel(f"{source}: tokenizer.ggml.pre is {pre!r}; this build knows {known}")
        try:
            blob, offsets = strings("tokenizer.ggml.tokens")
        except KeyError:
            raise refuse("tokens", "is missing") from None
        n = len(offsets) - 1
        if n < 1:
            raise refuse("tokens", "is empty")

        def numbers(key: str, kind: str) -> npt.NDArray[Any] | None:
            array: npt.NDArray[Any] | None = scalar(key, np.ndarray)
            if array is None:
                return None
            if array.dtype.kind not in kind:
                raise refuse(key, f"holds {array.dtype}, expected {'float32' if kind == 'f' else 'int32'}")
            if array.shape != (n,):
                raise refuse(key, f"has {array.size} entries, but there are {n} tokens")
            return array

        def token_id(key: str) -> int | None:
            value: int | None = scalar(f"{key}_token_id", int)
            if value is not None and not 0 <= value < n:
                raise refuse(f"{key}_token_id", f"is {value}, but ids are 0 to {n - 1}")
            return value

        bos, eos, eot, unk, pad = (token_id(key) for key in ("bos", "eos", "eot", "unknown", "padding"))
        scores = numbers("scores", "f")
        if scores is not None and not np.isfinite(scores).all():
            at = int(np.argmin(np.isfinite(scores)))
            raise refuse("scores", f"has {scores[at]} for token {at}, expected a finite number")
        if scores is None and model == "llama":
            raise refuse("scores", "is missing")
        types = numbers("token_type", "iu")
        if types is None:
            types = np.full(n, NORMAL, np.int32)
            types[[id for id in (bos, eos, eot) if id is not None]] = CONTROL
            if unk is not None and types[unk] == NORMAL:
                types[unk] = UNKNOWN
        if not ((types >= 0) & (types <= BYTE)).all():
            at = int(np.argmax((types < 0) | (types > BYTE)))
            raise refuse("token_type", f"is {types[at]} for token {at}, expected 0 to {BYTE}")
        return cls(
            source=source,
            model=model,
            pre=pre,
            blob=bytes(blob),
            offsets=np.asarray(offsets, np.int64),
            scores=None if scores is None else scores.astype(np.float32),
            types=types.astype(np.int32),
            merges=(lambda: strings("tokenizer.ggml.merges")) if model == "gpt2" else None,
            bos=bos,
            eos=eos,
            eot=eot,
            unk=unk,
            pad=pad,
            add_bos=scalar("add_bos_token", bool, model == "llama" or pre == "llama-bpe"),
            add_eos=scalar("add_eos_token", bool, False),
            add_space_prefix=model == "llama" and scalar("add_space_prefix", bool, True),
        )


class Tokenizer:
    """Encode and decode for one vocabulary. Many threads may use it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        """Build the library's tokenizer, about half a second for 262,144 tokens. Raises ModelFormatError for a
        vocabulary that cannot work; repeated, empty and undecodable tokens only warn, and no text becomes them."""
        self.vocabulary = vocabulary
        self.n_tokens = vocabulary.n_tokens
        self.bos, self.eos = vocabulary.bos, vocabulary.eos
        marks = (vocabulary.types == CONTROL) | (vocabulary.types == UNKNOWN)
        control = {vocabulary.token(id).decode("utf-8", "replace"): int(id) for id in np.nonzero(marks)[0][::-1]}
        self.control_texts = tuple(control)
        self._is_control = marks.tobytes()
        self._pieces: dict[int, bytes] = {}  # those asked for so far
        self._recognise = Recogniser(control)
        stops = [control.get(text) for text in STOP_TOKENS] + [vocabulary.eos, vocabulary.eot]
        self.stop_ids = frozenset(id for id in stops if id is not None)
        self._plain: _Plain = _Spm(vocabulary) if vocabulary.model == "llama" else _Bpe(vocabulary)

    def encode(self, text: str, *, bos: bool = False, special: bool = False) -> list[int]:
        """The ids of `text`. With `special`, control tokens written in it become their ids; else all of it is plain
        text. With `bos`, the beginning-of-sequence token comes first if the file asks for one. Lone surrogates become
        U+FFFD."""
        return self.encode_pieces([(text, special)], bos=bos)

    def encode_pieces(self, pieces: Iterable[tuple[str, bool]], *, bos: bool = False) -> list[int]:
        """The ids of a rendered chat: (text, special) each. With `bos`, as for `encode`, but never twice."""
        ids: list[int] = []
        for text, special in pieces:
            text = _clean(text)
            for part, id in self._recognise.split(text) if special else [(text, None)]:
                ids.extend(self._plain.encode(part) if id is None else [id])
        if bos and self.vocabulary.add_bos and self.bos is not None and ids[:1] != [self.bos]:
            ids.insert(0, self.bos)
        return ids

    def decode(self, ids: Iterable[int], *, special: bool = False, start: bool = True) -> str:
        """The text of `ids`. Control tokens are left out unless `special`. With `start`, the ids begin a text, so
        that the space which some vocabularies put before every text is removed. Bytes that are no UTF-8 become
        U+FFFD."""
        decoder = self.decoder(special=special, start=start)
        return "".join([*map(decoder.push, ids), decoder.finish()])

    def decoder(self, *, special: bool = False, start: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time; its pieces join to what `decode` gives."""
        return StreamDecoder(self, special, start and self.vocabulary.add_space_prefix)

    def piece(self, id: int) -> bytes:
        """The bytes that the token stands for; they need not be UTF-8 alone. A control token stands for its name."""
        if id in self._pieces:
            return self._pieces[id]
        self._pieces[id] = piece = self._piece(id)
        return piece

    def pieces(self) -> list[bytes]:
        """Those of the whole vocabulary."""
        return [self._piece(id) for id in range(self.n_tokens)]

    def is_control(self, id: int) -> bool:
        """Whether the token is a mark (control or unknown) and no text."""
        if not 0 <= id < self.n_tokens:
            raise InvalidRequest(f"token id {id} is outside the vocabulary, 0 to {self.n_tokens - 1}")
        return bool(self._is_control[id])

    def id_of(self, text: str) -> int | None:
        """The id of the first token that the file writes so, as "<bos>", or None."""
        token, blob, offsets = _clean(text).encode(), self.vocabulary.blob, self.vocabulary.offsets
        at = blob.find(token) if token else -1
        while at >= 0:
            id = int(np.searchsorted(offsets, at, "right")) - 1
            if self.vocabulary.token(id) == token:
                return id
            at = blob.find(token, at + 1)
        return None

    def _piece(self, id: int) -> bytes:
        return self.vocabulary.token(id) if self.is_control(id) else self._text_of(id)

    def _text_of(self, id: int) -> bytes:
        kind = self.vocabulary.types[id]
        if kind == BYTE:
            return bytes([_byte(self.vocabulary, id)])
        return self._plain.piece(self.vocabulary.token(id), bool(kind == USER_DEFINED))


class StreamDecoder:
    """Ids in, text out, as soon as its characters are complete."""

    def __init__(self, tokenizer: Tokenizer, special: bool, drop_space: bool) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._drop_space = drop_space
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that `id` completes, perhaps none. Raises InvalidRequest for an id outside the vocabulary."""
        if self._tokenizer.is_control(id):
            return self._utf8.decode(self._tokenizer.piece(id)) if self._special else ""
        piece = self._tokenizer.piece(id)
        if self._drop_space and piece:
            self._drop_space = False
            piece = piece.removeprefix(b" ")
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left: U+FFFD for a character that never became complete, or nothing."""
        return self._utf8.decode(b"", final=True)


class Recogniser:
    """Finds given strings in text: at each place the longest, from left to right, in linear time."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = {text: id for text, id in ids.items() if text}
        self._lengths = sorted({len(text) for text in self._ids}, reverse=True)
        # A vocabulary may have thousands of them; few beginnings, tried by one pattern, lead to a look-up.
        beginnings = sorted({text[:4] for text in self._ids}, key=len, reverse=True)
        self._begin = re.compile("|".join(map(re.escape, beginnings)) if beginnings else r"(?!)")

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Parts of `text` in order: (string, its id), or (what lies between, None)."""
        done = 0
        match = self._begin.search(text)
        while match:
            at = match.start()
            found = next((s for n in self._lengths if (s := text[at : at + n]) in self._ids), None)
            if found is None:
                match = self._begin.search(text, at + 1)
                continue
            if at > done:
                yield text[done:at], None
            yield found, self._ids[found]
            done = at + len(found)
            match = self._begin.search(text, done)
        if done < len(text):
            yield text[done:], None


class _Plain(Protocol):
    """What a library's tokenizer does for us: plain text to ids, and a token as the file writes it to its bytes."""

    def encode(self, text: str) -> list[int]: ...

    def piece(self, token: bytes, user_defined: bool) -> bytes: ...


def _clean(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return re.sub("[\ud800-\udfff]", "\ufffd", text)
    return text


def _byte(vocabulary: Vocabulary, id: int) -> int:
    token = vocabulary.token(id)
    if not re.fullmatch(rb"<0x[0-9A-Fa-f]{2}>", token):
        raise ModelFormatError(f"{vocabulary.source}: byte token {id} is {token[:32]!r}, expected <0x00> to <0xFF>")
    return int(token[3:5], 16)


def _first_of_each(vocabulary: Vocabulary) -> dict[str, int]:
    """Each text to the id of the first token that the file writes so. Warns of tokens that no text can become: the
    later of two equal ones, the empty, those of broken UTF-8, those too long for sentencepiece. Byte tokens are no text
    and left out."""
    ids: dict[str, int] = {}
    empty = broken = repeated = long = 0
    longest = LONGEST_PIECE if vocabulary.model == "llama" else len(vocabulary.blob)
    is_byte: list[bool] = (vocabulary.types == BYTE).tolist()
    bounds: list[int] = vocabulary.offsets.tolist()
    for id, (begin, end) in enumerate(pairwise(bounds)):
        try:
            text = vocabulary.blob[begin:end].decode()
        except UnicodeDecodeError:
            broken += 1
            continue
        if is_byte[id]:
            continue
        if vocabulary.model == "llama":
            text = text.replace(" ", SPACE)  # converters write some spaces as they are
        if not text:
            empty += 1
        elif end - begin > longest // 3 and len(text.encode()) > longest:  # ▁ is longer than a space
            long += 1
        elif ids.setdefault(text, id) != id:
            repeated += 1
    if empty or broken or repeated or long:
        log.warning(
            "%s: no text becomes these tokens: %d empty, %d of broken UTF-8, %d that repeat another, %d too long",
            *(vocabulary.source, empty, broken, repeated, long),
        )
    return ids


class _Spm:
    """SentencePiece's BPE: merges by score, bytes for characters that are no token."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=_model_proto(vocabulary))
        except RuntimeError as error:
            raise ModelFormatError(f"{vocabulary.source}: sentencepiece refuses the vocabulary: {error}") from None

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def piece(self, token: bytes, user_defined: bool) -> bytes:
        return token.replace(SPACE.encode(), b" ")


def _model_proto(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as a serialized sentencepiece ModelProto: its pieces, and the few other fields that matter."""
    assert vocabulary.scores is not None
    n = vocabulary.n_tokens
    given = np.where(vocabulary.types == 0, NORMAL, vocabulary.types)
    names: list[bytes] = [b""] * n
    types = np.full(n, CONTROL, np.int32)  # sentencepiece finds no control token in text
    ids = _first_of_each(vocabulary)

    bytes_of = {_byte(vocabulary, int(id)): int(id) for id in np.nonzero(given == BYTE)[0][::-1]}
    byte_fallback = len(bytes_of) == 256
    for value, id in bytes_of.items() if byte_fallback else ():
        ids.pop(f"<0x{value:02X}>", None)
        names[id], types[id] = b"<0x%02X>" % value, BYTE
    for text, id in ids.items():
        names[id] = text.encode()
    types[list(ids.values())] = given[list(ids.values())]

    unknown = np.nonzero(types == UNKNOWN)[0]
    types[unknown[1:]] = CONTROL  # sentencepiece has one
    scores = np.append(vocabulary.scores, 0).astype("<f4").tobytes()
    kinds: list[int] = [*types.tolist(), UNKNOWN]
    if not len(unknown):
        if not byte_fallback:
            raise ModelFormatError(
                f"{vocabulary.source}: neither an unknown token nor all 256 byte tokens; some texts would have no ids"
            )
        names.append(b"")  # asked for by sentencepiece, never met: every text has bytes

    fields = []
    for id, given_name in enumerate(names):
        name = given_name or f"\ufdd0{id}".encode()  # there must be one, unlike all others
        body = b"\x0a%b%b\x15%b\x18%c" % (_varint(len(name)), name, scores[4 * id : 4 * id + 4], kinds[id])
        fields.append(b"\x0a%b%b" % (_varint(len(body)), body))
    trainer = b"\x18\x02\x98\x02%c" % byte_fallback  # model_type = BPE, byte_fallback
    # name, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces
    normalizer = b"\x0a\x08identity\x18%c\x20\x00\x28\x01" % vocabulary.add_space_prefix
    fields += [b"\x12%c%b" % (len(trainer), trainer), b"\x1a%c%b" % (len(normalizer), normalizer)]
    return b"".join(fields)


def _varint(value: int) -> bytes:
    if value < 128:
        return _SMALL[value]
    return bytes([value & 127 | 128]) + _varint(value >> 7)


_SMALL = [bytes([value]) for value in range(128)]


class _Bpe:
    """GPT-2's byte-level BPE: words by patterns, merges by rank."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        source, kinds = vocabulary.source, vocabulary.types
        ids = _first_of_each(vocabulary)
        marks = {text: id for text, id in ids.items() if kinds[id] in (UNKNOWN, CONTROL)}
        given = {text: id for text, id in ids.items() if kinds[id] == USER_DEFINED}
        words = {text: id for text, id in ids.items() if text not in marks and text not in given}
        if missing := [value for char, value in _BYTE_OF.items() if char not in words]:
            log.info(
                "%s: %d bytes have no token and are left out of texts, as 0x%02X", source, len(missing), missing[0]
            )
        self._user_defined = Recogniser(given)
        try:
            model = models.BPE(words, list(_merges(vocabulary)), ignore_merges=vocabulary.pre == "llama-bpe")
        except Exception as error:  # the library raises no narrower class
            raise ModelFormatError(f"{source}: tokenizer.ggml.merges: {error}") from None
        self._tokenizer = tokenizers.Tokenizer(model)
        if vocabulary.pre == "qwen2":
            self._tokenizer.normalizer = normalizers.NFC()
        cuts = [pre_tokenizers.Split(tokenizers.Regex(p), "isolated") for p in PRE_TOKENIZERS[vocabulary.pre]]
        to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part, id in self._user_defined.split(text):
            ids.extend(self._tokenizer.encode(part, add_special_tokens=False).ids if id is None else [id])
        return ids

    def piece(self, token: bytes, user_defined: bool) -> bytes:
        if user_defined:
            return token
        return b"".join(
            bytes([_BYTE_OF[char]]) if char in _BYTE_OF else char.encode() for char in token.decode("utf-8", "replace")
        )


def _merges(vocabulary: Vocabulary) -> Iterator[tuple[str, str]]:
    assert vocabulary.merges is not None
    try:
        blob, offsets = vocabulary.merges()
    except KeyError:
        raise ModelFormatError(f"{vocabulary.source}: tokenizer.ggml.merges is missing") from None
    data = bytes(blob)
    for index, (begin, end) in enumerate(pairwise(offsets.tolist())):
        text = data[begin:end].decode("utf-8", "replace")
        left, _, right = text.partition(" ")
        if not (left and right):
            raise ModelFormatError(
                f"{vocabulary.source}: tokenizer.ggml.merges[{index}] is {text[:40]!r}, expected two tokens"
            )
        yield left, right


def _byte_alphabet() -> dict[str, int]:
    """How GPT-2 writes bytes as characters: printable Latin-1 as it is, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [value for value in range(256) if value not in printable]
    return {chr(value): value for value in printable} | {chr(256 + i): value for i, value in enumerate(others)}


_BYTE_OF = _byte_alphabet()
