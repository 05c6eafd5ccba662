"""The chat in the terminal: a line is a turn, on a base model a text to complete; one that begins with / a command."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gemmart.errors import ContextOverflow, GemmartError
from gemmart.results import Completion
from gemmart.terminal import Messages, Output, from_bytes, speeds, why_cut

if TYPE_CHECKING:
    from gemmart import Model, Session

PROMPT = ">>> "
MAKE_ROOM = "/undo or /clear makes room, or start again with a larger -c"


class Chat:
    """One conversation. `options` are those of `Session.stream`; `system` is for models with a chat template only."""

    def __init__(
        self, model: Model, options: dict[str, Any], *, system: str | None, output: Output, messages: Messages
    ) -> None:
        self._model = model
        self._options = options
        self._output = output
        self._messages = messages
        self._session: Session | None = model.session(system) if model.has_template else None
        self._last: Completion | None = None
        self._interactive = sys.stdin.isatty()
        self._commands: dict[str, Callable[[str], bool]] = {
            "/help": self._help,
            "/stats": self._stats,
            "/exit": self._exit,
            "/bye": self._exit,
        }
        if self._session is not None:
            self._commands |= {"/clear": self._clear, "/undo": self._undo, "/system": self._system}

    def run(self) -> int:
        """Read and answer until the end; returns the exit code."""
        if self._interactive:
            self._banner()
        while True:
            try:
                line = self._read()
            except EOFError:
                return 0
            except KeyboardInterrupt:
                self._messages.say("")
                if self._typed():
                    continue
                return 130
            if line.startswith("/"):
                if self._command(line):
                    return 0
            elif line.strip() and self._turn(line) and not self._interactive:
                return 130

    def _banner(self) -> None:
        info = self._model.info
        formats = sorted(info.formats, key=lambda name: -info.formats[name])
        device = f"CPU ({self._model.isa}), threads: {self._model.plan.threads}"
        self._messages.note(f"{info.name} · {formats[0]} · {device} · context {self._model.ctx} tokens")
        if self._session is None:
            self._messages.note("a base model: each line is completed as it stands; /help lists commands")
        else:
            self._messages.note("/help lists commands")

    def _read(self) -> str:
        """The next line. Raises EOFError at the end, KeyboardInterrupt at Ctrl-C."""
        if not self._interactive:
            data = sys.stdin.buffer.readline()
            if not data:
                raise EOFError
            return from_bytes(data, "stdin", self._messages).rstrip("\r\n")
        import readline  # noqa: F401  gives input() its line editing

        try:
            if self._output.is_terminal:
                return input(PROMPT)
            print(PROMPT, end="", file=sys.stderr, flush=True)  # stdout is for answers
            return input()
        except EOFError:
            self._messages.say("")
            raise

    def _typed(self) -> bool:
        """Whether there was something on the line at which Ctrl-C was pressed."""
        if not self._interactive:
            return False
        import readline

        return bool(readline.get_line_buffer())

    def _turn(self, text: str) -> bool:
        """Answer one line; returns whether Ctrl-C stopped it."""
        try:
            talk = self._model if self._session is None else self._session
            completion = self._output.answer(talk.stream(text, **self._options))
        except GemmartError as error:
            self._output.end_line()
            if not self._interactive:
                raise
            self._messages.say(f"error: {error}")
            if isinstance(error, ContextOverflow) and self._session is not None:
                self._messages.note(MAKE_ROOM)
            return False
        self._output.end_line()
        self._last = completion
        stopped = completion.finish_reason == "cancelled"
        if stopped and not completion.text and self._session is not None:
            self._session.undo()
            self._messages.note("[stopped while reading; the turn is dropped]")
        elif stopped:
            self._messages.note("[stopped]")
        elif completion.finish_reason == "length":
            max_tokens = self._options["max_tokens"]
            self._messages.say(f"[cut: {why_cut(completion, max_tokens, self._model.ctx)}]")
            if len(completion.tokens) != max_tokens and self._session is not None:
                self._messages.note(MAKE_ROOM)
        if self._interactive:
            self._messages.note(speeds(completion))
        return stopped

    def _command(self, line: str) -> bool:
        """Do what a line that begins with / says; returns whether to leave."""
        name, _, rest = line.partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._messages.say(f"{name}: no such command; /help lists them. A blank before the / makes it text.")
            return False
        return command(rest.strip())

    def _help(self, _: str) -> bool:
        """list the commands"""
        for name, command in self._commands.items():
            self._messages.say(f"{name:8} {command.__doc__}")
        return False

    def _stats(self, _: str) -> bool:
        """speed and seed of the last answer"""
        last = self._last
        self._messages.say(f"{speeds(last)} · seed {last.seed}" if last else "no answer yet")
        return False

    def _exit(self, _: str) -> bool:
        """leave"""
        return True

    def _clear(self, _: str) -> bool:
        """forget the conversation, except the system prompt"""
        assert self._session is not None
        first = self._session.messages[:1]
        self._restart(first[0]["content"] if first and first[0]["role"] == "system" else None)
        return False

    def _undo(self, _: str) -> bool:
        """forget the last turn and its answer"""
        assert self._session is not None
        if any(message["role"] == "user" for message in self._session.messages):
            self._session.undo()
        else:
            self._messages.say("nothing to undo")
        return False

    def _system(self, text: str) -> bool:
        """TEXT: set the system prompt and begin anew; without TEXT: none"""
        self._restart(text or None)
        return False

    def _restart(self, system: str | None) -> None:
        self._session = self._model.session(system)
        self._messages.note("the conversation begins anew")
