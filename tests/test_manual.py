"""The manual, the man pages, and completion."""

from __future__ import annotations

import subprocess
from pathlib import Path

import click
import pytest

import program
from gemmart import cli
from program import failure

MAN = Path(__file__).parents[1] / "docs" / "man"


def commands() -> dict[str, click.Command]:
    context = click.Context(cli.cli)
    return {name: command for name in cli.COMMANDS if (command := cli.cli.get_command(context, name))}


def test_the_overview_lists_every_command(tmp_path: Path) -> None:
    brief = program.run("--help", home=tmp_path).stdout.decode()
    manual = program.run("help", home=tmp_path).stdout.decode()
    for name in cli.COMMANDS:
        assert f"\n  {name} " in brief
        assert f"\n    {name}\n" in manual
    assert "no such command" in failure(program.run("help", "walk", home=tmp_path), 2)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_manual_of_a_command_tells_every_flag(tmp_path: Path, name: str) -> None:
    text = program.run("help", name, home=tmp_path).stdout.decode()
    assert text.startswith(f"NAME\n    gemmart-{name} - ")
    assert "EXIT STATUS\n    0    done\n" in text
    for param in commands()[name].params:
        if isinstance(param, click.Option) and not param.hidden:
            for flag in (*param.opts, *param.secondary_opts):
                assert f" {flag}" in text
            assert not param.envvar or f"[{param.envvar}]" in " ".join(text.split())


def test_run_has_examples(tmp_path: Path) -> None:
    text = program.run("help", "run", home=tmp_path).stdout.decode()
    assert "    gemmart run gemma2:27b --cli -p 'four score and seven' --log-disable\n" in text


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_man_pages_are_up_to_date(tmp_path: Path, name: str) -> None:
    """`gemmart help NAME --man > docs/man/gemmart-NAME.1` writes one anew."""
    page = MAN / ("-".join(filter(None, ("gemmart", name))) + ".1")
    text = program.run(*filter(None, ("help", name)), "--man", home=tmp_path).stdout.decode()
    assert text == page.read_text(encoding="utf-8")


def test_licences(tmp_path: Path) -> None:
    lines = program.run("--licenses", home=tmp_path).stdout.decode().splitlines()
    assert lines[0].startswith("gemmart ")
    assert lines[0].endswith(": Apache-2.0")
    assert any(line.startswith("numpy ") for line in lines)
    assert not any("not stated" in line for line in lines)


def test_completion_knows_what_is_here(tmp_path: Path) -> None:
    model = tmp_path / ".cache/gemmart/models/pypi/some-model/1.0/m.gguf"
    model.parent.mkdir(parents=True)
    model.write_bytes(b"GGUF")
    words = {"COMP_WORDS": "gemmart run pypi", "COMP_CWORD": "2", "_GEMMART_COMPLETE": "bash_complete"}
    assert "plain,pypi:some-model==1.0" in program.run(home=tmp_path, **words).stdout.decode().split()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("gemmart", "ben"), {"plain,bench"}),
        (("gemmart", "run", "--temp"), {"plain,--temp"}),
        (("gemmart", "run", "--ctx"), {"plain,--ctx", "plain,--ctx-size"}),
        (("gemmart", "run", "smol"), {"plain,smollm2-135m", "file,smol"}),
        (("gemmart", "show", "-m", "gemma2:9"), {"plain,gemma2:9b", "file,gemma2:9"}),
    ],
)
def test_completion(tmp_path: Path, typed: tuple[str, ...], expected: set[str]) -> None:
    words = {"COMP_WORDS": " ".join(typed), "COMP_CWORD": str(len(typed) - 1), "_GEMMART_COMPLETE": "bash_complete"}
    assert set(program.run(home=tmp_path, **words).stdout.decode().split()) == expected


def test_completion_script_is_bash(tmp_path: Path) -> None:
    script = program.run("completion", "bash", home=tmp_path).stdout
    assert b"_GEMMART_COMPLETE=bash_complete" in script
    assert subprocess.run(["bash", "-n"], input=script, capture_output=True).stderr == b""
