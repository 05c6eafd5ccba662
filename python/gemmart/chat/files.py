"""Commands that read or write files, and the clipboard."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemmart.chat import clipboard
from gemmart.chat import history as histories
from gemmart.errors import InvalidRequest

if TYPE_CHECKING:
    from gemmart.chat.loop import Chat

MAX_UPLOAD = 8 << 20
"""Bytes; a context of a million tokens holds about four of them."""
SHOWN_HISTORY = 20


@dataclass(frozen=True, slots=True)
class Upload:
    """A file that goes with the next message."""

    name: str
    block: str  # its text as a fenced block with its name


def path_of(text: str, command: str) -> Path:
    if not text:
        raise InvalidRequest(f"{command}: needs a file: {command} FILE")
    return Path(os.path.expanduser(text.strip("'\"")))


def upload(chat: Chat, text: str) -> None:
    """Send a text file along with your next message."""
    path = path_of(text, "/upload")
    data = read_file(path)
    try:
        content = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path}: is no text: byte {error.start} is not UTF-8") from None
    if "\0" in content:
        raise InvalidRequest(f"{path}: is no text: it has a zero byte")
    found = Upload(path.name, fenced(path, content))
    n = len(chat.model.tokenize(found.block))
    room = chat.model.ctx - chat.n_used() - sum(len(chat.model.tokenize(upload.block)) for upload in chat.uploads)
    if n >= room:
        raise InvalidRequest(f"{path}: has {n} tokens, but only {max(0, room)} of {chat.model.ctx} are left")
    chat.uploads.append(found)
    chat.note(f"{path.name}: {len(content.splitlines())} lines, {n} tokens; it goes with your next message")


def read_file(path: Path) -> bytes:
    """A regular file of bearable size. Raises InvalidRequest."""
    try:
        if not path.is_file():
            raise InvalidRequest(f"{path}: {'is no regular file' if path.exists() else 'there is no such file'}")
        with path.open("rb") as file:
            data = file.read(MAX_UPLOAD + 1)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}") from None
    if len(data) > MAX_UPLOAD:
        raise InvalidRequest(f"{path}: has {path.stat().st_size} bytes; at most {MAX_UPLOAD} can be sent along")
    return data


def fenced(path: Path, content: str) -> str:
    """Text between fences longer than any in it."""
    ticks = max((len(run) for run in re.findall("`{3,}", content)), default=2)
    fence = "`" * (ticks + 1)
    return f"{path.name}:\n\n{fence}{path.suffix.removeprefix('.')}\n{content.rstrip()}\n{fence}"


def dump(chat: Chat, text: str) -> None:
    """Show the raw conversation, or write it to a new FILE.
    It is what the model reads, with its control tokens."""
    raw = chat.model.detokenize(chat.talk.tokens, special=True)
    if not text:
        chat.output.write(raw)
        chat.output.end_line()
        return
    path = path_of(text, "/dump")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(raw)
    except FileExistsError:
        raise InvalidRequest(f"/dump: {path} exists; it is not replaced") from None
    except OSError as error:
        raise InvalidRequest(f"/dump: {path}: {error.strerror}") from None
    chat.note(f"{path}: {len(raw)} characters")


def save(chat: Chat, text: str) -> None:
    """Save the conversation, to go on with it by /load.
    Its settings are saved too, and what the model computed, so that it need not be read again; a FILE whose name ends
    in .json has the messages and settings alone."""
    from gemmart import saved

    path = path_of(text, "/save")
    if path.exists() and not saved.is_saved(path):
        raise InvalidRequest(f"/save: {path} exists and is no saved chat; it is not replaced")
    try:
        n = chat.talk.save(path)
        size = path.stat().st_size
    except OSError as error:
        raise InvalidRequest(f"/save: {path}: {error.strerror}") from None
    computed = f", keys and values of {n} tokens" if n else ""
    chat.note(f"{path}: {len(chat.talk.messages)} messages{computed}, {size / 2**20:,.1f} MiB")


def load(chat: Chat, text: str) -> None:
    """Go on with a saved conversation instead of this one."""
    session = chat.model.restore(path_of(text, "/load"), notice=chat.messages.warn)
    chat.adopt(session)


def copy(chat: Chat, _: str) -> None:
    """Copy the last answer to the clipboard."""
    if chat.session is not None:
        answers = (message["content"] for message in reversed(chat.talk.messages) if message["role"] == "assistant")
        text = next(answers, None)
    else:
        text = chat.last.text if chat.last else None
    if not text:
        raise InvalidRequest("there is no answer to copy")
    chat.say(clipboard.copy(str(text)))


def history(chat: Chat, what: str) -> None:
    """Show what was typed last.
    import takes in an old ~/.llamafile_history, once."""
    path = chat.history
    if path is None:
        raise InvalidRequest("no history is kept (--no-history)")
    if what not in ("", "import"):
        raise InvalidRequest(f"/history {what}: expected import")
    try:
        if what:
            n = histories.import_llamafile(path)
            chat.say(
                "~/.llamafile_history was read before" if n is None else f"{n} lines; offered from the next start on"
            )
            return
        chat.say("\n".join([*histories.entries(path)[-SHOWN_HISTORY:], f"kept in {path}"]))
    except OSError as error:
        raise InvalidRequest(f"{error.filename}: {error.strerror}") from None
