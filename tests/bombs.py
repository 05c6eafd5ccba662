"""Schemas, grammars and regular expressions that are to cost whoever compiles them time, memory or the stack.

REFUSED do not compile; COSTLY compile, and end an answer with an error or not at all, but hold up nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gemmart import Format


def nested(n: int, wrap: Callable[[Any], Any], inner: Any) -> Any:
    for _ in range(n):
        inner = wrap(inner)
    return inner


def chain(n: int, step: str, end: str, start: str = "start: a0") -> str:
    """Rules a0 to a(n − 1), each made of the next; "{}" and "{+}" in `step` are its number and the next one."""
    rules = (step.replace("{+}", str(i + 1)).replace("{}", str(i)) for i in range(n))
    return "\n".join([start, *rules, end])


def _schemas() -> dict[str, Any]:
    primes = (7, 11, 13, 17, 19, 23, 29)
    defs = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2, "minLength": i} for i in range(30)}
    return {
        "deep": nested(101, lambda x: {"items": x}, {}),
        "deep all": nested(60, lambda x: {"allOf": [x]}, {}),
        "deep lists": {"enum": [nested(120, lambda x: [x], 1)]},
        "wide": {"anyOf": [{}] * 10_000},
        "long": {"const": "x" * 65_536},
        "and regexes": {"allOf": [{"type": "string", "pattern": f"^.*{chr(97 + i)}.{{{i}}}$"} for i in range(12)]},
        "and searches": {"allOf": [{"type": "string", "pattern": f"{chr(97 + i)}.*{chr(98 + i)}"} for i in range(20)]},
        "all of any": {
            "allOf": [
                {"anyOf": [{"type": "object", "properties": {f"p{i}{j}": {"type": "integer"}}} for j in range(4)]}
                for i in range(12)
            ]
        },
        "all of any numbers": {
            "type": "integer",
            "allOf": [{"anyOf": [{"minimum": i + j} for j in range(10)]} for i in range(10)],
        },
        "one of regexes": {"oneOf": [{"type": "string", "pattern": f"^.{{{i}}}a.*b.*$"} for i in range(100)]},
        "itself": {"$ref": "#"},
        "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "itself or itself": {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 2}}},
        "all of itself": {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {}]}}},
        "laughs": {"$ref": "#/$defs/a0", "$defs": {**defs, "a30": {"type": "string"}}},
        "elsewhere": {"$ref": "http://localhost:9/schema.json"},
        "a file": {"$ref": "file:///etc/passwd"},
        "multiples": {"type": "integer", "allOf": [{"multipleOf": p} for p in primes]},
        "large multiples": {"type": "integer", "multipleOf": 999_999_937},
        "tiny multiples": {"type": "number", "multipleOf": 1e-300},
        "nothing": {"type": "integer", "minimum": 3, "maximum": 2},
        "wide numbers": {"type": "number", "minimum": -1e300, "maximum": 1e300},
        "a long number": {"type": "integer", "minimum": 10**400},
        "2,000 properties": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(2000)}},
        "patterns": {
            "type": "object",
            "patternProperties": {f"^x{i}[a-z]*$": {"type": "integer"} for i in range(700)},
        },
        "crossing patterns": {
            "type": "object",
            "patternProperties": {f"^.*{chr(97 + i)}.{{{i}}}$": {"type": "integer"} for i in range(10)},
        },
        "options of the compiler": {"x-guidance": {"lenient": True}, "type": "object"},
        "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
        "not": {"not": {"type": "string"}},
        "if": {"if": {"type": "string"}, "then": {}},
        "uniqueItems": {"type": "array", "uniqueItems": True},
        "contains": {"type": "array", "contains": {"type": "string"}},
        "a format": {"type": "string", "format": "idn-email"},
        "a type": {"type": "text"},
    }


_REGEXES = {
    "60,000 (": "(" * 60_000,
    "20,000 ()": "(" * 20_000 + ")" * 20_000,
    "60,000 *": "a" + "*" * 60_000,
    "20,000 +?": "a" + "+?" * 20_000,
    "deep": nested(99, lambda x: f"({x}|b)*", "a"),
    "n to 2n": "a?" * 10_000 + "a" * 10_000,
    "look-ahead": "(?=a)b",
    "a reference": r"(a)\1",
    "open": "(a",
    "long": "a" * 65_537,
}
_GRAMMARS = {
    "60,000 (": "start: " + "(" * 60_000,
    "20,000 ()": "start: " + "(" * 20_000 + '"a"' + ")" * 20_000,
    "30,000 ~": "start: A\nA: " + "~" * 30_000 + "/a/",
    "30,000 ?": 'start: "a"' + "?" * 30_000,
    "a chain": chain(3000, "a{}: a{+}", 'a3000: "x"'),
    "a chain of tokens": chain(3000, 'A{}: A{+} "x"', 'A3000: "x"', "start: A0"),
    "twice the token": chain(60, "A{}: A{+} A{+}", 'A60: "x"', "start: A0"),
    "itself": "start: start",
    "each other": "start: a\na: b\nb: a",
    "a token of itself": 'start: A\nA: "a" A | "b"',
    "nothing": "",
    "no start": 'a: "a"',
    "no rule": "start: b",
    "and": "start: A\nA: " + " & ".join(f"/.*{chr(97 + i)}.{{{5 + i}}}/" for i in range(15)),
    "a file": "%import /etc/passwd",
    "another grammar": "start: @other",
    "a special token": "start: <|im_end|>",
    "tokens that are not": "start: <[0-99999999]>",
    "deep JSON": "start: %json " + '{"items":' * 5000 + "true" + "}" * 5000,
    "a temperature": "start: a\na[temperature=3.0]: /.*/",
    "rules": 'start:a\na:"b"\n' + "\n".join(f"a:{i % 10}" for i in range(10_000)),
    "deep GBNF": "root ::= " + "(" * 20_000,
    "GBNF without a rule": "root ::= other",
    "a chain in GBNF": "root ::= a0\n" + "\n".join(f"a{i} ::= a{i + 1}" for i in range(3000)) + '\na3000 ::= "x"',
}
REFUSED: dict[str, Callable[[], Format]] = {
    **{f"schema: {name}": lambda value=value: Format.schema(value) for name, value in _schemas().items()},
    **{f"regex: {name}": lambda value=value: Format.regex(value) for name, value in _REGEXES.items()},
    **{f"grammar: {name}": lambda value=value: Format.lark(value) for name, value in _GRAMMARS.items()},
}

COSTLY = [
    Format.regex("((a{1,1000}){1,1000}){1,1000}"),
    Format.regex("a{1000000000}"),
    Format.regex("(a{0,65535}b){0,65535}"),
    Format.regex("(a|b)*a(a|b){30}"),
    Format.regex(".*(a.{20}|b.{21}|c.{22})x"),
    Format.regex(r"(\p{L}{1,500}\p{N}){1,500}"),
    Format.regex("(.*[a-z]){3000}"),
    Format.regex("".join(f"(a|b){{0,{i}}}c?" for i in range(500))),
    Format.lark("start: A\nA: ~(~(/.*a.{15}/) & ~(/.*b.{14}/)) & ~/.*c.{13}/"),
    Format.schema(nested(20, lambda x: {"type": "array", "items": x, "minItems": 1000}, {"type": "integer"})),
    Format.schema({"type": "string", "minLength": 10**9}),
    Format.schema({"type": "string", "pattern": "^(([a-z]{1,100}){1,100}){1,100}$"}),
    Format.schema({"type": "string", "pattern": "^.*a.{500}$"}),
    Format.schema(json.loads('{"enum": [' + ", ".join(f'"v{i:05}"' for i in range(3000)) + "]}")),
    Format.lark('start: start start | "a" | '),
    Format.lark('start: e\ne: e e | e e e | "a" | ""'),
    Format.lark(chain(60, "a{}: a{+} a{+}", 'a60: "x"')),
    Format.lark('start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x" | d\nd: "z" c'),
]
