"""What an answer must look like: JSON, a JSON schema, a regular expression, a grammar, one of several texts.

    model.generate("The capital of France is", format=gemmart.Format.choice(" Paris", " Rome"))

A Format is checked when it is used: what it asks for and is not offered is an error, before anything is generated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gemmart.errors import ConstraintError

MAX_SOURCE = 64 << 10
"""Bytes of a schema, grammar or regular expression."""
MAX_NESTING = 100
"""Levels of a schema; grammars and regular expressions are limited by their compiler, more closely."""
MAX_RULES = 10_000
"""Rules of a grammar; objects and lists of a schema."""

WHITESPACE = r"[ ]|\n(?:[ ]{0,40}|\t{0,10})"
"""What may stand once where JSON allows whitespace: as people write it, on one line or indented. A model that may write
any whitespace sometimes never ends it."""

MADE, LARK, GBNF = "made", "lark", "gbnf"
"""Whose source it is: our own, in llguidance's variant of Lark, or a caller's, in that or in llama.cpp's GBNF."""
RULE = re.compile(r"^[ \t]*[?!]?[A-Za-z_][^\n:\"/]*::?=?", re.MULTILINE)
GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z_][\w-]*[ \t]*::=", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Format:
    """What an answer must look like; made by the methods below, for the option `format` of Model.generate() and others.

    Raises ConstraintError for what is no schema or no text, or exceeds a limit; where it is used, for what does not
    compile, in the compiler's words."""

    source: str
    kind: str = MADE
    param: str = field(default="format", compare=False)  # what messages call it

    @classmethod
    def made(cls, grammar: str, *, param: str) -> Format:
        """A grammar of our own."""
        _check_source(grammar, param)
        return cls(grammar, param=param)

    @classmethod
    def json(cls, *, param: str = "format") -> Format:
        """Any JSON object."""
        return cls.schema({"type": "object"}, param=param)

    @classmethod
    def schema(cls, schema: Mapping[str, Any] | type, *, param: str = "format", lenient: bool = False) -> Format:
        """JSON that a schema (draft 2020-12) describes, or a type: a dataclass, a TypedDict, a msgspec or pydantic
        model. Properties come in the schema's order. Keywords that cannot be kept to are refused; lenient: left
        out."""
        value = dict(schema) if isinstance(schema, Mapping) else _schema_of(schema, param)
        _check_size(value, param)
        if "x-guidance" in value:
            raise ConstraintError(f"{param}: the key 'x-guidance' is not offered", param)
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConstraintError(f"{param}: a schema must be what JSON can hold: {error}", param) from None
        _check_source(text, param)
        options = json.dumps({"x-guidance": {"whitespace_pattern": WHITESPACE, "lenient": lenient}})
        separator = ", " if value else ""
        return cls(f"start: %json {options[:-1]}{separator}{text[1:]}\n", param=param)

    @classmethod
    def regex(cls, pattern: str, *, param: str = "format") -> Format:
        """The whole answer matches a regular expression, in the syntax of Rust's regex crate: no look-around, no
        references back, linear time. "." is any character but a newline, \\d one of the ten digits; \\w and \\s are
        Unicode's."""
        from llguidance import regex_to_lark

        _check_source(pattern, param)
        return cls(f"start: /{regex_to_lark(pattern, 'd')}/\n", param=param)

    @classmethod
    def lark(cls, grammar: str, *, param: str = "format") -> Format:
        """A context-free grammar whose first rule is `start`, in llguidance's variant of Lark; or llama.cpp's GBNF,
        whose first rule is `root`, which is converted."""
        _check_source(grammar, param)
        n = len(RULE.findall(grammar))
        if n > MAX_RULES:
            raise ConstraintError(f"{param}: the grammar has {n} rules, at most {MAX_RULES} are allowed", param)
        if re.search(r"\[[^\[\]\n]*\btemperature *=", grammar):
            raise ConstraintError(f"{param}: a temperature in a grammar is not offered", param)
        return cls(grammar, GBNF if GBNF_RULE.search(grammar) else LARK, param=param)

    @classmethod
    def choice(cls, *texts: str, param: str = "format") -> Format:
        """One of these texts."""
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ConstraintError(f"{param}: a choice is between texts, at least one", param)
        source = " | ".join(json.dumps(text, ensure_ascii=False) for text in texts)
        _check_source(source, param)
        return cls(f"start: {source}\n", param=param)


def _check_source(text: str, param: str) -> None:
    if not isinstance(text, str):
        raise ConstraintError(f"{param}: is {type(text).__name__}, expected a text", param)
    try:
        n = len(text.encode())
    except UnicodeEncodeError:
        raise ConstraintError(f"{param}: holds half a character (a lone surrogate)", param) from None
    if n > MAX_SOURCE:
        raise ConstraintError(f"{param}: has {n} bytes, at most {MAX_SOURCE} are allowed", param)


def _check_size(value: Any, param: str) -> None:
    """A schema's levels and its objects and lists, without following it down."""
    level, n = [value], 0
    for _ in range(MAX_NESTING):
        n += len(level)
        if n > MAX_RULES:
            raise ConstraintError(f"{param}: has more than {MAX_RULES} objects and lists", param)
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, Mapping) else outer)
            if isinstance(inner, Mapping | list | tuple)
        ]
        if not level:
            return
    raise ConstraintError(f"{param}: is nested deeper than {MAX_NESTING} levels", param)


def _schema_of(kind: Any, param: str) -> dict[str, Any]:
    """The JSON schema of a type."""
    if hasattr(kind, "model_json_schema"):
        return dict(kind.model_json_schema())
    import msgspec

    try:
        (schema,), components = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    except (TypeError, RecursionError) as error:
        raise ConstraintError(f"{param}: no JSON schema describes {kind!r}: {error}", param) from None
    return {**schema, "$defs": components} if components else schema
