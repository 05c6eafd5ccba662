"""Commands that change what was said, or show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemmart.errors import GemmartError, InvalidRequest

if TYPE_CHECKING:
    from gemmart.chat.loop import Chat

ROLES = ("user", "assistant", "system")
PREVIEW = 60
LISTED = 40
"""How many messages /context lists, those last said."""


def clear(chat: Chat, _: str) -> None:
    """Forget the conversation, except the system prompt.
    Files that wait to go with the next message are dropped too; what /push remembered stays."""
    chat.restart(chat.system)


def system(chat: Chat, text: str) -> None:
    """Set the system prompt and begin anew, or show it.
    /system "" removes it."""
    if not text:
        chat.say(chat.system if chat.system is not None else "there is no system prompt")
        return
    chat.restart(None if text == '""' else text)


def undo(chat: Chat, _: str) -> None:
    """Forget the last message and its answer."""
    if any(message["role"] == "user" for message in chat.talk.messages):
        chat.talk.undo()
    else:
        chat.say("nothing to undo")


def forget(chat: Chat, _: str) -> None:
    """Forget the oldest message and its answer, for room.
    The system prompt stays. What is left is read anew with the next message, so the answers are those to it alone."""
    if any(message["role"] == "user" for message in chat.talk.messages):
        chat.talk.forget()
        chat.note(used(chat))
    else:
        chat.say("nothing to forget")


def regenerate(chat: Chat, _: str) -> None:
    """Answer the last message again, with a new seed."""
    chat.answer(lambda: chat.talk.retry(seed=None))


def edit(chat: Chat, text: str) -> None:
    """Change your last message and have it answered anew.
    Without TEXT it stands at the prompt, to be edited there, or with Ctrl-X Ctrl-E in $EDITOR; left empty, all stays as
    it was."""
    last = next((message["content"] for message in reversed(chat.talk.messages) if message["role"] == "user"), None)
    if last is None:
        raise InvalidRequest("there is no message of yours to edit")
    if not text:
        if not chat.reader.can_edit:
            raise InvalidRequest("/edit: here it needs the new text: /edit TEXT")
        try:
            text = chat.read(default=str(last))
        except (EOFError, KeyboardInterrupt):
            return
    if text.strip():
        chat.answer(lambda: chat.talk.retry(text))


def context(chat: Chat, _: str) -> None:
    """Show how full the context is, message by message."""
    messages, count = chat.talk.messages, chat.model.tokenize
    counts = [len(count(str(message["content"]))) for message in messages]
    first = max(0, len(messages) - LISTED)
    lines = [f"… {first} earlier messages: {sum(counts[:first])} tokens"] if first else []
    for message, n in list(zip(messages, counts, strict=True))[first:]:
        text = " ".join(str(message["content"]).split())
        text = text[: PREVIEW - 1] + "…" if len(text) > PREVIEW else text
        lines.append(f"{message['role']:9} {n:6}  {text}")
    lines += [f"{'waiting':9} {len(count(upload.block)):6}  {upload.name}" for upload in chat.uploads]
    n_used = chat.n_used()
    if messages and n_used:
        lines.append(f"{'format':9} {max(0, n_used - sum(counts)):6}  marks of turns")
    chat.say("\n".join([*lines, used(chat)]))


def push(chat: Chat, _: str) -> None:
    """Remember this position, to come back to it with /pop."""
    chat.stack.append(list(chat.talk.messages))
    chat.note(f"position {len(chat.stack)}: {used(chat)}")


def pop(chat: Chat, _: str) -> None:
    """Return to the position remembered last."""
    if not chat.stack:
        raise InvalidRequest("no position is remembered; /push remembers one")
    chat.talk.messages[:] = chat.stack.pop()
    chat.note(used(chat))


def stack(chat: Chat, _: str) -> None:
    """List the remembered positions."""
    for i, messages in enumerate(chat.stack, 1):
        last = " ".join(str(messages[-1]["content"]).split())[:PREVIEW] if messages else "the beginning"
        chat.say(f"{i}: {len(messages)} messages, up to: {last}")
    chat.say(f"now: {used(chat)}" if chat.stack else "no position is remembered")


def manual(chat: Chat, state: str) -> None:
    """Write the messages of every role yourself.
    The prompt names the role, and an empty line changes it: user, assistant, system. /regen has the model answer the
    last message of the user; /manual off ends it."""
    if state not in ("", "on", "off"):
        raise InvalidRequest(f"/manual {state}: expected on or off")
    on = state == "on" or (not state and chat.role is None)
    chat.role = ROLES[0] if on else None
    chat.note("manual: an empty line changes the role, /manual off ends it" if on else "the model answers")


def next_role(role: str) -> str:
    return ROLES[(ROLES.index(role) + 1) % len(ROLES)]


def write_as(chat: Chat, role: str, text: str) -> None:
    """Add a message of a role; it stays out where the model's template refuses it. Raises GemmartError."""
    chat.talk.messages.append({"role": role, "content": text})
    try:
        chat.model.chat_tokens(chat.talk.messages)
    except GemmartError:
        chat.talk.messages.pop()
        raise
    chat.role = "assistant" if role == "user" else "user"


def used(chat: Chat) -> str:
    return f"{chat.n_used()} of {chat.model.ctx} tokens"
