"""The commands of the chat: one row each, whose function's docstring is its help."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gemmart.chat import conversation, files, model
from gemmart.chat.reader import PATHS
from gemmart.errors import InvalidRequest

if TYPE_CHECKING:
    from gemmart.chat.loop import Chat


@dataclass(frozen=True, slots=True)
class Command:
    """`do(chat, rest of the line)` raises GemmartError where it cannot."""

    names: tuple[str, ...]
    usage: str
    do: Callable[[Chat, str], None]
    words: Callable[[Chat], Iterable[str]] = lambda chat: ()  # what Tab offers after the name
    for_base: bool = False  # whether a base model, which has no conversation, has it too

    @property
    def summary(self) -> str:
        return (self.do.__doc__ or "").partition("\n")[0].rstrip(".")

    @property
    def call(self) -> str:
        return f"{', '.join(self.names)} {self.usage}".rstrip()


def available(chat: Chat) -> list[Command]:
    return [command for command in COMMANDS if chat.session is not None or command.for_base]


def find(chat: Chat, name: str) -> Command:
    """The command of that name, with its slash. Raises InvalidRequest naming the nearest one."""
    known = {name: command for command in available(chat) for name in command.names}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?" if near else "/help lists them."
    raise InvalidRequest(f"{name}: no such command; {hint} A blank before the / makes it text.")


def do(chat: Chat, line: str) -> None:
    """Do what a line that begins with / says. Raises GemmartError."""
    name, _, rest = line.partition(" ")
    find(chat, name).do(chat, rest.strip())


def complete(chat: Chat, line: str) -> Iterable[str]:
    """A Complete: the commands, and what their rows say."""
    name, blank, _ = line.partition(" ")
    commands = available(chat)
    if not blank:
        return [name for command in commands for name in command.names]
    return next((command.words(chat) for command in commands if name in command.names), ())


def help_(chat: Chat, name: str) -> None:
    """List the commands, or explain one."""
    if name:
        command = find(chat, name if name.startswith("/") else f"/{name}")
        lines = [line.strip() for line in (command.do.__doc__ or "").splitlines()]
        chat.say("\n".join([command.call, *lines]).rstrip())
        return
    rows = [(command.call, command.summary) for command in available(chat)]
    width = max(len(call) for call, _ in rows)
    chat.say("\n".join(f"{call:{width}}  {summary}" for call, summary in rows))
    if chat.reader.interactive:
        chat.say(
            'Alt-Enter or Ctrl-J adds a line, """ opens and closes a block; Ctrl-C stops an answer, Ctrl-D leaves.'
        )


def leave(chat: Chat, _: str) -> None:
    """Leave."""
    chat.leaving = True


def paths(_: Chat) -> Iterable[str]:
    return (PATHS,)


def names(chat: Chat) -> Iterable[str]:
    return [name.removeprefix("/") for command in available(chat) for name in command.names]


COMMANDS = (
    Command(("/help", "/?"), "[COMMAND]", help_, names, for_base=True),
    Command(("/clear",), "", conversation.clear),
    Command(("/context",), "", conversation.context),
    Command(("/stats",), "", model.stats, for_base=True),
    Command(("/undo",), "", conversation.undo),
    Command(("/forget",), "", conversation.forget),
    Command(("/regen",), "", conversation.regenerate),
    Command(("/edit",), "[TEXT]", conversation.edit),
    Command(("/push",), "", conversation.push),
    Command(("/pop",), "", conversation.pop),
    Command(("/stack",), "", conversation.stack),
    Command(("/manual",), "[on|off]", conversation.manual, lambda chat: ("on", "off")),
    Command(("/upload",), "FILE", files.upload, paths),
    Command(("/dump",), "[FILE]", files.dump, paths),
    Command(("/save",), "FILE", files.save, paths),
    Command(("/load",), "FILE", files.load, paths),
    Command(("/copy",), "", files.copy, for_base=True),
    Command(("/system",), "[TEXT]", conversation.system),
    Command(("/set",), "[NAME [VALUE]]", model.set_, model.set_names, for_base=True),
    Command(("/model",), "[MODEL]", model.switch, model.names, for_base=True),
    Command(("/template",), "", model.template),
    Command(("/history",), "[import]", files.history, lambda chat: ("import",), for_base=True),
    Command(("/exit", "/bye"), "", leave, for_base=True),
)
