"""Saved conversations: a ZIP file of chat.json and, where they are computed, kv.bin; or chat.json alone.

    chat.json  {"format": "gemmart chat", "version": 1, "messages": [{"role", "content"} …], "options": {…},
                "kv": {"tokens": [ids], "held_from": page, "computed_by": {…}} or null}
    kv.bin     the pages of these tokens, as prefix.Prefix has them

Such a file is not trusted. Its keys and values serve its own conversation only, and only where this model, computing as
it does now, would have come to the same: where `computed_by` is equal and the messages still make these tokens.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from gemmart.errors import InvalidRequest, OutOfMemory
from gemmart.new_file import replacing
from gemmart.prefix import PAGE, put_back, taken_out
from gemmart.sampling import Sampling, check_number
from gemmart.session import Session
from gemmart.stops import StopStrings
from gemmart.template import ROLES

if TYPE_CHECKING:
    from gemmart.model import Message, Model

FORMAT, VERSION = "gemmart chat", 1
CHAT, KV = "chat.json", "kv.bin"
MAX_MESSAGES = 10_000
MAX_JSON = 64 << 20  # bytes of chat.json
OPTIONS = ("sampling", "seed", "max_tokens", "stop", "ignore_eos")
BROKEN = (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, KeyError, OverflowError)
"""What zipfile raises for a file that is none."""


def write(path: str | PathLike[str], model: Model, session: Session) -> int:
    """Write a session, with its keys and values unless the name ends in .json; returns for how many tokens these are.
    The file is its owner's alone, and there as a whole or not at all. Raises OSError."""
    path = Path(path)
    if path.suffix == ".json":
        with replacing(path) as (_, file):
            file.write(_chat(session, None))
        return 0
    ids = session.tokens
    with (
        taken_out(model._engine, model.windows, ids, session._salt) as prefix,
        replacing(path) as (_, file),
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive,
    ):
        kv = None
        if prefix.n_tokens:
            kv = {"tokens": ids[: prefix.n_tokens], "held_from": prefix.held_from, "computed_by": model.computed_by}
        archive.writestr(zipfile.ZipInfo(CHAT), _chat(session, kv))
        if kv:
            with archive.open(zipfile.ZipInfo(KV), "w", force_zip64=True) as out:
                for part in prefix.parts:
                    out.write(part.read().data)
        return prefix.n_tokens


def is_saved(path: Path) -> bool:
    """Whether a file looks like one of write()'s."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError:
        return False
    return head[30 : 30 + len(CHAT)] == CHAT.encode() or head.startswith(b'{"format": "%b"' % FORMAT.encode())


def read(path: str | PathLike[str], model: Model, notice: Callable[[str], None]) -> Session:
    """The session of a file. Raises InvalidRequest naming what is wrong where, TemplateError."""
    path = Path(path)
    with _opened(path) as file:
        if file.read(1) == b"{":
            file.seek(0)
            return _session(model, _parsed(path, file.read(MAX_JSON + 1)), path)
        try:
            archive = zipfile.ZipFile(file)
            chat = archive.getinfo(CHAT)
            _check_member(path, chat, min(chat.file_size, MAX_JSON))
            data = _parsed(path, archive.read(chat))
        except BROKEN as error:
            if isinstance(error, InvalidRequest):
                raise
            raise InvalidRequest(f"{path}: is no saved chat, or a broken one: {error}") from None
        session = _session(model, data, path)
        session._salt = secrets.randbits(63) | 1
        try:
            _restore(path, model, session, data.get("kv"), archive)
        except (*BROKEN, OutOfMemory) as error:
            notice(f"{path}: what was computed is read again: {error}")
    return session


def _chat(session: Session, kv: dict[str, Any] | None) -> bytes:
    options = {name: value for name, value in session.options.items() if name in OPTIONS}
    if options.get("sampling") is not None:
        options["sampling"] = {name: value for name, value in asdict(options["sampling"]).items() if value is not None}
    chat = {
        "format": FORMAT,
        "version": VERSION,
        "messages": session.messages,
        "options": options,
        "kv": kv,
    }
    return re.sub("[\ud800-\udfff]", "\ufffd", json.dumps(chat, ensure_ascii=False)).encode()


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe without a writer would wait for ever
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise InvalidRequest(f"{path}: is no regular file")
    with open(number, "rb") as file:
        yield file


def _check_member(path: Path, member: zipfile.ZipInfo, n_bytes: int) -> None:
    """Raises InvalidRequest where a member is compressed, or not so long."""
    if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
        raise InvalidRequest(f"{path}: {member.filename} is compressed")
    if member.file_size != n_bytes:
        raise InvalidRequest(f"{path}: {member.filename} has {member.file_size} bytes, expected {n_bytes}")


def _parsed(path: Path, data: bytes) -> dict[str, Any]:
    if len(data) > MAX_JSON:
        raise InvalidRequest(f"{path}: {CHAT} has more than {MAX_JSON} bytes")
    try:
        chat = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: {CHAT}: {error}") from None
    if not isinstance(chat, dict) or chat.get("format") != FORMAT:
        raise InvalidRequest(f'{path}: is no saved chat: "format" is not "{FORMAT}"')
    if chat.get("version") != VERSION:
        raise InvalidRequest(f"{path}: version is {chat.get('version')!r}, this build reads {VERSION}")
    return chat


def _session(model: Model, chat: Mapping[str, Any], path: Path) -> Session:
    """The messages and options of a file, checked."""
    try:
        session = model.session(**_options(chat.get("options", {})))
        session.messages[:] = _messages(chat.get("messages"))
        if session.messages:
            model.chat_tokens(session.messages)
    except InvalidRequest as error:
        raise InvalidRequest(f"{path}: {error}") from None
    return session


def _messages(messages: Any) -> list[Message]:
    if not isinstance(messages, list):
        raise InvalidRequest("messages is no list")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(f"messages has {len(messages)} entries; at most {MAX_MESSAGES} are allowed")
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"messages[{i}] is {type(message).__name__}, expected a role and a content")
        if message.get("role") not in ROLES:
            raise InvalidRequest(f"messages[{i}].role is {message.get('role')!r}, expected one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise InvalidRequest(f"messages[{i}].content is no string")
    return messages


def _options(options: Any) -> dict[str, Any]:
    if not isinstance(options, dict) or not set(options) <= set(OPTIONS):
        raise InvalidRequest(f"options: expected an object with {', '.join(OPTIONS)}")
    known: dict[str, Any] = dict(options)
    if known.get("sampling") is not None:
        known["sampling"] = _sampling(known["sampling"])
    for name, largest in (("seed", 2**64 - 1), ("max_tokens", 2**63 - 1)):
        if known.get(name) is not None:
            check_number(f"options.{name}", known[name], int, 0, largest)
    stop = known.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
        raise InvalidRequest("options.stop: expected a list of strings")
    known["stop"] = tuple(stop)
    StopStrings(known["stop"])
    if not isinstance(known.get("ignore_eos", False), bool):
        raise InvalidRequest("options.ignore_eos: expected true or false")
    return known


def _sampling(given: Any) -> Sampling:
    try:
        fields = dict(given)
        if fields.get("logit_bias") is not None:
            fields["logit_bias"] = {int(token): bias for token, bias in dict(fields["logit_bias"]).items()}
        return Sampling(**fields)
    except InvalidRequest:
        raise
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"options.sampling: {error}") from None


def _restore(path: Path, model: Model, session: Session, kv: Any, archive: zipfile.ZipFile) -> None:
    """Put the keys and values of a file into the model's cache. Raises InvalidRequest where they are not what this
    model would compute, OutOfMemory, what zipfile raises."""
    if kv is None:
        return
    if not isinstance(kv, dict) or not isinstance(kv.get("computed_by"), dict):
        raise InvalidRequest('"kv" is no object with tokens, held_from and computed_by')
    mine, theirs = model.computed_by, kv["computed_by"]
    for name in mine:
        if theirs.get(name) != mine[name]:
            raise InvalidRequest(f"it was computed with {name} {str(theirs.get(name))[:80]}, here is {mine[name]}")
    ids, held_from = kv.get("tokens"), kv.get("held_from")
    n = len(ids) if isinstance(ids, list) else 0
    if not n or n % PAGE or n > model.ctx or session.tokens[:n] != ids:
        raise InvalidRequest("the messages do not make its tokens in this context")
    if type(held_from) is not int or not 0 <= held_from <= n // PAGE:
        raise InvalidRequest(f"held_from is {held_from!r}, expected 0 to {n // PAGE}")
    with put_back(model._engine, model.windows, ids, session._salt, held_from) as prefix:
        member = archive.getinfo(KV)
        _check_member(path, member, sum(part.n_bytes for part in prefix.parts))
        with archive.open(member) as file:
            for part in prefix.parts:
                part.write(file.read(part.n_bytes))
            file.read(1)  # here zipfile compares the checksum
