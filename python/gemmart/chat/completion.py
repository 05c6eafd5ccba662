"""What Tab offers: commands, what follows them, and paths."""

from __future__ import annotations

from collections.abc import Iterable

from prompt_toolkit.completion import CompleteEvent, Completion, PathCompleter
from prompt_toolkit.completion import Completer as Base
from prompt_toolkit.document import Document

from gemmart.chat.reader import PATHS, Complete


class Completer(Base):
    """prompt_toolkit's view of a Complete."""

    def __init__(self, complete: Complete) -> None:
        self._complete = complete
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        line = document.text_before_cursor
        if "\n" in line or not line.startswith("/"):
            return
        word = line.rpartition(" ")[2]
        for candidate in self._complete(line):
            if candidate is PATHS:
                rest = line.partition(" ")[2].lstrip()
                yield from self._paths.get_completions(Document(rest), complete_event)
            elif candidate.startswith(word) and candidate != word:
                yield Completion(candidate, -len(word))
