"""The chat itself: read, answer or obey, and again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from gemmart.chat import commands, conversation
from gemmart.chat.files import Upload
from gemmart.chat.reader import Reader, is_dumb, keys_unseen, open_reader
from gemmart.errors import ContextOverflow, GemmartError, InvalidRequest, TemplateError
from gemmart.results import Completion
from gemmart.sampling import Sampling
from gemmart.summary import without_summary
from gemmart.terminal import SHOWN, Messages, Output, finish, on_gpus, speeds, why_cut

if TYPE_CHECKING:
    from gemmart import Model, Session, Stream

PROMPT = ">>> "
MAKE_ROOM = "/forget, /undo or /clear makes room, or start again with a larger -c"


class Chat:
    """One conversation. `options` are those of `Model.stream()`; `system` is for models with a chat template only."""

    def __init__(
        self,
        model: Model,
        options: dict[str, Any],
        *,
        system: str | None,
        output: Output,
        messages: Messages,
        history: Path | None = None,
        overflow: str = "error",
        server_url: str | None = None,
        resume: Path | None = None,
        typed: Mapping[str, Any] = MappingProxyType({}),
        load_model: Callable[[str], Model] | None = None,
    ) -> None:
        """history: the file in which typed lines are kept, if any. overflow: as in Model.session(). server_url: of the
        server that serves this model beside the chat. resume: a saved conversation to go on with, with its own options
        but for those in `typed`. load_model: what /model loads others with. Raises as Model.restore() does."""
        self.model = model
        self.options = options
        self.output = output
        self.messages = messages
        self.history = history
        self.load_model = load_model
        self.last: Completion | None = None
        self.stack: list[list[Any]] = []
        self.uploads: list[Upload] = []
        self.role: str | None = None  # whose messages the person writes by hand
        self.leaving = False
        self._given = model  # which others close
        self._overflow = overflow
        self._server_url = server_url
        self.session: Session | None = None
        if model.has_template:
            self.session = model.session(system, overflow=overflow)
            self.session.options = options
        self.reader: Reader = open_reader(output, messages, history, lambda line: commands.complete(self, line))
        if resume is not None:
            if self.session is None:
                raise InvalidRequest(f"--resume: {model.info.name} is a base model, which has no conversations")
            self.adopt(model.restore(resume, notice=messages.warn), typed)

    # --- what the commands use ---

    @property
    def talk(self) -> Session:
        """The conversation of a chat model."""
        assert self.session is not None
        return self.session

    @property
    def system(self) -> str | None:
        first = self.talk.messages[:1]
        return without_summary(str(first[0]["content"])) or None if first and first[0]["role"] == "system" else None

    def say(self, text: str) -> None:
        self.messages.say(text.translate(SHOWN))

    def note(self, text: str) -> None:
        self.messages.note(text.translate(SHOWN))

    def n_used(self) -> int:
        """Tokens of the conversation; 0 where there is none, or only what the template does not take alone."""
        try:
            return len(self.talk.tokens) if self.session is not None else 0
        except TemplateError:
            return 0

    def restart(self, system: str | None) -> None:
        """A new conversation."""
        self._open([] if system is None else [{"role": "system", "content": system}])
        self.uploads.clear()
        self.note("the conversation begins anew")

    def adopt(self, session: Session, typed: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Go on with a restored conversation and its options, but for those in `typed`."""
        saved = session.options
        if "sampling" in typed:
            wanted = {name: value for name, value in asdict(typed["sampling"]).items() if value is not None}
            typed = {**typed, "sampling": replace(saved.get("sampling") or Sampling(), **wanted)}
        self.options |= saved | dict(typed)
        session.options, session.overflow = self.options, self._overflow
        self.session = session
        self.note(f"{len(session.messages)} messages, {conversation.used(self)}")

    def use(self, model: Model) -> None:
        """Go on with another model."""
        old, messages = self.model, list(self.talk.messages) if self.session is not None else []
        if messages:
            model.chat_tokens(messages)  # raises where its template refuses them
        self.model = model
        if model.has_template:
            self._open(messages)
        if self._server_url is not None and old is self._given:
            self.note(f"the server goes on with {old.info.name}")
        else:
            old.close()

    def banner(self) -> None:
        info = self.model.info
        formats = sorted(info.formats, key=lambda name: -info.formats[name])
        parts = [
            info.name,
            formats[0],
            *filter(None, [on_gpus(self.model.plan)]),
            f"CPU ({self.model.isa}), threads: {self.model.plan.threads}",
            f"context {self.model.ctx} tokens",
            *([self._server_url] if self._server_url else []),
        ]
        self.note(" · ".join(parts))
        if self.session is None:
            self.note("a base model: each line is completed as it stands; /help lists commands")
        else:
            self.note("/help lists commands")

    def read(self, prompt: str = PROMPT, default: str = "") -> str:
        gauge = f"{self.n_used()}/{self.model.ctx}" if self.session is not None else ""
        return self.reader.read(prompt, gauge, default)

    # --- the loop ---

    def run(self) -> int:
        """Read and answer until the end; returns the exit code."""
        try:
            if self.reader.interactive:
                self.banner()
            return self._loop()
        finally:
            if self.model is not self._given:
                self.model.close()

    def _loop(self) -> int:
        while not self.leaving:
            try:
                text = self.read(f"{self.role} {PROMPT}" if self.role else PROMPT)
            except EOFError:
                return 0
            except KeyboardInterrupt:
                return 130
            try:
                if text.startswith("/"):
                    commands.do(self, text)
                elif self._turn(text) and not self.reader.interactive:
                    return 130
            except GemmartError as error:
                self.output.end_line()
                if not self.reader.interactive:
                    raise
                self.say(f"error: {error}")
                if isinstance(error, ContextOverflow) and self.session is not None:
                    self.note(MAKE_ROOM)
            except KeyboardInterrupt:
                self.note("[stopped]")
                if not self.reader.interactive:
                    return 130
        return 0

    def _turn(self, text: str) -> bool:
        """What a line of text means; returns whether Ctrl-C stopped the answer."""
        if self.role is not None:
            if text.strip():
                conversation.write_as(self, self.role, text)
            else:
                self.role = conversation.next_role(self.role)
            return False
        if not text.strip():
            return False
        if self.session is None:
            return self.answer(lambda: self.model.stream(text, **self.options))
        whole = "\n\n".join([*(upload.block for upload in self.uploads), text])
        talk = self.session
        stopped = self.answer(lambda: talk.stream(whole))
        if any(message["content"] == whole for message in talk.messages[-2:]):  # else the turn was dropped
            self.uploads.clear()
        return stopped

    def answer(self, start: Callable[[], Stream]) -> bool:
        """Write an answer as it comes; returns whether Ctrl-C stopped it. Raises GemmartError."""
        with keys_unseen() if self.reader.interactive else nullcontext(), self.messages.progress() as progress:
            stream = start()
            self._tell_forgotten(stream)
            stream.progress = progress
            completion = self._write(stream)
        self.last = completion
        if getattr(stream, "summary", None) == "" and completion.finish_reason != "cancelled":
            self.say("[the model wrote no summary: they are forgotten]")
        stopped = completion.finish_reason == "cancelled"
        if stopped and not completion.text and self.session is not None:
            self.note("[stopped while reading; the turn is dropped]")
        elif stopped:
            self.note("[stopped]")
        elif completion.finish_reason == "length":
            max_tokens = self.options["max_tokens"]
            self.say(f"[cut: {why_cut(completion, max_tokens, self.model.ctx)}]")
            if len(completion.tokens) != max_tokens and self.session is not None:
                self.note(MAKE_ROOM)
        if self.reader.interactive:
            self.note(speeds(completion))
        return stopped

    def _tell_forgotten(self, stream: Stream) -> None:
        n = getattr(stream, "forgotten", 0)
        if n:
            done = "become a summary" if self._overflow == "summarise" else "are forgotten"
            self.say(f"[the context is full: the {n} oldest messages {done}]")

    def _write(self, stream: Stream) -> Completion:
        if self.session is None or not self.output.is_terminal or is_dumb():
            try:
                return self.output.answer(stream)
            finally:
                self.output.end_line()
        from gemmart.chat.markdown import MarkdownWriter

        writer = MarkdownWriter(self.output.send, color=self.output.color)
        try:
            return finish(stream, writer.write)
        finally:
            writer.finish()

    def _open(self, messages: list[Any]) -> None:
        self.session = self.model.session(overflow=self._overflow)
        self.session.messages[:] = messages
        self.session.options = self.options
