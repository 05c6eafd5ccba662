"""What commands print with --json: valid by the schemas in docs/schemas, which the page tells in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator, ValidationError

import program
import schemas
from conftest import Tiny

PAGE = Path(__file__).parents[1] / "docs" / "json.md"


def check(name: str, value: Any) -> None:
    Draft202012Validator(schemas.schema(name), format_checker=Draft202012Validator.FORMAT_CHECKER).validate(value)


def printed(*arguments: str | Path, home: Path, stdin: str = "", **environ: str) -> list[Any]:
    """The JSON values on stdout, one a line."""
    done = program.run(*arguments, home=home, stdin=stdin, **environ)
    assert done.returncode == 0, done.stderr
    return [json.loads(line, parse_constant=pytest.fail) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Path:
    return tiny("gemma2", dim=256, ffn_dim=512, n_layers=3)


@pytest.mark.parametrize("name", schemas.ORDER)
def test_schemas_are_schemas(name: str) -> None:
    Draft202012Validator.check_schema(schemas.schema(name))


def test_every_schema_is_told() -> None:
    assert sorted(schemas.ORDER) == sorted(path.stem for path in schemas.FOLDER.iterdir())
    assert PAGE.read_text(encoding="utf-8") == schemas.as_markdown()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("run", ("run", "MODEL", "hello", "--json", "-n", "4")),
        ("show", ("show", "MODEL", "--json")),
        ("show", ("show", "gemma2:27b", "--json")),
        ("plan", ("plan", "MODEL", "--json", "--mmap")),
        ("plan", ("plan", "MODEL", "--json", "--draft", "MODEL")),
        ("doctor", ("doctor", "--json")),
        ("config", ("config", "serve", "--json")),
        ("version", ("--version", "--json")),
        ("tokenize", ("tokenize", "MODEL", "hello <word>", "--json")),
        ("embed", ("embed", "MODEL", "a", "b", "--json")),
        ("bench", ("bench", "MODEL", "--json", "--prompt", "8", "--decode", "2", "--repeat", "1")),
        ("bench-phases", ("bench", "MODEL", "--phases", "--json", "--prompt", "8", "--decode", "2", "--repeat", "1")),
        ("quantize", ("quantize", "MODEL", "out.gguf", "Q4_0", "--dry-run", "--json")),
        ("perplexity", ("perplexity", "MODEL", "-", "-c", "16", "--json")),
        ("perplexity", ("perplexity", "MODEL", "-", "-c", "4", "--chunks", "1", "--json")),
    ],
)
def test_outputs_are_as_told(home: Path, model: Path, name: str, arguments: tuple[str, ...]) -> None:
    given = [model if argument == "MODEL" else argument for argument in arguments]
    (value,) = printed(*given, home=home, stdin="word " * 40 if name == "perplexity" else "")
    check(name, value)


def test_a_model_in_an_archive(home: Path, model: Path) -> None:
    packed = home / "packed.gemmart"
    assert program.run("pack", model, "-o", packed, home=home).returncode == 0
    (value,) = printed("show", packed, "--json", home=home)
    check("show", value)
    assert value["entry"]
    *_, last = events = printed("pull", packed, "--json", home=home)
    for event in events:
        check("pull", event)
    assert last["event"] == "done"


def test_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    from gemmart import kernel_bench

    monkeypatch.setattr(kernel_bench, "COLUMNS", (1,))
    found = kernel_bench.measure(threads=1, n_bytes=1 << 20, progress=lambda what, done, total: None)
    check("bench-kernels", json.loads(json.dumps(found)))


def test_list(home: Path, model: Path) -> None:
    (value,) = printed("list", "--json", home=home)
    check("list", value)
    store = home / ".lmstudio" / "models" / "somebody" / "tiny"
    store.mkdir(parents=True)
    (store / "tiny-Q4_K_M.gguf").write_bytes(model.read_bytes())
    (value,) = printed("list", "--json", home=home)
    check("list", value)
    assert [row["quant"] for row in value] == ["Q4_K_M"]


def test_a_wrong_output_would_be_seen() -> None:
    good = {"version": "1", "python": "3", "system": "x"}
    check("version", good)
    for wrong in ({}, {**good, "more": 1}, {**good, "python": 3}):
        with pytest.raises(ValidationError):
            check("version", wrong)
