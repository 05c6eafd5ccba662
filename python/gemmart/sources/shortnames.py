"""Short names for models: those of aliases.toml, and the user's own, which go before them:

[aliases]                       # in config.toml
work = "hf:user/repo:Q6_K"
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from gemmart.errors import InvalidRequest
from gemmart.places import config_files

QUANT = re.compile(r"(I?Q\d|TQ\d|B?F\d\d|MXFP\d)\w*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Alias:
    """What a short name stands for; `size` (bytes) and `sha256` pin the model file where they are given; `also` are
    other spellings."""

    ref: str
    size: int | None = None
    sha256: str | None = None
    also: tuple[str, ...] = ()


def aliases() -> dict[str, Alias]:
    """Every short name, in all its spellings. Raises InvalidRequest for a table [aliases] that is none of names."""
    return {**_own(), **_users()}


def find(ref: str) -> Alias | None:
    """What a name means, if it is one: a short name, or NAME:QUANT of one that stands for a repository of the hub."""
    known = aliases()
    if alias := known.get(ref):
        return _own().get(alias.ref, alias)  # a user's name may stand for one of ours
    name, colon, quant = ref.rpartition(":")
    alias = known.get(name)
    if colon and QUANT.fullmatch(quant) and alias is not None and alias.ref.startswith("hf:"):
        return replace(alias, ref=f"{alias.ref}:{quant}")
    return None


@functools.cache
def _own() -> dict[str, Alias]:
    table = tomllib.loads(resources.files(__package__).joinpath("aliases.toml").read_text(encoding="utf-8"))
    found = {}
    for name, row in table.items():
        names = (name, *row.get("also", []))
        found.update(dict.fromkeys(names, Alias(row["ref"], row.get("size"), row.get("sha256"), names)))
    return found


def _users() -> dict[str, Alias]:
    found: dict[str, Alias] = {}
    for path in config_files():
        found.update(_read(path))
    return found


def _read(path: Path) -> dict[str, Alias]:
    """The table [aliases] of a configuration file."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("aliases", {})
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path}: {error}") from None
    if not isinstance(table, dict):
        raise InvalidRequest(f"{path}: aliases: expected a table of names, such as work = 'hf:user/repo'")
    for name, ref in table.items():
        if not isinstance(ref, str) or not ref:
            raise InvalidRequest(f"{path}: aliases.{name}: expected a reference, such as 'hf:user/repo'")
    return {name: Alias(ref) for name, ref in table.items()}
