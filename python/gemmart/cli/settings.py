"""Settings from configuration files: flags by their long names, for all commands or in a table of one.

    ctx = "8k"          # --ctx 8k, wherever there is such a flag
    [serve]
    port = 9000
    [presets.coding]    # with --preset coding, or preset = "coding" above
    temp = 0
    [presets.coding.serve]
    port = 9001

Flags come before GEMMART_ variables, these before the preset, this before the user's file, and this before that of the
system.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

PRESETS = "presets"
OTHER_TABLES = ("aliases", PRESETS)


@dataclass(frozen=True, slots=True)
class Setting:
    """A value as text (a list of texts, for what may be repeated), and the file that gives it, or the preset there."""

    value: str | list[str]
    origin: str


def settings_of(command: click.Command, all_commands: Callable[[], dict[str, click.Command]]) -> dict[str, Setting]:
    """What the files set for `command`, by parameter name. `all_commands` is called, which imports them, only where
    there is a file. Raises UsageError for a file that is not TOML or a name that no command knows."""
    from gemmart.places import config_files

    found: dict[str, Setting] = {}
    for path in config_files():
        if path.exists():
            found |= _of(_read(path, all_commands()), command, str(path))
    return found


def preset_of(
    name: str, command: click.Command, all_commands: Callable[[], dict[str, click.Command]]
) -> dict[str, Setting]:
    """What the preset sets for `command`, by parameter name. Raises BadParameter where no file has it."""
    from gemmart.places import config_files

    tables = {path: _read(path, all_commands()).get(PRESETS, {}) for path in config_files() if path.exists()}
    if not any(name in presets for presets in tables.values()):
        known = sorted({preset for presets in tables.values() for preset in presets})
        raise click.BadParameter(f"{name!r}: no such preset; there are: {', '.join(known) or 'none'}")
    found: dict[str, Setting] = {}
    for path, presets in tables.items():
        found |= _of(presets.get(name, {}), command, f"{path} [{PRESETS}.{name}]")
    return found


def _of(table: dict[str, Any], command: click.Command, origin: str) -> dict[str, Setting]:
    """The settings of a table that `command` has: the common ones, then those of its own table."""
    names = _names(command)
    common = [(key, value) for key, value in table.items() if not isinstance(value, dict)]
    given = [(key.replace("_", "-"), value) for key, value in [*common, *table.get(command.name or "", {}).items()]]
    return {names[key]: Setting(_text(origin, key, value), origin) for key, value in given if key in names}


def _read(path: Path, commands: dict[str, click.Command]) -> dict[str, Any]:
    """A file, checked."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{path}: {error}") from None
    _check_table(str(path), {key: table[key] for key in table if key not in OTHER_TABLES}, commands)
    presets = table.get(PRESETS, {})
    if not isinstance(presets, dict):
        raise click.UsageError(
            f'{path}: {PRESETS}: is no table; write [{PRESETS}.NAME], and preset = "NAME" to choose one'
        )
    for name, preset in presets.items():
        where = f"{path}: [{PRESETS}.{name}]"
        if not isinstance(preset, dict):
            raise click.UsageError(f"{where}: is no table of settings")
        if "preset" in preset:
            raise click.UsageError(f"{where} preset: a preset takes in no other one")
        _check_table(where, preset, commands)
    return table


def _check_table(where: str, table: dict[str, Any], commands: dict[str, click.Command]) -> None:
    """Raises UsageError for a setting, or a table of a command, that there is not."""
    common = {key for key, value in table.items() if not isinstance(value, dict)}
    _check_names(where, common, {key for command in commands.values() for key in _names(command)})
    for key in table.keys() - common:
        if key not in commands:
            raise click.UsageError(f"{where}: [{key}]: no such table{_nearest(key, [*commands, *OTHER_TABLES])}")
        _check_names(f"{where}: [{key}]", set(table[key]), set(_names(commands[key])))


def _check_names(where: str, names: set[str], known: set[str]) -> None:
    for key in names:
        if key.replace("_", "-") not in known:
            raise click.UsageError(f"{where}: {key}: no such setting{_nearest(key, known)}")


def _nearest(name: str, known: set[str] | list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _names(command: click.Command) -> dict[str, str]:
    """The settings of a command: long name without dashes → parameter name."""
    return {key: str(param.name) for param in command.params if (key := getattr(param, "key", None))}


def _text(origin: str, key: str, value: Any) -> str | list[str]:
    """A TOML value as what would be typed."""
    if isinstance(value, list):
        return [str(item) for item in value]
    if isinstance(value, bool | int | float | str):
        return str(value)
    raise click.UsageError(f"{origin}: {key}: {value!r} is not a text, a number, true or false")
