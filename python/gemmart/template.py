"""Chat templates: from messages to the text that a model was trained on, in which a user can forge nothing.

A rendered chat is a list of pieces: control tokens, and the plain text between them, which is to be encoded as plain
text. Gemma's format is our own code; any other template is the file's own, rendered in a worker process under limits
(`template_worker.py`).
"""

from __future__ import annotations

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import markupsafe

from gemmart.contents import text_of
from gemmart.errors import InvalidRequest, TemplateError, TemplateLimit
from gemmart.worker import Worker, WorkerEnded

log = logging.getLogger("gemmart")

ROLES = ("system", "developer", "user", "assistant", "tool")
SYSTEM_STYLES = ("fold", "turn", "user")
MAX_SOURCE = 1 << 20  # bytes
RENDER_TIMEOUT = 10.0  # seconds; the worker ends itself after one second of computing
FIELDS = frozenset(("role", "content", "name", "tool_calls", "tool_call_id", "type", "function", "arguments"))
"""Names that the API gives, not a user."""
NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]

Message = Mapping[str, Any]

# Templates that may be asked for by name.
BUILT_IN = {
    "gemma": (  # of which Gemma's own code needs only to know that it is Gemma's
        "{{ bos_token }}{% for message in messages %}<start_of_turn>"
        "{{ 'model' if message['role'] == 'assistant' else message['role'] }}\n{{ message['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    "chatml": (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}


def template_source(value: str) -> str:
    """The Jinja source that `value` means: a name of BUILT_IN, a file's path, or the source itself, which has braces.
    Raises InvalidRequest for anything else."""
    if value in BUILT_IN:
        return BUILT_IN[value]
    if "{" in value:
        return value
    try:
        return Path(value).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InvalidRequest(
            f"template: {value!r} is not one of {', '.join(BUILT_IN)}, nor Jinja source, nor a file that can be read: "
            f"{reason}"
        ) from None


class Piece(NamedTuple):
    """A part of a rendered chat: one control token, or plain text."""

    text: str
    control: bool


class ChatTemplate(ABC):
    """How a model wants a chat written."""

    @staticmethod
    def for_model(
        source: str | None,
        architecture: str,
        *,
        bos: str,
        eos: str,
        control: Iterable[str],
        system_style: str = "fold",
        strict_roles: bool = False,
    ) -> ChatTemplate | None:
        """The template of a model file, or None for a base model without one.

        `source` is the file's template, `bos` and `eos` the texts of these tokens ("" if there is none), `control`
        those of all control tokens. For Gemma, `system_style` says where system messages go: "fold" into the next user
        turn, "turn" a system turn, "user" a user turn of their own; `strict_roles` refuses what Google's template
        refuses. Other templates decide for themselves. Raises TemplateError or TemplateLimit for a template that does
        not compile, reaches out or exceeds a limit.
        """
        if system_style not in SYSTEM_STYLES:
            raise InvalidRequest(f"system_style is {system_style!r}, expected one of {', '.join(SYSTEM_STYLES)}")
        if source is None:
            return None
        if architecture.startswith("gemma") and "<start_of_turn>" in source:
            return GemmaTemplate(bos, system_style, strict_roles)
        return FileTemplate(source, bos, eos, control)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: Sequence[Any] = (),
    ) -> list[Piece]:
        """The chat in pieces, the beginning-of-sequence token included where the template writes it.

        A message has a "role" (system, developer, user, assistant, tool) and a "content" (a string or a list of text
        parts). `continue_final`: the last message, the assistant's, stays open at its last character, to be gone on
        with. Raises InvalidRequest for another shape, TemplateError where the template refuses the messages."""
        checked = _checked(messages)
        if not continue_final:
            return self._render(checked, add_generation_prompt, tools)
        *before, last = checked
        if last["role"] != "assistant" or not last["content"]:
            where = f"messages[{len(before)}]"
            raise InvalidRequest(f"{where} is to be continued, but is no text of the assistant", where)
        if not before:
            raise InvalidRequest("messages has only the message that is to be continued", "messages")
        return [*self._render(before, True, tools), Piece(last["content"], False)]

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """The chat as one string, to be read by people: in it, typed control tokens look like real ones. Options as for
        render()."""
        return "".join(piece.text for piece in self.render(messages, **options))

    @abstractmethod
    def _render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, tools: Sequence[Any]
    ) -> list[Piece]:
        """render() for messages that _checked() has seen."""


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Copies of the messages whose role is known ("developer" is "system") and whose content is a string or, beside
    the assistant's tool calls, None."""
    if not messages:
        raise InvalidRequest("messages is empty; a chat needs at least one", "messages")
    checked = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidRequest(
                f"messages[{index}] is {type(message).__name__}, expected a role and a content", f"messages[{index}]"
            )
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidRequest(
                f"messages[{index}].role is {role!r}, expected one of {', '.join(ROLES)}", f"messages[{index}].role"
            )
        if content is not None or role != "assistant" or not message.get("tool_calls"):
            content = text_of(content, f"messages[{index}].content")
        checked.append({**message, "role": "system" if role == "developer" else role, "content": content})
    return checked


class GemmaTemplate(ChatTemplate):
    """The format of Gemma 1, 2 and 3: `<start_of_turn>ROLE⏎TEXT<end_of_turn>⏎`, stripped; the assistant is "model".

    Google's template refuses system messages and roles that do not alternate. Here, unless `strict_roles`, system
    messages go where `system_style` says, tool results into user turns, and neighbours of the same role become one turn
    with a blank line between.
    """

    def __init__(self, bos: str, system_style: str = "fold", strict_roles: bool = False) -> None:
        self._bos = bos
        self._system_style = system_style
        self._strict = strict_roles

    def _render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, tools: Sequence[Any]
    ) -> list[Piece]:
        if tools:
            raise TemplateError("Gemma's chat format has no place for tools")
        for index, message in enumerate(messages):
            if message["content"] is None:
                raise TemplateError(
                    f"messages[{index}] has only tool calls, for which Gemma's chat format has no place"
                )
        pieces = [Piece(self._bos, True)] if self._bos else []
        for role, text in self._google_turns(messages) if self._strict else self._turns(messages):
            pieces += [Piece("<start_of_turn>", True), Piece(f"{role}\n{text}", False)]
            pieces += [Piece("<end_of_turn>", True), Piece("\n", False)]
        if add_generation_prompt:
            pieces += [Piece("<start_of_turn>", True), Piece("model\n", False)]
        return pieces

    @staticmethod
    def _google_turns(messages: Sequence[Message]) -> list[tuple[str, str]]:
        if messages[0]["role"] == "system":
            raise TemplateError("System role not supported")
        for index, message in enumerate(messages):
            if (message["role"] == "user") != (index % 2 == 0):
                raise TemplateError("Conversation roles must alternate user/assistant/user/assistant/...")
        return [("model" if m["role"] == "assistant" else m["role"], m["content"].strip()) for m in messages]

    def _turns(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        if messages[0]["role"] == "assistant":
            log.warning(
                "the chat begins with an assistant message; Gemma was trained on chats that begin with the user"
            )
        turns: list[tuple[str, str, list[str]]] = []  # message role, turn role, texts
        folded: list[str] = []
        for message in messages:
            role, text = message["role"], message["content"].strip()
            if role == "system" and self._system_style == "fold":
                folded.append(text)
                continue
            if role == "system":
                turn = "system" if self._system_style == "turn" else "user"
            elif role == "assistant":
                turn = "model"
            else:
                role, turn = "user", "user"
            texts = [*folded, text] if role == "user" else [text]
            if role == "user":
                folded = []
            if turns and turns[-1][0] == role:
                turns[-1][2].extend(texts)
            else:
                turns.append((role, turn, texts))
        if folded:  # no user message follows
            if turns and turns[-1][0] == "user":
                turns[-1][2].extend(folded)
            else:
                turns.append(("user", "user", folded))
        return [(turn, "\n\n".join(filter(None, texts))) for _, turn, texts in turns]


class FileTemplate(ChatTemplate):
    """The template of a model file, in jinja2, as Hugging Face renders it.

    Text of messages and tools is inert: a noncharacter is put into what looks like a control token in it, or could
    become a part of one. So what looks like a control token in the rendered text is the template's own; then the
    noncharacter is taken out again."""

    def __init__(self, source: str, bos: str, eos: str, control: Iterable[str]) -> None:
        size = len(source.encode("utf-8", "replace"))
        if size > MAX_SOURCE:
            raise TemplateLimit(f"the chat template has {size} bytes, at most {MAX_SOURCE} are allowed")
        self._source = source
        self._tokens = {"bos_token": bos, "eos_token": eos}
        # One character cannot be taken apart; such a token stays text.
        self._control = sorted({text for text in control if len(text) > 1}, key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, self._control)) or r"(?!)")
        self._heads = {text[:n] for text in self._control for n in range(1, len(text))}
        self._tails = {text[n:] for text in self._control for n in range(1, len(text))}
        self._worker = _Worker()
        try:
            self.render([{"role": "user", "content": "Hello"}])
        except _Refused as refusal:  # it may want other messages
            log.info("%s", refusal)

    def _render(
        self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, tools: Sequence[Any]
    ) -> list[Piece]:
        try:
            typed = json.dumps([messages, list(tools)], ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"messages and tools must be what JSON can hold: {error}") from None
        mark = next((char for char in NONCHARACTERS if char not in typed), None)
        if mark is None:
            raise InvalidRequest("messages contain all noncharacters from U+FDD0 to U+FDEF", "messages")
        variables = {
            "messages": [{**self._inert(message, mark), "role": message["role"]} for message in messages],
            "tools": self._inert(list(tools), mark) or None,
            "add_generation_prompt": add_generation_prompt,
            **self._tokens,
        }
        text = self._worker.render(self._source, variables)
        pieces, done = [], 0
        for match in self._split.finditer(text):
            pieces += [Piece(text[done : match.start()].replace(mark, ""), False), Piece(match.group(), True)]
            done = match.end()
        pieces.append(Piece(text[done:].replace(mark, ""), False))
        return [piece for piece in pieces if piece.text]

    def _inert(self, value: Any, mark: str) -> Any:
        """`value` with every string in it made inert."""
        if isinstance(value, Mapping):
            return {
                key if key in FIELDS else self._inert(str(key), mark): self._inert(v, mark) for key, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._inert(item, mark) for item in value]
        if not isinstance(value, str):
            return value
        text = re.sub("[\ud800-\udfff]", "\ufffd", value)
        for token in self._control:
            while token in text:
                text = text.replace(token, token[0] + mark + token[1:])
        # Between template and text, or between two texts, a control token could arise too.
        longest = range(1, len(self._control[0]) if self._control else 1)
        before = any(text[:n] in self._tails for n in longest) or any(text in token for token in self._control if text)
        after = any(text[-n:] in self._heads for n in longest)
        return mark * before + text + mark * after


class _Refused(TemplateError):
    """The template called raise_exception."""


class _Worker(Worker):
    """The process that renders templates."""

    def __init__(self) -> None:
        super().__init__("template_worker.py", (jinja2, markupsafe), RENDER_TIMEOUT)

    def render(self, source: str, variables: Mapping[str, Any]) -> str:
        try:
            answer = self.ask({"source": source, "variables": variables})
        except TimeoutError:
            raise TemplateLimit(f"the chat template does not finish within {RENDER_TIMEOUT:g} s") from None
        except WorkerEnded as ended:
            reason = "computes for more than one second" if ended.too_long else "needs too much memory"
            raise TemplateLimit(f"the chat template {reason}") from None
        if "limit" in answer:
            raise TemplateLimit(f"the chat template {answer['limit']}")
        if "error" in answer:
            where = f", line {answer['line']}" if answer["line"] else ""
            kind = _Refused if answer["raised"] else TemplateError
            raise kind(f"chat template{where}: {answer['error']}")
        return str(answer["text"])
