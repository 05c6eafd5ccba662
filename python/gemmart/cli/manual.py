"""The manual: a command's help, what its flags are called elsewhere, and chapters; as text, or as a man page."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources

import click

from gemmart.cli.options import Option

WIDTH = 100  # columns of the text


@dataclass(frozen=True, slots=True)
class Section:
    """A heading and its paragraphs; `terms` are (what is typed, what it does). Paragraphs that begin with blanks are
    shown as they stand."""

    heading: str
    paragraphs: tuple[str, ...] = ()
    terms: tuple[tuple[str, str], ...] = ()


def sections(command: click.Command, ctx: click.Context) -> list[Section]:
    """The whole manual of a command; `ctx` is its context."""
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    found = [
        Section("Name", (f"{ctx.command_path.replace(' ', '-')} - {command.get_short_help_str(200).rstrip('.')}",)),
        Section("Synopsis", (f"    {usage}",)),
        Section("Description", tuple(_paragraphs(inspect.cleandoc(command.help or "")))),
    ]
    groups: dict[str, list[tuple[str, str]]] = {}
    for param in command.get_params(ctx):
        if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
            names, text = record
            if isinstance(param, Option) and param.envvar:
                text = f"{text} [{param.envvar}]"
            groups.setdefault(getattr(param, "group", "Help"), []).append((names, text))
    found += [Section(group, terms=tuple(terms)) for group, terms in groups.items()]
    if isinstance(command, click.Group):
        named = ((name, command.get_command(ctx, name)) for name in command.list_commands(ctx))
        found.append(
            Section("Commands", terms=tuple((name, each.get_short_help_str(200)) for name, each in named if each))
        )
    return found + list(_chapters(command.name or "")) + list(_chapters("every"))


def as_text(found: list[Section]) -> str:
    """For the terminal or its pager."""
    lines: list[str] = []
    for section in found:
        lines += [section.heading.upper()]
        for paragraph in section.paragraphs:
            literal = paragraph.startswith("    ")
            lines += paragraph.splitlines() if literal else _wrapped(paragraph, 4)
            lines.append("")
        for term, text in section.terms:
            lines += [f"    {term}", *_wrapped(text, 8)]
        if section.terms:
            lines.append("")
    return "\n".join(lines)


def as_man_page(title: str, version: str, found: list[Section]) -> str:
    """In the language of man(7)."""
    lines = [f'.TH "{title.upper()}" 1 "" "gemmart {version}" "gemmart manual"']
    for section in found:
        lines.append(f'.SH "{_roff(section.heading.upper())}"')
        for paragraph in section.paragraphs:
            if paragraph.startswith("    "):
                lines += [".PP", ".nf", *(_roff(line) for line in paragraph.splitlines()), ".fi"]
            else:
                lines += [".PP", _roff(paragraph)]
        for term, text in section.terms:
            lines += [".TP", rf"\fB{_roff(term)}\fR", _roff(text)]
    return "\n".join(lines) + "\n"


def _chapters(name: str) -> Iterator[Section]:
    """The chapters of chapters/NAME.md: `# Heading`, then paragraphs."""
    source = resources.files("gemmart.cli").joinpath("chapters", f"{name}.md")
    if source.is_file():
        for chapter in re.split(r"^# ", source.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
            heading, _, body = chapter.partition("\n")
            yield Section(heading.strip(), tuple(_paragraphs(body)))


def _paragraphs(text: str) -> Iterator[str]:
    r"""Paragraphs of a text, of which those that are indented, or that click's \b marks, stay as they are."""
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        if block.startswith("\b\n"):
            yield textwrap.indent(block.removeprefix("\b\n"), "    ")
        else:
            yield block if block.startswith("    ") else " ".join(block.split())


def _wrapped(text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=" " * indent, subsequent_indent=" " * indent)


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped
