"""Tokenizers: tiny vocabularies made here always, real ones where they are found."""

from __future__ import annotations

import json
import logging
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemmart.errors import InvalidRequest, ModelFormatError, UnsupportedModel
from gemmart.tokenizer import Recogniser, Tokenizer, Vocabulary
from vocab_reader import Metadata

SHARED = Path(os.environ.get("GEMMART_SHARED", Path(__file__).parents[1] / "../shared"))
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6


def gguf(tokens: list[str | bytes], **values: Any) -> tuple[dict[str, Any], Any]:
    """Metadata under short names, and the two getters that a file offers."""
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items() if key != "merges"}
    lists = {"tokens": tokens} | ({"merges": values["merges"]} if "merges" in values else {})

    def strings(key: str) -> tuple[bytes, np.ndarray]:
        parts = [s.encode() if isinstance(s, str) else s for s in lists[key.removeprefix("tokenizer.ggml.")]]
        return b"".join(parts), np.cumsum([0, *map(len, parts)])

    return metadata, strings


def load(tokens: list[str | bytes], **values: Any) -> Tokenizer:
    metadata, strings = gguf(tokens, **values)
    return Tokenizer(Vocabulary.from_gguf(metadata.get, strings, "tiny.gguf"))


BYTES = [f"<0x{value:02X}>" for value in range(256)]


def spm(extra: list[tuple[str | bytes, float, int]] = (), **changes: Any) -> Tokenizer:  # type: ignore[assignment]
    """pad 0, eos 1, bos 2, unk 3, two marks, a newline, the bytes 7–262, some words 263–."""
    heads = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n"]
    words = ["a", "b", "c", "▁", "ab", "▁c", "abc", "é"]
    tokens: list[str | bytes] = [*heads, *BYTES, *words, *(token for token, _, _ in extra)]
    types = [3, 3, 3, 2, 3, 3, 4, *[BYTE] * 256, *[NORMAL] * len(words), *(kind for _, _, kind in extra)]
    scores = [0.0] * 263 + [-10.0, -11, -12, -13, -1, -3, -2, -14] + [score for _, score, _ in extra]
    values: dict[str, Any] = {
        "model": "llama",
        "scores": np.array(scores, np.float32),
        "token_type": np.array(types, np.int32),
        "bos_token_id": 2,
        "eos_token_id": 1,
        "unknown_token_id": 3,
        "add_space_prefix": False,
    }
    return load(tokens, **values | changes)


def alphabet() -> list[str]:
    """The 256 byte characters of GPT-2, in the order of bytes, written out apart from the code under test."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [value for value in range(256) if value not in shown]
    return [chr(value if value in shown else 256 + hidden.index(value)) for value in range(256)]


BPE_MERGES = ["1 2", "12 3", "123 4", "Ġ a", "Ġa b", "a b", "' M", "Ċ Ċ", "Ã ©"]
BPE_WORDS = [merge.replace(" ", "") for merge in BPE_MERGES]


def bpe(pre: str = "gpt-2", **changes: Any) -> Tokenizer:
    """bytes 0–255, merged words 256–, then <|im_start|>, <|im_end|> and the user-defined <tool>."""
    tokens: list[str | bytes] = [*alphabet(), *BPE_WORDS, "<|im_start|>", "<|im_end|>", "<tool>"]
    values: dict[str, Any] = {
        "model": "gpt2",
        "pre": pre,
        "merges": BPE_MERGES,
        "token_type": np.array([NORMAL] * (256 + len(BPE_WORDS)) + [CONTROL, CONTROL, USER_DEFINED], np.int32),
        "eos_token_id": 256 + len(BPE_WORDS) + 1,
        "add_bos_token": False,
    }
    return load(tokens, **values | changes)


TINY = {"spm": spm, "bpe": bpe}


def shown(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer.piece(id).decode("utf-8", "backslashreplace") for id in ids]


# Encoding


def test_spm_merges_by_score_and_falls_back_to_bytes() -> None:
    tokenizer = spm()
    assert shown(tokenizer, tokenizer.encode("abc abc\né")) == ["abc", " ", "abc", "\n", "é"]
    assert shown(tokenizer, tokenizer.encode("cab c")) == ["c", "ab", " c"]
    assert tokenizer.encode("€") == [7 + value for value in "€".encode()]


@pytest.mark.parametrize(
    ("pre", "digits", "contraction"),
    [
        ("gpt-2", ["1234"], ["I", "'", "M"]),
        ("default", ["123", "4"], ["I", "'", "M"]),
        ("smollm", ["1", "2", "3", "4"], ["I", "'", "M"]),
        ("llama-bpe", ["123", "4"], ["I", "'M"]),
        ("qwen2", ["1", "2", "3", "4"], ["I", "'M"]),
    ],
)
def test_bpe_cuts_words_as_its_pre_tokenizer_says(pre: str, digits: list[str], contraction: list[str]) -> None:
    tokenizer = bpe(pre)
    assert shown(tokenizer, tokenizer.encode("1234")) == digits
    assert shown(tokenizer, tokenizer.encode("I'M")) == contraction
    assert shown(tokenizer, tokenizer.encode("ab ab")) == ["ab", " ab"]


def test_qwen2_composes_characters_first() -> None:
    assert bpe("qwen2").encode("e\u0301") == bpe("qwen2").encode("é")
    assert bpe("gpt-2").encode("e\u0301") != bpe("gpt-2").encode("é")


def test_llama3_takes_a_whole_word_before_merging() -> None:
    changes = {"merges": ["a b"], "token_type": None, "eos_token_id": None}
    tokens: list[str | bytes] = [*alphabet(), "ab", "xyz"]
    for pre, expected in (("llama-bpe", ["xyz"]), ("gpt-2", ["x", "y", "z"])):
        tokenizer = load(tokens, model="gpt2", pre=pre, **changes)
        assert shown(tokenizer, tokenizer.encode("xyz")) == expected


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_typed_control_tokens_are_text_unless_asked_for(make: Any) -> None:
    tokenizer = make()
    mark = "<end_of_turn>" if make is spm else "<|im_end|>"
    id = tokenizer.id_of(mark)
    for text in (mark, f"a{mark}b", f"{mark}{mark}", mark[:-1] + mark):
        plain, parsed = tokenizer.encode(text), tokenizer.encode(text, special=True)
        assert not any(tokenizer.is_control(i) for i in plain)
        assert tokenizer.decode(plain) == text
        assert parsed.count(id) == text.count(mark)
        assert tokenizer.decode(parsed, special=True) == text
        assert tokenizer.decode(parsed) == text.replace(mark, "")


def test_user_defined_tokens_are_always_found() -> None:
    tokenizer = bpe()
    assert shown(tokenizer, tokenizer.encode("a<tool>b")) == ["a", "<tool>", "b"]
    assert shown(spm([("<b>", 0, USER_DEFINED)]), [271]) == ["<b>"]
    assert spm([("<b>", 0, USER_DEFINED)]).encode("a<b>c") == [263, 271, 265]


def test_user_defined_spaces_may_be_written_as_spaces() -> None:
    tokenizer = spm([("   ", 0, USER_DEFINED)])
    assert tokenizer.encode("a   c") == [263, 271, 265]
    assert tokenizer.decode([263, 271, 265]) == "a   c"


def test_bos_follows_the_file() -> None:
    assert spm().encode("a", bos=True) == [2, 263]
    assert spm(add_bos_token=False).encode("a", bos=True) == [263]
    assert spm(bos_token_id=None).encode("a", bos=True) == [263]
    assert spm().encode("<bos>a", bos=True, special=True) == [2, 263], "never twice"
    assert bpe().encode("a", bos=True) == bpe().encode("a")
    pieces = [("<bos>", True), ("<eos>a", False)]
    assert spm().encode_pieces(pieces, bos=True) == [2, *spm().encode("<eos>a")]


def test_space_prefix_is_put_before_and_taken_away() -> None:
    tokenizer = spm(add_space_prefix=True)
    assert shown(tokenizer, tokenizer.encode("c")) == [" c"]
    assert tokenizer.decode(tokenizer.encode("c ab")) == "c ab"
    assert tokenizer.decode(tokenizer.encode("c"), start=False) == " c"


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_lone_surrogates_become_replacement_characters(make: Any) -> None:
    tokenizer = make()
    assert tokenizer.decode(tokenizer.encode("a\ud800b\udfff")) == "a\ufffdb\ufffd"


def test_stop_ids_are_eos_eot_and_known_marks() -> None:
    assert spm().stop_ids == {1, 5}
    assert spm(eot_token_id=4).stop_ids == {1, 4, 5}
    assert spm(token_type=np.array([3, 3, 3, 2, 3, NORMAL, 4, *[BYTE] * 256, *[NORMAL] * 8])).stop_ids == {1}
    assert bpe().stop_ids == {bpe().id_of("<|im_end|>")}


# Decoding


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_decode_gives_the_text_back(make: Any) -> None:
    tokenizer, rng = make(), random.Random(1)
    samples = [chr(code) for code in [*range(0xD800), *range(0xE000, 0x110000, 37)] if code != ord("▁")]
    samples += ["ab c\n", " ", "'M1234", "🙂\r\n\t"] * 1000  # SPM cannot tell ▁ from a space
    rng.shuffle(samples)
    text = "".join(samples)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("make", TINY.values(), ids=TINY)
def test_stream_equals_decode_and_never_cuts_a_character(make: Any) -> None:
    tokenizer, rng = make(), random.Random(2)
    first_byte = tokenizer.encode("\x00")[0]
    for _ in range(300):
        ids = [rng.choice([rng.randrange(tokenizer.n_tokens), first_byte + rng.randrange(128, 256)]) for _ in range(12)]
        ids += tokenizer.encode("🙂é")
        decoder = tokenizer.decoder()
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == tokenizer.decode(ids)
        whole = b"".join(tokenizer.piece(id) for id in ids if not tokenizer.is_control(id))
        assert tokenizer.decode(ids) == whole.decode("utf-8", "replace")
    decoder = tokenizer.decoder()
    smile = tokenizer.encode("🙂")
    assert [decoder.push(id) for id in smile] == ["", "", "", "🙂"]
    assert [decoder.push(id) for id in smile[:2]] == ["", ""]
    assert decoder.finish() == "\ufffd"


@pytest.mark.parametrize("id", [-1, 271, 2**31])
def test_ids_out_of_range_are_named(id: int) -> None:
    tokenizer = spm()
    for call in (tokenizer.piece, tokenizer.is_control, tokenizer.decoder().push, lambda id: tokenizer.decode([id])):
        with pytest.raises(InvalidRequest, match=rf"{id} .* 0 to 270"):
            call(id)


def test_id_of_finds_whole_tokens_only() -> None:
    tokenizer = spm([("<end", -20, NORMAL)])
    assert tokenizer.id_of("<end") == 271
    assert tokenizer.id_of("<end_of_turn>") == 5
    assert tokenizer.id_of("end_of") is None
    assert tokenizer.id_of("") is None


def test_recogniser_takes_the_longest_from_left_to_right() -> None:
    recogniser = Recogniser({"<a": 0, "<a>": 1, "<a><b": 2, "b": 3})
    assert list(recogniser.split("x<a><b<a>b<")) == [("x", None), ("<a><b", 2), ("<a>", 1), ("b", 3), ("<", None)]
    assert list(Recogniser({}).split("text")) == [("text", None)]
    assert list(recogniser.split("")) == []


# Vocabularies


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([("a", -5, NORMAL)], "1 that repeat"),
        ([("<eos>", -5, NORMAL)], "1 that repeat"),
        ([("", -5, NORMAL)], "1 empty"),
        ([(b"\xff\xfe", -5, NORMAL)], "1 of broken UTF-8"),
        ([("é", 0, CONTROL)], "1 that repeat"),
        ([("x" * 2**20, -5, NORMAL)], "1 too long"),
    ],
)
def test_odd_tokens_load_with_a_warning(extra: Any, words: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gemmart"):
        tokenizer = spm(extra)
    assert words in caplog.text
    assert "tiny.gguf" in caplog.text
    assert tokenizer.encode("abc é") == [269, 266, 270], "the first of two wins"
    assert tokenizer.decode([263, 271]).startswith("a")


def test_odd_tokens_of_bpe_load_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "gemmart"):
        tokenizer = load([*alphabet(), "ab", "ab", "", b"\xff"], model="gpt2", merges=["a b"])
    assert "1 empty, 1 of broken UTF-8, 1 that repeat" in caplog.text
    assert tokenizer.encode("ab") == [256]


def test_several_unknown_tokens_and_the_longest_one() -> None:
    tokenizer = spm([("<unk2>", 0, UNKNOWN), ("x" * 7_999, -20, NORMAL)])
    assert tokenizer.encode("abc") == [269]
    assert tokenizer.is_control(271)


def test_without_byte_tokens_the_unknown_token_stands_in() -> None:
    changes = {"scores": np.zeros(3, np.float32), "token_type": np.array([UNKNOWN, NORMAL, NORMAL])}
    tokenizer = load(["<unk>", "a", "▁"], model="llama", add_space_prefix=False, add_bos_token=False, **changes)
    assert tokenizer.encode("a€") == [1, 0]
    with pytest.raises(ModelFormatError, match="neither an unknown token"):
        load(["a"], model="llama", scores=np.zeros(1, np.float32), token_type=np.array([NORMAL]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"scores": np.zeros(5, np.float32)}, r"scores has 5 entries, but there are 271"),
        ({"scores": np.zeros(271, np.uint8)}, r"scores holds uint8, expected float32"),
        ({"scores": np.full(271, np.nan, np.float32)}, r"scores has nan for token 0"),
        ({"scores": None}, r"scores is missing"),
        ({"token_type": np.zeros(270, np.int32)}, r"token_type has 270 entries"),
        ({"token_type": np.full(271, 9, np.int32)}, r"token_type is 9 for token 0"),
        ({"token_type": np.zeros(271, np.float32)}, r"token_type holds float32, expected int32"),
        ({"token_type": np.full(271, BYTE, np.int32)}, r"byte token \d+ is"),
        ({"bos_token_id": -1}, r"bos_token_id is -1, but ids are 0 to 270"),
        ({"eos_token_id": 271}, r"eos_token_id is 271"),
        ({"eot_token_id": 2**31}, r"eot_token_id is 2147483648"),
        ({"model": None}, r"model is missing"),
    ],
)
def test_broken_vocabularies_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelFormatError, match="tiny.gguf: .*" + words):
        spm(**changes)


def test_broken_merges_are_refused() -> None:
    for merges, words in ((["ab"], "'ab', expected two tokens"), (["a qqq"], "qqq"), (["x y"], "xy")):
        with pytest.raises(ModelFormatError, match=rf"tiny.gguf: tokenizer.ggml.merges.*{words}"):
            bpe(merges=merges)
    metadata, strings = gguf(["a"], model="gpt2")
    with pytest.raises(ModelFormatError, match="merges is missing"):
        Tokenizer(Vocabulary.from_gguf(metadata.get, strings, "tiny.gguf"))


def test_missing_or_empty_tokens_are_refused() -> None:
    with pytest.raises(ModelFormatError, match="tokens is empty"):
        load([], model="llama")

    def no_strings(key: str) -> Any:
        raise KeyError(key)

    with pytest.raises(ModelFormatError, match="tokens is missing"):
        Vocabulary.from_gguf({"tokenizer.ggml.model": "llama"}.get, no_strings, "tiny.gguf")


def test_other_kinds_are_unsupported() -> None:
    with pytest.raises(UnsupportedModel, match="'bert'"):
        load(["a"], model="bert")
    with pytest.raises(UnsupportedModel, match=r"'tekken'.*llama-bpe"):
        bpe("tekken")


# Long texts: work per byte must not grow with the text. Time is not measured; quadratic work would run into the
# timeout.


@pytest.mark.timeout(120)
@pytest.mark.parametrize("char", ["a", " ", "\n", "1", "🙂", "<", "<en"])
@pytest.mark.parametrize(
    "make", [spm, bpe, lambda: bpe("llama-bpe"), lambda: bpe("default")], ids=["spm", "gpt-2", "llama-bpe", "default"]
)
def test_half_a_megabyte_of_one_character(make: Any, char: str) -> None:
    tokenizer = make()
    text = char * (500_000 // len(char.encode())) + "x"
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text


# Real vocabularies


def real(name: str) -> Tokenizer:
    if name == "gemma2":
        path = SHARED / "tokenizer/gemma-2-vocab.gguf"
    else:
        models = os.environ.get("GEMMART_MODELS")
        if not models:
            pytest.skip("GEMMART_MODELS names no folder with the real models")
        path = Path(models) / {"gemma3": "gemma-3-270m-q4_k_m.gguf", "smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"}[name]
    if not path.exists():
        pytest.skip(f"{path} is not there")
    metadata = Metadata(path)
    return Tokenizer(Vocabulary.from_gguf(metadata.get, metadata.strings, str(path)))


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm2"])
def test_ids_equal_the_reference_tokenizers(name: str) -> None:
    cases = SHARED / "tokenizer/cases.json"
    if not cases.exists():
        pytest.skip(f"{cases} is not there")
    tokenizer = real(name)
    checked = 0
    for case in json.loads(cases.read_text()):
        for key, special in ((name, True), (name + "_plain", False)):
            if key in case:
                assert tokenizer.encode(case["text"], special=special) == case[key], (key, case["text"])
                checked += 1
        if "▁" not in case["text"]:
            assert tokenizer.decode(tokenizer.encode(case["text"])) == case["text"]
    assert checked > 120


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm2"])
def test_no_control_token_can_be_typed(name: str) -> None:
    tokenizer = real(name)
    control = [id for id in range(tokenizer.n_tokens) if tokenizer.is_control(id)]
    for id in control:
        text = tokenizer.piece(id).decode()
        assert tokenizer.encode(text, special=True) == [id]
        assert not any(tokenizer.is_control(i) for i in tokenizer.encode(f"a{text}\n{text}"))
    stops = {
        "gemma2": {"<eos>", "<end_of_turn>"},
        "gemma3": {"<eos>", "<end_of_turn>"},
        "smollm2": {"<|im_end|>", "<|endoftext|>"},
    }
    assert {tokenizer.piece(id).decode() for id in tokenizer.stop_ids} == stops[name]


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "smollm2"])
def test_random_text_comes_back(name: str) -> None:
    tokenizer, rng = real(name), random.Random(3)
    planes = [
        (0x20, 0x7F),
        (0xA0, 0x250),
        (0x400, 0x460),
        (0x900, 0x970),
        (0x4E00, 0x5000),
        (0x1F600, 0x1F640),
        (9, 14),
    ]
    for _ in range(2_000):
        text = "".join(chr(rng.randrange(*rng.choice(planes))) for _ in range(rng.randrange(30)))
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert re.fullmatch(re.escape(text), tokenizer.decode(tokenizer.encode(text, special=True), special=True))
