"""Answers in a format: they keep to it, and are otherwise what the model says. Compared with validators that know
nothing of the compiler, and with sampling from the model's distribution without what is forbidden."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict

import jsonschema
import msgspec
import numpy as np
import psutil
import pytest

import bombs
import gemmart
from conftest import Tiny
from gemmart import ConstraintError, Format, InvalidRequest, Sampling
from gemmart.constraint import CACHED_FORMATS
from gemmart.format import MAX_NESTING, MAX_RULES, MAX_SOURCE
from gemmart.sampling import Candidates, Settings, adjust, choose
from test_engine import at_once, is_free, wait_until
from test_speculation import Oracle

SHORT = {"type": "string", "maxLength": 5}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b c", 'q"', "é"]}, "maxItems": 3},
        "more": {"anyOf": [{"type": "null"}, {"type": "boolean"}, SHORT]},
    },
    "required": ["name", "age", "tags", "more"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"v": {"enum": [1, 2]}, "l": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            "required": ["v", "l"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
SCHEMAS = [
    PERSON,
    TREE,
    {"type": "array", "items": {"type": "number", "minimum": -5, "exclusiveMaximum": 5}, "minItems": 1, "maxItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}, SHORT], "items": False, "minItems": 2},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 10_000},
    {"enum": ["x", 3, None, [1], {"a": 2}]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "minProperties": 1, "maxProperties": 1},
]
# What json.gbnf of llama.cpp's kind looks like.
GBNF = r"""
root   ::= object
object ::= "{" ws ( pair ("," ws pair)? )? "}" ws
pair   ::= string ":" ws value
string ::= "\"" [a-z]{0,3} "\""  # short
value  ::= string | number | object | "true" | "null"
number ::= "-"? ([0-9] | [1-9] [0-9]{1,3})
ws     ::= [ \t\n]{0,2}
"""


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Iterator[gemmart.Model]:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, parallel=8, batch=64, threads=2) as model:
        yield model


@pytest.fixture(scope="module", params=["gemma3", "llama"])
def other(request: pytest.FixtureRequest, tiny: Tiny) -> Iterator[gemmart.Model]:
    """Of each kind of vocabulary."""
    with gemmart.load(tiny(request.param), ctx=256, parallel=4, threads=2) as model:
        yield model


def answers(model: gemmart.Model, format: Format, n: int = 16) -> list[gemmart.Completion]:
    """With several temperatures and seeds; those that came to their end."""
    streams = [
        model.stream([7 + seed], Sampling(temperature=0.4 * (seed % 4), top_k=0), seed=seed, format=format)
        for seed in range(n)
    ]
    found = [stream.result() for stream in streams]
    ended = [answer for answer in found if answer.finish_reason == "stop"]
    assert ended, found
    return ended


@pytest.mark.parametrize("schema", SCHEMAS, ids=str)
def test_schemas(other: gemmart.Model, schema: dict[str, Any]) -> None:
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    jsonschema.Draft202012Validator.check_schema(schema)
    for answer in answers(other, Format.schema(schema)):
        checker.validate(json.loads(answer.text))
        assert not re.search(r"  (?! *\S)| {41}|\n\n|\r", re.sub(r'"(\\.|[^"\\])*"', '""', answer.text)), answer.text


class Wanted(TypedDict):
    a: int
    b: list[bool]


@dataclass
class Point:
    x: int
    y: int | None


class Shape(msgspec.Struct):
    name: Point
    kind: Wanted


@pytest.mark.parametrize("kind", [Point, Wanted, Shape, list[Point], int | None])
def test_types(model: gemmart.Model, kind: Any) -> None:
    for answer in answers(model, Format.schema(kind)):
        msgspec.json.decode(answer.text, type=kind)


def test_pydantic(model: gemmart.Model) -> None:
    pydantic = pytest.importorskip("pydantic")
    inner = pydantic.create_model("Inner", x=(int, ...), y=(bool, True))
    outer = pydantic.create_model("Outer", inner=(inner, ...), kind=(str | None, None))
    for answer in answers(model, Format.schema(outer)):
        outer.model_validate_json(answer.text)


PATTERNS = [
    r"[A-Z][a-z]{1,6}( [a-z]+){0,2}\.",
    r"(\d{1,3}\.){3}\d{1,3}",
    r"yes|no|(may)?be",
    "a\\/b\nc?/",
    r"[^\x00-\x7f]{1,3}",
    r"\"\\[\d_] \t?x*?",
    "",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_regular_expressions(other: gemmart.Model, pattern: str) -> None:
    for answer in answers(other, Format.regex(pattern)):
        assert re.fullmatch(pattern, answer.text), answer.text


def test_grammars(other: gemmart.Model) -> None:
    for answer in answers(other, Format.lark('start: "(" start ")" | /[0-9]/ "+" start | "x"')):
        rest = answer.text
        while (shorter := re.sub(r"\(x\)|[0-9]\+x", "x", rest)) != rest:
            rest = shorter
        assert rest == "x", answer.text
    for answer in answers(other, Format.lark(GBNF)):
        assert isinstance(json.loads(answer.text), dict)


def test_choices(other: gemmart.Model) -> None:
    choices = ["yes", 'no "no"', "é\n\t\\", "😀", "", "\x00"]
    found = {answer.text for answer in answers(other, Format.choice(*choices), 40)}
    assert len(found) > 2
    assert found <= set(choices)


def test_json(model: gemmart.Model) -> None:
    """Any object; a random model seldom ends one, but what there is of it is its beginning."""
    for seed in range(8):
        answer = model.generate([9], seed=seed, format=Format.json(), max_tokens=60)
        assert answer.text.startswith("{")
        if answer.finish_reason == "stop":
            assert isinstance(json.loads(answer.text), dict)
            continue
        with pytest.raises(json.JSONDecodeError) as caught:
            json.loads(answer.text)
        unfinished = "Unterminated" in caught.value.msg or "escape" in caught.value.msg
        assert unfinished or caught.value.pos >= len(answer.text.rstrip()) - 4, answer.text  # 4: as of "fals"


@pytest.mark.parametrize(
    "settings",
    [
        Settings(temperature=0),
        Settings(temperature=1.4),
        Settings(temperature=1, top_k=3),
        Settings(temperature=1, top_p=0.6),
        Settings(temperature=1, min_p=0.3),
        Settings(temperature=1, typical_p=0.7),
        Settings(temperature=1, repeat_penalty=1.5, presence_penalty=0.7, logit_bias={20: 5.0, 300: -9.0}),
    ],
    ids=str,
)
def test_sampling_is_from_what_is_allowed(other: gemmart.Model, settings: Settings) -> None:
    """Choices are few enough to say without any compiler what may come next."""
    rng = np.random.default_rng(3)
    letters = string.ascii_lowercase + " é"
    choices = ["".join(rng.choice(list(letters), 9)) for _ in range(200)] + ["the", "the of", "then"]
    pieces, stops = other.tokenizer.pieces(), other.tokenizer.stop_ids
    texts = [choice.encode() for choice in choices]
    wanted_lengths = set()
    for seed in range(10):
        answer = other.generate([9, 10 + seed], settings, seed=seed, format=Format.choice(*choices))
        ids, text = [9, 10 + seed], b""
        for token in answer.tokens:
            fits = [text + piece for piece in pieces]
            allowed = np.array(
                [
                    text in texts
                    if id in stops
                    else not other.tokenizer.is_control(id)
                    and bool(pieces[id])
                    and any(choice.startswith(fits[id]) for choice in texts)
                    for id in range(other.info.n_vocab)
                ]
            )
            row = adjust(other.logits(ids)[-1], settings, ids, allowed)
            order = np.argsort(-row, kind="stable")[: allowed.sum()].astype(np.int32)
            logsumexp = float(np.log(np.exp(row[order].astype(np.float64)).sum()))
            at = choose(Candidates(order, row[order], logsumexp, len(order)), settings, seed, len(ids))
            assert token == order[at]
            wanted_lengths.add(len(order))
            ids.append(token)
            text += b"" if token in stops else pieces[token]
        assert answer.text in choices
        assert answer.finish_reason == "stop"
    assert len(wanted_lengths) > 3


def mixed(n: int) -> list[tuple[list[int], dict[str, Any]]]:
    formats = [
        Format.schema(PERSON),
        Format.schema(TREE),
        Format.json(),
        Format.regex(r"([a-z]+ ){5,9}[a-z]+\."),
        Format.choice("yes", "no", "perhaps"),
        Format.lark('start: ("a" | /[0-9]+/ "," )+'),
        None,
    ]
    return [
        (
            [7 + i, 9, 11],
            {
                "sampling": Sampling(temperature=(0, 0.8, 1.5)[i % 3]),
                "seed": i,
                "max_tokens": 20 + i,
                "format": formats[i % len(formats)],
                "logprobs": 2 if i % 4 == 0 else None,
                "stop": ["s"] if i % 5 == 0 else [],
            },
        )
        for i in range(n)
    ]


def test_same_answers_alone_and_in_company(model: gemmart.Model, tiny: Tiny) -> None:
    """Streamed or not, with another number of threads, with and without guesses."""
    wanted = mixed(35)
    for lookup in (True, False):
        with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, batch=512, threads=1, lookup=lookup) as lonely:
            expected = [lonely.generate(prompt, **options) for prompt, options in wanted]

        def streamed(prompt: list[int], options: dict[str, Any]) -> gemmart.Completion:
            stream = model.stream(prompt, **options)
            text = "".join(delta.text for delta in stream)
            assert text == stream.result().text
            return stream.result()

        found = at_once([lambda p=p, o=o: streamed(p, o) for p, o in wanted])
        for answer, alone in zip(found, expected, strict=True):
            assert isinstance(answer, gemmart.Completion), answer
            assert (answer.tokens, answer.text, answer.finish_reason) == (alone.tokens, alone.text, alone.finish_reason)
            assert answer.logprobs == alone.logprobs
    wait_until(lambda: is_free(model))


def test_guesses_change_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, threads=1, lookup=False) as model:
        expected = [(prompt, options, model.generate(prompt, **options)) for prompt, options in mixed(28)]
    monkeypatch.setattr("gemmart.model.Lookup", Oracle)
    monkeypatch.setattr("gemmart.speculation.Pace.length", property(lambda pace: 7))
    monkeypatch.setattr(Oracle, "rng", rng, raising=False)
    monkeypatch.setattr(Oracle, "p_wrong", 0.5)
    with gemmart.load(tiny("gemma2", "Q8_0"), ctx=256, threads=1) as model:
        n_accepted = 0
        Oracle.answers[(5,)] = ()
        model.generate([5], max_tokens=3)  # plain steps, before which nothing is guessed
        for prompt, options, plain in expected:
            Oracle.answers[tuple(prompt)] = plain.tokens
            answer = model.generate(prompt, **options)
            assert (answer.tokens, answer.text, answer.finish_reason) == (plain.tokens, plain.text, plain.finish_reason)
            n_accepted += answer.timings.accepted_tokens
        assert n_accepted > 100


def test_the_end(model: gemmart.Model) -> None:
    cut = model.generate([9], seed=1, format=Format.schema(PERSON), max_tokens=5)
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 5)
    whole = model.generate([9], seed=1, format=Format.choice("the"))
    assert (whole.text, whole.finish_reason) == ("the", "stop")
    assert not set(whole.tokens) & model.tokenizer.stop_ids  # nothing can follow, so nothing is asked
    exact = model.generate([9], seed=1, format=Format.choice("the"), max_tokens=len(whole.tokens))
    assert (exact.text, exact.finish_reason) == ("the", "stop")
    last = model.generate([9], seed=1, format=Format.regex("the( of)?"), logprobs=1)
    assert last.text in ("the", "the of")
    assert last.logprobs is not None
    none = model.generate([9], format=Format.choice(""))
    assert (none.text, none.finish_reason) == ("", "stop")
    with pytest.raises(InvalidRequest, match="ignore_eos") as caught:
        model.generate([9], format=Format.json(), ignore_eos=True)
    assert caught.value.param == "ignore_eos"


def test_a_failure_stays_with_its_answer(model: gemmart.Model) -> None:
    """One format becomes too costly on the way."""
    rules = "\n".join(f'a{i}: "b{i}" start' for i in range(2500))
    costly = Format.lark('start: "the" "y" many\nmany: ' + "|".join(f"a{i}" for i in range(2500)) + "\n" + rules)
    options = {"seed": 1, "max_tokens": 40, "format": Format.regex("[a-z ]{30,60}")}
    alone = model.generate([9], **options)
    results = at_once(
        [lambda: model.generate([9], **options).text, lambda: model.generate([9], seed=1, format=costly)] * 3
    )
    assert [result for result in results if not isinstance(result, Exception)] == [alone.text] * 3
    for error in results[1::2]:
        assert isinstance(error, ConstraintError), error
        assert "format: the answer cannot go on: Parser Error" in str(error)
        assert (error.exit_code, error.http_status, error.http_code) == (11, 400, "invalid_schema")
    wait_until(lambda: is_free(model))


def test_costly_formats_hold_nobody_up(model: gemmart.Model) -> None:
    plain = model.generate([9, 10], seed=1, max_tokens=30).text

    def costly(format: Format) -> object:
        try:
            return model.generate([9], seed=1, max_tokens=30, format=format).finish_reason
        except ConstraintError as error:
            return error

    calls = [lambda f=f: costly(f) for f in bombs.COSTLY]
    results = at_once([*calls, lambda: model.generate([9, 10], seed=1, max_tokens=30).text])
    assert results[-1] == plain
    for result in results[:-1]:
        assert result in ("stop", "length") or isinstance(result, ConstraintError), result


@pytest.mark.parametrize("name", bombs.REFUSED)
def test_bombs_are_refused(model: gemmart.Model, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConstraintError) as caught:
        model.prepare([9], emit=print, format=bombs.REFUSED[name]())
    assert str(caught.value).startswith("format: ")
    assert 15 < len(str(caught.value)) < 1000
    assert caught.value.param == "format"
    assert capfd.readouterr() == ("", "")


def test_sixty_bombs() -> None:
    assert len(bombs.REFUSED) >= 60


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Format.schema({"type": "text"}), "format: Invalid type: text"),
        (lambda: Format.schema({"properties": {"a": {"not": {}}}}), 'Unimplemented keys: ["not"]'),
        (lambda: Format.regex("a(b"), "unclosed group"),
        (lambda: Format.lark('start: b\nc: "d"'), 'format: at 1(8): unknown name: "b"'),
        (lambda: Format.lark("root ::= other"), "the GBNF grammar cannot be converted: Rule 'other' not found"),
        (lambda: Format.schema({"enum": []}), "anyOf is empty"),
        (lambda: Format.schema({"$ref": "#"}), "no answer can satisfy it"),
    ],
)
def test_the_compiler_s_words(model: gemmart.Model, make: Any, words: str) -> None:
    with pytest.raises(ConstraintError) as caught:
        model.generate([9], format=make())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Format.schema({"const": float("nan")}), "what JSON can hold"),
        (lambda: Format.schema({"const": {1, 2}}), "what JSON can hold"),
        (lambda: Format.schema(3), "no JSON schema describes 3"),
        (lambda: Format.schema(re.Pattern), "no JSON schema describes"),
        (lambda: Format.regex(3), "int, expected a text"),
        (lambda: Format.lark("start: \ud800"), "half a character"),
        (lambda: Format.choice(), "at least one"),
        (lambda: Format.choice("a", 3), "between texts"),
    ],
)
def test_what_is_no_format(make: Any, words: str) -> None:
    with pytest.raises(ConstraintError, match=words):
        make()


def test_limits() -> None:
    assert len(Format.regex("a" * MAX_SOURCE).source) > MAX_SOURCE
    with pytest.raises(ConstraintError, match=f"has {MAX_SOURCE + 1} bytes, at most {MAX_SOURCE}"):
        Format.regex("a" * (MAX_SOURCE - 1) + "é")
    for n, fits in ((MAX_NESTING, True), (MAX_NESTING + 1, False)):
        schema = bombs.nested(n - 1, lambda x: {"items": x}, {})
        if fits:
            Format.schema(schema)
        else:
            with pytest.raises(ConstraintError, match=f"deeper than {MAX_NESTING} levels"):
                Format.schema(schema)
    Format.schema({"anyOf": [{}] * (MAX_RULES - 2)})
    with pytest.raises(ConstraintError, match=f"more than {MAX_RULES} objects"):
        Format.schema({"anyOf": [{}] * (MAX_RULES - 1)})
    rules = ["start:a", *["a:b"] * MAX_RULES]
    Format.lark("\n".join(rules[:-1]))
    with pytest.raises(ConstraintError, match=f"has {MAX_RULES + 1} rules"):
        Format.lark("\n".join(rules))
    loop: dict[str, Any] = {}
    loop["items"] = loop
    with pytest.raises(ConstraintError, match="deeper than"):
        Format.schema(loop)


def test_compiled_formats_are_few(tiny: Tiny) -> None:
    """Many different schemas leave no memory behind."""
    process, used = psutil.Process(), []
    with gemmart.load(tiny("llama"), ctx=64, threads=1) as model:
        for i in range(4 * CACHED_FORMATS):
            schema = {"type": "object", "properties": {f"property {i}{j}": {"type": "string"} for j in range(20)}}
            model.prepare([9], emit=print, format=Format.schema(schema))
            used.append(process.memory_info().rss)
        assert len(model._constraints._compiled) == CACHED_FORMATS
        for i in range(8):
            model.prepare([9], emit=print, format=Format.schema({"const": f"{i}" * 50_000}))
        assert len(model._constraints._compiled) < 8
    half = used[2 * CACHED_FORMATS :]
    assert max(half) - half[0] < 8 << 20


def test_the_same_format_compiles_once(model: gemmart.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model.prepare([9], emit=print, format=Format.schema({"const": "once"}))
    monkeypatch.setattr(model._constraints._worker, "ask", None)
    model.prepare([9], emit=print, format=Format.schema({"const": "once"}))
    with pytest.raises(TypeError):
        model.prepare([9], emit=print, format=Format.schema({"const": "twice"}))
