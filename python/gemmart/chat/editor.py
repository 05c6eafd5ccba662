"""The prompt on a terminal: editing, history, completion."""

from __future__ import annotations

from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.filters import completion_is_selected, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import ColorDepth
from prompt_toolkit.output.defaults import create_output
from prompt_toolkit.styles import Style

from gemmart.chat.completion import Completer
from gemmart.chat.history import prepare
from gemmart.chat.reader import MORE, Complete, finished, unfinished
from gemmart.terminal import Messages

STYLE = Style.from_dict({"rprompt": "ansibrightblack noinherit", "prompt": "bold", "more": "ansibrightblack"})


class LineEditor:
    """Enter sends; Alt-Enter and Ctrl-J add a line, as does Enter after a \\ or inside of triple quotes."""

    interactive = can_edit = True

    def __init__(self, messages: Messages, history: Path | None, complete: Complete) -> None:
        self._session: PromptSession[str] = PromptSession(
            multiline=True,
            history=_history(history, messages),
            completer=Completer(complete),
            complete_while_typing=False,
            enable_open_in_editor=True,
            tempfile_suffix=".md",
            key_bindings=_keys(),
            style=STYLE,
            color_depth=None if messages.color else ColorDepth.DEPTH_1_BIT,
            prompt_continuation=lambda width, line, wrapped: [("class:more", MORE if not wrapped else "")],
            output=create_output(always_prefer_tty=True),
        )

    def read(self, prompt: str, gauge: str, default: str = "") -> str:
        message: StyleAndTextTuples = [("class:prompt", prompt)]
        return finished(self._session.prompt(message, rprompt=[("", gauge)], default=default))


def _history(path: Path | None, messages: Messages) -> History:
    if path is None:
        return InMemoryHistory()
    try:
        prepare(path)
    except OSError as error:
        messages.warn(f"no history is kept: {path}: {error.strerror}")
        return InMemoryHistory()
    return FileHistory(path)


def _keys() -> KeyBindings:
    keys = KeyBindings()

    @keys.add("enter", filter=has_focus("DEFAULT_BUFFER") & ~completion_is_selected)
    def send(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if unfinished(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter")
    @keys.add("c-j")
    def add_line(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c")
    def interrupt(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return keys
