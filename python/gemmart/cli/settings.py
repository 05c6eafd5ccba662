"""Settings from configuration files: flags by their long names, for all commands or in a table of one.

    ctx = "8k"          # --ctx 8k, wherever there is such a flag
    [serve]
    port = 9000

Flags come before GEMMART_ variables, these before the user's file, this before the system's.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

OTHER_TABLES = ("aliases",)  # read elsewhere


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as text (a list of texts, for what may be repeated), and the file that gives it."""

    value: str | list[str]
    path: Path


def settings_of(command: click.Command, all_commands: Callable[[], dict[str, click.Command]]) -> dict[str, Setting]:
    """What the files set for `command`, by parameter name. `all_commands` is called, which imports them, only where
    there is a file. Raises UsageError for a file that is not TOML or a name that no command knows."""
    from gemmart.places import config_files

    known = _names(command)
    found: dict[str, Setting] = {}
    for path in config_files():
        if not path.exists():
            continue
        for key, setting in _read(path, command.name, all_commands()):
            if key in known:
                found[known[key]] = setting
    return found


def _read(path: Path, name: str | None, commands: dict[str, click.Command]) -> Iterator[tuple[str, Setting]]:
    """The settings of a file that `name` may use: the common ones, then those of its table."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path}: {error}") from None
    common = {key: value for key, value in table.items() if not isinstance(value, dict)}
    _check(path, common, {key for command in commands.values() for key in _names(command)})
    for key in table.keys() - common.keys() - set(OTHER_TABLES):
        if key not in commands:
            raise click.UsageError(f"{path}: [{key}]: no such table{_nearest(key, [*commands, *OTHER_TABLES])}")
        _check(path, table[key], set(_names(commands[key])), f"[{key}] ")
    for key, value in [*common.items(), *table.get(name or "", {}).items()]:
        yield key.replace("_", "-"), Setting(_text(path, key, value), path)


def _check(path: Path, table: dict[str, Any], known: set[str], where: str = "") -> None:
    for key in table:
        if key.replace("_", "-") not in known:
            raise click.UsageError(f"{path}: {where}{key}: no such setting{_nearest(key, known)}")


def _nearest(name: str, known: set[str] | list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _names(command: click.Command) -> dict[str, str]:
    """The settings of a command: long name without dashes → parameter name."""
    return {key: str(param.name) for param in command.params if (key := getattr(param, "key", None))}


def _text(path: Path, key: str, value: Any) -> str | list[str]:
    """A TOML value as what would be typed."""
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, bool | int | float | str):
        return str(value)
    raise click.UsageError(f"{path}: {key}: {value!r} is not a text, a number, true or false")
